r"""Inversion: the noise that a deterministic sampler makes given data from, and the way between two of them.

A step of DDIM from s down to t is the map `carry` with the noise that the denoiser says of x_s. Its inverse asks for
that noise before x_s is known,

    x_s = carry(x_t, eps(x_s, s)),

an equation whose first guess, x_t on the right, is DDIM inversion, and whose fixed point is the exact inverse. EDICT
instead steps with a pair (x, y), each by the noise of the other, which has an inverse in closed form.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mdiff.core.denoiser import Denoise, from_x0, to_x0
from mdiff.core.errors import UsageError
from mdiff.core.grids import Grid
from mdiff.core.names import pick
from mdiff.core.samplers.base import carry, noise_in
from mdiff.core.sampling import along
from mdiff.core.schedules import Time, blend

# --- DDIM -----------------------------------------------------------------------------------------


@torch.no_grad()
def ddim(
    denoise: Denoise,
    x0: Tensor,
    grid: Grid,
    *,
    told: str = "next",
    iterations: int = 1,
    read: str = "told",
    start: float = 0.0,
) -> Tensor:
    """The x at the first time of the grid from which DDIM comes back to x0 (Song et al., 2021: DDIM, section 4.3).

    With one iteration it comes back the better the more steps there are. With more, to rounding where they converge:
    where the denoiser's noise changes less than x does over a step (Pan et al., 2023: AIDI).

    Args:
        x0: clean data, (B, C, *axes).
        grid: the times of the sampler, visited backwards.
        told: the time that the denoiser is told in the step from t up to s: "next", s, or "own", t. At clean data no
            network answers, so with "own" x0 is taken for x at the last time before it (guided-diffusion).
        iterations: evaluations in each step; more than one only with "next".
        read: at which noise level the denoiser's answer is read, with "next": that of s, which it was "told", or that
            of x, its "level" (diffusers). It makes no difference to eps.
        start: the time that x0 is taken for, with "next"; the first entry of a table is what diffusers takes if not
            set_alpha_to_one.

    Raises:
        UsageError: options that do not go together, or a time without signal, from which DDIM does not come back.
    """
    guess = pick("time that the denoiser is told", TOLD, told)
    level = pick("reading", READ, read)
    if told == "own" and (iterations, read, start) != (1, "told", 0.0):
        raise UsageError("iterations, read and start are for told='next'")
    if iterations < 1:
        raise UsageError(f"a step takes at least 1 iteration, not {iterations}")
    times = _rising(denoise, grid)
    times = times[1:] if told == "own" else [denoise.schedule.at(start), *times[1:]]
    if times[0].value > times[1].value:
        raise UsageError(
            f"start {start} is above {times[1].value}, the last noisy time of the grid"
        )
    if level and times[0].sigma == 0:
        raise UsageError("read='level' needs a level of noise in x0: give start=schedule.low")
    x = x0
    for t, s in pairwise(times):
        y = x
        for _ in range(iterations):
            y = carry(x, guess(denoise, y, t, s, level), t, s)
        x = y
    return x


def _next(denoise: Denoise, y: Tensor, t: Time[float], s: Time[float], level: bool) -> Tensor:
    x0 = denoise(y, s).x0
    if not level:
        return noise_in(y, x0, s)
    said = from_x0(denoise.predicts, x0, y, s)
    return noise_in(y, to_x0(denoise.predicts, said, y, t), t)


def _own(denoise: Denoise, y: Tensor, t: Time[float], s: Time[float], level: bool) -> Tensor:
    return noise_in(y, denoise(y, t).x0, t)


TOLD: dict[str, Callable[[Denoise, Tensor, Time[float], Time[float], bool], Tensor]] = {
    "next": _next,
    "own": _own,
}
READ = {"told": False, "level": True}


def _rising(denoise: Denoise, grid: Grid) -> list[Time[float]]:
    """The times of a grid from clean data up, all with signal."""
    times = along(denoise.schedule, grid)[::-1]
    if times[-1].alpha == 0:
        raise UsageError(
            f"at t = {times[-1].value} there is no signal, so data cannot be found from there: "
            "begin the grid below"
        )
    return times


# --- EDICT ----------------------------------------------------------------------------------------


@torch.no_grad()
def edict(
    denoise: Denoise, x0: Tensor, grid: Grid, *, mixing: float = 0.93
) -> tuple[Tensor, Tensor]:
    """The pair from which `edict_decode` comes back to (x0, x0), to rounding (Wallace et al., 2023: EDICT).

    Two evaluations a step. What keeps the pair together on the way down drives it apart on the way up, by 1 / mixing^2
    a step: the default is for up to some fifty steps, and 1 - 3.5 / steps for more.

    Args:
        x0: clean data, (B, C, *axes).
        grid: the times of the decoder, visited backwards.
        mixing: how much of each of the pair stays its own in a step, above 0 and at most 1.
    """
    _check(mixing)
    x, y = x0, x0
    for t, s in pairwise(_rising(denoise, grid)):
        y = blend(1 / mixing, y, 1 - 1 / mixing, x)
        x = blend(1 / mixing, x, 1 - 1 / mixing, y)
        y = carry(y, noise_in(x, denoise(x, s).x0, s), t, s)
        x = carry(x, noise_in(y, denoise(y, s).x0, s), t, s)
    return x, y


@torch.no_grad()
def edict_decode(
    denoise: Denoise, pair: tuple[Tensor, Tensor], grid: Grid, *, mixing: float = 0.93
) -> tuple[Tensor, Tensor]:
    """The pair at clean data, from a pair at the first time of the grid (Wallace et al., 2023: EDICT).

    From (x, x) it is a sampler of its own, near DDIM. The arguments are those of `edict`.
    """
    _check(mixing)
    x, y = pair
    for s, t in pairwise(reversed(_rising(denoise, grid))):
        x = carry(x, noise_in(y, denoise(y, s).x0, s), s, t)
        y = carry(y, noise_in(x, denoise(x, s).x0, s), s, t)
        x = blend(mixing, x, 1 - mixing, y)
        y = blend(mixing, y, 1 - mixing, x)
    return x, y


def _check(mixing: float) -> None:
    if not 0 < mixing <= 1:
        raise UsageError(f"mixing {mixing} is not above 0 and at most 1")


NAMES: dict[str, Callable[..., Any]] = {"ddim": ddim, "edict": edict}


# --- between two samples --------------------------------------------------------------------------


def slerp(a: Tensor, b: Tensor, weight: float | Tensor) -> Tensor:
    """From noise a (weight 0) to noise b (weight 1) along the great circle (Shoemake, 1985; DDIM, appendix D.5).

    Noises of equal norm keep it on the way, which `lerp` does not. Shapes: a and b (B, C, *axes), weight one number or
    one per sample (B,).

    Raises:
        UsageError: a and b are opposite, and every way is as short.
    """
    u, v = (c.double().flatten(1) for c in (a, b))
    u, v = u / u.norm(dim=1, keepdim=True), v / v.norm(dim=1, keepdim=True)
    # exact for small angles too, where the arc cosine is not
    angle = 2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1))
    if bool((torch.pi - angle < 1e-6).any()):
        raise UsageError("two opposite noises have no shortest way between them")
    part = torch.as_tensor(weight, dtype=torch.float64, device=a.device)
    sine, near = angle.sin(), angle < 1e-6
    first = torch.where(near, 1 - part, torch.sin((1 - part) * angle) / sine)
    second = torch.where(near, part, torch.sin(part * angle) / sine)
    return blend(first, a, second, b)


def lerp(a: Mapping[str, Any], b: Mapping[str, Any], weight: float | Tensor) -> dict[str, Tensor]:
    """Conditions on the straight line from a (weight 0) to b (weight 1), by keyword; weight as in `slerp`.

    Raises:
        UsageError: other names or shapes in a than in b, or a condition with nothing between its values.
    """
    if a.keys() != b.keys():
        raise UsageError(f"conditions {sorted(a)} and {sorted(b)} must have the same names")
    for name in a:
        both = (a[name], b[name])
        if not all(isinstance(c, Tensor) and c.is_floating_point() for c in both):
            raise UsageError(
                f"condition {name!r} is no tensor of real numbers: keep one of the two"
            )
        if both[0].shape != both[1].shape:
            raise UsageError(
                f"condition {name!r} has the shapes {tuple(both[0].shape)} and "
                f"{tuple(both[1].shape)}, which should be the same"
            )
    part = torch.as_tensor(weight, dtype=torch.float64)
    return {name: blend(1 - part, a[name], part, b[name]) for name in a}
