"""Where a thing is in each frame of a clip on a plain ground, and how it moves: what one can say without a network.

The ground is the commonest colour of the frames' edges; the thing is what differs from it. Lengths are parts of a
frame's edge, and y grows downwards, so that clips of any size and length compare.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mdiff.plugins.video.data.motions import COMPASS

BEGINS, SURE = 0.1, 0.25
"""A pixel whose colour is less than the first away from the ground's is ground, and with the second it is thing."""
LEAST_SEEN = 0.004
"""The part of a frame that has to be thing: one in which it is less does not count."""
LEAST_WAY = 0.07
"""What moves less from the first to the last frame stays where it is."""
LEAST_HOP = 0.1
"""What goes up and down by more than this, besides the way it makes, bounces."""
LEAST_GROWTH = 0.6
"""Of the logarithm of its area, from the first to the last frame."""
DIRECTIONS = tuple(COMPASS)
"""Each an eighth of a turn from the one before, clockwise."""


@dataclass(frozen=True, kw_only=True)
class Track:
    """A thing through a clip.

    Attributes:
        thing: how sure each pixel is part of it, (T, H, W) in [0, 1].
        time: of the frames in which it is seen, 0 for the first frame of the clip and 1 for the last, (N,).
        place: its centre in these, x and y, (N, 2).
        area: the part of the frame that it takes in these, (N,).
    """

    thing: Tensor
    time: Tensor
    place: Tensor
    area: Tensor

    def line(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """How much values (N, ...) change from the first to the last frame, by least squares, and what is left."""
        time = self.time - self.time.mean()
        change = torch.tensordot(time, values - values.mean(0), 1) / (time**2).sum()
        shape = (-1, *[1] * (values.ndim - 1))
        return change, values - values.mean(0) - time.reshape(shape) * change

    @property
    def way(self) -> tuple[float, float]:
        """How far it goes, x and y; (0, 0) where it is not seen in two frames."""
        if len(self.time) < 2:
            return 0.0, 0.0
        x, y = self.line(self.place)[0].tolist()
        return x, y


def track(video: Tensor) -> Track:
    """Follows what differs from the ground in a clip (C, T, H, W) in [0, 1]."""
    _, frames, height, width = video.shape
    edges = torch.cat([video[:, :, [0, -1]].flatten(1), video[:, :, :, [0, -1]].flatten(1)], dim=1)
    ground = edges.median(dim=1).values.reshape(-1, 1, 1, 1)
    thing = (((video - ground).abs().amax(0) - BEGINS) / (SURE - BEGINS)).clamp(0, 1)
    area = thing.mean((1, 2))
    seen = (area >= LEAST_SEEN).nonzero().flatten()
    shown = thing[seen]
    x = (shown.sum(1) * (torch.arange(width) + 0.5)).sum(1) / width
    y = (shown.sum(2) * (torch.arange(height) + 0.5)).sum(1) / height
    place = torch.stack([x, y], dim=1) / shown.sum((1, 2)).unsqueeze(1).clamp(min=1e-6)
    return Track(thing=thing, time=seen / max(1, frames - 1), place=place, area=area[seen])


def direction(way: tuple[float, float]) -> str:
    """The nearest of the eight directions, "" for what stays where it is."""
    x, y = way
    if math.hypot(x, y) < LEAST_WAY:
        return ""
    return DIRECTIONS[round(math.atan2(y, x) / (math.pi / 4)) % 8]


def sideways(way: tuple[float, float]) -> str:
    """ "left", "right", or "" for what stays where it is, whatever it does up and down."""
    return direction((way[0], 0.0))


def kind(found: Track) -> str:
    """How a thing moves: "growing", "shrinking", "bouncing", "moving", "staying", or "" where it is not to be seen."""
    if len(found.time) < 3:
        return ""
    growth = float(found.line(found.area.log())[0])
    if abs(growth) >= LEAST_GROWTH:
        return "growing" if growth > 0 else "shrinking"
    hops = found.line(found.place)[1][:, 1]
    if float(hops.max() - hops.min()) >= LEAST_HOP:
        return "bouncing"
    return "moving" if direction(found.way) else "staying"


KINDS: Mapping[str, str] = {
    "moving": "moving",
    "bouncing": "bouncing",
    "growing": "growing",
    "shrinking": "shrinking",
    "turning": "staying",
    "still": "staying",
}
"""Kinds of motion that a clip can be asked for -> what `kind` says of them."""


def cut_out(video: Tensor, found: Track, frame: int, share: float = 0.88) -> Tensor:
    """The thing in a frame on white, in the middle of a square (C, S, S) of which its longer side is a `share`.

    The whole frame where the thing is not to be seen.
    """
    image, sure = video[:, frame], found.thing[frame]
    if float(sure.mean()) < LEAST_SEEN:
        return image
    (top, bottom), (left, right) = _span(sure.sum(1)), _span(sure.sum(0))
    side = math.ceil(max(bottom - top, right - left) / share)
    white = F.pad(sure * image + (1 - sure), [side] * 4, value=1.0)
    y, x = (side + (begin + end - side) // 2 for begin, end in ((top, bottom), (left, right)))
    return white[:, y : y + side, x : x + side]


def _span(profile: Tensor) -> tuple[int, int]:
    """The first and one beyond the last place that matter: specks on either side do not."""
    total = profile.cumsum(0) / profile.sum()
    begin, end = int((total < 0.01).sum()), int((total < 0.99).sum()) + 1
    return begin, min(end, len(profile))
