r"""What the denoiser says along a step, from what it said at a few places: the algebra that linear
multistep methods, exponential integrators and their singlestep forms share.

Each of them is the exact step for a network that keeps saying the same, `move` for x0 and `carry`
for eps, taken with the mean of a polynomial P instead. P goes through what was said at the nodes
tau_j, which are 0 at t and 1 at s and negative before; its mean is sum_i p_i m_i, with m_i = E[tau^i]
under the weight e^(-z tau) on [0, 1] that the step gives to each place:

    z = 0           in sigma / alpha, and in the count of steps   (Adams, 1883);
    z = -h, x0      in lambda = log(alpha / sigma), h = lambda_s - lambda_t   (Lu et al., 2022b);
    z = +h, eps     in lambda, the same for eps   (Lu et al., 2022a; Zhang and Chen, 2023).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from mdiff.core.samplers.base import carry, move, noise_in
from mdiff.core.schedules import Time, blend


class Form(NamedTuple):
    """What is interpolated: how it is read off (x, x0, t), how it carries x on, and z / h."""

    read: Callable[[Tensor, Tensor, Time], Tensor]
    travel: Callable[[Tensor, Tensor, Time, Time], Tensor]
    sign: float


FORMS = {
    "x0": Form(lambda x, x0, t: x0, move, -1.0),
    "eps": Form(noise_in, carry, 1.0),
}


def moments(z: float, n: int) -> list[float]:
    """E[tau^i], i = 0 ... n - 1, under the weight e^(-z tau) on [0, 1]: i! phi_{i+1} / phi_1 of z."""
    # of the integrals M_i of tau^i e^(z (1 - tau)): M_{i-1} = (z M_i + 1) / i
    if abs(z) > 1:
        integrals = [math.expm1(z) / z]
        for i in range(1, n):
            integrals.append((i * integrals[-1] - 1) / z)
    else:
        # upwards this would lose digits: the last is its series, the others follow downwards
        term = last = 1 / n
        for k in range(1, 20):
            term *= z / (n + k)
            last += term
        integrals = [last]
        for i in range(n - 1, 0, -1):
            integrals.insert(0, (z * integrals[0] + 1) / i)
    return [integral / integrals[0] for integral in integrals]


def weights(nodes: Sequence[float], means: Sequence[float]) -> list[float]:
    """c_j such that sum_j c_j P(nodes_j) = sum_i p_i means_i for each polynomial P through them."""
    result = []
    for j, node in enumerate(nodes):
        # the coefficients, lowest first, of the polynomial that is 1 at this node and 0 at others
        p = [1.0]
        for k, other in enumerate(nodes):
            if k != j:
                shifted = zip([0.0, *p], [*p, 0.0], strict=True)
                p = [(below - other * same) / (node - other) for below, same in shifted]
        result.append(sum(c * m for c, m in zip(p, means, strict=True)))
    return result


def average(
    nodes: Sequence[float], z: float, first: float | None = None, curvature: float = 1.0
) -> list[float]:
    """The weights of the mean of the polynomial through the nodes.

    `first`, if given, replaces m_1 between two nodes; `curvature` multiplies m_2 between three: the
    roundings that some published methods make.
    """
    means = moments(z, len(nodes))
    if first is not None and len(nodes) == 2:
        means[1] = first
    if len(nodes) == 3:
        means[2] *= curvature
    return weights(nodes, means)


def combine(coefficients: Sequence[Any], said: Sequence[Tensor]) -> Tensor:
    """sum_j c_j said_j, with c_j one number for all, or one per sample (B,)."""
    if len(said) == 1:
        return said[0]
    total = blend(coefficients[0], said[0], coefficients[1], said[1])
    for c, each in zip(coefficients[2:], said[2:], strict=True):
        total = blend(1.0, total, c, each)
    return total
