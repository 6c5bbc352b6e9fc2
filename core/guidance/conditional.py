r"""Guidance by conditions: x0 is extrapolated from its value without a condition to that with it.

Weights that add up to one commute with every affine map, and at a fixed x_t what a network says is
affine in x0: to guide x0 is to guide eps or v, whichever the network was trained for.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mdiff.core.denoiser import Denoise, Guided, Prediction, from_x0, tile, to_x0
from mdiff.core.errors import UsageError
from mdiff.core.schedules import Time


def classifier_free(
    denoise: Denoise,
    *,
    cond: Mapping[str, Any],
    uncond: Mapping[str, Any],
    scale: float,
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
) -> Guided:
    """x0 = x0(uncond) + scale (x0(cond) - x0(uncond)) (Ho and Salimans, 2022).

    Both come from one call on a doubled batch. Scale 1 is the condition alone and scale 0 its
    absence, each one call on the batch as it is.

    Args:
        cond, uncond: conditions by keyword, one row per sample or one for all; a negative prompt is
            an `uncond`.
        scale: 1 for no guidance, more for stronger.
        interval: the times (low, high) between which to guide; outside it the condition alone
            (Kynkaanniemi et al., 2024). It takes one time for the whole batch.
        rescale: how much of the way, 0 to 1, the standard deviation of what the network says is
            brought back to that under the condition alone (Lin et al., 2023, eq. 15 and 16).

    Raises:
        UsageError: the two sets of conditions have different names.
    """
    if cond.keys() != uncond.keys():
        raise UsageError(
            f"conditions {sorted(cond)} and their absence {sorted(uncond)} must have the same names"
        )
    single = {1.0: cond, 0.0: uncond}.get(scale)

    @lru_cache(maxsize=1)
    def both(rows: int) -> dict[str, Tensor]:
        # the same tensors in every step: networks may keep what they make of them
        return {name: _stack(name, cond[name], uncond[name], rows) for name in cond}

    def rule(inner: Denoise, x: Tensor, t: Time[Any]) -> Prediction:
        outside = interval is not None and not interval[0] <= t.value <= interval[1]
        if single is not None or outside:
            return inner.bind(**(cond if single is None else single))(x, t)
        said = inner.bind(**both(len(x)))(torch.cat([x, x]), t)
        positive, negative = said.x0.chunk(2)
        x0 = negative.lerp(positive, scale)
        if rescale > 0:
            x0 = _rescaled(inner.predicts, x0, positive, x, t, rescale)
        fraction = said.variance_fraction
        return Prediction(
            x0=x0, variance_fraction=None if fraction is None else fraction.chunk(2)[0]
        )

    return Guided(inner=denoise, rule=rule)


def _stack(name: str, cond: Any, uncond: Any, rows: int) -> Any:
    """Both values of a condition as one batch: first `rows` of one, then `rows` of the other."""
    if not isinstance(cond, Tensor) or not isinstance(uncond, Tensor):
        raise UsageError(f"condition {name!r} must be a tensor, to be one batch with its absence")
    return torch.cat([tile(name, value, rows) for value in (cond, uncond)])


def _rescaled(
    predicts: str, x0: Tensor, positive: Tensor, x: Tensor, t: Time[Any], amount: float
) -> Tensor:
    """x0 after the deviation of what the network says, per sample, was brought back."""
    guided, plain = (from_x0(predicts, value, x, t) for value in (x0, positive))
    axes = tuple(range(1, x.ndim))
    ratio = plain.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    return to_x0(predicts, guided * (1 + amount * (ratio - 1)), x, t)
