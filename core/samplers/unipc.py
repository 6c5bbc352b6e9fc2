r"""UniPC (Zhao et al., 2023): a multistep predictor whose steps are taken again, corrected, once the
network has spoken at their end.

The evaluation at t serves twice. With it as a further node, at tau = 1, the last step is repeated;
from the x that this gives, and without asking again, the next step is predicted. Both are means of
polynomials, see `interpolation`. So the method has one evaluation a step and gains an order. The
end of the run is not corrected.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mdiff.core.denoiser import Denoise
from mdiff.core.errors import UsageError
from mdiff.core.names import pick
from mdiff.core.noise import Noise
from mdiff.core.samplers.base import Memory, move
from mdiff.core.samplers.interpolation import FORMS, average, combine
from mdiff.core.samplers.multistep import Ending, keep, recall
from mdiff.core.schedules import Time

SOLVER_TYPES: dict[str, Callable[[float], float]] = {
    "bh1": lambda z: z / math.expm1(z) / 2,
    "bh2": lambda z: 0.5,
}
"""m_1 between two nodes, from z: what the choice of B(h) comes to, for with more nodes it cancels."""


@dataclass(frozen=True, kw_only=True)
class UniPC(Ending):
    """UniPC: multistep predictor and corrector on one evaluation a step (Zhao et al., 2023, alg. 1).

    Attributes:
        solver_order: the points that predict, this one included, 1 to 3 (the p of UniPC-p).
        solver_type: a row of `SOLVER_TYPES`.
        form: what is interpolated: "x0", or "eps".
        corrector: off leaves the predictor, UniP-p, which is of one order less.
        disable_corrector: the counts of steps, from 0, that stay as predicted.

    Raises:
        UsageError: another order, or an unknown form or solver type.
    """

    solver_order: int = 2
    solver_type: str = "bh2"
    form: str = "x0"
    corrector: bool = True
    disable_corrector: tuple[int, ...] = ()
    evaluations: ClassVar[int] = 1

    def __post_init__(self) -> None:
        pick("solver type", SOLVER_TYPES, self.solver_type)
        pick("form", FORMS, self.form)
        if not 1 <= self.solver_order <= 3:
            raise UsageError(f"unipc has solver_order 1, 2 or 3, not {self.solver_order}")

    @property
    def order(self) -> int:
        """Of the predictor, and one more with the corrector."""
        return self.solver_order + self.corrector

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

        The state is the last points, x before the last step, where that began, and how many points
        predicted it.
        """
        form = FORMS[self.form]
        index = state.get("index", 0.0)
        x0 = denoise(x, t).x0
        said = form.read(x, x0, t)
        past = recall(state)
        if self.corrector and past and index - 1 not in self.disable_corrector:
            began = Time(*(state[f"began.{name}"] for name in Time._fields))
            used = [(said, t.log_snr / 2), *past[: int(state["used"])]]
            x = self._moved(state["x"], used, began, t)
        points = [(said, t.log_snr / 2), *past][: self.solver_order]
        n = self.limit(len(points), index) if math.isfinite(s.log_snr - t.log_snr) else 1
        # without a past x is what x0 was read from, and no signal is needed
        after = self._moved(x, points[:n], t, s) if past else move(x, x0, t, s)
        if math.isinf(t.log_snr):
            return after, {"index": index + 1.0}
        here = {f"began.{name}": value for name, value in t._asdict().items()}
        return after, {**keep(points), **here, "x": x, "used": float(n), "index": index + 1.0}

    def _moved(
        self, x: Tensor, points: list[tuple[Tensor, float]], t: Time[float], s: Time[float]
    ) -> Tensor:
        """x from t to s, by the mean of the polynomial through these points."""
        form = FORMS[self.form]
        if len(points) == 1:
            return form.travel(x, points[0][0], t, s)
        h = (s.log_snr - t.log_snr) / 2
        z = form.sign * h
        nodes = [(at - t.log_snr / 2) / h for _, at in points]
        c = average(nodes, z, SOLVER_TYPES[self.solver_type](z))
        return form.travel(x, combine(c, [said for said, _ in points]), t, s)
