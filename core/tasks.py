"""Tasks: what a request asks of a stage besides a sample from pure noise, on any number of axes.
(What a model is trained by is a `hooks.Task`.)

A plugin makes of the request's input what its stage can use (`given`, and `encoded` where the stage
works on latents), and after the stage puts back what is known (`restored`). All else is done here
for every modality: where the sampler begins (`begin`), and what it follows (`followed`).

    strength        begins at x_t = alpha_t start + sigma_t z, at the level that it says
    mask            what is kept replaces what the denoiser says (`guidance.replacement`)
    operator        so does what was measured; some operators are masks without a file
    guide           what is not known is drawn to what is (`guidance.reconstruction`)
    bounds          x0 is cut off after all that guides it, and before what is known replaces it
    invert          z is the noise that DDIM comes back to the start from
    to_seed         z lies between the noises of two seeds, on the great circle
    to_text         conditions lie between those of two texts, on the straight line
    weighted texts  their differences from the unconditional x0 add up (`guidance.composed`)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mdiff.core import inversion, operators
from mdiff.core.denoiser import Denoise
from mdiff.core.errors import UsageError, nearest
from mdiff.core.grids import Grid
from mdiff.core.guidance import classifier_free, composed, replacement
from mdiff.core.hooks import Given, Media, Problem, Request, Stage
from mdiff.core.noise import Noise
from mdiff.core.operators import Linear, Operator
from mdiff.core.request import FILES, weighted
from mdiff.core.samplers.base import noise_in
from mdiff.core.sampling import along
from mdiff.core.schedules import blend

# --- the input, for plugins -----------------------------------------------------------------------

Read = Callable[[tuple[int, ...]], Tensor]
"""(C, *axes) -> the input fitted into that shape, as the data of the stage, (1, C, *axes)."""

Form = Callable[[Sequence[str], tuple[int, ...], Sequence[float], Read], Given]
"""(words after the name, (C, *axes), entries a unit along each axis, the input) -> what is given."""


def given(
    request: Request,
    carry: Mapping[str, Any],
    shape: tuple[int, ...],
    fit: Callable[[Mapping[str, Any], tuple[int, ...]], Tensor],
    *,
    forms: Mapping[str, Form] | None = None,
    units: Sequence[float] = (),
    middle: float = 0.0,
) -> Given | None:
    """What the request's input says of a sample of this shape; None where it names no input.

    Args:
        carry: of `Stage.prepare`.
        shape: (C, *axes).
        fit: (sample of a file, shape) -> it in that shape, (1, C, *axes).
        forms: the operators that mean something here, by name; those of `FORMS` if None.
        units: entries a unit along each axis, in which the numbers of operators count: pixels,
            seconds; 0 for an axis that they do not cut. 1 along every axis if empty.
        middle: what in a mask is above it is made anew.

    Raises:
        UsageError: an operator that there is not, or with numbers that it does not take.
    """
    if request.input is None:
        return None

    def read(wanted: tuple[int, ...]) -> Tensor:
        return fit(carry["input"], wanted)

    if request.operator is not None:
        name, *words = request.operator.split() or [""]
        table = FORMS if forms is None else forms
        if name not in table:
            raise UsageError(f"there is no operator {name!r} here{nearest(name, table)}")
        return table[name](words, shape, units or [1.0] * (len(shape) - 1), read)
    keep = None
    if request.mask is not None:
        keep = fit(carry["mask"], (1, *shape[1:])) <= middle
    return Given(start=read(shape), keep=keep)


def measured(operator: Linear, shape: tuple[int, ...], read: Read) -> Given:
    """The input as what the operator makes of the sample."""
    made = operator(torch.zeros(1, *shape))
    return Given(operator=operator, measurement=read(tuple(made.shape[1:])))


def encoded(
    given: Given | None,
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
) -> Given | None:
    """The same for a stage of latents: what is not known of all that a latent stands for is not
    kept, and operators see what latents decode to.

    Args:
        encode, decode: data (B, C, *axes) to latents as the stage has them (B, Z, *axes), and back.
    """
    if given is None:
        return None
    given = replace(given, encode=encode, decode=decode)
    if given.start is None:
        return given
    start = encode(given.start)
    return replace(given, start=start, keep=_shrunk(given.keep, start.shape[2:]))


def restored(given: Given | None, x: Tensor) -> Tensor:
    """Data x (B, C, *axes) with what is known of it in its place, whatever a decoder made of that."""
    if given is None:
        return x
    if given.operator is not None and given.measurement is not None:
        wanted = operators.place(given.operator, given.measurement.to(x))
        made = given.operator(x)
        x = x + given.operator.pinv(wanted(made) - made, x)
    return kept(given, x)


def kept(given: Given | None, x: Tensor) -> Tensor:
    """Data x (B, C, *axes) with what stays of the start in its place."""
    if given is None or given.keep is None or given.start is None:
        return x
    return torch.where(given.keep.to(x.device), given.start.to(x), x)


def _shrunk(keep: Tensor | None, sizes: Sequence[int]) -> Tensor | None:
    """Where all of a block is kept, (1, C, *sizes)."""
    if keep is None:
        return None
    for axis, size in enumerate(sizes, 2):
        keep = keep.unflatten(axis, (size, -1)).all(axis + 1)
    return keep.all(1, keepdim=True)


# --- the forms of operators -----------------------------------------------------------------------


def _upscale(
    words: Sequence[str], shape: tuple[int, ...], units: Sequence[float], read: Read
) -> Given:
    """upscale 4: the input is the mean over blocks of 4 along each axis."""
    factor = _number("upscale", words, "upscale 4")
    sizes = tuple(size for size, unit in zip(shape[1:], units, strict=True) if unit > 0)
    if factor != int(factor) or not all(size % int(factor) == 0 for size in sizes):
        raise UsageError(f"operator 'upscale {factor:g}': the sizes {sizes} are no multiples of it")
    factors = [int(factor) if unit > 0 else 1 for unit in units]
    return measured(operators.downsample(factors), shape, read)


def _sharpen(
    words: Sequence[str], shape: tuple[int, ...], units: Sequence[float], read: Read
) -> Given:
    """sharpen 1.5: the input is blurred by a Gaussian of that deviation."""
    std = _number("sharpen", words, "sharpen 1.5")
    return measured(operators.blur([std * unit for unit in units]), shape, read)


def _extend(
    words: Sequence[str], shape: tuple[int, ...], units: Sequence[float], read: Read
) -> Given:
    """extend 16, extend 0:16 8:8: the input with so much more before and after it along each axis.

    Where nothing is known the start is its nearest known entry.
    """
    if len(words) == 1 and ":" not in words[0]:
        words = [f"{words[0]}:{words[0]}"] * sum(unit > 0 for unit in units)
    bounds = [
        (before, size - after)
        for (before, after), size in zip(
            _pairs("extend", words, units, [(0, 0)] * len(units)), shape[1:], strict=True
        )
    ]
    if any(low >= high for low, high in bounds):
        raise UsageError(
            f"operator 'extend {' '.join(words)}' leaves no room for the input in {shape[1:]}"
        )
    start = read((shape[0], *(high - low for low, high in bounds)))
    for axis, ((low, high), size) in enumerate(zip(bounds, shape[1:], strict=True), 2):
        place = (torch.arange(size) - low).clamp(0, high - low - 1)
        start = start.index_select(axis, place.to(start.device))
    return Given(start=start, keep=_box(shape, bounds))


def _hole(
    words: Sequence[str], shape: tuple[int, ...], units: Sequence[float], read: Read
) -> Given:
    """hole 1.0:1.5, hole 8:24 8:24: the input is kept but from there to there along each axis."""
    bounds = _pairs("hole", words, units, [(0, size) for size in shape[1:]])
    bounds = [(low, min(high, size)) for (low, high), size in zip(bounds, shape[1:], strict=True)]
    if any(low >= high for low, high in bounds):
        raise UsageError(f"operator 'hole {' '.join(words)}' is empty in {shape[1:]}")
    return Given(start=read(shape), keep=~_box(shape, bounds))


FORMS: Mapping[str, Form] = {
    "upscale": _upscale,
    "sharpen": _sharpen,
    "extend": _extend,
    "hole": _hole,
}
"""What an operator of a request may be, on any axes."""


def _number(name: str, words: Sequence[str], example: str) -> float:
    try:
        (word,) = words
        number = float(word)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise UsageError(f"operator {name!r} takes one number above 0: --operator {example!r}")
    return number


def _pairs(
    name: str, words: Sequence[str], units: Sequence[float], pairs: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Two places for each axis: "a:b" in its units, or what `pairs` says of it."""
    axes = [axis for axis, unit in enumerate(units) if unit > 0]
    example = f"{name} {' '.join(['8:16'] * len(axes))}"
    found = list(pairs)
    try:
        if not 1 <= len(words) <= len(axes):
            raise ValueError
        for axis, word in zip(axes, words, strict=False):
            low, high = (round(float(number) * units[axis]) for number in word.split(":"))
            if min(low, high) < 0:
                raise ValueError
            found[axis] = low, high
    except (ValueError, OverflowError):
        raise UsageError(
            f"operator {name!r} takes two numbers for an axis: --operator {example!r}"
        ) from None
    return found


