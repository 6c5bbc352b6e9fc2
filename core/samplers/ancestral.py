r"""Ancestral samplers: move to less noise than asked for, then add what is missing.

The reverse step p(x_s | x_t, x0) has mean alpha_s x0 + sqrt(sigma_s^2 - var) eps, with eps the
noise in x_t and var the variance that is drawn afresh: 0 is the probability flow, and
sigma_s^2 (1 - SNR_t / SNR_s) is the posterior q(x_s | x_t, x0). Samplers differ in the fresh part
var / sigma_s^2 (a row of `FRESH`) and in the method that moves.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from mdiff.core.denoiser import Denoise
from mdiff.core.errors import UsageError
from mdiff.core.names import pick
from mdiff.core.noise import Noise
from mdiff.core.samplers.base import Memory, Sampler, at_log_snr, move, renoise
from mdiff.core.samplers.runge_kutta import Euler
from mdiff.core.samplers.singlestep import dpm2, dpmpp_2s
from mdiff.core.schedules import Time


def _posterior(eta: float, t: Time[float], s: Time[float]) -> float:
    """1 - SNR_t / SNR_s, the posterior's; the standard deviation grows with eta."""
    return min(1.0, -(eta**2) * math.expm1(t.log_snr - s.log_snr))


def _sde(eta: float, t: Time[float], s: Time[float]) -> float:
    """1 - (SNR_t / SNR_s)^eta: an SDE whose noise has eta times the posterior's rate."""
    return -math.expm1(eta * (t.log_snr - s.log_snr)) if eta > 0 else 0.0


def _flow(eta: float, t: Time[float], s: Time[float]) -> float:
    """A step of a rectified flow that is longer by eta, in its sigma = r / (1 + r), r^-2 = SNR."""
    if eta == 0 or s.sigma == 0:
        return 0.0
    sigma_t, sigma_s = (1 / (1 + math.exp(time.log_snr / 2)) for time in (t, s))
    down = sigma_s * (1 + eta * (sigma_s / sigma_t - 1))
    return 1 - (down / (1 - down) * (1 - sigma_s) / sigma_s) ** 2


FRESH: dict[str, Callable[[float, Time[float], Time[float]], float]] = {
    "posterior": _posterior,
    "sde": _sde,
    "flow": _flow,
}
"""How eta sets the part of sigma_s^2 that is drawn afresh; 0 draws nothing."""


def _down(s: Time[float], fresh: float) -> Time[float]:
    """s with the part `fresh` of its sigma^2 left out."""
    return s._replace(sigma=s.sigma * math.sqrt(1 - fresh))


def leap(
    x: Tensor,
    x0: Tensor,
    t: Time[float],
    s: Time[float],
    fresh: float,
    noise: Noise,
    noise_scale: float = 1.0,
) -> Tensor:
    """From t to s if the denoiser says x0 all the way: `move`, with a part of sigma_s^2 fresh."""
    mean = move(x, x0, t, _down(s, fresh))
    std = s.sigma * math.sqrt(fresh) * noise_scale
    return mean.add_(noise.between(t, s, x.device, x.dtype), alpha=std) if std > 0 else mean


@dataclass(frozen=True, kw_only=True)
class DDIM:
    """DDIM (Song et al., 2021, eq. 12 and 16): eta 0 is the probability flow, 1 the posterior.

    Its larger variance (sigma-hat of section 5) is `DDPM` with variance "large".

    Attributes:
        eta: how much noise is drawn afresh.
        rule: how eta sets it, a row of `FRESH`.
        noise_scale: a factor on that noise.
    """

    eta: float = 0.0
    rule: str = "posterior"
    noise_scale: float = 1.0
    order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_eta(self.eta)
        pick("rule", FRESH, self.rule)

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
        fresh = FRESH[self.rule](self.eta, t, s)
        return leap(x, denoise(x, t).x0, t, s, fresh, noise, self.noise_scale), state


VARIANCES: dict[str, float | None] = {"small": 0.0, "large": 1.0, "learned": None}
"""Where DDPM's variance lies between the posterior's and beta, in logs; None: the network says."""


