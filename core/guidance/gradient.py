r"""Guidance by gradients: x0 is moved to where something is more likely.

By Tweedie's formula x0 = (x_t + sigma_t^2 grad log p(x_t)) / alpha_t. So to condition on y is

    x0 + (sigma_t^2 / alpha_t) grad_x log p(y | x_t),

and since the gradient shifts x0, samplers need not know of it. Loops run without gradients: these
functions record one for themselves, also in inference mode. Around each other they differentiate
through each other.
"""

import bisect
import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mdiff.core.denoiser import Denoise, Guided, Prediction, tile
from mdiff.core.errors import UsageError
from mdiff.core.grids import Grid
from mdiff.core.names import pick
from mdiff.core.samplers.ancestral import VARIANCES
from mdiff.core.schedules import Schedule, Time, pad

T = TypeVar("T")
LogDensity = Callable[[Tensor, Time[Any]], Tensor]
"""(x (B, C, *axes), t) -> log p (B,) up to a constant, differentiable in x. Guidance around it may
stack batches: what there is per sample is repeated in order by `denoiser.tile`.
"""


def classifier(
    denoise: Denoise,
    log_p: LogDensity,
    scale: float = 1.0,
    *,
    ancestral: Grid | None = None,
    variance: str = "small",
) -> Guided:
    """x0 + (sigma^2 / alpha) scale grad log p(y | x_t) (Dhariwal and Nichol, 2021, alg. 2).

    Algorithm 2 of the paper, for DDIM, lowers eps by sigma grad log p: that is this. Its algorithm
    1 adds the variance of the step times the gradient to the mean of DDPM. The two agree as steps
    become small; `ancestral` gives the second exactly, for DDPM of that `variance` on that grid.

    Args:
        log_p: (x_t, t) -> log p(y | x_t), (B,), e.g. of a classifier trained on noisy x_t;
            `denoiser.TIMES` makes of t what it was told in training.
        scale: 1 for Bayes' rule, more to overdo it.
        ancestral: the grid that will be sampled on, for algorithm 1.
        variance: that of the sampler, a row of `samplers.ancestral.VARIANCES`.
    """
    pick("variance", VARIANCES, variance)
    following = following_of(denoise.schedule, ancestral) if ancestral is not None else None

    def rule(inner: Denoise, x: Tensor, t: Time[Any]) -> Prediction:
        said = inner(x, t)
        _, slope = _differentiate(lambda at: (None, _one_each(log_p(at, t), at)), x)
        if following is None:
            level = score_level(t)
        else:
            level = _ancestral_level(t, following(t), said, VARIANCES[variance])
        return shifted(said, scale * level, slope)

    return Guided(inner=denoise, rule=rule)


def universal(denoise: Denoise, log_p: LogDensity, scale: float = 1.0) -> Guided:
    """As `classifier`, of log p(y | x0) at the x0 that the denoiser says (Bansal et al., 2023).

    It takes functions that know only clean data, for a gradient through the network.

    Args:
        log_p: (x0, t) -> log p(y | x0), (B,), or minus any loss.
        scale: how strongly.
    """

    def rule(inner: Denoise, x: Tensor, t: Time[Any]) -> Prediction:
        said, slope = pulled(inner, x, t, lambda x0: log_p(x0, t))
        return shifted(said, scale * score_level(t), slope)

    return Guided(inner=denoise, rule=rule)


def similarity(
    denoise: Denoise,
    embed: Callable[[Tensor, Time[Any]], Tensor],
    target: Tensor,
    scale: float,
    *,
    noised: bool = True,
) -> Guided:
    """Towards an embedding, by its cosine with that of the sample: CLIP guidance (Nichol et al., 2022).

    Args:
        embed: (x, t) -> embedding (B, D) of the sample, differentiable.
        target: the embedding to come close to, e.g. of a text, (1 or B, D).
        scale: the guidance scale times the inverse temperature of the embeddings.
        noised: embed was trained on noisy x_t (GLIDE); else it sees x0 as the denoiser says it.
    """

    def log_p(x: Tensor, t: Time[Any]) -> Tensor:
        found = embed(x, t)
        wanted = tile("target embedding", target, len(x)).to(found)
        if wanted.shape != found.shape:
            raise UsageError(
                f"the embedding of x is {tuple(found.shape)} and the target {tuple(target.shape)}: "
                "both are (B, D), with the same D"
            )
        return F.cosine_similarity(found, wanted, dim=1)

    return (classifier if noised else universal)(denoise, log_p, scale)


# --- the parts, which posterior guidance shares ---------------------------------------------------


