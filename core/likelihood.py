r"""The log-likelihood of data, by the probability flow.

On the quarter circle alpha = r cos(phi), sigma = r sin(phi) the flow of z = x / r is the same for every schedule
(Salimans and Ho, 2022, appendix D),

    dz / dphi = v(z, phi) = cos(phi) eps - sin(phi) x0,

and finite where no signal is left. The density of z changes along it by the divergence of v, so that from clean data
to the prior (Chen et al., 2018, eq. 8)

    log p(x0) = log prior(z) + integral of div v over phi + D log cos(phi_low).

The divergence is exact for few dimensions, or estimated by probes e with E[e e^T] = I (Hutchinson, 1990). The solver
is torchdiffeq's adaptive Dormand-Prince method.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchdiffeq import odeint

from mdiff.core.bound import mean_of_each
from mdiff.core.denoiser import Denoise, from_x0
from mdiff.core.errors import NonFiniteError, UsageError
from mdiff.core.names import pick
from mdiff.core.noise import Noise
from mdiff.core.schedules import Schedule

State = tuple[Tensor, Tensor]
"""z, (B, C, *axes), and what the density changed by so far, per dimension, (B,)."""


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """How probable each sample is.

    Attributes:
        log_density: (B,) log p(x0) in nats, float64.
        bits: (B,) bits per dimension, -log2 (p(x0) level_width^D) / D.
        latent: (B, C, *axes), where the flow takes the data at the last time.
        evaluations: of the denoiser.
    """

    log_density: Tensor
    bits: Tensor
    latent: Tensor
    evaluations: int


def log_likelihood(
    denoise: Denoise,
    x0: Tensor,
    probe: Noise | None = None,
    *,
    probes: str = "rademacher",
    tolerance: float = 1e-5,
    low: float | None = None,
    high: float | None = None,
    level_width: float = 1.0,
) -> Likelihood:
    """The log-likelihood of each sample under the probability flow (Song et al., 2021: score SDE, appendix D.2).

    Args:
        denoise: the denoiser, differentiable in x.
        x0: clean data, (B, C, *axes); of 8 bits after `dequantise`.
        probe: the streams that the probe of the divergence is drawn from, one per sample; they are copied. If None the
            divergence is exact, with D times as much to differentiate.
        probes: a row of `PROBES`.
        tolerance: of the solver, absolute and relative, for the sample that needs the smallest steps. So a sample's
            value depends on its batch, within the tolerance.
        low, high: the first and last time of the flow, those of the schedule if None. The paper's low is 1e-5.
        level_width: of the levels of data that was discrete, to count in bits of those: 2 / 256 for 8 bits in [-1, 1]
            (the "offset" 7 of score SDE), 1 / 256 in [0, 1] (offset 8).

    Raises:
        UsageError: the probe does not fit x0, or an unknown kind of probe.
        NonFiniteError: the flow met a NaN or an infinity.
    """
    draw = pick("kind of probe", PROBES, probes)
    e = None
    if probe is not None:
        if (len(probe.generators), *probe.shape) != x0.shape:
            raise UsageError(
                f"the probe is for {(len(probe.generators), *probe.shape)}, and x0 is "
                f"{tuple(x0.shape)}"
            )
        e = draw(Noise.restore(probe.state()).draw(x0.device, x0.dtype))
    schedule, size = denoise.schedule, x0[0].numel()
    first = _angle(schedule, schedule.low if low is None else low)
    last = _angle(schedule, schedule.high if high is None else high)
    evaluations = 0

    def flow(phi: Tensor, state: State) -> State:
        nonlocal evaluations
        evaluations += 1
        with torch.enable_grad():
            z = state[0].detach().requires_grad_()
            # the solver looks for its first step by one that may go too far
            v = velocity(denoise, z, phi.clamp(max=last))
            divergence = _exact(v, z) if e is None else _estimate(v, z, e)
        # an adaptive solver waits for its errors in every step: one more look costs nothing
        if not bool(v.isfinite().all() & divergence.isfinite().all()):
            raise NonFiniteError(
                f"a NaN or an infinity in the probability flow, at sigma / alpha = "
                f"{math.tan(phi.item()):.4g}: raise `low`, lower `high`, or compute in float32"
            )
        return v.detach(), divergence / size

    start = (x0 * math.cos(first), torch.zeros(len(x0), dtype=x0.dtype, device=x0.device))
    z, change = integrate(flow, start, first, last, tolerance)
    end = schedule.at(schedule.high if high is None else high)
    # the prior of x is N(0, max(1, sigma)^2), and z = x / r
    std = max(1.0, end.sigma) / math.hypot(end.alpha, end.sigma)
    prior = -mean_of_each(z.double() ** 2) / (2 * std**2) - math.log(2 * math.pi * std**2) / 2
    each = prior + change.double() + math.log(math.cos(first))
    return Likelihood(
        log_density=each * size,
        bits=-(each + math.log(level_width)) / math.log(2),
        latent=z * math.hypot(end.alpha, end.sigma),
        evaluations=evaluations,
    )


def dequantise(
    levels: Tensor, noise: Noise, count: int = 256, low: float = -1.0, high: float = 1.0
) -> tuple[Tensor, float]:
    """Integers 0 ... count - 1 as points of [low, high], uniform within each level, and the width of a level.

    A density of those bounds the probability of the integers: -log2 P <= -log2 (p width) on average (Theis et al.,
    2016, section 3.1).

    Args:
        levels: (B, C, *axes) integers.
        noise: the streams, one per sample; they are copied and stay where they are.
    """
    normal = Noise.restore(noise.state()).draw(levels.device, torch.float64)
    width = (high - low) / count
    x = low + width * (levels.double() + torch.special.ndtr(normal))
    return x.float(), width


# --- the flow -------------------------------------------------------------------------------------


def velocity(denoise: Denoise, z: Tensor, phi: Tensor) -> Tensor:
    """dz / dphi of z (B, C, *axes) at the angle phi, a scalar."""
    at = denoise.schedule.at(denoise.schedule.time(-2 * torch.log(phi.tan())))
    r = torch.hypot(at.alpha, at.sigma).to(z)
    x = z * r
    return from_x0("v", denoise(x, at).x0, x, at) / r


def integrate(
    flow: Callable[[Tensor, State], State],
    start: State,
    first: float,
    last: float,
    tolerance: float,
) -> State:
    """The end of a flow, by steps that are small enough for each sample."""
    span = torch.tensor([first, last], dtype=torch.float64, device=start[0].device)

    def largest(state: State) -> Tensor:
        squares = [part.reshape(len(part), -1).square().mean(1).amax() for part in state]
        return torch.stack(squares).amax().sqrt()

    # the last makes the solver end at the end, not behind it
    options = {"norm": largest, "step_t": span[1:]}
    with torch.no_grad():
        ends = odeint(flow, start, span, rtol=tolerance, atol=tolerance, options=options)
    return ends[0][-1], ends[1][-1]


def _angle(schedule: Schedule, t: float) -> float:
    at = schedule.at(t)
    return math.atan2(at.sigma, at.alpha)


# --- the divergence -------------------------------------------------------------------------------


def _rademacher(normal: Tensor) -> Tensor:
    return torch.where(normal < 0, -1.0, 1.0).to(normal)


PROBES: dict[str, Callable[[Tensor], Tensor]] = {
    # the smaller variance of the two
    "rademacher": _rademacher,
    "gaussian": lambda normal: normal,
}


def _estimate(v: Tensor, z: Tensor, e: Tensor) -> Tensor:
    """e^T (dv / dz) e of each sample, (B,)."""
    (product,) = torch.autograd.grad(v, z, e)
    return (product * e).flatten(1).sum(1)


def _exact(v: Tensor, z: Tensor) -> Tensor:
    """The trace of dv / dz of each sample, (B,): one row after the other."""
    flat = v.flatten(1)
    trace = torch.zeros(len(z), dtype=z.dtype, device=z.device)
    for i in range(flat.shape[1]):
        (row,) = torch.autograd.grad(flat[:, i].sum(), z, retain_graph=True)
        trace = trace + row.flatten(1)[:, i]
    return trace
