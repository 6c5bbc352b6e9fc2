"""The recipes of the video plugin: what ships is small, hears the text, and learns from what `video/motion` gives."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mdiff.core import host as hosts
from mdiff.core import registry
from mdiff.core.hooks import ModelCard, text_encoder
from mdiff.core.training import recipe
from mdiff.plugins.video import mdiff_recipes, training, vdm


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def read(name: str) -> tuple[recipe.Recipe, ModelCard]:
    models = registry.load(hosts.current())
    found = recipe.read(mdiff_recipes()[name])
    return found, recipe.card_of(found, models)


@pytest.mark.parametrize("name", ["default", "vdm-mini"])
def test_recipes_build_what_they_train(name: str) -> None:
    found, card = read(name)
    model = vdm.build(card, "cpu", torch.float32)
    task = training.task(card, model, found.part, found.task)
    weights = sum(p.numel() for p in model.modules[found.part].parameters())
    assert task.denoiser is not None and 2 * weights < 15e6


def test_texts_that_differ_in_one_word_differ_to_the_network() -> None:
    _, card = read("vdm-mini")
    ways = [f"a red apple moving {way}" for way in ("to the left", "to the right")]
    heard = vdm.listener(card.config)(ways)
    pooled = text_encoder("text/mini").encode(ways).pooled
    assert float(torch.cosine_similarity(*pooled, dim=0)) > 0.95  # alone it would say nothing
    assert 0.9 < float(heard["vector"].std()) < 1.1
    left, right = heard["context"]
    apart = (left - right).norm(dim=1) / left.norm(dim=1).clamp(min=1e-6)
    assert left.shape == (16, 384) and float(apart.max()) > 0.7


def test_a_scale_of_pooled_vectors_is_one_where_nothing_is_said() -> None:
    _, card = read("vdm-mini")
    config: dict[str, Any] = {k: v for k, v in card.config.items() if k != "vector_scale"}
    plain = vdm.listener(config)(["a dog"])["vector"]
    torch.testing.assert_close(vdm.listener(card.config)(["a dog"])["vector"], 20 * plain)
    assert float(plain.norm()) == pytest.approx(1, abs=1e-3)


def test_recipes_are_there() -> None:
    assert {"default", "vdm-mini"} <= set(mdiff_recipes())
    assert all(isinstance(path, Path) and path.is_file() for path in mdiff_recipes().values())
