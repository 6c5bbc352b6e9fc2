r"""Ancestral samplers: move to less noise than asked for, then add what is missing.

The reverse step p(x_s | x_t, x0) has mean alpha_s x0 + sqrt(sigma_s^2 - var) eps, with eps the
noise in x_t and var the variance that is drawn afresh: 0 is the probability flow, and
sigma_s^2 (1 - SNR_t / SNR_s) is the posterior q(x_s | x_t, x0).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mdiff.core.denoiser import Denoise
from mdiff.core.errors import UsageError
from mdiff.core.names import pick
from mdiff.core.noise import Noise
from mdiff.core.samplers.base import Memory, move
from mdiff.core.schedules import Time


def _fresh(t: Time[float], s: Time[float]) -> float:
    """1 - SNR_t / SNR_s: the part of sigma_s^2 that the posterior draws afresh."""
    return -math.expm1(t.log_snr - s.log_snr)


def _down(s: Time[float], fresh: float) -> Time[float]:
    """s with the part `fresh` of its sigma^2 left out."""
    return s._replace(sigma=s.sigma * math.sqrt(1 - fresh))


@dataclass(frozen=True, kw_only=True)
class DDIM:
    """DDIM (Song et al., 2021, eq. 12 and 16): eta 0 is the probability flow, 1 the posterior."""

    eta: float = 0.0
    order: ClassVar[int] = 1
    evaluations: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise UsageError(f"eta {self.eta} is not between 0 (deterministic) and 1 (ancestral)")

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
        fresh = self.eta**2 * _fresh(t, s)
        mean = move(x, denoise(x, t).x0, t, _down(s, fresh))
        std = s.sigma * math.sqrt(fresh)
        return (mean.add_(noise.draw(x.device, x.dtype), alpha=std) if std > 0 else mean), state


VARIANCES: dict[str, float | None] = {"small": 0.0, "large": 1.0, "learned": None}
"""Where DDPM's variance lies between the posterior's and beta, in logs; None: the network says."""


@dataclass(frozen=True, kw_only=True)
class DDPM:
    """DDPM (Ho et al., 2020, alg. 2) between any two times.

    The mean is the posterior's. The variance is `_fresh` times sigma_s^2 ("small") or sigma_t^2
    ("large": beta of the step), or lies between them where a network learned the place ("learned";
    Nichol and Dhariwal, 2021, eq. 15).
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
        fresh = _fresh(t, s)
        mean = move(x, said.x0, t, _down(s, fresh))
        if s.sigma == 0:
            return mean, state
        z = noise.draw(x.device, x.dtype)
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
