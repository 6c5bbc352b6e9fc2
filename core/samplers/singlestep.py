r"""Singlestep exponential integrators: the places to interpolate between lie inside the step.

At t and at one or two times evenly spread in lambda = log(alpha / sigma) the network is asked; each
time is reached with what was said before it, and the step is taken with the mean of all, see
`interpolation`. Nothing is kept between steps. A step to clean data, or from where there is no
signal, is infinite in lambda: it is Euler's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mdiff.core.denoiser import Denoise
from mdiff.core.errors import UsageError
from mdiff.core.names import pick
from mdiff.core.noise import Noise
from mdiff.core.samplers.base import Memory, Sampler, between, move
from mdiff.core.samplers.interpolation import FORMS, Form, average, combine
from mdiff.core.samplers.multistep import SOLVER_TYPES
from mdiff.core.schedules import Time, pad

PLACES = {2: (1 / 2,), 3: (1 / 3, 2 / 3)}
"""Where a method of this order asks besides t, as parts of the step in lambda."""


def _landed(
    x: Tensor,
    said: Sequence[Tensor],
    nodes: Sequence[float],
    t: Time[Any],
    s: Time[Any],
    form: Form,
    first: float | None = None,
) -> Tensor:
    """x at s, by the mean of the polynomial through what was said at the nodes."""
    z = form.sign * (s.log_snr - t.log_snr) / 2
    if isinstance(z, Tensor):
        rows = [average(nodes, value, first) for value in z.tolist()]
        c: Sequence[Any] = torch.tensor(rows, dtype=torch.float64).unbind(dim=1)
    else:
        c = average(nodes, z, first)
    return form.travel(x, combine(c, said), t, s)


def _said(
    denoise: Denoise,
    x: Tensor,
    x0: Tensor,
    t: Time[Any],
    s: Time[Any],
    form: Form,
    places: Sequence[float],
    first: float | None = None,
) -> list[Tensor]:
    """What is said at t and at these places of the step, each reached by all before it."""
    said, nodes = [form.read(x, x0, t)], [0.0]
    for place in places:
        at = between(denoise.schedule, t, s, place)
        there = _landed(x, said, [node / place for node in nodes], t, at, form, first)
        said.append(form.read(there, denoise(there, at).x0, at))
        nodes.append(place)
    return said


@dataclass(frozen=True, kw_only=True)
class Singlestep:
    """A DPM-Solver with its evaluations inside the step; the functions below have names.

    Attributes:
        order: 2 or 3, and so many evaluations.
        form: what is interpolated, a row of `interpolation.FORMS`.
        solver_type: "midpoint" takes the last place only, weighing it roughly at order 2, as the
            papers do; "heun" all places, exactly.
        inner_type: the same for the way to the second place of order 3: "heun" in the papers,
            `solver_type` in diffusers.
    """

    order: int
    form: str
    solver_type: str = "midpoint"
    inner_type: str = "heun"

    def __post_init__(self) -> None:
        for name in (self.solver_type, self.inner_type):
            pick("solver type", SOLVER_TYPES, name)

    @property
    def evaluations(self) -> int:
        """One for each order."""
        return self.order

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
        x0 = denoise(x, t).x0
        if not math.isfinite(s.log_snr - t.log_snr):
            return move(x, x0, t, s), state
        form, places = FORMS[self.form], PLACES[self.order]
        inner = SOLVER_TYPES[self.inner_type]
        said, nodes = _said(denoise, x, x0, t, s, form, places, inner), [0.0, *places]
        if self.solver_type == "midpoint":
            said, nodes = [said[0], said[-1]], [nodes[0], nodes[-1]]
        first = SOLVER_TYPES[self.solver_type] if self.order == 2 else None
        return _landed(x, said, nodes, t, s, form, first), state


def dpmpp_2s(*, solver_type: str = "midpoint") -> Sampler:
    """DPM-Solver++(2S): x0 at t and in the middle of the step (Lu et al., 2022b, alg. 1)."""
    return Singlestep(order=2, form="x0", solver_type=solver_type)


def dpmpp_3s(*, solver_type: str = "midpoint", inner_type: str = "heun") -> Sampler:
    """DPM-Solver++(3S): x0 at t and at both thirds of the step (Lu et al., 2022b)."""
    return Singlestep(order=3, form="x0", solver_type=solver_type, inner_type=inner_type)


def dpm_2s(*, solver_type: str = "midpoint") -> Sampler:
    """DPM-Solver-2: eps at t and in the middle of the step (Lu et al., 2022a, alg. 1)."""
    return Singlestep(order=2, form="eps", solver_type=solver_type)


def dpm2() -> Sampler:
    """The midpoint method in log sigma, DPM2, which is `dpm_2s` (Karras et al., 2022; k-diffusion)."""
    return dpm_2s()


def dpm_3s(*, solver_type: str = "midpoint", inner_type: str = "heun") -> Sampler:
    """DPM-Solver-3: eps at t and at both thirds of the step (Lu et al., 2022a, alg. 2)."""
    return Singlestep(order=3, form="eps", solver_type=solver_type, inner_type=inner_type)


@dataclass(frozen=True, kw_only=True)
class DPMAdaptive:
    """DPM-Solver-12 or -23: as many steps inside a step as its error asks for (Lu et al., 2022a).

    Two orders share their evaluations and the difference between them steers the size of the next
    step (controller and constants of k-diffusion, of which each sample here has its own, so
    that its neighbours in the batch do not matter). Meant for grids of few times: the error is
    looked at, and an accelerator waited for, in each of the steps inside. `evaluations` are those
    of one of them.

    Attributes:
        order: of the better solution, 2 or 3.
        rtol, atol: the error allowed, relative to x and absolute.
        h_init: the first size, in lambda.
        pcoeff, icoeff, dcoeff: of the controller.
        accept_safety: a step is repeated if it shrinks the next below this.

    Raises:
        UsageError: another order, or a tolerance that is not above 0.
    """

    order: int = 3
    rtol: float = 0.05
    atol: float = 0.0078
    h_init: float = 0.05
    pcoeff: float = 0.0
    icoeff: float = 1.0
    dcoeff: float = 0.0
    accept_safety: float = 0.81

    def __post_init__(self) -> None:
        if self.order not in PLACES:
            raise UsageError(f"the adaptive DPM-Solver has order 2 or 3, not {self.order}")
        if not (self.rtol > 0 and self.atol > 0 and self.h_init > 0):
            raise UsageError("rtol, atol and h_init of the adaptive DPM-Solver are above 0")

    @property
    def evaluations(self) -> int:
        """Those of one step inside the step."""
        return self.order

    def step(
        self,
        denoise: Denoise,
        x: Tensor,
        t: Time[float],
        s: Time[float],
        state: Memory,
        noise: Noise,
    ) -> tuple[Tensor, Memory]:
        """One step, see `Sampler`; the state is the size of the next step of each sample."""
        end = s.log_snr / 2
        if not math.isfinite(end - t.log_snr):
            return move(x, denoise(x, t).x0, t, s), state
        form, places = FORMS["eps"], PLACES[self.order]
        nodes = [0.0, *places]
        sizes = state["h"].tolist() if state else [self.h_init] * len(x)
        pids = [_PID(self, size) for size in sizes]
        at, last = [t.log_snr / 2] * len(x), x
        while any(value < end - 1e-5 for value in at):
            ends = [min(end, value + pid.h) for value, pid in zip(at, pids, strict=True)]
            here, there = (_each(denoise, values) for values in (at, ends))
            said = _said(denoise, x, denoise(x, here).x0, here, there, form, places)
            # order 2 from the places of order 3, and its rough weight; order 1 is that of no place
            low = _landed(x, said[:-1], nodes[:-1], here, there, form, first=0.5)
            rough = [said[0], said[-1]], [0.0, nodes[-1]]
            high = _landed(x, *rough, here, there, form, 0.5 if self.order == 2 else None)
            allowed = torch.maximum(low.abs(), last.abs()).mul_(self.rtol).clamp_(min=self.atol)
            errors = ((low - high) / allowed).flatten(1).square().mean(dim=1).sqrt().tolist()
            taken = []
            for k, error in enumerate(errors):
                # a NaN is for the loop to report: it is taken to the end
                over = at[k] >= end - 1e-5
                taken.append(not over and (pids[k].accepts(error) or not math.isfinite(error)))
                if taken[k]:
                    at[k] = ends[k] if math.isfinite(error) else end
            mask = pad(torch.tensor(taken, device=x.device), x).bool()
            x, last = torch.where(mask, high, x), torch.where(mask, low, last)
        return x, {"h": torch.tensor([pid.h for pid in pids], dtype=torch.float64)}


def _each(denoise: Denoise, values: Sequence[float]) -> Time[Tensor]:
    """A time for each sample, by its lambda."""
    log_snr = 2 * torch.tensor(values, dtype=torch.float64)
    at = denoise.schedule.at(denoise.schedule.time(log_snr))
    return at._replace(sigma=at.alpha * torch.exp(-log_snr / 2), log_snr=log_snr)


class _PID:
    """The controller of one sample: the size h of its next step."""

    def __init__(self, method: DPMAdaptive, h: float) -> None:
        p, i, d = method.pcoeff, method.icoeff, method.dcoeff
        self.h = h
        self.powers = [c / method.order for c in (p + i + d, -p - 2 * d, d)]
        self.safety = method.accept_safety
        self.inverse: list[float] = []

    def accepts(self, error: float) -> bool:
        """Whether a step with this error is good enough; sets the size of the next."""
        inverse = 1 / (error + 1e-8)
        past = self.inverse or [inverse, inverse, inverse]
        past = [inverse, *past[1:]]
        factor = math.prod(value**power for value, power in zip(past, self.powers, strict=True))
        factor = 1 + math.atan(factor - 1)
        good = factor >= self.safety
        self.inverse = [inverse, inverse, past[1]] if good else past
        self.h *= factor
        return good
