r"""Guidance by conditions: x0 is extrapolated from its value without a condition to that with it.

Weights that add up to one commute with every affine map, and at a fixed x_t what a network says is
affine in x0: to guide x0 is to guide eps or v, whichever the network was trained for.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mdiff.core.denoiser import Denoise, Guided, Prediction, from_x0, tile, to_x0
from mdiff.core.errors import UsageError
from mdiff.core.schedules import Time, pad

Conditions = Mapping[str, Any]
Ask = Callable[[Denoise, Tensor, Time[Any]], tuple[Sequence[Tensor], Tensor | None]]
"""(x0 under each of several conditions, the variance fraction under the first of them)."""


def classifier_free(
    denoise: Denoise,
    *,
    cond: Conditions,
    uncond: Conditions,
    scale: float | Tensor,
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
    split: bool = False,
) -> Guided:
    """x0 = x0(uncond) + scale (x0(cond) - x0(uncond)) (Ho and Salimans, 2022).

    Both come from one call on a doubled batch. Scale 1 is the condition alone and scale 0 its
    absence, each one call on the batch as it is.

    Args:
        cond, uncond: conditions by keyword, one row per sample or one for all; a negative prompt is
            an `uncond`.
        scale: 1 for no guidance, more for stronger; one number, or one per sample (B,).
        interval: the times (low, high) between which to guide; outside it the condition alone
            (Kynkaanniemi et al., 2024). It takes one time for the whole batch.
        rescale: how much of the way, 0 to 1, the standard deviation of what the network says is
            brought back to that under the condition alone (Lin et al., 2023, eq. 15 and 16).
        split: two calls on the batch as it is, to the same values: half the memory, and conditions
            that are no tensors or differ in shape.

    Raises:
        UsageError: the two sets of conditions have different names.
    """
    ask = _ask([cond, uncond], split)
    single = None if isinstance(scale, Tensor) else {1.0: cond, 0.0: uncond}.get(scale)

    def rule(inner: Denoise, x: Tensor, t: Time[Any]) -> Prediction:
        if single is not None or outside(interval, t):
            return inner.bind(**(cond if single is None else single))(x, t)
        (positive, negative), fraction = ask(inner, x, t)
        x0 = negative.lerp(positive, _per_sample(scale, x))
        if rescale > 0:
            x0 = _rescaled(inner.predicts, x0, positive, x, t, rescale)
        return Prediction(x0=x0, variance_fraction=fraction, x0_noise=negative)

    return Guided(inner=denoise, rule=rule)


def composed(
    denoise: Denoise,
    *,
    conds: Sequence[Conditions],
    uncond: Conditions,
    scales: Sequence[float | Tensor],
    split: bool = False,
) -> Guided:
    """x0 = x0(uncond) + sum_i scale_i (x0(cond_i) - x0(uncond)) (Liu et al., 2022).

    A negative scale pushes away from its condition. Guidance by an image and by a text (Brooks et
    al., 2023, eq. 3, scales a and b) is `conds` of the image, and of the image with the text, with
    `scales` a - b and b.

    Args:
        conds, uncond: as for `classifier_free`; all of them come from one call.
        scales: one for each of `conds`: one number, or one per sample (B,).
        split: one call for each, to the same values.

    Raises:
        UsageError: not as many scales as conditions, none at all, or sets of different names.
    """
    if not conds or len(conds) != len(scales):
        raise UsageError(
            f"{len(conds)} conditions and {len(scales)} scales: give one scale for each condition"
        )
    ask = _ask([*conds, uncond], split)

    def rule(inner: Denoise, x: Tensor, t: Time[Any]) -> Prediction:
        (*positives, negative), fraction = ask(inner, x, t)
        x0 = negative
        for scale, positive in zip(scales, positives, strict=True):
            x0 = x0 + _per_sample(scale, x) * (positive - negative)
        return Prediction(x0=x0, variance_fraction=fraction, x0_noise=negative)

    return Guided(inner=denoise, rule=rule)


def projected(
    denoise: Denoise,
    *,
    cond: Conditions,
    uncond: Conditions,
    scale: float | Tensor,
    parallel: float = 0.0,
    radius: float = math.inf,
    interval: tuple[float, float] | None = None,
    split: bool = False,
) -> Guided:
    """Adaptive projected guidance: less of what saturates (Sadat et al., 2024).

    The difference that `classifier_free` scales is cut off at a norm and split into its parts along
    x0(cond) and across it, of which the first, which saturates, is weakened. Momentum, the third
    part of the paper, is left out: it would be a state between calls, and a guided denoiser is a
    function of x and t.

    Args:
        cond, uncond, scale, interval, split: as for `classifier_free`.
        parallel: what is kept of the part along x0(cond), eta of the paper; 1 keeps all.
        radius: the largest norm of the difference of one sample, r of the paper.
    """
    ask = _ask([cond, uncond], split)

    def rule(inner: Denoise, x: Tensor, t: Time[Any]) -> Prediction:
        if outside(interval, t):
            return inner.bind(**cond)(x, t)
        (positive, negative), fraction = ask(inner, x, t)
        step = positive - negative
        if radius < math.inf:
            # a difference of zero has no direction, and stays zero
            step = step * (radius / _norm(step)).clamp(max=1).nan_to_num()
        axes = tuple(range(1, x.ndim))
        along = (step * positive).sum(axes, keepdim=True) / _norm(positive) ** 2
        step = step - (1 - parallel) * along.nan_to_num() * positive
        x0 = positive + (_per_sample(scale, x) - 1) * step
        return Prediction(x0=x0, variance_fraction=fraction, x0_noise=negative)

    return Guided(inner=denoise, rule=rule)


def _ask(conds: Sequence[Conditions], split: bool) -> Ask:
    """How to ask for x0 under several conditions: at once as one batch, or one by one."""
    names, count = conds[0].keys(), len(conds)
    for other in conds:
        if other.keys() != names:
            raise UsageError(
                f"conditions {sorted(names)} and their absence or alternative {sorted(other)} "
                "must have the same names"
            )

    @lru_cache(maxsize=1)
    def stacked(rows: int) -> dict[str, Tensor]:
        # the same tensors in every step: networks may keep what they make of them
        return {name: _stack(name, [cond[name] for cond in conds], rows) for name in names}

    latest: list[tuple[Denoise, int, Denoise]] = []

    def bound(inner: Denoise, rows: int) -> Denoise:
        # the same denoiser in every step of a run
        if not latest or latest[0][0] is not inner or latest[0][1] != rows:
            latest[:] = [(inner, rows, inner.bind(**stacked(rows)))]
        return latest[0][2]

    def batched(inner: Denoise, x: Tensor, t: Time[Any]) -> tuple[Sequence[Tensor], Tensor | None]:
        times = _repeated(t, x, count) if isinstance(t.value, Tensor) else t
        said = bound(inner, x.shape[0])(torch.cat([x] * count), times)
        fraction = said.variance_fraction
        return said.x0.chunk(count), None if fraction is None else fraction.chunk(count)[0]

    def apart(inner: Denoise, x: Tensor, t: Time[Any]) -> tuple[Sequence[Tensor], Tensor | None]:
        said = [inner.bind(**cond)(x, t) for cond in conds]
        return [one.x0 for one in said], said[0].variance_fraction

    return apart if split else batched


def _repeated(t: Time[Any], x: Tensor, count: int) -> Time[Any]:
    """The times of `count` batches like x in a row."""
    return Time(*(tile("t", entry, count * len(x)) for entry in t))


def _stack(name: str, values: Sequence[Any], rows: int) -> Any:
    """All values of a condition as one batch: first `rows` of one, then `rows` of the next."""
    if not all(isinstance(value, Tensor) for value in values):
        raise UsageError(
            f"condition {name!r} must be a tensor, to be one batch with its absence: make it one, "
            "or guide with split=True"
        )
    shapes = {value.shape[1:] for value in values}
    if len(shapes) > 1:
        raise UsageError(
            f"condition {name!r} has rows of different shapes, {sorted(map(tuple, shapes))}, and "
            "cannot be one batch: pad them, or guide with split=True"
        )
    return torch.cat([tile(name, value, rows) for value in values])


def _per_sample(scale: float | Tensor, x: Tensor) -> Any:
    """A scale to multiply x with: as it is, or (B, 1, ..., 1)."""
    if not isinstance(scale, Tensor):
        return scale
    return pad(tile("scale", scale, len(x)).to(x.device), x)


def outside(interval: tuple[float, float] | None, t: Time[Any]) -> bool:
    """Whether there is an interval, and t not in it."""
    if interval is None:
        return False
    if isinstance(t.value, Tensor):
        raise UsageError("guidance in an interval of times takes one time for the whole batch")
    return not interval[0] <= t.value <= interval[1]


def _norm(x: Tensor) -> Tensor:
    """The norm of each sample, (B, 1, ..., 1)."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)


def _rescaled(
    predicts: str, x0: Tensor, positive: Tensor, x: Tensor, t: Time[Any], amount: float
) -> Tensor:
    """x0 after the deviation of what the network says, per sample, was brought back."""
    guided, plain = (from_x0(predicts, value, x, t) for value in (x0, positive))
    axes = tuple(range(1, x.ndim))
    ratio = plain.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    return to_x0(predicts, guided * (1 + amount * (ratio - 1)), x, t)
