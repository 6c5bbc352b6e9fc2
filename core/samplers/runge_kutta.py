r"""Runge-Kutta methods on the probability flow, which in x / alpha and sigma / alpha is

d(x / alpha) / d(sigma / alpha) = eps(x, t) = (x - alpha_t x0) / sigma_t    (Karras et al., 2022,
eq. 4).

The mean of the slope at t and of that at s, where the first leads, is `move` with

    x0 + (u_t / u_s) (x0_s - x0) / 2,

u = sigma / alpha. In the coordinates of flow matching, where x / (alpha + sigma) is a straight line
in u = sigma / (alpha + sigma) for a network that says the same x0, the same holds with that u. The
midpoint method is exponential too, see `singlestep.dpm2`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mdiff.core.denoiser import Denoise
from mdiff.core.names import pick
from mdiff.core.noise import Noise
from mdiff.core.samplers.base import Memory, move
from mdiff.core.schedules import Time, blend

FRAMES: dict[str, Callable[[Time[float]], float]] = {
    "sigma": lambda t: t.sigma / t.alpha if t.alpha > 0 else math.inf,
    "flow": lambda t: t.sigma / (t.alpha + t.sigma),
}
"""u, in which a network that says the same x0 leads along a straight line."""


@dataclass(frozen=True, kw_only=True)
class Euler:
    """Euler's method: x0 at t all the way, which is `move` in any coordinates (Euler, 1768).

    On `schedules.flow` it is the Euler sampler of flow matching, elsewhere DDIM.
    """

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

    The slopes are those in `frame`, a row of `FRAMES`: "sigma" is the paper's, "flow" that of flow
    matching's Heun sampler. Steps to clean data are Euler's, because no slope is defined there: n
    steps cost 2 n - 1 evaluations. So is, in "sigma", a step from where there is no signal.
    """

    frame: str = "sigma"
    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 2

    def __post_init__(self) -> None:
        pick("frame", FRAMES, self.frame)

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
        u_t, u_s = FRAMES[self.frame](t), FRAMES[self.frame](s)
        if u_s == 0 or math.isinf(u_t):
            return euler, state
        w = u_t / u_s / 2
        return move(x, blend(1 - w, x0, w, denoise(euler, s).x0), t, s), state
