r"""Data for which everything is known: a normal, or a mixture of them, independent in each entry,
and a normal of any covariance, with its exact posterior given a linear measurement.

The denoiser, the score and the density have closed forms on every schedule (and the probability
flow of the normal has one), which makes them the yardstick for samplers, guidance and likelihoods,
here and in other packages.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from mdiff.core.denoiser import Prediction
from mdiff.core.errors import UsageError
from mdiff.core.schedules import Schedule, Time, blend, pad


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


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixture:
    """The exact denoiser of a mixture of normals of one std, drawn anew in each entry.

    Raises:
        UsageError: weights and means are not as many, or the weights do not add up to one.
    """

    schedule: Schedule
    means: tuple[float, ...] = (-1.0, 1.0)
    weights: tuple[float, ...] = (0.5, 0.5)
    std: float = 0.25
    predicts: ClassVar[str] = "x0"

    def __post_init__(self) -> None:
        whole = math.isclose(sum(self.weights), 1.0) and min(self.weights, default=0) > 0
        if len(self.means) != len(self.weights) or not whole:
            raise UsageError(
                f"a mixture has a weight for each mean, positive and 1 together, not means "
                f"{self.means} and weights {self.weights}"
            )

    @property
    def device(self) -> torch.device:
        """Anywhere; the CPU unless x is given."""
        return torch.device("cpu")

    def bind(self, **cond: Any) -> "Mixture":
        """Itself: nothing conditions this data."""
        del cond
        return self

    def __call__(self, x: Tensor, t: Time[float] | Time[Tensor] | float | Tensor) -> Prediction:
        """E[x_0 | x_t = x]. Shapes: x (B, C, *axes); t one number, or one per sample (B,)."""
        alpha, variance, logits = self._modes(x, t)
        gain = alpha * self.std**2 / variance
        return Prediction(x0=gain * x + (1 - gain * alpha) * self._mean(logits))

    def score(self, x: Tensor, t: Time[float] | Time[Tensor] | float | Tensor) -> Tensor:
        """The gradient of `log_density`, of x's shape."""
        alpha, variance, logits = self._modes(x, t)
        return (alpha * self._mean(logits) - x) / variance

    def log_density(self, x: Tensor, t: Time[float] | Time[Tensor] | float | Tensor) -> Tensor:
        """log p_t(x) of each sample, (B,), in nats."""
        _, variance, logits = self._modes(x, t)
        each = logits.logsumexp(0) - (2 * math.pi * variance).log() / 2
        return each.flatten(1).sum(1)

    def moments(self, t: float) -> tuple[float, float]:
        """Mean and variance of every entry of x_t."""
        at = self.schedule.at(t)
        mean = sum(w * m for w, m in zip(self.weights, self.means, strict=True))
        square = sum(w * m**2 for w, m in zip(self.weights, self.means, strict=True))
        return at.alpha * mean, at.alpha**2 * (self.std**2 + square - mean**2) + at.sigma**2

    def _modes(self, x: Tensor, t: Any) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, the variance of a mode of x_t, and each mode's log-weight at x (modes first)."""
        at = self.schedule.at(t)
        alpha, sigma = (
            pad(torch.as_tensor(c, dtype=torch.float64, device=x.device), x)
            for c in (at.alpha, at.sigma)
        )
        variance = alpha**2 * self.std**2 + sigma**2
        logits = [
            math.log(w) - (x - alpha * m) ** 2 / (2 * variance)
            for w, m in zip(self.weights, self.means, strict=True)
        ]
        return alpha, variance, torch.stack(logits)

    def _mean(self, logits: Tensor) -> Tensor:
        """The mean of the modes' means, weighted by how likely each is."""
        likely = logits.softmax(0)
        return sum(
            (p * m for p, m in zip(likely, self.means, strict=True)), torch.zeros_like(logits[0])
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Correlated:
    """The exact denoiser of N(mean, covariance) over all n entries of a sample, in their order.

    Attributes:
        covariance: (n, n), float64, n = C times the axes.
        mean: (n,), zeros if None.

    Raises:
        UsageError: the covariance is not square, symmetric and positive.
    """

    schedule: Schedule
    covariance: Tensor
    mean: Tensor | None = None
    predicts: ClassVar[str] = "x0"

    def __post_init__(self) -> None:
        c = self.covariance
        if c.ndim != 2 or not torch.equal(c, c.T) or bool(self._spectrum[0].min() <= 0):
            raise UsageError("a covariance is (n, n), symmetric and positive definite")

    @property
    def device(self) -> torch.device:
        """That of the covariance."""
        return self.covariance.device

    def bind(self, **cond: Any) -> "Correlated":
        """Itself: nothing conditions this data."""
        del cond
        return self

    def __call__(self, x: Tensor, t: Time[float] | Time[Tensor] | float | Tensor) -> Prediction:
        """E[x_0 | x_t = x]. Shapes: x (B, C, *axes); t one number, or one per sample (B,)."""
        alpha, sigma = self._levels(t)
        values, vectors = self._spectrum
        gain = alpha * values / (alpha**2 * values + sigma**2)
        rest = x.double().flatten(1) - alpha * self._centre
        return Prediction(
            x0=(self._centre + (rest @ vectors * gain) @ vectors.T).to(x.dtype).reshape(x.shape)
        )

    def given(self, t: Time[float] | float) -> Tensor:
        """Cov[x_0 | x_t], (n, n): the same for all x_t."""
        alpha, sigma = self._levels(t)
        values, vectors = self._spectrum
        return (vectors * (values * sigma**2 / (alpha**2 * values + sigma**2))) @ vectors.T

    def posterior(self, matrix: Tensor, y: Tensor, noise: float = 0.0) -> tuple[Tensor, Tensor]:
        """Mean (n,) and covariance (n, n) of x_0 given y = matrix x_0 + N(0, noise^2).

        Shapes: matrix (m, n) of rank m, or any with noise; y (m,).
        """
        across = self.covariance @ matrix.T
        total = matrix @ across + noise**2 * torch.eye(len(matrix), dtype=across.dtype)
        gain = torch.linalg.solve(total, across.T).T
        return self._centre + gain @ (y - matrix @ self._centre), self.covariance - gain @ across.T

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors of the covariance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return values, vectors

    @property
    def _centre(self) -> Tensor:
        return self.covariance.new_zeros(len(self.covariance)) if self.mean is None else self.mean

    def _levels(self, t: Any) -> tuple[Tensor, Tensor]:
        """alpha and sigma, () or (B, 1)."""
        at = self.schedule.at(t)
        alpha, sigma = (torch.as_tensor(c, dtype=torch.float64) for c in (at.alpha, at.sigma))
        return alpha[..., None], sigma[..., None]
