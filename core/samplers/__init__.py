"""Samplers: one file per family, one frozen dataclass per sampler, one step for all."""

from collections.abc import Callable
from typing import Any

from mdiff.core.names import make
from mdiff.core.samplers.ancestral import (
    DDIM,
    DDPM,
    Ancestral,
    dpm2_ancestral,
    dpmpp_2s_ancestral,
    euler_ancestral,
)
from mdiff.core.samplers.base import Memory, Sampler, move
from mdiff.core.samplers.cfgpp import CFGpp, dpmpp_2m_cfgpp
from mdiff.core.samplers.churn import Churn, Restart
from mdiff.core.samplers.consistency import LCM, TCD, Consistency
from mdiff.core.samplers.langevin import (
    AnnealedLangevin,
    EulerMaruyama,
    PredictorCorrector,
    ReverseDiffusion,
    ancestral_corrected,
)
from mdiff.core.samplers.multistep import (
    PNDM,
    Multistep,
    deis,
    dpm_1,
    dpm_2m,
    dpm_3m,
    dpmpp_2m,
    dpmpp_3m,
    gradient_estimation,
    ipndm,
    ipndm_v,
    lms,
    plms,
    pndm,
    res_multistep,
)
from mdiff.core.samplers.repaint import RePaint
from mdiff.core.samplers.runge_kutta import Euler, Heun
from mdiff.core.samplers.sde import (
    DPMppSDE,
    SDEMultistep,
    dpmpp_2m_sde,
    dpmpp_3m_sde,
    sa_solver,
)
from mdiff.core.samplers.singlestep import (
    DPMAdaptive,
    Singlestep,
    dpm2,
    dpm_2s,
    dpm_3s,
    dpmpp_2s,
    dpmpp_3s,
)
from mdiff.core.samplers.unipc import UniPC

__all__ = [
    "DDIM",
    "DDPM",
    "LCM",
    "NAMES",
    "PNDM",
    "TCD",
    "Ancestral",
    "AnnealedLangevin",
    "CFGpp",
    "Churn",
    "Consistency",
    "DPMAdaptive",
    "DPMppSDE",
    "Euler",
    "EulerMaruyama",
    "Heun",
    "Memory",
    "Multistep",
    "PredictorCorrector",
    "RePaint",
    "Restart",
    "ReverseDiffusion",
    "SDEMultistep",
    "Sampler",
    "Singlestep",
    "UniPC",
    "from_name",
    "move",
]

NAMES: dict[str, Callable[..., Sampler]] = {
    "ddpm": DDPM,
    "ddim": DDIM,
    "euler": Euler,
    "heun": Heun,
    "dpm2": dpm2,
    "lms": lms,
    "ipndm": ipndm,
    "ipndm_v": ipndm_v,
    "pndm": pndm,
    "plms": plms,
    "gradient_estimation": gradient_estimation,
    "deis": deis,
    "dpm_1": dpm_1,
    "dpm_2m": dpm_2m,
    "dpm_3m": dpm_3m,
    "dpm_2s": dpm_2s,
    "dpm_3s": dpm_3s,
    "dpm_adaptive": DPMAdaptive,
    "dpmpp_1": dpm_1,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "dpmpp_2s": dpmpp_2s,
    "dpmpp_3s": dpmpp_3s,
    "res_multistep": res_multistep,
    "unipc": UniPC,
    "euler_ancestral": euler_ancestral,
    "dpm2_ancestral": dpm2_ancestral,
    "dpmpp_2s_ancestral": dpmpp_2s_ancestral,
    "dpmpp_sde": DPMppSDE,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "sa_solver": sa_solver,
    "edm": Churn,
    "restart": Restart,
    "repaint": RePaint,
    "reverse_diffusion": ReverseDiffusion,
    "euler_maruyama": EulerMaruyama,
    "predictor_corrector": PredictorCorrector,
    "ancestral_corrected": ancestral_corrected,
    "annealed_langevin": AnnealedLangevin,
    "consistency": Consistency,
    "lcm": LCM,
    "tcd": TCD,
    "cfgpp": CFGpp,
    "dpmpp_2m_cfgpp": dpmpp_2m_cfgpp,
}


def from_name(name: str, /, **params: Any) -> Sampler:
    """The sampler of that name, e.g. from_name("ddim", eta=0.5).

    Raises:
        UsageError: unknown name (the nearest is named), or parameters that it does not take.
    """
    return make("sampler", NAMES, name, **params)
