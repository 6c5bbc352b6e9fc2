"""Guidance: functions from denoiser to denoiser. No sampler knows of them, and they nest."""

from collections.abc import Callable

from mdiff.core.denoiser import Guided
from mdiff.core.guidance.bounds import clamp
from mdiff.core.guidance.conditional import classifier_free

__all__ = ["NAMES", "clamp", "classifier_free"]

NAMES: dict[str, Callable[..., Guided]] = {"classifier_free": classifier_free, "clamp": clamp}
