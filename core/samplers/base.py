r"""A sampler: the step from x at time t to x at an earlier time s.

Between t and s the probability flow has an exact solution for a network that keeps saying the same
x0,

    x_s = (sigma_s / sigma_t) (x_t - alpha_t x0) + alpha_s x0,

the map `move` below. It holds for every schedule, and families of samplers differ in what they put
in it: which x0, and which sigma_s. Dividing by alpha turns it into a straight line in sigma /
alpha, where classical ODE methods work.
"""

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from mdiff.core.denoiser import Denoise
from mdiff.core.noise import Noise
from mdiff.core.schedules import Schedule, Time, blend

Memory = Mapping[str, Any]
"""Tensors and floats that a sampler keeps from earlier steps; empty before the first."""


class Sampler(Protocol):
    """A step, with the order of its global error and its evaluations of the denoiser."""

    @property
    def order(self) -> int: ...
    @property
    def evaluations(self) -> int: ...
    def step(
        self,
        denoise: Denoise,
        x: Tensor,
        t: Time[float],
        s: Time[float],
        state: Memory,
        noise: Noise,
    ) -> tuple[Tensor, Memory]:
        """From x at t to (x at s, state for the next step); x (B, C, *axes) is not changed."""


def move(x: Tensor, x0: Tensor, t: Time[float], s: Time[float]) -> Tensor:
    """Along the probability flow from t to s, if the denoiser says x0 all the way."""
    ratio = s.sigma / t.sigma
    return blend(ratio, x, s.alpha - ratio * t.alpha, x0)


def noise_in(x: Tensor, x0: Tensor, t: Time[float]) -> Tensor:
    """eps: the noise in x at t, if x0 is the data in it."""
    return blend(1 / t.sigma, x, -t.alpha / t.sigma, x0)


def carry(x: Tensor, eps: Tensor, t: Time[float], s: Time[float]) -> Tensor:
    """Along the probability flow from t to s, if the noise is eps all the way; t has signal."""
    ratio = s.alpha / t.alpha
    return blend(ratio, x, s.sigma - ratio * t.sigma, eps)


def renoise(x: Tensor, t: Time[float], s: Time[float], z: Tensor) -> Tensor:
    """The way back, from t to more noise at s: x (alpha_s / alpha_t) + what z is to add."""
    ratio = s.alpha / t.alpha
    return blend(ratio, x, math.sqrt(max(0.0, s.sigma**2 - (ratio * t.sigma) ** 2)), z)


def at_log_snr(schedule: Schedule, log_snr: float) -> Time[float]:
    """The time of this log-SNR; the first or the last time where the schedule never has it."""
    t = schedule.at(schedule.time(torch.tensor(log_snr, dtype=torch.float64)).item())
    if not (0 < t.value < 1):
        return t
    # sigma of the log-SNR as it was asked for: tables round times that are close to an entry
    return t._replace(sigma=t.alpha * math.exp(-log_snr / 2), log_snr=log_snr)


def between(schedule: Schedule, t: Time[Any], s: Time[Any], part: float) -> Time[Any]:
    """The time that lies this part of the way from t to s in log-SNR; both may be one per sample."""
    log_snr = t.log_snr + part * (s.log_snr - t.log_snr)
    if isinstance(log_snr, Tensor):
        at = schedule.at(schedule.time(log_snr))
        return at._replace(sigma=at.alpha * torch.exp(-log_snr / 2), log_snr=log_snr)
    return at_log_snr(schedule, log_snr)