@dataclass(frozen=True, kw_only=True)
class DDPM:
    """DDPM (Ho et al., 2020, alg. 2) between any two times.

    The mean is the posterior's. The variance is its fresh part times sigma_s^2 ("small") or
    sigma_t^2 ("large": beta of the step), or lies between them where a network learned the place
    ("learned"; Nichol and Dhariwal, 2021, eq. 15). Under `schedules.ve` it is the ancestral
    sampling ("small") and the reverse diffusion ("large") of score SDEs (Song et al., 2021, app. F
    and E).
    """

    variance: str = "small"
    order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 1

    def __post_init__(self) -> None:
        pick("variance", VARIANCES, self.variance)

    def step(
        self,
        denoise: Denoise,
        x: Tensor,
        t: Time[float],
        s: Time[float],
        state: Memory,
        noise: Noise,
    ) -> tuple[Tensor, Memory]:
        """One step, see `Sampler`.

        Raises:
            UsageError: the variance is "learned" and the network learned none.
        """
        said = denoise(x, t)
        fresh = _posterior(1.0, t, s)
        mean = move(x, said.x0, t, _down(s, fresh))
        if s.sigma == 0:
            return mean, state
        z = noise.between(t, s, x.device, x.dtype)
        fraction = VARIANCES[self.variance]
        if fraction is not None:
            std = math.sqrt(fresh) * t.sigma**fraction * s.sigma ** (1 - fraction)
            return mean.add_(z, alpha=std), state
        if said.variance_fraction is None:
            raise UsageError(
                "variance 'learned' needs a network that learned one: take 'small' or 'large'"
            )
        growth = math.log(t.sigma / s.sigma)
        std_of_each = torch.exp(said.variance_fraction * growth) * (math.sqrt(fresh) * s.sigma)
        return mean.addcmul_(std_of_each, z), state


@dataclass(frozen=True, kw_only=True)
class Ancestral:
    """Any sampler with a part of the noise drawn afresh in each step (k-diffusion, `_ancestral`).

    Attributes:
        sampler: the one that moves.
        eta, rule, noise_scale: as for `DDIM`, which is this with `Euler`.
    """

    sampler: Sampler = field(default_factory=Euler)
    eta: float = 1.0
    rule: str = "posterior"
    noise_scale: float = 1.0

    def __post_init__(self) -> None:
        check_eta(self.eta)
        pick("rule", FRESH, self.rule)

    @property
    def order(self) -> int:
        """That of the sampler without fresh noise, 1 with it."""
        return 1 if self.eta > 0 else self.sampler.order

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
        """One step, see `Sampler`."""
        fresh = FRESH[self.rule](self.eta, t, s)
        if s.sigma == 0 or fresh == 0:
            return self.sampler.step(denoise, x, t, s, state, noise)
        log_snr = s.log_snr - math.log1p(-fresh) if fresh < 1 else math.inf
        down = at_log_snr(denoise.schedule, log_snr)
        x, state = self.sampler.step(denoise, x, t, down, state, noise)
        z = noise.between(t, s, x.device, x.dtype)
        return renoise(x, down, s, z * self.noise_scale), state


def euler_ancestral(*, eta: float = 1.0, rule: str = "posterior", noise_scale: float = 1.0) -> DDIM:
    """Euler's method with fresh noise: `DDIM` of eta 1 (k-diffusion, `sample_euler_ancestral`).

    `rule` "flow" is its form for rectified flows (ComfyUI and diffusers, euler ancestral RF).
    """
    return DDIM(eta=eta, rule=rule, noise_scale=noise_scale)


def dpm2_ancestral(*, eta: float = 1.0, noise_scale: float = 1.0) -> Ancestral:
    """The midpoint method with fresh noise (k-diffusion, `sample_dpm_2_ancestral`)."""
    return Ancestral(sampler=dpm2(), eta=eta, noise_scale=noise_scale)


def dpmpp_2s_ancestral(*, eta: float = 1.0, noise_scale: float = 1.0) -> Ancestral:
    """DPM-Solver++(2S) with fresh noise (k-diffusion, `sample_dpmpp_2s_ancestral`)."""
    return Ancestral(sampler=dpmpp_2s(), eta=eta, noise_scale=noise_scale)


def check_eta(eta: float) -> None:
    """Raises UsageError for an eta outside [0, 1]."""
    if not 0 <= eta <= 1:
        raise UsageError(f"eta {eta} is not between 0 (deterministic) and 1 (ancestral)")
