"""What a picture that a request names says of the picture to make."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mdiff.core import operators, tasks
from mdiff.core.errors import UsageError
from mdiff.core.hooks import Given, Request
from mdiff.plugins.image.io import LUMA, fitted, in_channels


def given(request: Request, carry: Mapping[str, Any], shape: tuple[int, int, int]) -> Given | None:
    """What the request's input says of a picture (C, H, W) in [-1, 1]; None without one. Raises as `tasks.given`."""
    return tasks.given(request, carry, shape, _signed, forms=FORMS)


def _signed(sample: Mapping[str, Any], shape: tuple[int, ...]) -> Tensor:
    """The picture of a file fitted into (C, H, W), as networks see it: (1, C, H, W) in [-1, 1]."""
    channels, height, width = shape
    return fitted(in_channels(sample["image"], channels), (height, width))[None] * 2 - 1


def _colour(
    words: Sequence[str], shape: tuple[int, ...], units: Sequence[float], read: tasks.Read
) -> Given:
    """colour: the input is what is left without it."""
    if words or shape[0] != len(LUMA):
        raise UsageError("operator 'colour' takes no number, and a model of pictures in colour")
    return tasks.measured(operators.channel_mix([LUMA]), shape, read)


FORMS: Mapping[str, tasks.Form] = {**tasks.FORMS, "colour": _colour}
"""What an operator of a request may be here; numbers are pixels."""
