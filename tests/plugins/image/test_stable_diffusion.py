"""Stable Diffusion's stages on random weights: conditions, sizes, precision, the shipped form of token states."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mdiff.core import host as hosts
from mdiff.core import pipeline, registry
from mdiff.core.conditions import token_states
from mdiff.core.errors import UsageError
from mdiff.core.hooks import Model, ModelCard, Request, text_encoder
from mdiff.core.nn.autoencoder import AutoencoderKL

OPTIONS = [{"name": name, "type": "int", "default": 16} for name in ("height", "width")]
REQUEST = Request(
    model="image/stable-diffusion",
    text="a red apple",
    steps=2,
    guidance=2.0,
    options={"height": 16, "width": 16},
)


@pytest.fixture
def opened(folder: Callable[..., Path]) -> tuple[Model, ModelCard]:
    models = registry.load(hosts.current())
    card = models.resolve(str(folder("stable-diffusion", options=OPTIONS)))
    return pipeline.open_model(card, REQUEST, models.host), card


def run(opened: tuple[Model, ModelCard], **changes: Any) -> torch.Tensor:
    request = replace(REQUEST, **changes)
    return pipeline.generate(*opened, request, host=hosts.current())["image"]


def test_token_states_have_one_length() -> None:
    encoder = text_encoder("text/mini")
    texts = ["", "a red apple", "a red apple on a green table beside a blue cup and a book"]
    found = token_states(encoder, texts, 8)
    assert found.shape == (3, 8, encoder.width) and found.dtype == torch.float32
    states = encoder.encode(texts)
    used = states.mask[:2].sum(1).tolist()
    for row, count in enumerate(used):
        assert torch.equal(found[row, :count], states.tokens[row, :count])
        assert not found[row, count:].any()
    assert torch.equal(found[2], states.tokens[2, :8])
    # the empty text is something, so that it can be told from no text at all
    assert found[0, :1].any()


def test_what_decides_a_picture(opened: tuple[Model, ModelCard]) -> None:
    base = run(opened)
    assert base.shape == (3, 16, 16) and base.min() >= 0 and base.max() <= 1
    assert torch.equal(base, run(opened))
    for change in ({"seed": 1}, {"text": "a dog"}, {"negative": "blur"}, {"guidance": 1.0}):
        assert not torch.equal(base, run(opened, **change)), change


def test_a_negative_text_is_what_guidance_leads_away_from(opened: tuple[Model, ModelCard]) -> None:
    problem = opened[0].stages[0].prepare(replace(REQUEST, negative="blur"), {})
    encoder = text_encoder("text/mini")
    assert problem.uncond is not None
    assert torch.equal(problem.uncond["context"], token_states(encoder, ["blur"], 8))
    assert torch.equal(problem.cond["context"], token_states(encoder, ["a red apple"], 8))
    # away from itself is nowhere: then the scale means nothing
    same = {"negative": REQUEST.text}
    one, two = (run(opened, guidance=scale, **same) for scale in (1.0, 7.0))
    torch.testing.assert_close(one, two, atol=1e-4, rtol=0)


def test_sizes(opened: tuple[Model, ModelCard]) -> None:
    assert run(opened, options={"height": 8, "width": 24}).shape == (3, 8, 24)
    with pytest.raises(UsageError, match="multiples of 4, they are 18 and 16"):
        run(opened, options={"height": 18, "width": 16})


def test_latents_are_scaled_back_before_they_are_decoded(opened: tuple[Model, ModelCard]) -> None:
    model, _ = opened
    latent, image = model.stages
    problem = latent.prepare(REQUEST, {})
    assert problem.shape == (2, 8, 8)
    x = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    autoencoder = model.modules["autoencoder"]
    assert isinstance(autoencoder, AutoencoderKL)
    with torch.no_grad():
        carry = dict(latent.finish(REQUEST, problem, x, {}))
        sample = image.finish(REQUEST, image.prepare(REQUEST, carry), None, carry)["sample"]
        expected = (autoencoder.decode(x / 2.0)[0] + 1) / 2
    torch.testing.assert_close(sample["image"], expected.clamp(0, 1))


def test_bf16(folder: Callable[..., Path]) -> None:
    models = registry.load(hosts.current())
    card = models.resolve(str(folder("stable-diffusion", options=OPTIONS)))
    request = replace(REQUEST, precision="bf16")
    near = pipeline.open_model(card, request, models.host)
    exact = pipeline.open_model(card, REQUEST, models.host)
    difference = run((near, card), precision="bf16") - run((exact, card))
    assert 0 < difference.abs().mean() < 0.05
