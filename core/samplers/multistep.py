r"""Linear multistep methods: one evaluation a step, interpolated with those of earlier steps.

The families are rows of one table: what is interpolated (x0 or eps), in which variable, through how
many points, see `interpolation`. Where the variable is infinite at an end of the step, for lambda
at clean data and for all but the count of steps at a time without signal, the step takes what was
just said as it is, which is Euler's.

The first steps have fewer points to go through. Order p is that of the method with its history; a
run from nothing starts with Euler's step, whose error alone is of second order.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mdiff.core.denoiser import Denoise
from mdiff.core.errors import UsageError
from mdiff.core.names import pick
from mdiff.core.noise import Noise
from mdiff.core.samplers.base import Memory, Sampler, carry, move, noise_in
from mdiff.core.samplers.interpolation import FORMS, average, combine
from mdiff.core.samplers.runge_kutta import Euler
from mdiff.core.schedules import Time, blend

Point = tuple[Tensor, float]
"""What was said, and where: in the variable of the method."""


def recall(state: Memory) -> list[Point]:
    """The points that `keep` put into the state, newest first."""
    count = sum(name.startswith("said") for name in state)
    return [(state[f"said{j}"], state[f"at{j}"]) for j in range(count)]


def keep(points: Sequence[Point]) -> dict[str, Any]:
    """Points as a state."""
    return {
        **{f"said{j}": said for j, (said, _) in enumerate(points)},
        **{f"at{j}": at for j, (_, at) in enumerate(points)},
    }


def _rho(t: Time[float]) -> float:
    return t.sigma / t.alpha if t.alpha > 0 else math.inf


VARIABLES: dict[str, Callable[[Time[float], Time[float], float], tuple[float, float]]] = {
    "lambda": lambda t, s, index: (t.log_snr / 2, s.log_snr / 2),
    "sigma": lambda t, s, index: (_rho(t), _rho(s)),
    "index": lambda t, s, index: (index, index + 1),
}
"""What P is a polynomial in: its values at both ends of step `index` from t to s."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a run of known length ends.

    Attributes:
        lower_order_final: the number of steps of the run, if none of the last may go through more
            points than steps are left, itself included; 0 if they may. (diffusers does so in runs
            of fewer than 15, and in all of UniPC's.)
        euler_at_final: the same, if this is to hold for the last step only.
    """

    lower_order_final: int = 0
    euler_at_final: int = 0

    def limit(self, points: int, index: float) -> int:
        """How many of so many points step `index` may go through."""
        if self.lower_order_final:
            points = min(points, max(1, self.lower_order_final - int(index)))
        return 1 if self.euler_at_final and index + 1 >= self.euler_at_final else points


@dataclass(frozen=True, kw_only=True)
class Multistep(Ending):
    """A linear multistep method; the functions below are those with a name.

    Attributes:
        order: of the global error.
        points: of the polynomial, this one included: points - 1 tensors are kept.
        form: what is interpolated, a row of `interpolation.FORMS`.
        variable: in what, a row of `VARIABLES`.
        first, curvature: see `interpolation.average`.
    """

    order: int
    points: int
    form: str
    variable: str
    first: float | None = None
    curvature: float = 1.0
    evaluations: ClassVar[int] = 1

    def step(
        self,
        denoise: Denoise,
        x: Tensor,
        t: Time[float],
        s: Time[float],
        state: Memory,
        noise: Noise,
    ) -> tuple[Tensor, Memory]:
        """One step, see `Sampler`; the state is the last points and the count of steps."""
        index = state.get("index", 0.0)
        here, there = VARIABLES[self.variable](t, s, index)
        ahead = there - here
        form = FORMS[self.form]
        x0 = denoise(x, t).x0
        points = [(form.read(x, x0, t), here), *recall(state)][: self.points]
        used = points[: self.limit(self.points, index) if math.isfinite(ahead) else 1]
        if len(used) == 1:
            after = move(x, x0, t, s)
        else:
            nodes = [(at - here) / ahead for _, at in used]
            z = form.sign * ahead if self.variable == "lambda" else 0.0
            c = average(nodes, z, self.first, self.curvature)
            after = form.travel(x, combine(c, [said for said, _ in used]), t, s)
        kept = points[: self.points - 1] if math.isfinite(here) else []
        return after, {**keep(kept), "index": index + 1.0}


# --- exponential integrators ----------------------------------------------------------------------

SOLVER_TYPES: dict[str, float | None] = {"midpoint": 0.5, "heun": None}
"""How DPM-Solvers weigh the difference between two points; None: exactly."""


def _dpm(form: str, order: int, solver_type: str, curvature: float, **ending: int) -> Sampler:
    return Multistep(
        order=2 if curvature != 1 else order,
        points=order,
        form=form,
        variable="lambda",
        first=pick("solver type", SOLVER_TYPES, solver_type),
        curvature=curvature,
        **ending,
    )


def dpm_1() -> Sampler:
    """DPM-Solver of order 1, with or without ++, which is DDIM and Euler (Lu et al., 2022a, 4.1)."""
    return Euler()


def dpmpp_2m(*, solver_type: str = "midpoint", lower_order_final: int = 0) -> Sampler:
    """DPM-Solver++(2M): a line in lambda through this x0 and the last (Lu et al., 2022b, alg. 2).

    Its weight is rounded ("midpoint") or exact ("heun"); for `lower_order_final` see `Ending`.
    """
    return _dpm("x0", 2, solver_type, 1.0, lower_order_final=lower_order_final)


def dpmpp_3m(
    *,
    solver_type: str = "heun",
    curvature: float = 1.0,
    lower_order_final: int = 0,
    euler_at_final: int = 0,
) -> Sampler:
    """DPM-Solver++(3M): a parabola in lambda through the last three x0 (Lu et al., 2022b).

    Published code (DPM-Solver, k-diffusion, diffusers) counts half of the curvature and is of order
    2: `curvature` 0.5. `solver_type` is of the second step, "midpoint" in diffusers.
    """
    return _dpm(
        "x0",
        3,
        solver_type,
        curvature,
        lower_order_final=lower_order_final,
        euler_at_final=euler_at_final,
    )


def dpm_2m(*, solver_type: str = "midpoint", lower_order_final: int = 0) -> Sampler:
    """DPM-Solver(2M): a line in lambda through this eps and the last (Lu et al., 2022b).

    Options as of `dpmpp_2m`.
    """
    return _dpm("eps", 2, solver_type, 1.0, lower_order_final=lower_order_final)


def dpm_3m(
    *,
    solver_type: str = "heun",
    curvature: float = 1.0,
    lower_order_final: int = 0,
    euler_at_final: int = 0,
) -> Sampler:
    """DPM-Solver(3M): a parabola in lambda through the last three eps (Lu et al., 2022b).

    Options as of `dpmpp_3m`.
    """
    return _dpm(
        "eps",
        3,
        solver_type,
        curvature,
        lower_order_final=lower_order_final,
        euler_at_final=euler_at_final,
    )


def deis(*, order: int = 3, lower_order_final: int = 0) -> Sampler:
    """DEIS in log rho: a polynomial in lambda through the last eps (Zhang and Chen, 2023, tAB).

    Order 1 to 4; orders 2 and 3 are `dpm_2m` and `dpm_3m` with exact weights.
    """
    return Multistep(
        order=order,
        points=_points("deis", order),
        form="eps",
        variable="lambda",
        lower_order_final=lower_order_final,
    )


def res_multistep() -> Sampler:
    """The refined exponential solver, multistep: `dpmpp_2m` with exact weights (Zhang et al., 2023)."""
    return dpmpp_2m(solver_type="heun")


# --- Adams' methods -------------------------------------------------------------------------------


def lms(*, order: int = 4) -> Sampler:
    """Linear multistep: Adams' method in sigma / alpha, with true step sizes (k-diffusion).

    Order 1 to 4.
    """
    return Multistep(order=order, points=_points("lms", order), form="eps", variable="sigma")


def ipndm_v(*, order: int = 4) -> Sampler:
    """iPNDM with true step sizes, which is Adams' method and `lms` (Zhang and Chen, 2023).

    The weights that circulate under this name are Adams' for two points, and for three and four
    only where the steps are even.
    """
    return lms(order=order)


def ipndm(*, order: int = 4) -> Sampler:
    """iPNDM: Adams' weights of even steps, whatever the steps (Zhang and Chen, 2023).

    `order` 1 to 4 is of the weights; steps are not even in sigma / alpha, so that the error is of
    second order at best, as for PNDM (Liu et al., 2022).
    """
    points = _points("ipndm", order)
    return Multistep(order=min(order, 2), points=points, form="eps", variable="index")


def gradient_estimation(*, gamma: float = 2.0) -> Sampler:
    """Gradient estimation: gamma of this eps, 1 - gamma of the last (Permenter and Yuan, 2024).

    Of second order where gamma is 1.5, and of first order elsewhere.
    """
    return Multistep(
        order=2 if gamma == 1.5 else 1,
        points=2,
        form="eps",
        variable="index",
        first=gamma - 1,
    )


def _points(name: str, order: int) -> int:
    if not 1 <= order <= 4:
        raise UsageError(f"{name} has order 1, 2, 3 or 4, not {order}")
    return order


@dataclass(frozen=True, kw_only=True)
class PNDM:
    """PNDM: `ipndm` after three pseudo Runge-Kutta steps (Liu et al., 2022, alg. 2).

    Those cost 4 evaluations each. With `skip_prk_steps` only the first step is special: an improved
    Euler step, of 2 evaluations (PLMS). The step to clean data is never special, because no eps is
    defined there.

    Raises:
        UsageError: in the step, at a time without signal, where eps says nothing of x0.
    """

    skip_prk_steps: bool = False
    order: ClassVar[int] = 2
    evaluations: ClassVar[int] = 1

    def step(
        self,
        denoise: Denoise,
        x: Tensor,
        t: Time[float],
        s: Time[float],
        state: Memory,
        noise: Noise,
    ) -> tuple[Tensor, Memory]:
        """One step, see `Sampler`; the state is the last three eps."""
        if t.alpha == 0:
            raise UsageError(
                "pndm interpolates eps, which says nothing where there is no signal: start the "
                "grid later, or take a sampler of x0 (dpmpp_2m, ...)"
            )
        eps = noise_in(x, denoise(x, t).x0, t)
        points = [(eps, 0.0), *recall(state)][:4]
        start = self._improved_euler if self.skip_prk_steps else self._runge_kutta
        if s.sigma > 0 and len(points) < (2 if self.skip_prk_steps else 4):
            used = start(denoise, x, t, s, eps)
        else:
            c = average([-float(j) for j in range(len(points))], 0.0)
            used = combine(c, [said for said, _ in points])
        return carry(x, used, t, s), keep(points[:3])

    def _improved_euler(
        self, denoise: Denoise, x: Tensor, t: Time[float], s: Time[float], eps: Tensor
    ) -> Tensor:
        return blend(0.5, eps, 0.5, _tried(denoise, x, eps, t, s))

    def _runge_kutta(
        self, denoise: Denoise, x: Tensor, t: Time[float], s: Time[float], eps: Tensor
    ) -> Tensor:
        middle = denoise.schedule.at((t.value + s.value) / 2)
        second = _tried(denoise, x, eps, t, middle)
        third = _tried(denoise, x, second, t, middle)
        fourth = _tried(denoise, x, third, t, s)
        return combine([1 / 6, 1 / 3, 1 / 3, 1 / 6], [eps, second, third, fourth])


def _tried(denoise: Denoise, x: Tensor, eps: Tensor, t: Time[float], s: Time[float]) -> Tensor:
    """The eps at s, where eps would lead."""
    there = carry(x, eps, t, s)
    return noise_in(there, denoise(there, s).x0, s)


def pndm() -> Sampler:
    """PNDM with pseudo Runge-Kutta steps at the start (Liu et al., 2022, alg. 2)."""
    return PNDM()


def plms() -> Sampler:
    """PNDM without Runge-Kutta steps, as latent diffusion samples (Liu et al., 2022; PLMS)."""
    return PNDM(skip_prk_steps=True)
