"""Do clips look real, show what was asked for, and move as they were asked to? The metrics of `mdiff eval`.

How frames look is told by features of EfficientNet-Lite0, by which figures are named; what they show by the scorer of
`mdiff.core.seeing`, which no generator has a part in; how a thing moves by following it (`tracking`). What was asked
for are facts of the example, as `video/motion` has them: `phrase`, `motion`, `direction`; `other` where there is more
than one thing, which nothing here follows.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mdiff.core import distances, seeing
from mdiff.core.hooks import Example, Metric, text_encoder
from mdiff.core.nn import efficientnet
from mdiff.plugins.video import tracking

LOOKED_AT = 4
"""Frames of a clip, or pairs of neighbours, that a network sees: spread evenly."""
AMONG = 20
"""Things of which the right one is to be found."""

Rows = NDArray[Any]

_seen = seeing.Seen()


def frames(video: Tensor, neighbours: int = 1) -> list[int]:
    """The numbers of the frames that are looked at, each followed by `neighbours` - 1 more."""
    last = max(0, video.shape[1] - neighbours)
    return [round(k * last / max(1, LOOKED_AT - 1)) for k in range(LOOKED_AT)]


def features(sample: Mapping[str, Any], frame: int) -> Tensor:
    """Features of a frame (1280,)."""
    return _seen(sample, frame, lambda: sample["video"][:, frame])


def _single(example: Example, fact: str) -> bool:
    """Whether an example says that of the one thing in it."""
    return bool(example.facts.get(fact)) and not example.facts.get("other")


# --- how frames look ------------------------------------------------------------------------------


def _each_frame(sample: Mapping[str, Any], example: Example) -> Rows:
    return torch.cat([features(sample, k) for k in frames(sample["video"])]).numpy()


def _of_frames(score: Callable[[Rows, Rows], float]) -> Callable[[Rows, Rows], float]:
    """A score of sets of frames, whose rows are clips."""
    width = efficientnet.WIDTH
    return lambda made, real: score(made.reshape(-1, width), real.reshape(-1, width))


def fid() -> Metric:
    """Fréchet distance of frames on EfficientNet-Lite0 features; it compares with no other FID, and FVD is another.
    Source: Heusel et al. 2017, arXiv:1706.08500.
    """
    efficientnet.installed()
    return Metric(
        summary="Frechet distance on EfficientNet-Lite0 features of frames, to held-out clips; 0 and up",
        better="lower",
        measure=_each_frame,
        score=_of_frames(distances.frechet),
        reference="held_out",
        least=20,
    )


def kid() -> Metric:
    """Kernel distance of frames on EfficientNet-Lite0 features. Source: Binkowski et al. 2018, arXiv:1801.01401."""
    efficientnet.installed()
    return Metric(
        summary="kernel distance on EfficientNet-Lite0 features of frames, to held-out clips; about 0 and up",
        better="lower",
        measure=_each_frame,
        score=_of_frames(distances.kernel),
        reference="held_out",
        least=10,
    )


def consistency() -> Metric:
    """How alike neighbouring frames are: next to real clips, for a still picture is the most alike to itself."""
    efficientnet.installed()

    def measure(sample: Mapping[str, Any], example: Example) -> Rows:
        pairs = [(features(sample, k), features(sample, k + 1)) for k in frames(sample["video"], 2)]
        alike = [F.cosine_similarity(one, next_, dim=0) for one, next_ in pairs]
        return torch.stack(alike).mean(0, keepdim=True).numpy()

    return Metric(
        summary="mean cosine of EfficientNet-Lite0 features of neighbouring frames; up to 1",
        better="higher",
        measure=measure,
        score=_mean,
    )


# --- what they show -------------------------------------------------------------------------------


def thing() -> Metric:
    """The share of frames whose thing is found among 20, cut out and laid on white, by a contrastive scorer."""
    efficientnet.installed()
    net, encode = seeing.scorer(), text_encoder(seeing.ENCODER).encode

    @torch.no_grad()
    def measure(sample: Mapping[str, Any], example: Example) -> Rows:
        video = sample["video"]
        found = tracking.track(video)
        looks = [
            _seen(sample, ("thing", k), partial(tracking.cut_out, video, found, k))
            for k in frames(video)
        ]
        said = net.text(encode([example.facts["phrase"]]).pooled.float())
        return torch.cat([net.image(torch.stack(looks)), said]).flatten().numpy()

    return Metric(
        summary=f"share of frames whose thing is found among {AMONG} held-out ones; 0 to 1",
        better="higher",
        measure=measure,
        score=lambda made, real: seeing.found_among(_pairs(made), _pairs(real), AMONG),
        applies=lambda example: _single(example, "phrase"),
        reference="held_out",
        least=2,
    )


def _pairs(rows: Rows) -> Rows:
    """Rows of clips, vectors of frames and then that of the phrase -> rows of a frame and the phrase each."""
    each = rows.reshape(len(rows), -1, seeing.WIDTH)
    looks, said = each[:, :-1], each[:, -1:]
    return np.concatenate([looks, said.repeat(looks.shape[1], 1)], axis=2).reshape(
        -1, 2 * seeing.WIDTH
    )


# --- how they move --------------------------------------------------------------------------------


def direction() -> Metric:
    """The share of clips whose thing goes where it was asked to: the nearest of eight directions is the one asked for.

    Of what bounces, left or right alone. A row is whether it is right, and how far the thing goes, x and y.
    """

    def measure(sample: Mapping[str, Any], example: Example) -> Rows:
        way = tracking.track(sample["video"]).way
        bounces = example.facts.get("motion") == "bouncing"
        told = tracking.sideways(way) if bounces else tracking.direction(way)
        return np.array([told == example.facts["direction"], *way], dtype=np.float64)

    return Metric(
        summary="share of clips whose thing goes in the direction asked for, told by its centre; 0 to 1",
        better="higher",
        measure=measure,
        score=_mean,
        applies=lambda example: (
            _single(example, "direction") and example.facts["direction"] in tracking.DIRECTIONS
        ),
    )


def motion() -> Metric:
    """The share of clips whose thing moves in the way asked for: it moves on, bounces, grows, shrinks or stays."""

    def measure(sample: Mapping[str, Any], example: Example) -> Rows:
        told = tracking.kind(tracking.track(sample["video"]))
        return np.array([told == tracking.KINDS[example.facts["motion"]]], dtype=np.float64)

    return Metric(
        summary="share of clips whose thing moves on, bounces, grows, shrinks or stays as asked for; 0 to 1",
        better="higher",
        measure=measure,
        score=_mean,
        applies=lambda example: (
            _single(example, "motion") and example.facts["motion"] in tracking.KINDS
        ),
    )


def _mean(rows: Rows, reference: Rows) -> float:
    """The mean of what rows begin with."""
    return float(rows[:, 0].mean())


_MAKERS: Sequence[Callable[[], Metric]] = (fid, kid, consistency, thing, direction, motion)
METRICS: Mapping[str, Callable[[], Metric]] = {maker.__name__: maker for maker in _MAKERS}
