"""Operators: the laws of adjoints and inverses, on any number of axes, and what they refuse."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mdiff.core import operators
from mdiff.core.errors import UsageError
from mdiff.core.operators import Linear

SHAPES = [(3, 8), (3, 4, 6), (3, 4, 2, 6)]

MIX = [[0.3, 0.6, 0.1], [0.0, 1.0, -1.0]]

MADE: dict[str, Callable[[tuple[int, ...]], Linear]] = {
    "mask": lambda shape: operators.mask(some(shape)),
    "crop": lambda shape: operators.crop([(1, 3), *[None] * (len(shape) - 2)]),
    "downsample": lambda shape: operators.downsample([2] * (len(shape) - 1)),
    "blur": lambda shape: operators.blur([0.6, 0.0, 0.9][: len(shape) - 1]),
    "channel_mix": lambda shape: operators.channel_mix(MIX),
    "compose": lambda shape: operators.compose(
        operators.channel_mix(MIX),
        operators.blur([0.5] * (len(shape) - 1)),
        operators.downsample([2] * (len(shape) - 1)),
    ),
    "linear": lambda shape: operators.linear(lambda x: x[:, :1].cumsum(-1) + 2 * x[:, 1:2]),
}


def some(shape: tuple[int, ...], rows: int = 1) -> Tensor:
    return torch.rand(rows, *shape, generator=torch.Generator().manual_seed(5)) < 0.5


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def dense(operator: Linear, shape: tuple[int, ...]) -> Tensor:
    """A as a matrix."""
    n = math.prod(shape)
    return operator(torch.eye(n, dtype=torch.float64).reshape(n, *shape)).flatten(1).T


cases = pytest.mark.parametrize(
    ("name", "shape"), [(name, shape) for name in MADE for shape in SHAPES]
)


def test_every_operator_is_tried() -> None:
    assert MADE.keys() == operators.NAMES.keys()


@cases
def test_adjoint_and_inverses_are_those_of_the_matrix(name: str, shape: tuple[int, ...]) -> None:
    operator = MADE[name](shape)
    a, x = dense(operator, shape), normal(2, *shape)
    made = operator(x)
    torch.testing.assert_close(made.flatten(1), x.flatten(1) @ a.T)
    y = operator.within(normal(*made.shape, seed=1))
    adjoint = operator.adjoint(y, x)
    assert adjoint.shape == x.shape
    torch.testing.assert_close(adjoint.flatten(1), y.flatten(1) @ a)
    # in the range of A: elsewhere inverses of what is almost singular may differ
    pinv = operator.pinv(made, x).flatten(1)
    torch.testing.assert_close(pinv, made.flatten(1) @ torch.linalg.pinv(a).T, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(operator(operator.pinv(made, x)), made, rtol=1e-6, atol=1e-6)
    gram = a @ a.T
    for variance in (0.7, torch.tensor([0.7, 1.3], dtype=torch.float64)):
        found = operator.solve(y, x, variance, 0.5).flatten(1)
        for k in range(2):
            v = variance[k] if isinstance(variance, Tensor) else variance
            total = v * gram + 0.25 * torch.eye(len(a), dtype=torch.float64)
            wanted = torch.linalg.solve(total, y[k].flatten())
            torch.testing.assert_close(found[k], wanted, rtol=1e-7, atol=1e-7)


@cases
def test_types_stay_and_nothing_is_changed(name: str, shape: tuple[int, ...]) -> None:
    operator = MADE[name](shape)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = normal(2, *shape).to(dtype)
        copy = x.clone()
        made = operator(x)
        assert made.dtype == operator.adjoint(made, x).dtype == dtype
        assert torch.equal(x, copy)


def test_a_blur_spreads_and_keeps_the_mean() -> None:
    blur = operators.blur([1.5])
    x = torch.zeros(1, 1, 33, dtype=torch.float64)
    x[..., 16] = 1.0
    kernel = blur(x)[0, 0]
    place = torch.arange(33, dtype=torch.float64) - 16
    normal_density = torch.exp(-(place**2) / (2 * 1.5**2)) / (1.5 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(kernel, normal_density, rtol=0, atol=2e-3)
    y = normal(2, 1, 33)
    torch.testing.assert_close(blur(y).mean(-1), y.mean(-1))
    torch.testing.assert_close(operators.blur([0.0])(y), y)


def test_a_mask_hides_whatever_is_there() -> None:
    known = some((3, 8))
    x = normal(2, 3, 8)
    x = torch.where(known, x, torch.nan)
    operator = operators.mask(known)
    assert operator(x).isfinite().all()
    assert torch.equal(operator.within(x), operator(x))
    # one mask per sample, also where guidance stacks batches
    each = some((3, 8), rows=2)
    stacked = operators.mask(each)(torch.ones(4, 3, 8))
    assert torch.equal(stacked, each.float().repeat(2, 1, 1))
    # broadcast over channels and one axis
    rows = operators.mask(torch.tensor([1.0, 0.0, 1.0, 0.0]).reshape(1, 1, 4, 1))
    assert rows(torch.ones(2, 3, 4, 5)).sum() == 2 * 3 * 2 * 5


def test_misuse_is_refused() -> None:
    x = torch.zeros(2, 3, 8)
    with pytest.raises(UsageError, match="true or 1 where"):
        operators.mask(torch.tensor([0.5]))
    with pytest.raises(UsageError, match=r"mask is \(1, 3, 7\) and x \(2, 3, 8\)"):
        operators.mask(torch.ones(1, 3, 7))(x)
    with pytest.raises(UsageError, match="'mask' has 3 rows"):
        operators.mask(torch.ones(3, 3, 8))(x)
    with pytest.raises(UsageError, match="crop was made for 2 axes"):
        operators.crop([(0, 2), None])(x)
    with pytest.raises(UsageError, match="not inside an axis of 8"):
        operators.crop([(4, 9)])(x)
    with pytest.raises(UsageError, match="no whole number of blocks of 3"):
        operators.downsample([3])(x)
    with pytest.raises(UsageError, match="1 or more"):
        operators.downsample([0])
    with pytest.raises(UsageError, match="blur was made for 3 axes"):
        operators.blur([1.0, 1.0, 1.0])(x)
    with pytest.raises(UsageError, match="not be negative"):
        operators.blur([-1.0])
    with pytest.raises(UsageError, match="takes 2, and x"):
        operators.channel_mix([[1.0, 1.0]])(x)
    with pytest.raises(UsageError, match="a row for each"):
        operators.channel_mix([1.0, 1.0])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="at least one"):
        operators.compose()
    with pytest.raises(UsageError, match="did you mean 'crop'"):
        operators.from_name("crops")
    assert operators.from_name("downsample", factors=[2])(x).shape == (2, 3, 4)
