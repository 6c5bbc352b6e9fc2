r"""Samplers that put back another noise than that of the guided x0.

A step along the flow is alpha_s x0 + sigma_s eps. With guidance, eps is usually that which goes
with the guided x0, (x - alpha x0) / sigma; here it goes with the denoiser's `x0_noise`.
"""

from dataclasses import dataclass, field, replace

from torch import Tensor

from mdiff.core.denoiser import Denoise, Guided, Prediction
from mdiff.core.noise import Noise
from mdiff.core.samplers.ancestral import DDIM
from mdiff.core.samplers.base import Memory, Sampler
from mdiff.core.samplers.multistep import dpmpp_2m
from mdiff.core.schedules import Time


@dataclass(frozen=True, kw_only=True)
class CFGpp:
    """CFG++: the guided x0 with the noise of the unguided (Chung et al., 2024, alg. 2).

    The sampler steps as if not guided at all, and what guidance changed in x0 at t is added to the
    data at s. Scales are those of the paper, between 0 and 1. Where nothing guides (outside of an
    interval, or at scale 1, where `classifier_free` asks for the condition alone) it is the sampler
    as it is.

    Attributes:
        sampler: the one that steps.
    """

    sampler: Sampler = field(default_factory=DDIM)

    @property
    def order(self) -> int:
        """1 where something guides, for the change of x0 is taken as it is at t."""
        return 1

    @property
    def evaluations(self) -> int:
        """Those of the sampler."""
        return self.sampler.evaluations

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
        changes: list[Tensor | None] = []

        def unguided(inner: Denoise, x: Tensor, t: Time[float]) -> Prediction:
            said = inner(x, t)
            if said.x0_noise is None:
                changes.append(None)
                return said
            changes.append(said.x0 - said.x0_noise)
            return replace(said, x0=said.x0_noise)

        x, state = self.sampler.step(Guided(inner=denoise, rule=unguided), x, t, s, state, noise)
        change = changes[0]
        return x if change is None else x.add(change, alpha=s.alpha), state


def dpmpp_2m_cfgpp(*, solver_type: str = "midpoint") -> CFGpp:
    """DPM-Solver++(2M) with the noise of the unguided x0 (Chung et al., 2024)."""
    return CFGpp(sampler=dpmpp_2m(solver_type=solver_type))
