"""The diffusion core: it knows tensors and nothing else.

Read it in this order: schedules, grids, noise, denoiser, samplers, guidance, sampling. Importing
this package imports no torch; each name below is imported when it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mdiff.core.denoiser import Denoiser as Denoiser
    from mdiff.core.denoiser import Prediction as Prediction
    from mdiff.core.sampling import State as State
    from mdiff.core.sampling import sample as sample
    from mdiff.core.sampling import steps as steps

_OBJECTS = {
    "Denoiser": "mdiff.core.denoiser",
    "Prediction": "mdiff.core.denoiser",
    "State": "mdiff.core.sampling",
    "sample": "mdiff.core.sampling",
    "steps": "mdiff.core.sampling",
}
_MODULES = (
    "analytic",
    "bound",
    "consistency",
    "denoiser",
    "errors",
    "grids",
    "guidance",
    "inversion",
    "likelihood",
    "losses",
    "noise",
    "operators",
    "samplers",
    "sampling",
    "schedules",
    "times",
)


def __getattr__(name: str) -> Any:
    if name in _OBJECTS:
        return getattr(import_module(_OBJECTS[name]), name)
    if name in _MODULES:
        return import_module(f"mdiff.core.{name}")
    raise AttributeError(f"module 'mdiff.core' has no attribute {name!r}")
