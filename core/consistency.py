r"""Consistency training: a denoiser that says the same of all points on one path of the probability flow.

A consistency function f(x_t, t) takes any point of a path to its end, f(x, 0) = x (Song et al., 2023). The losses here
compare f at a time t of a grid with f at the next time s, on x_s found by a teacher's step (distillation) or with the
same data and noise (training). At the last step s is clean data and f(x_s, s) is x_s itself: so the boundary
condition holds for every network, also for one that is not built to fulfil it.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mdiff.core.bound import mean_of_each
from mdiff.core.denoiser import Denoise, from_x0, to_x0
from mdiff.core.errors import UsageError
from mdiff.core.grids import Grid
from mdiff.core.names import pick
from mdiff.core.samplers.base import move
from mdiff.core.schedules import Schedule, Time, blend, pad

Distance = Callable[[Tensor, Tensor], Tensor]


def squared(a: Tensor, b: Tensor) -> Tensor:
    """The mean squared error (Song et al., 2023: l2), (B,)."""
    return mean_of_each((a - b) ** 2)


def absolute(a: Tensor, b: Tensor) -> Tensor:
    """The mean absolute error (Song et al., 2023: l1), (B,)."""
    return mean_of_each((a - b).abs())


def pseudo_huber(a: Tensor, b: Tensor) -> Tensor:
    """sqrt(|a - b|^2 + c^2) - c, c = 0.00054 sqrt(D), over a whole sample (Song and Dhariwal, 2024: iCT), (B,)."""
    c = 0.00054 * math.sqrt(a[0].numel())
    return ((a - b).flatten(1).square().sum(1) + c**2).sqrt() - c


DISTANCES: dict[str, Distance] = {
    "squared": squared,
    "absolute": absolute,
    "pseudo_huber": pseudo_huber,
}


# --- the two losses -------------------------------------------------------------------------------


def consistency_distillation(
    teacher: Denoise,
    grid: Grid,
    *,
    target: Denoise | None = None,
    solver: str = "heun",
    distance: str = "squared",
    weight: str = "uniform",
) -> Callable[[Denoise, Tensor, Tensor, Tensor], Tensor]:
    """Consistency distillation: x_s by one step of a teacher's flow (Song et al., 2023, alg. 2).

    Args:
        teacher: a trained denoiser.
        grid: the times; t is to be drawn from it, see `times.visited`.
        target: what says f at s, an average of the network's past weights; the network itself if None.
        solver: "heun" or "euler"; the step to clean data is Euler's.
        distance: a row of `DISTANCES`.
        weight: a row of `WEIGHTS`.
    """
    step = pick("solver", SOLVERS, solver)

    def follow(x0: Tensor, z: Tensor, x: Tensor, t: Time[Tensor], s: Time[Tensor]) -> Tensor:
        return step(teacher, x, t, s)

    return _loss(follow, grid, target, distance, weight)


def consistency_training(
    grid: Grid,
    *,
    target: Denoise | None = None,
    distance: str = "squared",
    weight: str = "uniform",
) -> Callable[[Denoise, Tensor, Tensor, Tensor], Tensor]:
    """Consistency training: x_s from the same data and noise, no teacher (Song et al., 2023, alg. 3).

    With no target, "pseudo_huber", weight "gap" and times of a normal law it is that of Song and Dhariwal, 2024. The
    arguments are those of `consistency_distillation`.
    """

    def follow(x0: Tensor, z: Tensor, x: Tensor, t: Time[Tensor], s: Time[Tensor]) -> Tensor:
        return blend(s.alpha, x0, s.sigma, z)

    return _loss(follow, grid, target, distance, weight)


WEIGHTS: dict[str, Callable[[Time[Tensor], Time[Tensor]], Tensor]] = {
    "uniform": lambda t, s: torch.ones_like(t.value),
    # smaller noise counts more (Song and Dhariwal, 2024, section 3.1)
    "gap": lambda t, s: 1 / (t.sigma / t.alpha - s.sigma / s.alpha),
}


def _loss(
    follow: Callable[[Tensor, Tensor, Tensor, Time[Tensor], Time[Tensor]], Tensor],
    grid: Grid,
    target: Denoise | None,
    distance: str,
    weight: str,
) -> Callable[[Denoise, Tensor, Tensor, Tensor], Tensor]:
    apart, counts = pick("distance", DISTANCES, distance), pick("weight", WEIGHTS, weight)

    def loss(denoise: Denoise, x0: Tensor, t: Tensor, z: Tensor) -> Tensor:
        schedule = denoise.schedule
        now = schedule.at(t.double())
        then = schedule.at(following(grid, schedule, now.value))
        x = blend(now.alpha, x0, now.sigma, z)
        with torch.no_grad():
            y = follow(x0, z, x, now, then)
            said = (target or denoise)(y, _evaluable(schedule, then)).x0
            goal = torch.where(_is_clean(then, y), y, said)
        each = apart(denoise(x, now).x0, goal)
        return each * counts(now, then).to(each)

    return loss


def following(grid: Grid, schedule: Schedule, t: Tensor) -> Tensor:
    """The next time of the grid below each t, (B,)."""
    rising = grid(schedule).to(t).flip(0)
    # what a law or a float32 rounded still is the time that it was drawn as
    place = torch.searchsorted(rising, t.contiguous() * (1 - 1e-6)) - 1
    return rising[place.clamp(min=0)]


def _is_clean(s: Time[Tensor], x: Tensor) -> Tensor:
    return pad((s.sigma == 0).to(x.device), x) > 0


def _evaluable(schedule: Schedule, s: Time[Tensor]) -> Time[Tensor]:
    """s, with the lowest time at which networks are evaluated in place of clean data."""
    return schedule.at(s.value.clamp(min=schedule.low))


# --- the teacher's step ---------------------------------------------------------------------------


def _euler(teacher: Denoise, x: Tensor, t: Time[Any], s: Time[Any]) -> Tensor:
    return move(x, teacher(x, t).x0, t, s)


def _heun(teacher: Denoise, x: Tensor, t: Time[Any], s: Time[Any]) -> Tensor:
    x0 = teacher(x, t).x0
    euler = move(x, x0, t, s)
    end = _evaluable(teacher.schedule, s)
    first, second = from_x0("eps", x0, x, t), from_x0("eps", teacher(euler, end).x0, euler, end)
    mean = to_x0("eps", (first + second) / 2, x, t)
    return torch.where(_is_clean(s, x), euler, move(x, mean, t, s))


SOLVERS: dict[str, Callable[[Denoise, Tensor, Time[Any], Time[Any]], Tensor]] = {
    "euler": _euler,
    "heun": _heun,
}


# --- how the grid grows while a network trains ----------------------------------------------------


def growing(step: int, total: int, low: int = 2, high: int = 150) -> int:
    """Number of times of the grid: its square grows evenly from low to high + 1 (Song et al., 2023, appendix C)."""
    _training(step, total)
    square = step / total * ((high + 1) ** 2 - low**2) + low**2
    return math.ceil(math.sqrt(square) - 1) + 1


def doubling(step: int, total: int, low: int = 10, high: int = 1280) -> int:
    """Number of times of the grid: doubled at even intervals up to high, plus 1 (Song and Dhariwal, 2024: iCT)."""
    _training(step, total)
    interval = total // (math.floor(math.log2(high / low)) + 1)
    return min(low * 2 ** (step // max(1, interval)), high) + 1


def target_decay(steps: int, low: int = 2, decay: float = 0.95) -> float:
    """Decay of the target's average for a grid of so many steps: exp(low log(decay) / steps) (Song et al., 2023)."""
    return math.exp(low * math.log(decay) / steps)


def _training(step: int, total: int) -> None:
    if not 0 <= step <= total:
        raise UsageError(f"step {step} is not between 0 and the {total} of the training")