def _box(shape: tuple[int, ...], bounds: Sequence[tuple[int, int]]) -> Tensor:
    """True between the bounds along every axis, (1, 1, *axes)."""
    box = torch.zeros(1, 1, *shape[1:], dtype=torch.bool)
    inside = tuple(slice(low, high) for low, high in bounds)
    box[(slice(None), slice(None), *inside)] = True
    return box


# --- for the pipeline -----------------------------------------------------------------------------


def files(request: Request, media: Sequence[Media]) -> dict[str, Any]:
    """The samples in the files that a request names, by field: what the carry begins with.

    Raises:
        MissingError, UsageError: as the media's readers.
        UsageError: a mask of another size than the input.
    """
    found: dict[str, Any] = {}
    for name in FILES:
        path = getattr(request, name)
        if path is not None:
            kinds = {kind.suffix: kind for kind in media}
            default = next((kind for kind in media if kind.default), media[0])
            # a reader knows files by what is in them: more kinds than are written
            found[name] = kinds.get(Path(path).suffix.lower(), default).read(Path(path))
    if "mask" in found:
        sizes = [_sizes(found[name]) for name in ("mask", "input")]
        if sizes[0] != sizes[1]:
            raise UsageError(
                f"the mask {request.mask} has the size {sizes[0]} and {request.input} has "
                f"{sizes[1]}: give a mask of the same size"
            )
    return found


