"""The video model that ships: its clips have the size that is said, one ground and the colour asked for."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mdiff.core import host, registry

Clip = Callable[..., Tensor]


@pytest.fixture
def clip(sample_of: Callable[..., Mapping[str, Any]]) -> Clip:
    """Fields of a request -> its clip (3, T, H, W)."""
    return lambda **fields: sample_of("video", steps=10, **fields)["video"]


def colour(video: Tensor) -> Tensor:
    """The mean of what differs from the ground, which the corners show, (3,)."""
    corners = video[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    ground = corners.flatten(1).median(1).values.reshape(3, 1, 1, 1)
    return video[:, (video - ground).abs().amax(0) > 0.25].mean(1)


def test_the_model_is_small() -> None:
    card = registry.load(host.current()).resolve("video")
    assert card.id == "video/vdm-mini"
    assert sum(file.size for file in card.files) <= 15e6
    assert all((Path(card.root) / file.name).stat().st_size == file.size for file in card.files)


def test_things_have_their_colour_on_one_ground(clip: Clip) -> None:
    apple = [clip(text="a red apple moving to the left", seed=seed) for seed in range(2)]
    frog = [clip(text="a frog moving to the left", seed=seed) for seed in range(2)]
    assert apple[0].shape == (3, 16, 64, 64)
    red = torch.stack([colour(video) for video in apple]).mean(0)
    green = torch.stack([colour(video) for video in frog]).mean(0)
    assert red[0] > red[1] + 0.15 and green[1] > green[0]
    corners = torch.stack(apple)[..., [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.flatten(2).std(-1).mean() < 0.1  # over all frames
