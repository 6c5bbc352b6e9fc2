"""What a clip that a request names says of the clip to make."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mdiff.core import tasks
from mdiff.core.errors import UsageError
from mdiff.core.hooks import Given, Request
from mdiff.plugins.video.ffmpeg import rate_of

LUMA = (0.299, 0.587, 0.114)
"""Of red, green and blue (BT.601)."""


def given(
    request: Request, carry: Mapping[str, Any], shape: tuple[int, ...], fps: Fraction
) -> Given | None:
    """What the request's input says of a clip (C, T, H, W) in [-1, 1]; None without one. Raises as `tasks.given`."""

    def fit(sample: Mapping[str, Any], wanted: tuple[int, ...]) -> Tensor:
        return fitted(sample, wanted, fps)[None] * 2 - 1

    return tasks.given(request, carry, shape, fit, forms=FORMS)


def fitted(sample: Mapping[str, Any], shape: tuple[int, ...], fps: Fraction) -> Tensor:
    """The clip of a file as (C, T, H, W) in [0, 1]: what is to be seen at the times of T frames, C 1 or 3.

    Args:
        shape: T below 0 asks for the last frames instead of the first.
        fps: frames a second; a frame stays until the next.

    Raises:
        UsageError: the file has fewer frames.
    """
    channels, count, *size = shape
    video = held(sample["video"], rate_of(sample["fps"]), fps)
    if video.shape[1] < abs(count):
        raise UsageError(
            f"the input has {video.shape[1]} frames at {float(fps):g} a second, and {abs(count)} are asked of it: "
            "give a longer clip, or ask for fewer frames"
        )
    video = video[:3, :count] if count > 0 else video[:3, count:]
    if channels == 1:
        video = torch.einsum("c,cthw->thw", video.new_tensor(LUMA), video)[None]
    scale = max(size[0] / video.shape[2], size[1] / video.shape[3])
    cover = [
        max(wanted, round(edge * scale)) for wanted, edge in zip(size, video.shape[2:], strict=True)
    ]
    if cover != list(video.shape[2:]):
        frames = F.interpolate(video.transpose(0, 1), cover, mode="bicubic", antialias=True)
        video = frames.transpose(0, 1).clamp(0, 1)
    top, left = ((edge - wanted) // 2 for edge, wanted in zip(cover, size, strict=True))
    return video[:, :, top : top + size[0], left : left + size[1]]


def held(video: Tensor, own: Fraction, fps: Fraction) -> Tensor:
    """A clip (C, T, H, W) at another rate: the frame that is to be seen at each of its times."""
    if own == fps:
        return video
    count = -(-video.shape[1] * fps // own)
    places = [int(k * own / fps) for k in range(int(count))]
    return video[:, places]


def _extend(
    words: Sequence[str], shape: tuple[int, ...], units: Sequence[float], read: tasks.Read
) -> Given:
    """extend 0:8: the last frames of the input with 8 more after them; extend 8:0: its first with 8 before them."""
    if len(words) == 1 and ":" not in words[0]:
        words = [f"{words[0]}:{words[0]}"]

    def last(wanted: tuple[int, ...]) -> Tensor:
        return read((wanted[0], -wanted[1], *wanted[2:]))

    onwards = bool(words) and words[0].startswith("0:")
    return tasks.FORMS["extend"](words, shape, units, last if onwards else read)


def _between(
    words: Sequence[str], shape: tuple[int, ...], units: Sequence[float], read: tasks.Read
) -> Given:
    """between 4: every fourth frame is the input's, from the first on, and those in between are made."""
    if len(words) != 1 or not words[0].isdigit() or int(words[0]) < 2:
        raise UsageError("operator 'between' takes one number from 2 on: --operator 'between 4'")
    keep = torch.zeros(1, 1, *shape[1:], dtype=torch.bool)
    keep[:, :, :: int(words[0])] = True
    return Given(start=read(shape), keep=keep)


def _ends(
    words: Sequence[str], shape: tuple[int, ...], units: Sequence[float], read: tasks.Read
) -> Given:
    """ends: the first and the last frame are the input's; ends 2: two of each. The rest starts as the nearer one."""
    count = int(words[0]) if len(words) == 1 and words[0].isdigit() else 0 if words else 1
    if not 0 < 2 * count < shape[1]:
        raise UsageError(
            f"operator 'ends' takes how many frames are known at either end, fewer than half of {shape[1]}: "
            "--operator 'ends 2'"
        )
    first, last = (read((shape[0], sign * count, *shape[2:])) for sign in (1, -1))
    half = shape[1] // 2
    near = torch.arange(half).clamp(max=count - 1)
    far = (torch.arange(half - shape[1], 0) + count).clamp(min=0)
    start = torch.cat([first[:, :, near], last[:, :, far]], 2)
    keep = torch.zeros(1, 1, *shape[1:], dtype=torch.bool)
    keep[:, :, :count] = keep[:, :, -count:] = True
    return Given(start=start, keep=keep)


def _in_space(form: tasks.Form) -> tasks.Form:
    """An operator on frames, whose number does not count these."""

    def within(
        words: Sequence[str], shape: tuple[int, ...], units: Sequence[float], read: tasks.Read
    ) -> Given:
        return form(words, shape, (0, *units[1:]), read)

    return within


FORMS: Mapping[str, tasks.Form] = {
    "extend": _extend,
    "between": _between,
    "ends": _ends,
    "hole": tasks.FORMS["hole"],
    "upscale": _in_space(tasks.FORMS["upscale"]),
    "sharpen": _in_space(tasks.FORMS["sharpen"]),
}
"""What an operator of a request may be here; numbers are frames, then rows and columns of pixels."""
