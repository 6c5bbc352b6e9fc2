r"""Exponential integrators of the reverse SDE: the x0 that `leap` takes is a polynomial's mean.

The SDE whose noise has eta times the posterior's rate is solved exactly for a network that keeps
saying the same x0: that is `leap` with the rule "sde". What is approximated is x0 along the step,
as by the multistep methods of the probability flow, with (1 + eta) h for their h.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mdiff.core.denoiser import Denoise
from mdiff.core.errors import UsageError
from mdiff.core.names import pick
from mdiff.core.noise import Noise
from mdiff.core.samplers.ancestral import FRESH, check_eta, leap
from mdiff.core.samplers.base import Memory, between
from mdiff.core.samplers.interpolation import average, combine
from mdiff.core.samplers.multistep import Ending, Point, keep, recall
from mdiff.core.schedules import Time, blend


@dataclass(frozen=True, kw_only=True)
class DPMppSDE:
    """DPM-Solver++ SDE, two evaluations a step (k-diffusion `dpmpp_sde`; Lu et al., 2022b).

    On Brownian paths, where the noise of the first part of the step is part of that of the whole,
    it is SEEDS-2 (Gonzalez et al., 2023).

    Attributes:
        eta: 1 is the reverse SDE, 0 the probability flow.
        r: where in the step, in log-SNR, the second evaluation is.
        noise_scale: a factor on the noise.
    """

    eta: float = 1.0
    r: float = 0.5
    noise_scale: float = 1.0
    evaluations: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_eta(self.eta)

    @property
    def order(self) -> int:
        """1, and 2 without noise."""
        return 1 if self.eta > 0 else 2

    def step(
        self,
        denoise: Denoise,
        x: Tensor,
        t: Time[float],
        s: Time[float],
        state: Memory,
        noise: Noise,
    ) -> tuple[Tensor, Memory]:
        """One step, see `Sampler`; to clean data, or from where no signal is, it has no middle."""

        def to(x0: Tensor, end: Time[float]) -> Tensor:
            fresh = FRESH["posterior"](self.eta, t, end)
            return leap(x, x0, t, end, fresh, noise, self.noise_scale)

        x0 = denoise(x, t).x0
        if math.isinf(t.log_snr) or math.isinf(s.log_snr):
            return to(x0, s), state
        middle = between(denoise.schedule, t, s, self.r)
        later = denoise(to(x0, middle), middle).x0
        part = 1 / (2 * self.r)
        return to(blend(1 - part, x0, part, later), s), state


SOLVER_TYPES: dict[str, Callable[[float], float] | None] = {
    "heun": None,
    "midpoint": lambda z: 0.5,
    "sa": lambda z: z / math.expm1(z) / 2,
}
"""m_1 between two nodes, from z = -(1 + eta) h; None: exactly. "midpoint" is DPM-Solver's, "sa" is
SA-Solver's for few steps (the code of Xue et al., 2023)."""


