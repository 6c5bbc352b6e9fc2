r"""Samplers that go back to more noise on the way: what they add then forgets errors made before.

Both wrap a sampler. Levels are those of the papers, in which alpha is 1: sigma / alpha here.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor

from mdiff.core.denoiser import Denoise
from mdiff.core.errors import UsageError
from mdiff.core.noise import Noise
from mdiff.core.samplers.base import Memory, Sampler, at_log_snr, renoise
from mdiff.core.samplers.runge_kutta import Heun
from mdiff.core.schedules import Time


def _level(t: Time[float]) -> float:
    """sigma / alpha."""
    return math.exp(-t.log_snr / 2) if t.log_snr > -math.inf else math.inf


@dataclass(frozen=True, kw_only=True)
class Churn:
    """EDM's stochastic sampler: noise up a little, then a step (Karras et al., 2022, alg. 2).

    Attributes:
        sampler: the step; Heun's is the paper's.
        gamma: by how much sigma grows first, at most sqrt 2 - 1: the paper's S_churn over the
            number of steps, so that its 40 over 256 steps is 0.156.
        low, high: the levels between which it does, S_min and S_max.
        noise_scale: a factor on the noise, S_noise.
    """

    sampler: Sampler = field(default_factory=Heun)
    gamma: float = 40 / 256
    low: float = 0.0
    high: float = math.inf
    noise_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= math.sqrt(2) - 1 + 1e-9:
            raise UsageError(
                f"gamma {self.gamma} is not between 0 and sqrt 2 - 1: it is S_churn over the number "
                "of steps, cut off there"
            )

    @property
    def order(self) -> int:
        """That of the sampler without noise, 1 with it."""
        return 1 if self.gamma > 0 else self.sampler.order

    @property
    def evaluations(self) -> int:
        """Those of the sampler."""
        return self.sampler.evaluations

    def step(
        self,
        denoise: Denoise,
        x: Tensor,
        t: Time[float],
        s: Time[float],
        state: Memory,
        noise: Noise,
    ) -> tuple[Tensor, Memory]:
        """One step, see `Sampler`; sigma grows no further than the schedule goes."""
        if self.gamma > 0 and self.low <= _level(t) <= self.high:
            raised = at_log_snr(denoise.schedule, t.log_snr - 2 * math.log1p(self.gamma))
            if raised.log_snr < t.log_snr:
                z = noise.draw(x.device, x.dtype)
                x, t = renoise(x, t, raised, z * self.noise_scale), raised
        return self.sampler.step(denoise, x, t, s, state, noise)


@dataclass(frozen=True, kw_only=True)
class Restart:
    """Restart sampling: an interval is run through again from fresh noise (Xu et al., 2023).

    The step that ends at or below `low` is followed by `times` rounds: noise up to `high`, then
    down again along `steps` steps of a Karras grid.

    Attributes:
        sampler: the steps, of the run and of the rounds. A stochastic one would meet the same
            noise in each round if it is that of Brownian paths.
        low, high: the levels of the interval.
        times: rounds, K of the paper.
        steps: steps a round.
        rho: of the grid of a round.
    """

    sampler: Sampler = field(default_factory=Heun)
    low: float = 0.1
    high: float = 2.0
    times: int = 2
    steps: int = 9
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high or self.steps < 1 or self.times < 0:
            raise UsageError(
                f"restart needs 0 < low < high, 1 step or more and no negative number of times, not "
                f"low {self.low}, high {self.high}, steps {self.steps} and times {self.times}"
            )

    @property
    def order(self) -> int:
        """That of the sampler."""
        return self.sampler.order

    @property
    def evaluations(self) -> int:
        """Those of a step that no round follows."""
        return self.sampler.evaluations

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
        x, state = self.sampler.step(denoise, x, t, s, state, noise)
        if not 0 < _level(s) <= self.low < _level(t):
            return x, state
        ends = [level ** (1 / self.rho) for level in (self.high, _level(s))]
        levels = [
            (ends[0] + (ends[1] - ends[0]) * i / self.steps) ** self.rho for i in range(self.steps)
        ]
        times = [at_log_snr(denoise.schedule, -2 * math.log(level)) for level in levels] + [s]
        for _ in range(self.times):
            x, state = renoise(x, s, times[0], noise.draw(x.device, x.dtype)), {}
            for a, b in pairwise(times):
                x, state = self.sampler.step(denoise, x, a, b, state, noise)
        return x, {}
