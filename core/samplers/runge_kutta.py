r"""Runge-Kutta methods on the probability flow, which in x / alpha and sigma / alpha is

d(x / alpha) / d(sigma / alpha) = eps(x, t) = (x - alpha_t x0) / sigma_t    (Karras et al., 2022,
eq. 4).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mdiff.core.denoiser import Denoise
from mdiff.core.noise import Noise
from mdiff.core.samplers.base import Memory, move
from mdiff.core.schedules import Time, blend


def _slope(x: Tensor, x0: Tensor, t: Time[float]) -> Tensor:
    """eps: the noise in x at t."""
    return blend(1 / t.sigma, x, -t.alpha / t.sigma, x0)


@dataclass(frozen=True, kw_only=True)
class Euler:
    """Euler's method: the slope at t all the way, which is `move`."""

    order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 1

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
        return move(x, denoise(x, t).x0, t, s), state


@dataclass(frozen=True, kw_only=True)
class Heun:
    """Heun's method: the mean of the slopes at both ends (Karras et al., 2022, alg. 1).

    The step to clean data is Euler's, because no slope is defined there: n steps cost 2 n - 1
    evaluations.
    """

    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 2

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
        x0 = denoise(x, t).x0
        euler = move(x, x0, t, s)
        if s.sigma == 0:
            return euler, state
        change = _slope(euler, denoise(euler, s).x0, s).sub_(_slope(x, x0, t))
        return euler.add(change, alpha=(s.sigma - s.alpha * t.sigma / t.alpha) / 2), state