@dataclass(frozen=True, kw_only=True)
class SDEMultistep(Ending):
    """Stochastic Adams: x0 as a polynomial through earlier steps (Xue et al., 2023, alg. 1).

    With a corrector, x0 at the end of a step is a further node, at tau = 1, once it is known: the
    step is repeated with it and with the same noise, and the network is not asked again.

    Attributes:
        points: that the polynomial goes through, this one included.
        corrector: the same for the corrector, its further node included; 0 for none.
        eta: 1 is the reverse SDE, 0 the probability flow (tau^2 of the paper).
        window: the times (low, high) between which there is noise; outside it eta is 0.
        solver_type: a row of `SOLVER_TYPES`.
        curvature: see `interpolation.average`.
        noise_scale: a factor on the noise.
    """

    points: int = 2
    corrector: int = 0
    eta: float = 1.0
    window: tuple[float, float] = (0.0, 1.0)
    solver_type: str = "heun"
    curvature: float = 1.0
    noise_scale: float = 1.0
    evaluations: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_eta(self.eta)
        pick("solver type", SOLVER_TYPES, self.solver_type)
        if self.points < 1 or self.corrector < 0:
            raise UsageError(
                f"a multistep method goes through 1 point or more and its corrector through 0 or "
                f"more, not {self.points} and {self.corrector}"
            )

    @property
    def order(self) -> int:
        """1, and without noise that of the polynomial."""
        return 1 if self.eta > 0 else max(self.points, self.corrector)

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

        The state is the last points, the count of steps, and with a corrector the last step but for
        its x0: the rest of it, the weight of x0, z, where in lambda it began, and how many points
        correct it.
        """
        index = state.get("index", 0.0)
        points = [(denoise(x, t).x0, t.log_snr / 2), *recall(state)]
        if "rest" in state:
            used = points[: int(state["used"])]
            x0 = self._mean(used, state["began"], points[0][1], state["z"])
            x = blend(1.0, state["rest"], state["weight"], x0)
        eta = self.eta if self.window[0] <= t.value <= self.window[1] else 0.0
        fresh = FRESH["sde"](eta, t, s)
        if s.sigma == 0:
            return leap(x, points[0][0], t, s, fresh, noise), {}
        z = (1 + eta) * (t.log_snr - s.log_snr) / 2
        # leap is affine in x0: what it makes of 0, and the weight of x0
        rest = leap(x, torch.zeros_like(x), t, s, fresh, noise, self.noise_scale)
        weight = -s.alpha * math.expm1(z)
        used = points[: self.limit(min(self.points, len(points)), index)]
        x0 = self._mean(used, t.log_snr / 2, s.log_snr / 2, z)
        after = blend(1.0, rest, weight, x0)
        # no polynomial goes through a place without any signal, which is infinitely far away
        if math.isinf(t.log_snr):
            return after, {"index": index + 1.0}
        kept = keep(points[: max(self.points, self.corrector) - 1])
        if not self.corrector:
            return after, {**kept, "index": index + 1.0}
        n = 1 + self.limit(min(self.corrector - 1, len(points)), index)
        last = {"rest": rest, "weight": weight, "z": z, "began": t.log_snr / 2, "used": float(n)}
        return after, {**kept, **last, "index": index + 1.0}

    def _mean(self, points: list[Point], start: float, end: float, z: float) -> Tensor:
        """The mean of the polynomial through these points, over the step from start to end."""
        said = [value for value, _ in points]
        if len(said) == 1:
            return said[0]
        nodes = [(at - start) / (end - start) for _, at in points]
        first = SOLVER_TYPES[self.solver_type]
        return combine(average(nodes, z, first and first(z), self.curvature), said)


def dpmpp_2m_sde(
    *,
    eta: float = 1.0,
    solver_type: str = "midpoint",
    noise_scale: float = 1.0,
    lower_order_final: int = 0,
) -> SDEMultistep:
    """DPM-Solver++(2M) SDE: a line through this x0 and the last (Lu et al., 2022b; k-diffusion).

    Its weight is rounded ("midpoint") or exact ("heun").
    """
    return SDEMultistep(
        points=2,
        eta=eta,
        solver_type=solver_type,
        noise_scale=noise_scale,
        lower_order_final=lower_order_final,
    )


def dpmpp_3m_sde(
    *,
    eta: float = 1.0,
    curvature: float = 1.0,
    solver_type: str = "heun",
    noise_scale: float = 1.0,
    lower_order_final: int = 0,
) -> SDEMultistep:
    """DPM-Solver++(3M) SDE: a parabola through the last three x0 (Lu et al., 2022b; k-diffusion).

    k-diffusion counts half of the curvature: `curvature` 0.5. `solver_type` is of the second step.
    """
    return SDEMultistep(
        points=3,
        eta=eta,
        curvature=curvature,
        solver_type=solver_type,
        noise_scale=noise_scale,
        lower_order_final=lower_order_final,
    )


def sa_solver(
    *,
    points: int = 2,
    corrector: int = 2,
    eta: float = 1.0,
    window: tuple[float, float] = (0.2, 0.8),
    solver_type: str = "sa",
    lower_order_final: int = 0,
) -> SDEMultistep:
    """SA-Solver: stochastic Adams with a corrector (Xue et al., 2023, alg. 1).

    The paper's tau^2 is `eta` within the `window` of times and 0 outside.
    """
    return SDEMultistep(
        points=points,
        corrector=corrector,
        eta=eta,
        window=window,
        solver_type=solver_type,
        lower_order_final=lower_order_final,
    )
