"""Samplers: one file per family, one frozen dataclass per sampler, one step for all."""

from collections.abc import Callable
from typing import Any

from mdiff.core.names import make
from mdiff.core.samplers.ancestral import DDIM, DDPM
from mdiff.core.samplers.base import Memory, Sampler, move
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
from mdiff.core.samplers.runge_kutta import Euler, Heun
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
    "NAMES",
    "PNDM",
    "DPMAdaptive",
    "Euler",
    "Heun",
    "Memory",
    "Multistep",
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
}


def from_name(name: str, **params: Any) -> Sampler:
    """The sampler of that name, e.g. from_name("ddim", eta=0.5).

    Raises:
        UsageError: unknown name (the nearest is named), or parameters that it does not take.
    """
    return make("sampler", NAMES, name, **params)
