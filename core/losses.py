r"""Losses: what to regress, and what each noise level counts.

What a network says is affine in x0, F = (x0 - skip x_t) / out, so the squared error of eps, v, the score or the flow is
that of x0 times 1 / out^2, and every regression is one formula,

    loss(x0, t, z) = weight(t) |x0 - x0hat(alpha_t x0 + sigma_t z, t)|^2,

with a weight of its own, whatever the network itself predicts. A loss is a function

    loss(denoise, x0, t, z) -> (B,)

of a denoiser with its conditions bound, data and standard normal noise z, (B, C, *axes), and times t (B,). Module
`times` draws those, and `evaluate` puts both together. One loss per sample is what importance sampling and logs by
level need.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mdiff.core import bound, denoiser
from mdiff.core.consistency import consistency_distillation, consistency_training
from mdiff.core.denoiser import PREDICTS, Denoise, Kind
from mdiff.core.errors import UsageError
from mdiff.core.names import make, pick
from mdiff.core.schedules import Schedule, Time, blend
from mdiff.core.times import Draw, Times

Loss = Callable[[Denoise, Tensor, Tensor, Tensor], Tensor]
"""loss(denoise, x0, t, z) -> (B,)"""
Weight = Callable[[Time[Tensor], Schedule], Tensor]
"""weight(t, schedule) -> (B,), on the squared error of x0"""


# --- what a noise level counts --------------------------------------------------------------------


def snr(t: Time[Tensor]) -> Tensor:
    """alpha^2 / sigma^2."""
    return torch.exp(t.log_snr)


def of(predicts: str | Kind) -> Weight:
    """The weight that makes the error of x0 that of a kind of prediction, e.g. a row of `PREDICTS`: 1 / out^2."""
    kind = pick("prediction", PREDICTS, predicts) if isinstance(predicts, str) else predicts
    return lambda t, schedule: kind(t)[1] ** -2


def decay(t: Time[Tensor], schedule: Schedule) -> Tensor:
    """-dSNR / dt, the score's g^2 as a weight on x0: by central differences, to about 1e-8 of it.

    In a table it is that of half a step on both sides of an entry.
    """
    h = 1e-5 * t.value if schedule.steps is None else 0.5 / schedule.steps
    below, above = t.value - h, (t.value + h).clamp(max=1.0)
    fall = torch.exp(schedule.log_snr(below)) - torch.exp(schedule.log_snr(above))
    return fall / (above - below)


def _regression(weight: Weight, *, reduce: str = "mean", factor: float = 1.0) -> Loss:
    """weight(t) times the squared error of x0, its mean or sum over a sample, times a factor."""
    pick("reduction", REDUCTIONS, reduce)

    def loss(denoise: Denoise, x0: Tensor, t: Tensor, z: Tensor) -> Tensor:
        at = denoise.schedule.at(t.double())
        said = denoise(blend(at.alpha, x0, at.sigma, z), at)
        each = REDUCTIONS[reduce]((said.x0 - x0) ** 2)
        return each * (weight(at, denoise.schedule) * factor).to(each)

    return loss


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": bound.mean_of_each,
    "sum": lambda values: bound.mean_of_each(values) * values[0].numel(),
}


# --- regressions ----------------------------------------------------------------------------------


def eps(reduce: str = "mean") -> Loss:
    """Regression of the noise, L_simple (Ho et al., 2020, eq. 14)."""
    return _regression(of("eps"), reduce=reduce)


def x0(reduce: str = "mean") -> Loss:
    """Regression of the data (Salimans and Ho, 2022, section 4)."""
    return _regression(of("x0"), reduce=reduce)


def v(reduce: str = "mean") -> Loss:
    """Regression of v = alpha eps - sigma x0 (Salimans and Ho, 2022, section 4: SNR + 1)."""
    return _regression(of("v"), reduce=reduce)


def score(reduce: str = "mean") -> Loss:
    """Regression of the score with no weight: denoising score matching (Vincent, 2011)."""
    return _regression(of("score"), reduce=reduce)


def flow(reduce: str = "mean") -> Loss:
    """Regression of the velocity z - x0: flow matching (Lipman et al., 2023, eq. 9; Esser et al., 2024).

    Rectified flow takes times "uniform", Stable Diffusion 3 "logit_normal".
    """
    return _regression(of("flow"), reduce=reduce)


def ncsn() -> Loss:
    """Denoising score matching with weight sigma^2, half the sum (Song and Ermon, 2019, eq. 5 and 6)."""
    return _regression(of("eps"), reduce="sum", factor=0.5)


def score_sde(likelihood: bool = False, reduce: str = "mean") -> Loss:
    """Denoising score matching with weight sigma^2 or g^2, the likelihood's (Song et al., 2021: score SDE, eq. 7).

    `reduce` "mean" is what the VP models were trained with, "sum", of which half is taken, the VE models. Half the sum
    with weight g^2 and uniform times is the continuous variational bound in nats (Kingma et al., 2021).
    """

    weight = decay if likelihood else of("eps")
    return _regression(weight, reduce=reduce, factor=0.5 if reduce == "sum" else 1.0)


def edm(sigma_data: float = 0.5) -> Loss:
    """Regression of what networks of EDM say (Karras et al., 2022, table 1); times "log_normal".

    The weight is (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 where alpha is 1.
    """
    return _regression(of(denoiser.edm(sigma_data)))


def min_snr(gamma: float = 5.0) -> Loss:
    """Weight min(SNR, gamma) on x0, the same loss for eps, v and x0 (Hang et al., 2023: min-SNR)."""
    return _regression(lambda t, schedule: snr(t).clamp(max=gamma))


def soft_min_snr(gamma: float = 4.0) -> Loss:
    """Weight SNR gamma / (SNR + gamma) on x0 (Crowson et al., 2024: soft-min-SNR)."""
    return _regression(lambda t, schedule: snr(t) * gamma / (snr(t) + gamma))


def truncated_snr() -> Loss:
    """Weight max(SNR, 1) on x0 (Salimans and Ho, 2022, section 4)."""
    return _regression(lambda t, schedule: snr(t).clamp(min=1.0))


def p2(gamma: float = 1.0, k: float = 1.0) -> Loss:
    """Weight 1 / (k + SNR)^gamma on eps: less for what the eye misses (Choi et al., 2022: P2)."""
    return _regression(lambda t, schedule: snr(t) / (k + snr(t)) ** gamma)


# --- the variational bound ------------------------------------------------------------------------


def vlb(rescale: bool = True, variance: str = "small") -> Loss:
    """A term of the variational bound in bits per dimension, for times "entries" (Nichol and Dhariwal, 2021, eq. 4).

    Args:
        rescale: times T, so that the mean over times is the bound (less the prior's term).
        variance: of a network that learned none, a row of `VARIANCES`.
    """

    def loss(denoise: Denoise, x0: Tensor, t: Tensor, z: Tensor) -> Tensor:
        schedule = denoise.schedule
        at = schedule.at(t.double())
        said = denoise(blend(at.alpha, x0, at.sigma, z), at)
        each = bound.term(said, x0, *_neighbours(schedule, at), variance)
        return each * schedule.entries if rescale else each

    return loss


def hybrid(predicts: str = "eps", scale: float = 0.001) -> Loss:
    """L_simple + scale L_vlb, which only the variance learns from (Nichol and Dhariwal, 2021, eq. 16).

    L_vlb is T times the term of one t. So the published 0.001 is a factor T / 1000 on a term; a weight of 1 on a term
    would be a scale of 1 / T.

    Args:
        predicts: what the first part regresses, a row of `PREDICTS`.

    Raises:
        UsageError: (when used) the network learned no variance, or the schedule is no table.
    """
    simple = of(predicts)

    def loss(denoise: Denoise, x0: Tensor, t: Tensor, z: Tensor) -> Tensor:
        schedule = denoise.schedule
        at = schedule.at(t.double())
        said = denoise(blend(at.alpha, x0, at.sigma, z), at)
        if said.variance_fraction is None:
            raise UsageError(
                "the hybrid loss needs a network that learns a variance: build it with twice the "
                "channels and learned_variance=True, or take the loss 'eps'"
            )
        each = bound.mean_of_each((said.x0 - x0) ** 2)
        held = replace(said, x0=said.x0.detach())
        term = bound.term(held, x0, *_neighbours(schedule, at))
        return each * simple(at, schedule).to(each) + term * (scale * schedule.entries)

    return loss


def _neighbours(
    schedule: Schedule, t: Time[Tensor]
) -> tuple[Time[Tensor], Time[Tensor], Time[Tensor]]:
    """t, the entry below it and the one above."""
    step = 1 / schedule.entries
    index = schedule.index(t.value)
    s = schedule.at((index * step).clamp(min=0.0))
    return t, s, schedule.at(((index + 2) * step).clamp(max=1.0))


# --- a batch --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The loss of a batch.

    Attributes:
        mean: what to minimise, a scalar.
        each: (B,) the loss of each sample before the weight of its time, without gradient.
        t: (B,) the times.
    """

    mean: Tensor
    each: Tensor
    t: Tensor


def evaluate(
    loss: Loss, times: Times, denoise: Denoise, x0: Tensor, generator: torch.Generator
) -> Outcome:
    """The loss of a batch x0 (B, C, *axes) at times and with noise from the generator."""
    draw: Draw = times(denoise.schedule, len(x0), generator)
    z = torch.randn(x0.shape, generator=generator, device=generator.device, dtype=x0.dtype)
    each = loss(denoise, x0, draw.t, z.to(x0.device))
    return Outcome(mean=(each * draw.weight.to(each)).mean(), each=each.detach(), t=draw.t)


def by_level(
    schedule: Schedule,
    t: Tensor,
    each: Tensor,
    bins: int = 8,
    span: tuple[float, float] = (-10, 10),
) -> Tensor:
    """The mean loss in even bins of log-SNR over `span`, (bins,); NaN where there was none. For logs.

    What lies outside counts to the first or the last bin. Shapes: t and each (B,).
    """
    low, high = span
    place = (schedule.log_snr(t.double()).to(each.device) - low) / (high - low) * bins
    index = place.clamp(0, bins - 1).long()
    sums, counts = each.new_zeros(bins), each.new_zeros(bins)
    return sums.index_add(0, index, each) / counts.index_add(0, index, torch.ones_like(each))


NAMES: dict[str, Callable[..., Loss]] = {
    "eps": eps,
    "x0": x0,
    "v": v,
    "score": score,
    "flow": flow,
    "ncsn": ncsn,
    "score_sde": score_sde,
    "edm": edm,
    "min_snr": min_snr,
    "soft_min_snr": soft_min_snr,
    "truncated_snr": truncated_snr,
    "p2": p2,
    "vlb": vlb,
    "hybrid": hybrid,
    "consistency_distillation": consistency_distillation,
    "consistency_training": consistency_training,
}


def from_name(name: str, **params: Any) -> Loss:
    """The loss of that name, e.g. from_name("min_snr", gamma=5).

    Raises:
        UsageError: unknown name (the nearest is named), or parameters that it does not take.
    """
    return make("loss", NAMES, name, **params)
