r"""Measurement operators: what of a sample is known.

A linear operator A takes x (B, C, *axes) to a measurement y, on any number of axes. Beside A it
gives the adjoint A^T and functions f(A A^T) of its Gram matrix, from which its pseudo-inverse
A^+ = A^T (A A^T)^+ and the weighing of a residual (v A A^T + n^2)^-1 follow. Where A A^T is diagonal
in a known basis they are exact and cost no more than A; elsewhere (`compose`, `linear`) by conjugate
gradients.

Any differentiable function x -> y is an operator as well, for the guidance that needs no more.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mdiff.core.denoiser import tile
from mdiff.core.errors import UsageError
from mdiff.core.names import make
from mdiff.core.schedules import pad

Operator = Callable[[Tensor], Tensor]
Spectral = Callable[[Any], Any]
"""A function of an eigenvalue, or of a tensor of them."""

NEGLIGIBLE = 1e-6
"""Eigenvalues of A A^T below this are taken for 0: what a blur hides as well, no inverse shows."""

ITERATIONS = 32
"""Of conjugate gradients; they are exact after as many as A A^T has different eigenvalues."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Linear:
    """A linear operator.

    Attributes:
        name: what it is, for people.
        apply: A x.
        adjoint: (y, like) -> A^T y, of the shape of `like`.
        gram: (f, y) -> f(A A^T) y, if it has a closed form.
        within: y without the entries that A never gives; what is there may be anything, NaN too.
    """

    name: str
    apply: Callable[[Tensor], Tensor]
    adjoint: Callable[[Tensor, Tensor], Tensor]
    gram: Callable[[Spectral, Tensor], Tensor] | None = None
    within: Callable[[Tensor], Tensor] = lambda y: y

    def __call__(self, x: Tensor) -> Tensor:
        """A x."""
        return self.apply(x)

    def solve(
        self, y: Tensor, like: Tensor, variance: float | Tensor = 1.0, noise: float = 0.0
    ) -> Tensor:
        """(variance A A^T + noise^2)^+ y.

        Args:
            y: of the shape of A x.
            like: of the shape of x.
            variance: one number, or one per sample (B,).
            noise: one number.
        """
        v = pad(variance.to(y.device), y) if isinstance(variance, Tensor) else variance

        def inverse(e: Any) -> Any:
            if noise > 0:
                return 1 / (v * e + noise**2)
            if isinstance(e, Tensor):
                return torch.where(e > NEGLIGIBLE, 1 / (v * e), 0.0)
            return 1 / (v * e) if e > NEGLIGIBLE else 0.0

        if self.gram is not None:
            return self.gram(inverse, y)
        return _conjugate_gradients(
            lambda u: v * self.apply(self.adjoint(u, like)) + noise**2 * u, y
        )

    def pinv(self, y: Tensor, like: Tensor) -> Tensor:
        """A^+ y, the smallest x of the shape of `like` that comes closest to A x = y."""
        return self.adjoint(self.solve(y, like), like)


def mask(known: Tensor) -> Linear:
    """What is known of x, and zeros elsewhere: inpainting, extension (Song et al., 2021, app. I.2).

    Args:
        known: true or 1 where x is known, else false or 0: (B, C, *axes), each of these either 1 or
            as in x.
    """
    if not bool(((known == 0) | (known == 1)).all()):
        raise UsageError("a mask is true or 1 where x is known, and false or 0 elsewhere")
    known = known.bool()
    placed = _placed(known)

    def apply(x: Tensor) -> Tensor:
        rows = placed(x.device, torch.bool)
        if len(rows) > 1:
            rows = tile("mask", rows, len(x))
        fits = rows.ndim == x.ndim and all(
            a in (1, b) for a, b in zip(rows.shape, x.shape, strict=True)
        )
        if not fits:
            raise UsageError(
                f"the mask is {tuple(known.shape)} and x {tuple(x.shape)}: give it every axis of "
                "x, each of x's size or of size 1"
            )
        # not a product: what is unknown may be NaN
        return torch.where(rows, x, 0.0)

    return Linear(
        name="mask",
        apply=apply,
        adjoint=lambda y, like: apply(y),
        gram=lambda f, y: f(1.0) * apply(y),
        within=apply,
    )


def crop(bounds: Sequence[tuple[int, int] | None]) -> Linear:
    """The part of x between two places along each axis (Kawar et al., 2022).

    Args:
        bounds: for each axis (first, end), or None for all of it.
    """

    def ends(x: Tensor) -> list[tuple[int, int]]:
        _has_axes("crop", len(bounds), x)
        found = [
            (0, size) if bound is None else bound
            for bound, size in zip(bounds, x.shape[2:], strict=True)
        ]
        for (low, high), size in zip(found, x.shape[2:], strict=True):
            if not 0 <= low < high <= size:
                raise UsageError(f"crop {(low, high)} is not inside an axis of {size}")
        return found

    def apply(x: Tensor) -> Tensor:
        for axis, (low, high) in enumerate(ends(x), 2):
            x = x.narrow(axis, low, high - low)
        return x

    def adjoint(y: Tensor, like: Tensor) -> Tensor:
        margins = [
            (low, size - high) for (low, high), size in zip(ends(like), like.shape[2:], strict=True)
        ]
        # the last axis first
        return F.pad(y, [margin for pair in reversed(margins) for margin in pair])

    return Linear(name="crop", apply=apply, adjoint=adjoint, gram=lambda f, y: f(1.0) * y)


