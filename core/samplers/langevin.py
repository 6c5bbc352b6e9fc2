r"""Samplers from the score, grad log p_t(x) = -(x - alpha x0) / sigma^2: the reverse SDE in steps of
t, and Langevin dynamics at one t.

The forward SDE is dx = f x dt + g dW, with f = d log alpha / dt and g^2 = d sigma^2 / dt - 2 f
sigma^2; the reverse has drift f x - g^2 score (Song et al., 2021, eq. 6).
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from mdiff.core.denoiser import Denoise
from mdiff.core.errors import UsageError
from mdiff.core.noise import Noise
from mdiff.core.samplers.ancestral import DDPM, check_eta
from mdiff.core.samplers.base import Memory, Sampler
from mdiff.core.schedules import Schedule, Time, blend, pad


def _score(x: Tensor, x0: Tensor, t: Time[float]) -> Tensor:
    return blend(-1 / t.sigma**2, x, t.alpha / t.sigma**2, x0)


@dataclass(frozen=True, kw_only=True)
class ReverseDiffusion:
    """The forward step run backwards (Song et al., 2021, app. E, eq. 46).

    A forward step from s to t is x_t = a x_s + G z, a = alpha_t / alpha_s, G^2 = sigma_t^2 - a^2
    sigma_s^2. Under `schedules.ve` this is `DDPM` with variance "large".
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
        """One step, see `Sampler`; the last, to clean data, adds no noise."""
        a = t.alpha / s.alpha
        variance = t.sigma**2 - (a * s.sigma) ** 2
        mean = blend(2 - a, x, variance, _score(x, denoise(x, t).x0, t))
        if s.sigma == 0:
            return mean, state
        return mean.add_(noise.between(t, s, x.device, x.dtype), alpha=variance**0.5), state


@dataclass(frozen=True, kw_only=True)
class EulerMaruyama:
    """Euler-Maruyama on the reverse SDE in t (Song et al., 2021, section 4.1).

    Attributes:
        eta: how much of the noise of the SDE; 0 is Euler's method in t on the probability flow,
            which on a rectified flow is `Euler` itself.
    """

    eta: float = 1.0
    order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_eta(self.eta)

    def step(
        self,
        denoise: Denoise,
        x: Tensor,
        t: Time[float],
        s: Time[float],
        state: Memory,
        noise: Noise,
    ) -> tuple[Tensor, Memory]:
        """One step, see `Sampler`; the last, to clean data, adds no noise.

        Raises:
            UsageError: at t there is no signal at all, and no drift is defined.
        """
        if t.alpha == 0:
            raise _silent(t)
        f, squared = _rates(denoise.schedule, t)
        dt = s.value - t.value
        pull = -(1 + self.eta**2) / 2 * squared * dt
        mean = blend(1 + f * dt, x, pull, _score(x, denoise(x, t).x0, t))
        if s.sigma == 0 or self.eta == 0:
            return mean, state
        std = self.eta * math.sqrt(-squared * dt)
        return mean.add_(noise.between(t, s, x.device, x.dtype), alpha=std), state


def _silent(t: Time[float]) -> UsageError:
    return UsageError(
        f"this sampler cannot start at t = {t.value}, where there is no signal: begin the grid a "
        "little later, or take another sampler"
    )


def _rates(schedule: Schedule, t: Time[float]) -> tuple[float, float]:
    """f and g^2 at t."""
    with torch.enable_grad():
        at = torch.tensor(t.value, dtype=torch.float64, requires_grad=True)
        alpha, sigma = schedule.kernel(at)
        # a schedule that preserves the mean has an alpha that depends on nothing
        (f,) = torch.autograd.grad(alpha.log() + 0 * at, at, retain_graph=True)
        (growth,) = torch.autograd.grad(sigma**2, at)
    return f.item(), (growth - 2 * f * t.sigma**2).item()


