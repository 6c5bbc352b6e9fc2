r"""The times that a sampler visits: t_0 > t_1 > ... > t_n = 0.

A grid is a function from a schedule to a float64 tensor of n + 1 strictly decreasing times. The
last is clean data; the n before it are where the network is evaluated, so n is the number of steps.
Each function below makes grids by one rule: even in t, in the index of a table, in log-SNR, or in a
power of the noise-to-signal ratio.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mdiff.core.errors import UsageError
from mdiff.core.names import make
from mdiff.core.schedules import Schedule

Grid = Callable[[Schedule], Tensor]


def linear(steps: int) -> Grid:
    """Even in t from schedule.high to schedule.low: on a table, the "linspace" of its indices."""
    return _even(steps, lambda schedule, t: t, lambda schedule, t: t)


def logsnr(steps: int) -> Grid:
    """Even in log-SNR (Lu et al., 2022)."""
    return _even(steps, Schedule.log_snr, Schedule.time)


def karras(steps: int, rho: float = 7.0) -> Grid:
    """Even in (sigma / alpha)^(1 / rho) (Karras et al., 2022, eq. 5)."""
    return _even(
        steps,
        lambda schedule, t: torch.exp(-schedule.log_snr(t) / (2 * rho)),
        lambda schedule, u: schedule.time(-2 * rho * u.log()),
    )


def leading(steps: int, offset: int = 0) -> Grid:
    """Indices offset + i k of a table of T, k = T // steps: the spacing of DDIM.

    `offset` is what diffusers calls steps_offset: 1 for Stable Diffusion and its kin.
    """

    def grid(schedule: Schedule) -> Tensor:
        total = _table(schedule, steps)
        index = torch.arange(steps - 1, -1, -1, dtype=torch.float64) * (total // steps) + offset
        return _closed((index + 1) / total)

    return grid


def trailing(steps: int) -> Grid:
    """Indices T - 1 - i T / steps of a table of T, rounded (Lin et al., 2023)."""

    def grid(schedule: Schedule) -> Tensor:
        total = _table(schedule, steps)
        place = total - torch.arange(steps, dtype=torch.float64) * total / steps
        return _closed(place.round() / total)

    return grid


def truncate(grid: Grid, start: float) -> Grid:
    """The part of a grid at t <= start, for data noised to the first of those times.

    Raises:
        UsageError: (when used) the grid has no step there.
    """

    def truncated(schedule: Schedule) -> Tensor:
        times = grid(schedule)
        kept = times[times <= start + 1e-9]
        if len(kept) < 2:
            raise UsageError(
                f"start {start} leaves no step of this grid, the last of which begins at "
                f"t = {times[-2]:.4g}: raise the start or the number of steps"
            )
        return kept

    return truncated


def _even(
    steps: int,
    forward: Callable[[Schedule, Tensor], Tensor],
    inverse: Callable[[Schedule, Tensor], Tensor],
) -> Grid:
    """`steps` times from schedule.high to schedule.low, even in forward(t), then clean data."""
    _positive(steps)

    def grid(schedule: Schedule) -> Tensor:
        ends = torch.tensor([schedule.high, schedule.low], dtype=torch.float64)
        first, last = forward(schedule, ends)
        times = inverse(
            schedule, torch.lerp(first, last, torch.linspace(0, 1, steps, dtype=torch.float64))
        )
        # the ends as they are given, not as they come back from the inverse
        times[-1], times[0] = ends[1], ends[0]
        return _closed(times)

    return grid


def _closed(times: Tensor) -> Tensor:
    return torch.cat([times, times.new_zeros(1)])


def _table(schedule: Schedule, steps: int) -> int:
    """The length of the schedule's table, which must have at least `steps` entries."""
    _positive(steps)
    if steps > schedule.entries:
        raise UsageError(f"{steps} steps do not fit into a table of {schedule.entries} entries")
    return schedule.entries


def _positive(steps: int) -> None:
    if steps < 1:
        raise UsageError(f"a grid has at least 1 step, not {steps}")


NAMES: dict[str, Callable[..., Grid]] = {
    "linear": linear,
    "leading": leading,
    "trailing": trailing,
    "logsnr": logsnr,
    "karras": karras,
}


def from_name(name: str, steps: int, **params: Any) -> Grid:
    """The grid of that name with so many steps, e.g. from_name("karras", 20, rho=7).

    Raises:
        UsageError: unknown name (the nearest is named), or parameters that it does not take.
    """
    return make("grid", NAMES, name, steps, **params)