def downsample(factors: Sequence[int]) -> Linear:
    """The mean over blocks, one factor for each axis: super-resolution (Kawar et al., 2022).

    Args:
        factors: sizes of a block along the axes; 1 leaves an axis as it is.
    """
    if not all(factor >= 1 for factor in factors):
        raise UsageError(f"factors {list(factors)} to downsample by must be 1 or more")

    def apply(x: Tensor) -> Tensor:
        _has_axes("downsample", len(factors), x)
        for axis, factor in enumerate(factors, 2):
            if x.shape[axis] % factor:
                raise UsageError(
                    f"an axis of {x.shape[axis]} has no whole number of blocks of {factor}: crop "
                    "it first, or take another factor"
                )
            x = x.unflatten(axis, (-1, factor)).mean(axis + 1)
        return x

    def adjoint(y: Tensor, like: Tensor) -> Tensor:
        for axis, factor in enumerate(factors, 2):
            y = y.repeat_interleave(factor, axis, output_size=y.shape[axis] * factor) / factor
        return y

    # each mean of n entries has variance 1 / n, and blocks share none
    share = 1 / math.prod(factors)
    return Linear(name="downsample", apply=apply, adjoint=adjoint, gram=lambda f, y: f(share) * y)


def blur(stds: Sequence[float]) -> Linear:
    """A Gaussian blur, mirrored at the ends (Hoogeboom and Salimans, 2023).

    It is diagonal in the cosine basis, where it takes frequency k of an axis of n entries down by
    exp(-(std pi k / n)^2 / 2).

    Args:
        stds: standard deviation of the kernel along each axis, in entries; 0 leaves it as it is.
    """
    if not all(std >= 0 for std in stds):
        raise UsageError(f"standard deviations {list(stds)} of a blur must not be negative")
    blurred = [axis for axis, std in enumerate(stds, 2) if std > 0]

    @lru_cache(maxsize=1)
    def gains(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        with torch.inference_mode(False):
            exponent = torch.zeros([1] * len(shape), dtype=torch.float64)
            for axis in blurred:
                # cosines of frequency k are those of a Fourier series over twice the length
                k = torch.arange(2 * shape[axis], dtype=torch.float64)
                k = torch.minimum(k, 2 * shape[axis] - k)
                if axis == blurred[-1]:
                    k = k[: shape[axis] + 1]
                square = (stds[axis - 2] * math.pi * k / shape[axis]) ** 2 / 2
                exponent = exponent + square.reshape(
                    [-1 if i == axis else 1 for i in range(len(shape))]
                )
            return torch.exp(-exponent).to(device, dtype)

    def scaled(f: Spectral, x: Tensor) -> Tensor:
        """f(A) x."""
        _has_axes("blur", len(stds), x)
        if not blurred:
            return f(1.0) * x
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        for axis in blurred:
            wide = torch.cat([wide, wide.flip(axis)], axis)
        spectrum = torch.fft.rfftn(wide, dim=blurred)
        spectrum = spectrum * f(gains(tuple(x.shape), x.device, wide.dtype))
        wide = torch.fft.irfftn(spectrum, s=[wide.shape[axis] for axis in blurred], dim=blurred)
        for axis in blurred:
            wide = wide.narrow(axis, 0, x.shape[axis])
        return wide.to(x.dtype)

    def apply(x: Tensor) -> Tensor:
        return scaled(lambda h: h, x)

    return Linear(
        name="blur",
        apply=apply,
        adjoint=lambda y, like: apply(y),
        gram=lambda f, y: scaled(lambda h: f(h**2), y),
    )


def channel_mix(matrix: Tensor | Sequence[Sequence[float]]) -> Linear:
    """Each channel of y a sum over those of x: colourisation (Kawar et al., 2022).

    Args:
        matrix: (channels of y, channels of x); [[0.299, 0.587, 0.114]] is grey from colour.
    """
    weights = torch.as_tensor(matrix, dtype=torch.float64)
    if weights.ndim != 2:
        raise UsageError("a matrix of channels has a row for each channel made, one entry for each")
    values, vectors = torch.linalg.eigh(weights @ weights.T)
    values = values.clamp(min=0)
    placed, basis, eigenvalues = _placed(weights), _placed(vectors), _placed(values)

    def mixed(m: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("kc,bc...->bk...", m, x)

    def apply(x: Tensor) -> Tensor:
        if x.shape[1] != weights.shape[1]:
            raise UsageError(
                f"the matrix of channels takes {weights.shape[1]}, and x {tuple(x.shape)} has "
                f"{x.shape[1]}"
            )
        return mixed(placed(x.device, x.dtype), x)

    def gram(f: Spectral, y: Tensor) -> Tensor:
        u = basis(y.device, y.dtype)
        e = eigenvalues(y.device, y.dtype).reshape(-1, *(1 for _ in y.shape[2:]))
        return mixed(u, f(e) * mixed(u.T, y))

    return Linear(
        name="channel_mix",
        apply=apply,
        adjoint=lambda y, like: mixed(placed(y.device, y.dtype).T, y),
        gram=gram,
    )


def compose(*operators: Linear) -> Linear:
    """One operator after another, the first first (Wang et al., 2023)."""
    if not operators:
        raise UsageError("compose needs at least one operator")

    def stages(x: Tensor) -> list[Tensor]:
        made = [x]
        for operator in operators:
            made.append(operator(made[-1]))
        return made

    def adjoint(y: Tensor, like: Tensor) -> Tensor:
        shapes = stages(like)[:-1]
        for operator, shape in zip(reversed(operators), reversed(shapes), strict=True):
            y = operator.adjoint(y, shape)
        return y

    return Linear(
        name=" then ".join(operator.name for operator in operators),
        apply=lambda x: stages(x)[-1],
        adjoint=adjoint,
        gram=operators[0].gram if len(operators) == 1 else None,
        within=operators[-1].within,
    )


def linear(apply: Callable[[Tensor], Tensor], name: str = "linear") -> Linear:
    """Any linear function; its adjoint by automatic differentiation (Chung et al., 2023).

    Args:
        apply: x (B, C, *axes) -> y, linear, and with no constant part.
    """

    def adjoint(y: Tensor, like: Tensor) -> Tensor:
        return torch.func.vjp(apply, torch.zeros_like(like))[1](y)[0]

    return Linear(name=name, apply=apply, adjoint=adjoint)


def place(operator: Operator, measurement: Tensor) -> Callable[[Tensor], Tensor]:
    """A x -> the measurement y, where A x is and as many rows; moved there once.

    Raises:
        UsageError: (when used) y has not the shape that the operator makes.
    """

    @lru_cache(maxsize=1)
    def placed(rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        with torch.inference_mode(False):
            y = measurement.to(device, dtype)
            y = tile("measurement", y.clone() if y.is_inference() else y, rows)
            return operator.within(y) if isinstance(operator, Linear) else y

    def measured(made: Tensor) -> Tensor:
        if measurement.shape[1:] != made.shape[1:]:
            raise UsageError(
                f"the measurement is {tuple(measurement.shape)}, and the operator makes "
                f"{tuple(made.shape)}: it must be what the operator makes, one row per sample or "
                "one for all"
            )
        return placed(len(made), made.device, made.dtype)

    return measured


def _conjugate_gradients(gram: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    """The u with gram(u) = y, for each sample (Hestenes and Stiefel, 1952)."""
    axes = tuple(range(1, y.ndim))

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(axes, keepdim=True)

    u, rest, direction = torch.zeros_like(y), y, y
    left = first = dot(y, y)
    for _ in range(ITERATIONS):
        image = gram(direction)
        # what is solved but for rounding stays as it is: no sample is waited for
        open_ = left > first * torch.finfo(y.dtype).eps ** 2
        size = torch.where(open_, left, 0.0) / torch.where(open_, dot(direction, image), 1.0)
        u, rest = u + size * direction, rest - size * image
        now = dot(rest, rest)
        direction = rest + now / torch.where(open_, left, 1.0) * direction
        left = now
    return u


def _placed(value: Tensor) -> Callable[[torch.device, torch.dtype], Tensor]:
    """The tensor on a device and in a type, moved there once."""

    @lru_cache(maxsize=1)
    def placed(device: torch.device, dtype: torch.dtype) -> Tensor:
        with torch.inference_mode(False):
            return value.to(device, dtype)

    return placed


def _has_axes(name: str, count: int, x: Tensor) -> None:
    if x.ndim - 2 != count:
        raise UsageError(
            f"{name} was made for {count} axes, and x {tuple(x.shape)} has {x.ndim - 2} (after "
            "batch and channels): give one value for each"
        )


NAMES: dict[str, Callable[..., Linear]] = {
    "mask": mask,
    "crop": crop,
    "downsample": downsample,
    "blur": blur,
    "channel_mix": channel_mix,
    "compose": compose,
    "linear": linear,
}


def from_name(name: str, **params: Any) -> Linear:
    """The operator of that name, e.g. from_name("downsample", factors=[4, 4]).

    Raises:
        UsageError: unknown name (the nearest is named), or parameters that it does not take.
    """
    return make("operator", NAMES, name, **params)