def _sizes(sample: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """The axes of what is in a sample, without channels."""
    tensors = [value for value in sample.values() if isinstance(value, Tensor)]
    return [tuple(t.shape[1:] if t.ndim > 1 else t.shape) for t in tensors]


def prepared(
    stage: Stage, request: Request, carry: dict[str, Any]
) -> tuple[Problem, tuple[Problem, ...]]:
    """A stage's problem under the first of the request's texts, and those under the others."""
    texts = [text for text, _ in weighted(request.text)] if request.text is not None else []
    texts = [*texts[1:], *([] if request.to_text is None else [request.to_text])]
    others: list[Problem] = []
    if stage.denoiser is not None:
        bare = replace(request, input=None, mask=None, operator=None)
        before = {name: value for name, value in carry.items() if name not in FILES}
        others = [stage.prepare(replace(bare, text=text), dict(before)) for text in texts]
    return stage.prepare(first(request), carry), tuple(others)


def first(request: Request) -> Request:
    """The request with the first of its texts alone, which is what a model is shown of them."""
    if request.text is None or len(parts := weighted(request.text)) == 1:
        return request
    return replace(request, text=parts[0][0])


def followed(
    denoise: Denoise, problem: Problem, others: Sequence[Problem], request: Request
) -> tuple[Denoise, Denoise]:
    """What the sampler follows, and what the input is inverted under: that without the way to another text.

    Raises:
        UsageError: several texts for a stage without guidance.
    """
    scale = request.guidance if problem.guidance is None else problem.guidance
    uncond = problem.uncond

    def under(cond: Mapping[str, Any]) -> Denoise:
        if uncond is None:
            return denoise.bind(**cond)
        return classifier_free(denoise, cond=cond, uncond=uncond, scale=scale)

    conds = [problem.cond, *(other.cond for other in others)]
    made = source = under(problem.cond)
    if all(_same(cond, problem.cond) for cond in conds) and uncond is None:
        pass  # a stage that does not listen to texts
    elif request.to_text is not None:
        made = under(_between(conds[0], conds[1], request.position or 0.0))
    elif len(conds) > 1:
        if uncond is None:
            raise UsageError(f"{request.model} has no guidance, which several texts need: give one")
        weights = [weight for _, weight in weighted(request.text or "")]
        scales = [scale * weight for weight in weights]
        made = source = composed(denoise, conds=conds, uncond=uncond, scales=scales)
    bounds = problem.bounds or (lambda denoise: denoise)
    facts = [] if problem.given is None else _facts(problem.given)
    if problem.given is not None and problem.given.guide is not None and facts:
        made = problem.given.guide(made, *_together(facts))
    made, source = bounds(made), bounds(source)
    for fact in facts:
        made = replacement(made, fact.operator, fact.known, encode=fact.encode, decode=fact.decode)
    return made, source


class _Fact(NamedTuple):
    """known = operator(x), or operator(decode(x))."""

    operator: Linear
    known: Tensor
    encode: Callable[[Tensor], Tensor] | None = None
    decode: Callable[[Tensor], Tensor] | None = None

    @property
    def seen(self) -> Operator:
        """From x to what is known."""
        decode, operator = self.decode, self.operator
        return operator if decode is None else lambda x0: operator(decode(x0))


def _facts(given: Given) -> list[_Fact]:
    """What is known of x; what stays comes last, since it replaces the rest."""
    facts = []
    if given.operator is not None and given.measurement is not None:
        facts.append(_Fact(given.operator, given.measurement, given.encode, given.decode))
    if given.keep is not None and given.start is not None:
        facts.append(_Fact(operators.mask(given.keep), given.start))
    return facts


def _together(facts: Sequence[_Fact]) -> tuple[Operator, Tensor]:
    """Facts as one operator and what it makes."""
    if len(facts) == 1:
        return facts[0].seen, facts[0].known
    rows = max(len(fact.known) for fact in facts)
    known = [fact.operator.within(fact.known).flatten(1).cpu() for fact in facts]
    return (
        lambda x0: torch.cat([fact.seen(x0).flatten(1) for fact in facts], 1),
        torch.cat([row.expand(rows, -1) for row in known], 1),
    )


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(_equal(one[name], other[name]) for name in one)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return bool(one == other)


def _between(one: Mapping[str, Any], other: Mapping[str, Any], position: float) -> dict[str, Any]:
    """Conditions on the way from one to the other; what is the same in both stays."""
    moving = [name for name in one if name not in other or not _equal(one[name], other[name])]
    there = {name: other[name] for name in moving if name in other}
    return {**one, **inversion.lerp({name: one[name] for name in moving}, there, position)}


def begin(
    denoise: Denoise,
    problem: Problem,
    request: Request,
    grid: Grid,
    streams: Noise,
    others: Noise | None,
) -> Tensor | None:
    """Where a request begins at the first time of the grid, (copies, C, *axes); None for pure noise.

    Args:
        denoise: what the input is inverted under.
        streams, others: of the seed, and of the seed that it goes to; the first are moved on by what is drawn.

    Raises:
        UsageError: less than full strength for an input that is no sample, or one of another shape.
    """
    start = None if problem.given is None else problem.given.start
    strength = 1.0 if request.strength is None else request.strength
    if problem.given is not None and start is None and (strength < 1 or request.invert):
        raise UsageError("this operator makes all of the sample anew: leave the strength at 1")
    pure = start is None or (strength == 1 and not request.invert)
    if pure and others is None:
        return None
    z = streams.draw(denoise.device)
    t = along(denoise.schedule, grid)[0]
    if start is not None:
        if start.shape[1:] != streams.shape:
            raise UsageError(
                f"the start is {tuple(start.shape)}, and the stage makes {streams.shape}"
            )
        start = start.to(z).expand_as(z)
        if request.invert:
            found = inversion.ddim(denoise, start, grid, iterations=request.invert)
            z = noise_in(found, start, t)
    if others is not None:
        z = inversion.slerp(z, others.draw(denoise.device), request.position or 0.0)
    if start is None or pure:
        return z * max(1.0, t.sigma)
    return blend(t.alpha, start, t.sigma, z)
