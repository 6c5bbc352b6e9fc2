"""Samples longer than a network makes at once: blocks along one axis, each knowing the end of the one before.

All there is between two blocks is a `Whole`: what has been made so far is given to what follows, as an input is. So a
block is a problem like any other (Ho et al., 2022, Video Diffusion Models, section 3.1), with replacement or whatever
guidance `Given.guide` names, and may begin at a file, end at one, or fill the gap between two. In `prepare` of a stage

    whole = carry["whole"] = carry.get("whole") or Whole(shape=..., size=16, overlap=8, given=...)
    here = blocks.block(whole)
    return Problem(shape=here.shape, given=here.given, more=here.more, ...)

and in its `finish`

    return {"whole": blocks.put(carry["whole"], x)}
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mdiff.core.errors import UsageError
from mdiff.core.hooks import Given
from mdiff.core.tasks import kept


@dataclass(frozen=True, kw_only=True, eq=False)
class Whole:
    """A sample of any length, as far as it is known.

    Attributes:
        shape: (C, *axes) of all of it.
        size: entries of a block along the axis.
        overlap: entries of a block that are known from earlier ones, or more of them at an end.
        axis: that blocks follow each other on, 0 for the first.
        given: what is known. An operator works on each entry along the axis by itself.

    Raises:
        UsageError: the overlap leaves nothing to make, or an operator changes the axis.
    """

    shape: tuple[int, ...]
    size: int
    overlap: int
    axis: int = 0
    given: Given = field(default_factory=Given)

    def __post_init__(self) -> None:
        if self.length <= self.size:
            return
        if not 0 < self.overlap < self.size:
            raise UsageError(
                f"{self.length} are made in blocks of {self.size}, which overlap by 1 to {self.size - 1} and not by "
                f"{self.overlap}"
            )
        y = self.given.measurement
        if y is not None and y.shape[self.axis + 2] != self.length:
            raise UsageError(
                f"this operator makes {y.shape[self.axis + 2]} of {self.length}, which is more than the {self.size} "
                "that are made at once: ask for less"
            )

    @property
    def length(self) -> int:
        """Entries along the axis."""
        return self.shape[1 + self.axis]


class Block(NamedTuple):
    """A block as fields of a `Problem`: the shape and what is given of it, and how many blocks follow."""

    shape: tuple[int, ...]
    given: Given | None
    more: int


def block(whole: Whole) -> Block:
    """The block to be made next."""
    low, high, more = _place(whole)
    shape = list(whole.shape)
    shape[1 + whole.axis] = high - low
    given = whole.given
    if given.start is None and given.operator is None:
        return Block(tuple(shape), None, more)

    def cut(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.narrow(whole.axis + 2, low, high - low)

    if (low, high) != (0, whole.length):
        given = replace(
            given,
            start=cut(given.start),
            keep=cut(given.keep),
            measurement=cut(given.measurement),
        )
    return Block(tuple(shape), given, more)


def put(whole: Whole, x: Tensor) -> Whole:
    """The same with its next block made: x (copies, C, *axes). What stayed of the start stays as it was."""
    low, high, _ = _place(whole)
    start, keep = whole.given.start, whole.given.keep
    if start is None:
        start = x.new_zeros(1, *whole.shape)
    if keep is None:
        keep = torch.zeros(1, 1, *whole.shape[1:], dtype=torch.bool)
    start = start.to(x).expand(len(x), *whole.shape).clone()
    keep = keep.clone()
    here = (slice(None),) * (whole.axis + 2) + (slice(low, high),)
    start[here] = kept(block(whole).given, x)
    keep[here] = True
    return replace(whole, given=replace(whole.given, start=start, keep=keep))


def plan(known: Sequence[bool], size: int, overlap: int) -> list[int]:
    """Where blocks begin, in the order in which they are made: onwards from what is known, then back from it.

    Args:
        known: for each entry along the axis.
        size, overlap: as in `Whole`, the size less than the length.
    """
    there, starts = list(known), []
    while not all(there):
        starts.append(low := _next(there, size, overlap))
        there[low : low + size] = [True] * size
    return starts or [0]


def _next(known: Sequence[bool], size: int, overlap: int) -> int:
    room = len(known) - size
    if not any(known):
        return 0
    for place in range(1, len(known)):
        if known[place - 1] and not known[place]:
            return min(max(0, place - overlap), room)
    # nothing follows what is known: the beginning is missing
    return min(max(0, known.index(True) + overlap - size), room)


def _place(whole: Whole) -> tuple[int, int, int]:
    """From where to where the next block reaches, and how many follow."""
    if whole.length <= whole.size:
        return 0, whole.length, 0
    known = [False] * whole.length
    if whole.given.start is not None and whole.given.keep is not None:
        rows = whole.given.keep.transpose(0, whole.axis + 2).flatten(1)
        known = rows.all(1).tolist()
    starts = plan(known, whole.size, whole.overlap)
    return starts[0], starts[0] + whole.size, len(starts) - 1
