r"""Resampling: go from t to s, back to t with fresh noise, and down again.

What is said at s and what is known there come to agree only over several passes: noise on the way
back lets the sample forget what did not fit.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mdiff.core.denoiser import Denoise
from mdiff.core.errors import UsageError
from mdiff.core.noise import Noise
from mdiff.core.operators import Linear, place
from mdiff.core.samplers.ancestral import DDPM
from mdiff.core.samplers.base import Memory, Sampler, renoise
from mdiff.core.schedules import Schedule, Time


@dataclass(frozen=True, kw_only=True, eq=False)
class RePaint:
    """RePaint (Lugmayr et al., 2022, alg. 1) around any sampler: each step several times.

    After each step the known part is the measurement, noised to that level with fresh noise.
    Without an operator only the passes remain, which help any guidance ("time travel").

    Attributes:
        sampler: what takes the steps.
        operator, measurement: what is known: x_s + A^+ (alpha_s y + sigma_s A z - A x_s) follows
            each step, with z normal; None for nothing.
        repeats: passes from t to s, 1 for none again (jump_n_sample of the paper's code).
        substeps: steps of a pass, even in t between t and s (jump_length): n steps of the grid are
            then n * substeps of the paper.
        interval: the times (low, high) between which a step begins that is repeated. The paper's
            code repeats all but the first.

    Raises:
        UsageError: repeats or substeps below 1, or an operator without a measurement.
    """

    sampler: Sampler = field(default_factory=DDPM)
    operator: Linear | None = None
    measurement: Tensor | None = None
    repeats: int = 10
    substeps: int = 1
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.repeats < 1 or self.substeps < 1:
            raise UsageError(
                f"repeats {self.repeats} and substeps {self.substeps} must be 1 or more"
            )
        if (self.operator is None) != (self.measurement is None):
            raise UsageError("an operator needs its measurement, and a measurement its operator")

    @property
    def order(self) -> int:
        """That of the sampler."""
        return self.sampler.order

    @property
    def evaluations(self) -> int:
        """Those of all passes."""
        return self.sampler.evaluations * self.repeats * self.substeps

    def step(
        self,
        denoise: Denoise,
        x: Tensor,
        t: Time[float],
        s: Time[float],
        state: Memory,
        noise: Noise,
    ) -> tuple[Tensor, Memory]:
        """One step, see `Sampler`."""
        times = [t, *_between(denoise.schedule, t, s, self.substeps), s]
        low, high = self.interval
        for again in range(self.repeats if low <= t.value <= high else 1):
            if again:
                x = renoise(x, s, t, noise.draw(x.device, x.dtype))
                # what was remembered lies on a path that was left
                state = {}
            for here, there in pairwise(times):
                x, state = self.sampler.step(denoise, x, here, there, state, noise)
                x = self._known(x, there, noise)
        return x, state

    def _known(self, x: Tensor, s: Time[float], noise: Noise) -> Tensor:
        """x with the known part of s."""
        if self.operator is None or self.measurement is None:
            return x
        made = self.operator(x)
        wanted = s.alpha * self._measured(made)
        if s.sigma > 0:
            wanted = wanted.add_(self.operator(noise.draw(x.device, x.dtype)), alpha=s.sigma)
        return x + self.operator.pinv(wanted - made, x)

    @cached_property
    def _measured(self) -> Callable[[Tensor], Tensor]:
        """The measurement for a batch."""
        assert self.operator is not None and self.measurement is not None
        return place(self.operator, self.measurement)


def _between(schedule: Schedule, t: Time[float], s: Time[float], count: int) -> list[Time[Any]]:
    """The count - 1 times between t and s, even in t."""
    if count == 1:
        return []
    at = schedule.at(torch.linspace(t.value, s.value, count + 1, dtype=torch.float64)[1:-1])
    return [Time(*row) for row in zip(*(entry.tolist() for entry in at), strict=True)]