def pulled(
    inner: Denoise, x: Tensor, t: Time[Any], log_p: Callable[[Tensor], Tensor]
) -> tuple[Prediction, Tensor]:
    """What a denoiser says of x_t, and the gradient of log p(x0) in x_t, through the denoiser."""

    def function(at: Tensor) -> tuple[Prediction, Tensor]:
        said = inner(at, t)
        return said, _one_each(log_p(said.x0), at)

    return _differentiate(function, x)


def shifted(said: Prediction, level: float | Tensor, slope: Tensor) -> Prediction:
    """The same with x0 + level * slope; level one number, one per sample, or one per entry."""
    if isinstance(level, Tensor):
        return replace(said, x0=said.x0 + pad(level.to(slope.device), slope) * slope)
    return replace(said, x0=said.x0.add(slope, alpha=level))


def score_level(t: Time[Any]) -> Any:
    """sigma^2 / alpha: by how much x0 moves with the score."""
    if not isinstance(t.alpha, Tensor) and t.alpha == 0:
        raise UsageError(
            f"at t = {t.value:.4g} no signal is left, and a gradient moves x0 without bound: begin "
            "the grid at an earlier time"
        )
    return t.sigma**2 / t.alpha


def step_level(t: Time[float], s: Time[float]) -> float:
    """By how much x0 must move for DDPM's mean of x_s to move by 1, on the step from t to s."""
    return 1 / (s.alpha * -math.expm1(t.log_snr - s.log_snr))


def following_of(schedule: Schedule, grid: Grid) -> Callable[[Time[Any]], Time[float]]:
    """Where a step of the grid from t leads."""
    # ascending, as bisection wants it
    at = schedule.at(grid(schedule).double().flip(0))
    times = [Time(*row) for row in zip(*(entry.tolist() for entry in at), strict=True)]
    values = [time.value for time in times]

    def following(t: Time[Any]) -> Time[float]:
        if isinstance(t.value, Tensor):
            raise UsageError("guidance by the steps of a grid takes one time for the whole batch")
        return times[max(0, bisect.bisect_left(values, t.value - 1e-9) - 1)]

    return following


def _ancestral_level(
    t: Time[float], s: Time[float], said: Prediction, fraction: float | None
) -> float | Tensor:
    """By how much x0 must move with a gradient for DDPM's mean to move by its variance."""
    if fraction is not None:
        return (t.sigma**fraction * s.sigma ** (1 - fraction)) ** 2 / s.alpha
    if said.variance_fraction is None:
        raise UsageError(
            "variance 'learned' needs a network that learned one: take 'small' or 'large'"
        )
    if s.sigma == 0:
        return 0.0
    growth = 2 * math.log(t.sigma / s.sigma)
    return torch.exp(said.variance_fraction * growth) * (s.sigma**2 / s.alpha)


def _differentiate(function: Callable[[Tensor], tuple[T, Tensor]], x: Tensor) -> tuple[T, Tensor]:
    """function(x) = (value, numbers (B,)), and the gradient of the numbers in x.

    Where a gradient through x is being recorded, all stays part of that record.
    """
    recording = torch.is_grad_enabled() and x.requires_grad
    with torch.inference_mode(False), torch.enable_grad():
        at = x if recording else x.detach().clone().requires_grad_()
        try:
            value, numbers = function(at)
            if not numbers.requires_grad:
                raise UsageError(
                    "guidance by a gradient met a function that is not differentiable in x: a "
                    "network or operator in it runs under no_grad, or rounds"
                )
            (slope,) = torch.autograd.grad(numbers.sum(), at, create_graph=recording)
        except RuntimeError as error:
            if "nference tensor" not in str(error):
                raise
            raise UsageError(
                "guidance by a gradient met a tensor made in inference mode: make weights, "
                "conditions and measurements under torch.no_grad() instead, or clone them outside"
            ) from error
    return (value if recording else _detached(value)), slope


def _detached(value: Any) -> Any:
    """The same with no record of how its tensors were made."""
    if not isinstance(value, Prediction):
        return value
    parts = {entry.name: getattr(value, entry.name) for entry in fields(value)}
    return Prediction(
        **{k: part.detach() if isinstance(part, Tensor) else part for k, part in parts.items()}
    )


def _one_each(numbers: Tensor, x: Tensor) -> Tensor:
    if numbers.shape != x.shape[:1]:
        raise UsageError(
            f"a log-probability is one number per sample, ({len(x)},), not {tuple(numbers.shape)}: "
            "sum over all axes but the first"
        )
    return numbers
