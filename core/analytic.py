r"""Data for which everything is known: N(mean, std^2), independent in each entry.

Its denoiser and its probability flow have closed forms on every schedule, which makes it the
yardstick for samplers, guidance and likelihoods, here and in other packages.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mdiff.core.denoiser import Prediction
from mdiff.core.schedules import Schedule, Time, blend


@dataclass(frozen=True, kw_only=True, eq=False)
class Gaussian:
    """The exact denoiser of N(mean, std^2) data."""

    schedule: Schedule
    mean: float = 0.0
    std: float = 1.0
    predicts: ClassVar[str] = "x0"

    @property
    def device(self) -> torch.device:
        """Anywhere; the CPU unless x is given."""
        return torch.device("cpu")

    def bind(self, **cond: Any) -> "Gaussian":
        """Itself: nothing conditions this data."""
        del cond
        return self

    def __call__(self, x: Tensor, t: Time[float] | Time[Tensor] | float | Tensor) -> Prediction:
        """E[x_0 | x_t = x]. Shapes: x (B, C, *axes); t one number, or one per sample (B,)."""
        at = self.schedule.at(t)
        gain = at.alpha * self.std**2 / self._variance(at)
        return Prediction(x0=blend(gain, x, (1 - gain * at.alpha) * self.mean, torch.ones_like(x)))

    def moments(self, t: float) -> tuple[float, float]:
        """Mean and variance of every entry of x_t."""
        at = self.schedule.at(t)
        return at.alpha * self.mean, self._variance(at)

    def flow(self, x: Tensor, t: float, s: float) -> Tensor:
        """Where the probability flow takes x from t to s."""
        (mean_t, variance_t), (mean_s, variance_s) = self.moments(t), self.moments(s)
        return mean_s + (variance_s / variance_t) ** 0.5 * (x - mean_t)

    def _variance(self, at: Time[Any]) -> Any:
        return at.alpha**2 * self.std**2 + at.sigma**2
