"""What tests of the models that ship share."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from mdiff.core import host, pipeline, registry, request
from mdiff.core.hooks import Model, ModelCard


@pytest.fixture(scope="module")
def sample_of() -> Callable[..., Mapping[str, Any]]:
    """(model, fields of a request) -> its sample; each model is opened once."""
    here = host.current()
    models = registry.load(here)
    opened: dict[str, tuple[ModelCard, Model]] = {}

    def made(name: str, **fields: object) -> Mapping[str, Any]:
        card = models.resolve(name)
        asked = request.resolve(card, {"seed": 1, **fields}, here)
        if name not in opened:
            opened[name] = card, pipeline.open_model(card, asked, here)
        return pipeline.generate(opened[name][1], card, asked, host=here)

    return made
