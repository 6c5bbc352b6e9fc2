r"""Posterior guidance: samples of p(x_0 | y) from a measurement y = A x_0 + noise.

The exact E[x_0 | x_t, y] is x0 + (sigma^2 / alpha) grad_x log p(y | x_t). Of that gradient only
p(y | x_0) is known, and methods differ in what they take for the rest:

    replacement      no gradient: x0 is changed where y says what it is
    pseudo_inverse   p(x_0 | x_t) is N(x0, v I): exact for white normal data, and with the true
                     covariance for any normal data
    reconstruction   the same with v = sigma^2 / alpha^2, and A A^T taken for the identity
    dps              p(x_0 | x_t) is the point x0, and the strength is chosen by hand

A is an operator of `mdiff.core.operators`, on any number of axes; the last two take any
differentiable function. For noise that is drawn anew in known parts, and for going back and forth,
see `samplers.RePaint`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mdiff.core.denoiser import Denoise, Guided, Prediction
from mdiff.core.errors import UsageError
from mdiff.core.grids import Grid
from mdiff.core.guidance.gradient import following_of, pulled, score_level, shifted, step_level
from mdiff.core.operators import Linear, Operator, place
from mdiff.core.schedules import Time

Residual = Callable[[Tensor], Tensor]
"""x0 -> y - A x0"""


def replacement(
    denoise: Denoise,
    operator: Linear,
    measurement: Tensor,
    *,
    encode: Callable[[Tensor], Tensor] | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
) -> Guided:
    """x0 + A^+ (y - A x0): what is known in place of what was said (Wang et al., 2023, eq. 13).

    The range-null space decomposition (DDNM); for a mask, the known part pasted into x0 (Song et
    al., 2021, app. I.2; GLIDE). Samplers carry the noise of the known part along, so at each level
    it is the measurement noised to that level. It costs no gradient and obeys y exactly in the end.
    Its bias: the unknown part sees y only through the noise, so it depends on y less than it should.

    Args:
        operator: linear, of `mdiff.core.operators`.
        measurement: y, of the shape that the operator gives, one row per sample or one for all.
        encode, decode: where the operator sees what x0 decodes to. Then x0 moves by what its
            replacement makes of its code, and an x0 that obeys y stays whatever the codec loses.

    Raises:
        UsageError: one of encode and decode without the other.
    """
    operator = _linear(operator, "replacement")
    if (encode is None) != (decode is None):
        raise UsageError("encode needs its decode, and decode its encode")
    residual = _residual(operator, measurement)

    def rule(inner: Denoise, x: Tensor, t: Time[Any]) -> Prediction:
        said = inner(x, t)
        seen = said.x0 if decode is None else decode(said.x0)
        change = operator.pinv(residual(seen), seen)
        if encode is not None:
            change = encode(seen + change) - encode(seen)
        return shifted(said, 1.0, change)

    return Guided(inner=denoise, rule=rule)


def pseudo_inverse(
    denoise: Denoise,
    operator: Linear,
    measurement: Tensor,
    *,
    noise: float = 0.0,
    std: float = 1.0,
    scale: float = 1.0,
    solve: Callable[[Tensor, Time[Any]], Tensor] | None = None,
) -> Guided:
    """Pseudo-inverse guidance, PiGDM (Song, Vahdat et al., 2023): p(x_0 | x_t) is N(x0, v I).

    x0 + (sigma^2 / alpha) J^T A^T (v A A^T + noise^2 I)^-1 (y - A x0), with J the Jacobian of the
    denoiser and v = sigma^2 std^2 / (alpha^2 std^2 + sigma^2), the variance of x_0 given x_t where
    x_0 is N(0, std^2 I).

    Args:
        operator: linear, of `mdiff.core.operators`.
        measurement: y, as for `replacement`.
        noise: standard deviation of the noise in y.
        std: that of the data.
        scale: 1 for Bayes' rule.
        solve: (residual, t) -> (A C_t A^T + noise^2 I)^-1 residual, if the covariance C_t of x_0
            given x_t is known better than v I. With the true one it is exact for normal data.
    """
    operator = _linear(operator, "pseudo_inverse")
    residual = _residual(operator, measurement)

    def rule(inner: Denoise, x: Tensor, t: Time[Any]) -> Prediction:
        variance = t.sigma**2 * std**2 / (t.alpha**2 * std**2 + t.sigma**2)

        def log_p(x0: Tensor) -> Tensor:
            rest = residual(x0)
            # the weights are held fixed, so that the gradient is J^T A^T weighed
            with torch.no_grad():
                if solve is None:
                    weighed = operator.solve(rest, x0, variance, noise)
                else:
                    weighed = solve(rest, t)
            return _dot(weighed, operator(x0))

        said, slope = pulled(inner, x, t, log_p)
        return shifted(said, scale * score_level(t), slope)

    return Guided(inner=denoise, rule=rule)


def reconstruction(
    denoise: Denoise, operator: Operator, measurement: Tensor, scale: float = 1.0
) -> Guided:
    """x0 - (scale alpha / 2) grad_x |y - A x0|^2 (Ho et al., 2022, Video Diffusion, eq. 7 and 8).

    For a mask the paper replaces the known part too: put `replacement` around this.

    Args:
        operator: any differentiable function of x0.
        measurement: y, as for `replacement`.
        scale: w_r of the paper, 1 for what it derives, more for what it finds better.
    """
    residual = _residual(operator, measurement)

    def rule(inner: Denoise, x: Tensor, t: Time[Any]) -> Prediction:
        said, slope = pulled(inner, x, t, lambda x0: -_square(residual(x0)))
        return shifted(said, scale * t.alpha / 2, slope)

    return Guided(inner=denoise, rule=rule)


def dps(
    denoise: Denoise,
    operator: Operator,
    measurement: Tensor,
    scale: float = 1.0,
    *,
    grid: Grid | None = None,
) -> Guided:
    """Diffusion posterior sampling (Chung et al., 2023, alg. 1): x_s - scale grad |y - A x0|.

    The algorithm moves the result of a step of DDPM; here x0 moves by as much as has the same
    effect. With the grid it is sampled on this is the algorithm; without, it is the algorithm of
    1000 steps even in t, whatever the sampler and its grid.

    Args:
        operator: any differentiable function of x0.
        measurement: y, as for `replacement`.
        scale: zeta of the paper's code, 0.3 to 1 there: that of the norm, and not of its square. A
            step moves x by about that much whatever its size, so small data want less.
        grid: the grid that will be sampled on, for the algorithm step by step.
    """
    residual = _residual(operator, measurement)
    schedule = denoise.schedule
    following = following_of(schedule, grid) if grid is not None else None

    def rule(inner: Denoise, x: Tensor, t: Time[Any]) -> Prediction:
        if isinstance(t.value, Tensor):
            raise UsageError("dps takes one time for the whole batch")
        before: float = max(0.0, t.value - 1e-3)
        s = following(t) if following else schedule.at(before)
        said, slope = pulled(inner, x, t, lambda x0: -_norm(residual(x0)))
        return shifted(said, scale * step_level(t, s), slope)

    return Guided(inner=denoise, rule=rule)


def _residual(operator: Operator, measurement: Tensor) -> Residual:
    """y - A x0 as a function of x0."""
    measured = place(operator, measurement)
    return lambda x0: measured(made := operator(x0)) - made


def _linear(operator: Operator, name: str) -> Linear:
    if not isinstance(operator, Linear):
        raise UsageError(
            f"{name} needs a linear operator with an adjoint: take one of mdiff.core.operators, "
            "or make one of your function with operators.linear"
        )
    return operator


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each sample, (B,)."""
    return (a * b).flatten(1).sum(1)


def _square(y: Tensor) -> Tensor:
    return _dot(y, y)


def _norm(y: Tensor) -> Tensor:
    # its gradient is zero, and no NaN, where y is
    return torch.linalg.vector_norm(y.flatten(1), dim=1)
