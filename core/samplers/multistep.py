r"""Multistep exponential integrators: the x0 that `move` takes is extrapolated from earlier steps.

The linear part of the probability flow is solved exactly; what is approximated is x0 as a
polynomial in half the log-SNR, lambda = log(alpha / sigma), through the last evaluations (Lu et
al., 2022).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mdiff.core.denoiser import Denoise
from mdiff.core.noise import Noise
from mdiff.core.samplers.base import Memory, move
from mdiff.core.schedules import Time, blend


@dataclass(frozen=True, kw_only=True)
class DPMpp2M:
    """DPM-Solver++(2M): a straight line through this x0 and the last (Lu et al., 2022, alg. 2).

    The first step, and the step to clean data, take x0 as it is.
    """

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
        """One step, see `Sampler`; the state is the last x0 and its log-SNR."""
        x0 = used = denoise(x, t).x0
        if state and s.sigma > 0:
            # half the ratio of this step to the last, in log-SNR
            ahead = (s.log_snr - t.log_snr) / (t.log_snr - state["log_snr"]) / 2
            used = blend(1 + ahead, x0, -ahead, state["x0"])
        return move(x, used, t, s), {"x0": x0, "log_snr": t.log_snr}