@dataclass(frozen=True, kw_only=True)
class PredictorCorrector:
    """Langevin steps at t, then a step to s (Song et al., 2021, alg. 1 to 5).

    Attributes:
        predictor: the step: `ReverseDiffusion`, `EulerMaruyama`, `DDPM` (ancestral) or any other.
        corrections: Langevin steps before it.
        snr: the ratio r of the norms of the score's part of a Langevin step and of the noise's.
    """

    predictor: Sampler = field(default_factory=ReverseDiffusion)
    corrections: int = 1
    snr: float = 0.16

    @property
    def order(self) -> int:
        """1: Langevin steps of a finite size leave an error of their own."""
        return 1

    @property
    def evaluations(self) -> int:
        """Those of the predictor, and one a correction."""
        return self.predictor.evaluations + self.corrections

    def step(
        self,
        denoise: Denoise,
        x: Tensor,
        t: Time[float],
        s: Time[float],
        state: Memory,
        noise: Noise,
    ) -> tuple[Tensor, Memory]:
        """One step, see `Sampler`; norms are those of each sample, not their mean over a batch."""
        a = t.alpha / s.alpha
        for _ in range(self.corrections):
            score = _score(x, denoise(x, t).x0, t)
            z = noise.draw(x.device, x.dtype)
            size = 2 * (a * self.snr * _norm(z) / _norm(score)) ** 2
            x = x + pad(size, x) * score + pad((2 * size).sqrt(), x) * z
        return self.predictor.step(denoise, x, t, s, state, noise)


def ancestral_corrected(*, corrections: int = 1, snr: float = 0.16) -> PredictorCorrector:
    """DDPM's step after Langevin steps at t (Ho et al., 2022, Video Diffusion, section 3)."""
    return PredictorCorrector(predictor=DDPM(), corrections=corrections, snr=snr)


def _norm(x: Tensor) -> Tensor:
    """That of each sample, (B,)."""
    return torch.stack([torch.linalg.vector_norm(row) for row in x])


@dataclass(frozen=True, kw_only=True)
class AnnealedLangevin:
    """Annealed Langevin dynamics (Song and Ermon, 2019, alg. 1; 2020, alg. 1).

    At each level of the grid `steps` Langevin steps of size `size` sigma^2, and on to the next as
    it is. `size` is epsilon / sigma_L^2 of the papers, sigma_L their last level: 2e-5 / 0.01^2 =
    0.2 with 100 steps (NCSN, whose paper writes alpha_i = 2 size sigma_i^2), 6.2e-6 / 0.01^2 =
    0.062 with 5 (NCSN v2 on CIFAR-10).

    Attributes:
        steps: Langevin steps a level.
        size: of a step, over sigma^2; below 1 for the dynamics to be stable.
        final: end with the denoiser's x0 instead of the last noisy x (Jolicoeur-Martineau et al.,
            2021).
    """

    steps: int = 5
    size: float = 0.062
    final: bool = True
    order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.size < 1:
            raise UsageError(
                f"annealed Langevin takes 1 step or more of a size between 0 and 1 (over sigma^2), "
                f"not {self.steps} of {self.size}"
            )

    @property
    def evaluations(self) -> int:
        """One a Langevin step; the last level takes one more if the end is denoised."""
        return self.steps

    def step(
        self,
        denoise: Denoise,
        x: Tensor,
        t: Time[float],
        s: Time[float],
        state: Memory,
        noise: Noise,
    ) -> tuple[Tensor, Memory]:
        """One step, see `Sampler`: the dynamics at t, then x as it is taken for x at s.

        Raises:
            UsageError: at t there is no signal at all, and so no x over alpha to keep.
        """
        if t.alpha == 0:
            raise _silent(t)
        for _ in range(self.steps):
            z = noise.draw(x.device, x.dtype)
            x = blend(1 - self.size, x, self.size * t.alpha, denoise(x, t).x0)
            x.add_(z, alpha=math.sqrt(2 * self.size) * t.sigma)
        if s.sigma == 0 and self.final:
            return denoise(x, t).x0, state
        return x * (s.alpha / t.alpha), state
