"""Guidance by bounds: what x0 is known to lie in."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from mdiff.core.denoiser import Denoise, Guided, Prediction
from mdiff.core.schedules import Time


def clamp(denoise: Denoise, low: float = -1.0, high: float = 1.0) -> Guided:
    """x0 cut off at the range of the data; samplers then take the noise in x_t to be the rest."""

    def rule(inner: Denoise, x: Tensor, t: Time[Any]) -> Prediction:
        said = inner(x, t)
        return replace(said, x0=said.x0.clamp(low, high))

    return Guided(inner=denoise, rule=rule)
