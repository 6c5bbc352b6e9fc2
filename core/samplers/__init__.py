"""Samplers: one file per family, one frozen dataclass per sampler, one step for all."""

from collections.abc import Callable
from typing import Any

from mdiff.core.names import make
from mdiff.core.samplers.ancestral import DDIM, DDPM
from mdiff.core.samplers.base import Memory, Sampler, move
from mdiff.core.samplers.multistep import DPMpp2M
from mdiff.core.samplers.runge_kutta import Euler, Heun

__all__ = [
    "DDIM",
    "DDPM",
    "NAMES",
    "DPMpp2M",
    "Euler",
    "Heun",
    "Memory",
    "Sampler",
    "from_name",
    "move",
]

NAMES: dict[str, Callable[..., Sampler]] = {
    "ddpm": DDPM,
    "ddim": DDIM,
    "euler": Euler,
    "heun": Heun,
    "dpmpp_2m": DPMpp2M,
}


def from_name(name: str, **params: Any) -> Sampler:
    """The sampler of that name, e.g. from_name("ddim", eta=0.5).

    Raises:
        UsageError: unknown name (the nearest is named), or parameters that it does not take.
    """
    return make("sampler", NAMES, name, **params)
