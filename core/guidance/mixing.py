r"""Guidance by other denoisers: x0 is a sum over several, with weights that add up to one.

x0 = sum_i w_i x0_i extrapolates from what is worse to what is better. The worse one is a weaker
network, or the same one with a part of it taken away; whoever builds networks gives it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from mdiff.core.denoiser import Denoise, Guided, Prediction
from mdiff.core.errors import UsageError
from mdiff.core.guidance.conditional import outside
from mdiff.core.schedules import Schedule, Time


@dataclass(frozen=True, kw_only=True, eq=False)
class Several:
    """Denoisers side by side, which conditions reach together; called, it is the first of them.

    Raises:
        UsageError: there is none, or they are not of one schedule.
    """

    parts: tuple[Denoise, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise UsageError("guidance by several denoisers needs at least one")
        levels = [_levels(part.schedule) for part in self.parts]
        for part, level in zip(self.parts, levels, strict=True):
            if not torch.allclose(level, levels[0], rtol=1e-4):
                raise UsageError(
                    f"denoisers that guide each other see the same x_t: {part.schedule.name} must "
                    f"be the schedule {self.parts[0].schedule.name}"
                )

    @property
    def schedule(self) -> Schedule:
        """The one of all."""
        return self.parts[0].schedule

    @property
    def predicts(self) -> str:
        """That of the first."""
        return self.parts[0].predicts

    @property
    def device(self) -> torch.device:
        """That of the first."""
        return self.parts[0].device

    def bind(self, **cond: Any) -> "Several":
        """All of them with these conditions."""
        return replace(self, parts=tuple(part.bind(**cond) for part in self.parts))

    def __call__(self, x: Tensor, t: Time[float] | Time[Tensor] | float | Tensor) -> Prediction:
        """What the first says."""
        return self.parts[0](x, t)


def mixture(
    denoisers: Sequence[Denoise],
    weights: Sequence[float],
    *,
    interval: tuple[float, float] | None = None,
) -> Guided:
    """x0 = sum_i weight_i x0_i, weights that add up to one: any of these at once (Liu et al., 2022).

    Guidance by a text and a perturbed network, scales a and b, is the denoisers with the text,
    without it, and perturbed with the text, and the weights a + b, 1 - a and -b.

    Args:
        denoisers: of one schedule; the first is the one outside the interval, and says the variance
            where it was learned. Conditions that are bound later reach all of them.
        weights: one for each.
        interval: the times (low, high) between which to guide. It takes one time for the batch.

    Raises:
        UsageError: not as many weights, or they do not add up to one; different schedules.
    """
    if len(weights) != len(denoisers) or not math.isclose(sum(weights), 1.0, abs_tol=1e-6):
        raise UsageError(
            f"{len(denoisers)} denoisers need as many weights, 1 together, not {list(weights)}"
        )

    def rule(inner: Denoise, x: Tensor, t: Time[Any]) -> Prediction:
        if outside(interval, t):
            return inner(x, t)
        parts = cast(Several, inner).parts
        said = parts[0](x, t)
        x0 = said.x0
        # from the first on by differences, which is exact where all say the same
        for weight, part in zip(weights[1:], parts[1:], strict=True):
            x0 = x0 + weight * (part(x, t).x0 - said.x0)
        return replace(said, x0=x0)

    return Guided(inner=Several(parts=tuple(denoisers)), rule=rule)


def autoguidance(
    denoise: Denoise,
    weak: Denoise,
    *,
    scale: float,
    interval: tuple[float, float] | None = None,
) -> Guided:
    """x0 = x0(weak) + scale (x0 - x0(weak)), weak a worse version of it (Karras et al., 2024).

    Args:
        weak: a smaller or less trained network as a denoiser of the same schedule; conditions that
            are bound later reach both.
        scale: 1 for no guidance, more for stronger.
        interval: as for `mixture`.
    """
    return mixture([denoise, weak], [scale, 1 - scale], interval=interval)


def perturbed(
    denoise: Denoise,
    perturbed: Denoise,
    *,
    scale: float,
    interval: tuple[float, float] | None = None,
) -> Guided:
    """x0 + scale (x0 - x0(perturbed)): perturbed attention (Ahn et al., 2024), smoothed energy.

    Smoothed-energy guidance (Hong, 2024) blurs the queries of attention where perturbed-attention
    guidance takes the identity for its map: both are this, with the network so changed.

    Args:
        perturbed: the network with its attention perturbed, as a denoiser of the same schedule.
        scale: 0 for no guidance, more for stronger.
        interval: as for `mixture`.
    """
    return autoguidance(denoise, perturbed, scale=1 + scale, interval=interval)


def _levels(schedule: Schedule) -> Tensor:
    """alpha and sigma at a few times: what schedules are compared by."""
    return torch.stack(schedule(torch.linspace(0.1, 0.9, 5, dtype=torch.float64)))
