"""What a sound that a request names says of the sound to make."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mdiff.core import tasks
from mdiff.core.hooks import Given, Request
from mdiff.plugins.audio.io import mixed, resampled

FORMS: Mapping[str, tasks.Form] = {name: tasks.FORMS[name] for name in ("extend", "hole")}
"""What an operator of a request may be here; numbers are seconds."""

FADE = 0.01
"""Seconds over which a sound that is kept gives way to one that was made."""


def given(request: Request, carry: Mapping[str, Any], samples: int, rate: int) -> Given | None:
    """What the request's input says of a waveform (1, samples); None without one. Raises as `tasks.given`."""

    def fit(sample: Mapping[str, Any], shape: tuple[int, ...]) -> Tensor:
        return wave(sample, shape[-1], rate)[None]

    return tasks.given(request, carry, (1, samples), fit, forms=FORMS, units=(rate,))


def wave(sample: Mapping[str, Any], samples: int, rate: int) -> Tensor:
    """The sound of a file in mono and within full scale, cut off or filled up with silence: (1, samples)."""
    sound = resampled(mixed(sample["audio"], 1), sample["rate"], rate)[:, :samples]
    sound = sound / sound.abs().max().clamp(min=1.0)
    return F.pad(sound, (0, samples - sound.shape[1]))


def woven(given: Given | None, made: Tensor, rate: int) -> Tensor:
    """A waveform (B, N) with the input's own where that is kept, faded over on the side that is known."""
    if given is None or given.keep is None or given.start is None:
        return made
    width = 2 * round(FADE * rate) + 1
    known = F.pad(given.keep.float(), (width // 2, width // 2), mode="replicate")
    weight = (F.avg_pool1d(known, width, 1)[0] * 2 - 1).clamp(0, 1).to(made)
    return torch.lerp(made, given.start[0].to(made), weight)
