"""Guidance by bounds: what x0 is known to lie in."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mdiff.core.denoiser import Denoise, Guided, Prediction
from mdiff.core.errors import UsageError
from mdiff.core.schedules import Time, pad


def clamp(denoise: Denoise, low: float = -1.0, high: float = 1.0) -> Guided:
    """x0 cut off at the range of the data: static thresholding (Ho et al., 2020).

    Samplers then take the noise in x_t to be the rest; `cfgpp` takes that of x0 before the cut (as
    diffusers does without `use_clipped_model_output`).
    """

    def rule(inner: Denoise, x: Tensor, t: Time[Any]) -> Prediction:
        said = inner(x, t)
        return _bounded(said, said.x0.clamp(low, high))

    return Guided(inner=denoise, rule=rule)


def dynamic_threshold(
    denoise: Denoise,
    percentile: float = 0.995,
    *,
    low: float = 1.0,
    high: float = math.inf,
) -> Guided:
    """x0 cut off at a percentile of its own size, and scaled to [-1, 1] (Saharia et al., 2022).

    The bound is a number for each sample: x0 is cut off at [-bound, bound] and divided by bound.
    The noise is as for `clamp`.

    Args:
        percentile: the part of |x0| that is left inside, 0 to 1.
        low, high: the range of the bound. With high = 1, the default of diffusers
            (`sample_max_value`), it is `clamp`.

    Raises:
        UsageError: the percentile is not between 0 and 1, or the range is empty.
    """
    if not 0 <= percentile <= 1 or not 0 < low <= high:
        raise UsageError(
            f"percentile {percentile} must be in [0, 1], and the bound's range ({low}, {high}) "
            "rise from above 0"
        )

    def rule(inner: Denoise, x: Tensor, t: Time[Any]) -> Prediction:
        said = inner(x, t)
        bound = pad(_quantile(said.x0.abs().flatten(1), percentile).clamp(low, high), x)
        return _bounded(said, said.x0.clamp(-bound, bound) / bound)

    return Guided(inner=denoise, rule=rule)


def from_clip(clip: bool | float) -> Callable[[Denoise], Guided] | None:
    """How x0 is cut off, as a model's config says it in a word.

    Args:
        clip: true for `clamp`, false for not at all, a number for `dynamic_threshold` at that percentile.
    """
    if isinstance(clip, bool):
        return clamp if clip else None
    return partial(dynamic_threshold, percentile=clip)


def _bounded(said: Prediction, x0: Tensor) -> Prediction:
    """The same with this x0, and the noise of the x0 before."""
    return replace(said, x0=x0, x0_noise=said.x0 if said.x0_noise is None else said.x0_noise)


def _quantile(rows: Tensor, q: float) -> Tensor:
    """The q-quantile of each row, linear between entries, from the largest ones alone: as
    torch.quantile, but of any size and without sorting all.
    """
    place = q * (rows.shape[1] - 1)
    below = math.floor(place)
    top = rows.topk(rows.shape[1] - below, dim=1).values
    return torch.lerp(top[:, -1], top[:, max(-2, -top.shape[1])], place - below)
