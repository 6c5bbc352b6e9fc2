r"""Few-step samplers of distilled networks: jump to (almost) clean data, then add noise anew.

Such a network says x0 as the end of the probability flow, not as a mean, so no step along the flow
is needed.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mdiff.core.denoiser import Denoise
from mdiff.core.errors import UsageError
from mdiff.core.noise import Noise
from mdiff.core.samplers.base import Memory, move, renoise
from mdiff.core.schedules import Schedule, Time, blend


@dataclass(frozen=True, kw_only=True)
class Consistency:
    """Multistep consistency sampling: x0, then noise up to s (Song et al., 2023, alg. 1).

    Attributes:
        floor: sigma / alpha of what the network says, epsilon of the paper: 0.002 where it was
            trained to stop there, 0 for clean data.
        noise_scale: a factor on the noise.
    """

    floor: float = 0.0
    noise_scale: float = 1.0
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
        x0 = denoise(x, t).x0
        least = s.alpha * self.floor
        if s.sigma <= least * (1 + 1e-9):
            return s.alpha * x0, state
        std = math.sqrt(s.sigma**2 - least**2) * self.noise_scale
        return blend(s.alpha, x0, std, noise.draw(x.device, x.dtype)), state


@dataclass(frozen=True, kw_only=True)
class LCM:
    """Latent consistency: `Consistency` with a boundary at index 0 (Luo et al., 2023).

    The consistency function c_skip x + c_out x0, c_skip = d^2 / (u^2 + d^2) and c_out = u / sqrt(u^2
    + d^2) of u = `scaling` times the index, is x itself at index 0 of the table.

    Attributes:
        scaling: of the index, which is 1000 t on a schedule without a table.
        data_std: d.
    """

    scaling: float = 10.0
    data_std: float = 0.5
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
        schedule, d = denoise.schedule, self.data_std
        u = self.scaling * (1000 * t.value if schedule.steps is None else schedule.index(t.value))
        square = u**2 + d**2
        x0 = blend(d**2 / square, x, u / math.sqrt(square), denoise(x, t).x0)
        if s.sigma == 0:
            return x0, state
        return blend(s.alpha, x0, s.sigma, noise.draw(x.device, x.dtype)), state


@dataclass(frozen=True, kw_only=True)
class TCD:
    """Strategic stochastic sampling: past s along the flow, then back (Zheng et al., 2024).

    Attributes:
        gamma: how far past, as a part of s: 0 stops at s and is `DDIM`, 1 goes to the end of the
            table, which is multistep consistency sampling.
    """

    gamma: float = 0.3
    order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise UsageError(f"gamma {self.gamma} is not between 0 (deterministic) and 1")

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
        down = self._past(denoise.schedule, s)
        x = move(x, denoise(x, t).x0, t, down)
        if down.value == s.value:
            return x, state
        return renoise(x, down, s, noise.draw(x.device, x.dtype)), state

    def _past(self, schedule: Schedule, s: Time[float]) -> Time[float]:
        """The time between s and the end, on a table one of its entries."""
        if self.gamma == 0 or s.sigma == 0:
            return s
        if schedule.steps is None:
            return schedule.at((1 - self.gamma) * s.value)
        index = (1 - self.gamma) * schedule.index(s.value)
        return schedule.at((math.floor(index + 1e-6) + 1) / schedule.entries)
