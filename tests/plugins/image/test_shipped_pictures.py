"""The picture models that ship: what is asked for can be seen in what they make."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from mdiff import cli
from mdiff.core import host, registry
from mdiff.core.training import recipe

Picture = Callable[..., Tensor]


@pytest.fixture
def picture(sample_of: Callable[..., Mapping[str, Any]]) -> Picture:
    """(model, fields of a request) -> its picture (3, H, W)."""
    return lambda name, **fields: sample_of(name, **fields)["image"]


def colour(image: Tensor) -> Tensor:
    """The mean of what is not white, (3,)."""
    return image[:, image.amin(0) < 0.8].mean(1)


def test_the_models_are_small() -> None:
    models = registry.load(host.current())
    for name, megabytes in (("stable-diffusion-mini", 25), ("ddpm-emoji", 8)):
        card = models.resolve(name)
        assert sum(file.size for file in card.files) <= megabytes * 1e6
        assert all((Path(card.root) / file.name).stat().st_size == file.size for file in card.files)
    assert models.resolve("image").id == "image/stable-diffusion-mini"


def test_colours_and_styles_are_those_of_the_text(picture: Picture) -> None:
    def mean(text: str) -> Tensor:
        made = [picture("image", text=text, steps=10, seed=seed) for seed in range(3)]
        return torch.stack([colour(image) for image in made]).mean(0)

    red, blue, grey = (
        mean("a red heart, flat"),
        mean("a blue heart, flat"),
        mean("a red heart, black and white"),
    )
    assert red[0] > red[2] + 0.2 and blue[2] > blue[0] + 0.2
    assert grey.max() - grey.min() < 0.1


def test_pictures_stand_on_white(picture: Picture) -> None:
    for name, fields in (("image", {"text": "a dog face, 3D"}), ("ddpm-emoji", {})):
        edges = [picture(name, seed=seed, steps=10, **fields)[:, 0] for seed in range(3)]
        assert torch.stack(edges).mean() > 0.9


def test_they_are_fine_tuned_by_their_recipes(tmp_path: Path) -> None:
    for k in range(4):
        Image.new("RGB", (128, 128), ("red", "green", "blue", "grey")[k]).save(
            tmp_path / f"{k}.png"
        )
        (tmp_path / f"{k}.txt").write_text(f"a square, number {k}\n")
    name, out = "image/stable-diffusion-mini", tmp_path / "run"
    small = ["--set", "batch.size=2", "--set", "preview.every=0", "--quiet"]
    train = ["train", name, "--data", str(tmp_path), "--out", str(out), *small]
    assert cli.main([*train, "--init", name, "--steps", "1"]) == 0
    # the autoencoder is that of the model to begin with, and stays it
    assert recipe.read(out / "recipe.toml").parts == {"autoencoder": name}
    assert cli.main([*train, "--resume", "--steps", "2"]) == 0
    assert recipe.read(out / "recipe.toml").parts == {"autoencoder": name}
