"""Guidance: functions from denoiser to denoiser. No sampler knows of them, and they nest."""

from collections.abc import Callable
from typing import Any

from mdiff.core.denoiser import Denoise, Guided
from mdiff.core.guidance.bounds import clamp, dynamic_threshold, from_clip
from mdiff.core.guidance.conditional import classifier_free, composed, projected
from mdiff.core.guidance.gradient import classifier, similarity, universal
from mdiff.core.guidance.mixing import autoguidance, mixture, perturbed
from mdiff.core.guidance.posterior import dps, pseudo_inverse, reconstruction, replacement
from mdiff.core.names import make

__all__ = [
    "NAMES",
    "autoguidance",
    "clamp",
    "classifier",
    "classifier_free",
    "composed",
    "dps",
    "dynamic_threshold",
    "from_clip",
    "from_name",
    "mixture",
    "perturbed",
    "projected",
    "pseudo_inverse",
    "reconstruction",
    "replacement",
    "similarity",
    "universal",
]

NAMES: dict[str, Callable[..., Guided]] = {
    "classifier_free": classifier_free,
    "composed": composed,
    "projected": projected,
    "autoguidance": autoguidance,
    "perturbed": perturbed,
    "mixture": mixture,
    "classifier": classifier,
    "similarity": similarity,
    "universal": universal,
    "clamp": clamp,
    "dynamic_threshold": dynamic_threshold,
    "replacement": replacement,
    "pseudo_inverse": pseudo_inverse,
    "reconstruction": reconstruction,
    "dps": dps,
}


def from_name(name: str, denoise: Denoise, **params: Any) -> Guided:
    """The denoiser guided by that name, e.g. from_name("clamp", denoise, low=0.0).

    Raises:
        UsageError: unknown name (the nearest is named), or parameters that it does not take.
    """
    return make("guidance", NAMES, name, denoise, **params)
