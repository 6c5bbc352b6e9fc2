r"""The variational bound: bits per dimension of data under a chain of reverse steps.

For any times 1 >= t_0 > ... > t_n = 0 the chain p(x_s | x_t) bounds the probability of data (Ho et al., 2020, eq. 5):

    -log p(x0)  <=  KL(q(x_{t_0} | x0) || prior) + sum KL(q(x_s | x_t, x0) || p(x_s | x_t)) - E log p(x0 | x_{t_{n-1}})

Both reverse steps are normal. Their means differ by alpha_s (1 - SNR_t / SNR_s) (x0 - x0hat), so that with equal
variances a term is (SNR_s - SNR_t) / 2 (x0 - x0hat)^2 on every schedule (Kingma et al., 2021); a learned
variance adds a factor and its logarithm. The last term counts data of 8 bits, scaled to [-1, 1].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mdiff.core import grids
from mdiff.core.denoiser import Denoise, Prediction
from mdiff.core.errors import UsageError
from mdiff.core.grids import Grid
from mdiff.core.names import pick
from mdiff.core.noise import Noise
from mdiff.core.samplers.ancestral import VARIANCES
from mdiff.core.sampling import along
from mdiff.core.schedules import Schedule, Time, blend, pad


def mean_of_each(values: Tensor) -> Tensor:
    """The mean over the entries of each sample, (B,), in float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32)).flatten(1).mean(1)


def prior(schedule: Schedule, x0: Tensor, t: float = 1.0) -> Tensor:
    """KL(q(x_t | x0) || N(0, max(1, sigma_t)^2)) in bits per dimension, (B,) (Ho et al., 2020, eq. 5: L_T)."""
    at = schedule.at(t)
    variance = max(1.0, at.sigma) ** 2
    constant = at.sigma**2 / variance - 1 + math.log(variance / at.sigma**2)
    return mean_of_each(x0**2 * (at.alpha**2 / variance) + constant) / (2 * math.log(2))


def term(
    said: Prediction,
    x0: Tensor,
    t: Time[Tensor],
    s: Time[Tensor],
    above: Time[Tensor],
    variance: str = "small",
) -> Tensor:
    """The term of the step from t to s, in bits per dimension, (B,).

    It is the Kullback-Leibler divergence of the step, or -log p(x0 | x_t) where s is clean data.

    Args:
        said: what the denoiser says of x_t; its variance is used if it has one.
        t, s, above: the times of the step, and that of the step before, from above to t: the variance of the posterior
            is 0 at clean data, and that of the step before stands in for it, as in the code of Ho et al., 2020.
        variance: of a network that learned none, a row of `VARIANCES`.
    """
    clean = s.sigma == 0
    small, large = _log_variances(t, s, above)

    def spread(coefficient: Tensor) -> Tensor:
        return pad(coefficient.to(x0.device), x0)

    fraction: Any = said.variance_fraction
    if fraction is None:
        fixed = pick("variance", VARIANCES, variance)
        if fixed is None:
            raise UsageError(
                "variance 'learned' needs a network that learned one: take 'small' or 'large'"
            )
        # DDPM's "large" takes the posterior's variance for the last step: its likelihood is better
        fraction = spread(torch.where(clean, 0.0, fixed))
    excess = fraction * spread(large - small)
    # infinite at clean data, where it is not used, and must not become NaN in a gradient
    gap = torch.where(clean, 0.0, torch.exp(s.log_snr) - torch.exp(t.log_snr))
    distance = (x0 - said.x0) ** 2 * spread(gap)
    divergence = (excess - 1 + torch.exp(-excess) * (1 + distance)) / 2
    decoder = -discretised_gaussian(x0, said.x0, (excess + spread(small)) / 2)
    nats = torch.where(spread(clean) > 0, decoder, divergence)
    return mean_of_each(nats) / math.log(2)


def _log_variances(t: Time[Tensor], s: Time[Tensor], above: Time[Tensor]) -> tuple[Tensor, Tensor]:
    """log of the posterior's variance and of beta, for the step from t to s."""

    def log_fresh(t: Time[Tensor], s: Time[Tensor]) -> Tensor:
        return torch.log(-torch.expm1(t.log_snr - s.log_snr))

    beta = log_fresh(t, s) + 2 * t.sigma.log()
    # a chain of one step has no step before: beta is all there is
    before = torch.where(above.value > t.value, log_fresh(above, t) + 2 * t.sigma.log(), beta)
    return torch.where(s.sigma == 0, before, log_fresh(t, s) + 2 * s.sigma.log()), beta


def discretised_gaussian(x: Tensor, mean: Tensor, log_std: Tensor, levels: int = 256) -> Tensor:
    """log of what N(mean, std^2) gives to the bin around each x, in nats (Ho et al., 2020, eq. 13).

    x is one of `levels` values, evenly from -1 to 1; the bins of -1 and 1 reach to infinity. The distribution function
    is the tanh approximation that the published numbers use (Page, 1977).
    """
    half = 1 / (levels - 1)
    upper, lower = (_ndtr((x - mean + side) * torch.exp(-log_std)) for side in (half, -half))
    upper = torch.where(x > 0.999, 1.0, upper)
    lower = torch.where(x < -0.999, 0.0, lower)
    return (upper - lower).clamp(min=1e-12).log()


def _ndtr(x: Tensor) -> Tensor:
    return (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A bound in bits per dimension and its parts.

    Attributes:
        prior: (B,).
        terms: (B, n), in the order of the steps; the last is the decoder's.
        errors: (B, n), the mean squared errors of x0.
    """

    prior: Tensor
    terms: Tensor
    errors: Tensor

    @property
    def total(self) -> Tensor:
        """The bound, (B,)."""
        return self.prior + self.terms.sum(1)


@torch.no_grad()
def bound(
    denoise: Denoise,
    x0: Tensor,
    noise: Noise,
    *,
    grid: Grid | None = None,
    variance: str = "small",
) -> Bound:
    """The variational bound of each sample, with one draw of x_t for each term.

    Args:
        x0: (B, C, *axes), 256 levels from -1 to 1.
        noise: the streams, one per sample; they are copied and stay where they are.
        grid: the times of the chain; every entry of the table if None.
        variance: of a network that learned none, a row of `VARIANCES`.
    """
    schedule = denoise.schedule
    visited = along(schedule, grid or grids.leading(schedule.entries))
    times = [schedule.at(torch.tensor(t.value, dtype=torch.float64)) for t in visited]
    noise = Noise.restore(noise.state())
    terms: list[Tensor] = []
    errors: list[Tensor] = []
    for above, (t, s) in zip([times[0], *times], pairwise(times), strict=False):
        x = blend(t.alpha, x0, t.sigma, noise.draw(x0.device, x0.dtype))
        said = denoise(x, t)
        terms.append(term(said, x0, t, s, above, variance))
        errors.append(mean_of_each((said.x0 - x0) ** 2))
    start = prior(schedule, x0, visited[0].value)
    return Bound(prior=start, terms=_columns(terms), errors=_columns(errors))


def _columns(columns: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(columns), dim=1)
