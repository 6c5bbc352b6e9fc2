r"""The times that a sampler visits: t_0 > t_1 > ... > t_n = 0.

A grid is a function from a schedule to a float64 tensor of n + 1 strictly decreasing times. The
last is clean data; the n before it are where the network is evaluated, so n is the number of steps.
Each function below makes grids by one rule: even in t, in the index of a table, in log-SNR, or in
another function of the noise-to-signal ratio sigma / alpha, which is the "sigma" of the papers
where alpha is 1. How a grid ends is the same choice for all rules, a row of `FINALS`.
"""

import math
import re
from collections.abc import Callable, Sequence
from itertools import accumulate, repeat
from typing import Any

import torch
from torch import Tensor

from mdiff.core.errors import UsageError
from mdiff.core.names import make, pick
from mdiff.core.schedules import FAINT, Schedule

Grid = Callable[[Schedule], Tensor]
Rule = Callable[[Schedule, int], Tensor]
"""(schedule, n) -> n decreasing times."""

FINALS: dict[str, tuple[int, bool]] = {
    "zero": (0, False),
    "low": (0, True),
    "discard": (1, False),
    "discard_low": (1, True),
}
"""How a grid of n steps ends, as (times left out, ends at schedule.low). "zero": n times by the
rule, then clean data. "low": clean data is not reached, the last step ends at the schedule's least
noise. "discard": the rule makes n + 1 times, and the last of them gives way to the end: the spacing
of SGM, of DPM-Solver in diffusers, and what web interfaces call "discard next-to-last sigma"."""


def linear(steps: int, *, final: str = "zero", whole: bool = False) -> Grid:
    """Even in t from schedule.high to schedule.low (Ho et al., 2020): "linspace" on a table.

    `whole` rounds to entries of the table, as DDIM and DPM-Solver do in diffusers.
    """
    return _grid(_even(lambda schedule, t: t, lambda schedule, t: t), steps, final, whole)


def sgm_uniform(steps: int, *, whole: bool = False) -> Grid:
    """Even in t, with one time more than steps, the last of which is left out.

    Source: the generative-models code of Podell et al., 2023.
    """
    return linear(steps, final="discard", whole=whole)


def quadratic(steps: int, *, reach: float = 0.8, final: str = "zero") -> Grid:
    """Squares of even numbers: indices of a table up to `reach` of it (Song et al., 2021, DDIM).

    Indices that coincide are visited once, so that there may be fewer steps. Without a table it is
    even in the square root of t from high to low (Lu et al., 2022).
    """

    def rule(schedule: Schedule, n: int) -> Tensor:
        if schedule.steps is None:
            return even(schedule, n)
        root = torch.linspace(0, math.sqrt(schedule.steps * reach), n, dtype=torch.float64)
        return _entries(schedule, (root**2).floor().unique().flip(0))

    even = _even(lambda schedule, t: t.sqrt(), lambda schedule, u: u**2)
    return _grid(rule, steps, final)


def leading(steps: int, offset: int = 0, *, final: str = "zero") -> Grid:
    """Indices offset + i k of a table of T, k = T // steps (Song et al., 2021, DDIM).

    `offset` is what diffusers calls steps_offset: 1 for Stable Diffusion and its kin.
    """

    def rule(schedule: Schedule, n: int) -> Tensor:
        stride = _table(schedule, n) // n
        return _entries(schedule, torch.arange(n - 1, -1, -1) * stride + offset)

    return _grid(rule, steps, final)


def trailing(steps: int, offset: int = 0, *, final: str = "zero") -> Grid:
    """Indices T - 1 - i T / steps of a table of T, rounded, plus offset (Lin et al., 2023)."""

    def rule(schedule: Schedule, n: int) -> Tensor:
        total = _table(schedule, n)
        place = total - torch.arange(n, dtype=torch.float64) * total / n
        return _entries(schedule, place.round() - 1 + offset)

    return _grid(rule, steps, final)


def simple(steps: int, *, final: str = "zero") -> Grid:
    """Indices T - 1 - floor(i T / steps) of a table of T. Source: "simple" of ComfyUI."""

    def rule(schedule: Schedule, n: int) -> Tensor:
        total = _table(schedule, n)
        return _entries(
            schedule, torch.tensor([total - 1 - int(i * (total / n)) for i in range(n)])
        )

    return _grid(rule, steps, final)


def respaced(sections: str) -> Grid:
    """Indices of a table as Improved DDPM writes them: "250", "10,15,20", "ddim50" or "fast27".

    Numbers split the table into as many even sections, each with so many indices, its ends among
    them; "ddimN" is the one stride that gives exactly N indices from 0; "fast27" is the upsampler's
    of GLIDE: "10,10,3,2,2" that ends two indices early. The text says the number of steps. Source:
    Nichol and Dhariwal, 2021, section 4; Nichol et al., 2022.

    Raises:
        UsageError: another form; when used, more indices than the table has.
    """
    if not RESPACED.fullmatch(sections):
        raise UsageError(
            f'"{sections}" is not a respacing such as 250, "10,15,20", ddim50 or fast27'
        )

    def rule(schedule: Schedule, n: int) -> Tensor:
        del n
        total = schedule.entries
        if sections.startswith("ddim"):
            indices = _strided(total, int(sections.removeprefix("ddim")))
        elif sections == "fast27":
            indices = [*_sections(total, [10, 10, 3, 2, 2])[:-1], total - 3]
        else:
            indices = _sections(total, [int(count) for count in sections.split(",")])
        return _entries(schedule, torch.tensor(sorted(set(indices), reverse=True)))

    return _grid(rule, 1)


RESPACED = re.compile(r"\d+(,\d+)*|ddim\d+|fast27")
"""The names that `from_name` takes for a respacing."""


def logsnr(
    steps: int,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    final: str = "zero",
    whole: bool = False,
) -> Grid:
    """Even in log-SNR, which is even in log sigma: "exponential", Lu's lambdas (Lu et al., 2022)."""
    rule = _even(Schedule.log_snr, Schedule.time, sigma_min, sigma_max)
    return _grid(rule, steps, final, whole)


def karras(
    steps: int,
    rho: float = 7.0,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    final: str = "zero",
    whole: bool = False,
) -> Grid:
    """Even in sigma^(1 / rho), sigma meaning sigma / alpha (Karras et al., 2022, eq. 5).

    Args:
        sigma_min, sigma_max: the ends, those of the schedule if None.
        whole: round to entries of the table.
    """
    rule = _even(
        lambda schedule, t: torch.exp(-schedule.log_snr(t) / (2 * rho)),
        lambda schedule, u: schedule.time(-2 * rho * u.log()),
        sigma_min,
        sigma_max,
    )
    return _grid(rule, steps, final, whole)


def polyexponential(
    steps: int,
    rho: float = 1.0,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    final: str = "zero",
) -> Grid:
    """log sigma falls as (1 - u)^rho over even u in [0, 1]. Source: k-diffusion, Crowson, 2022."""
    return _grid(
        _even(
            Schedule.log_snr, Schedule.time, sigma_min, sigma_max, warp=lambda u: 1 - (1 - u) ** rho
        ),
        steps,
        final,
    )


def beta(
    steps: int,
    alpha: float = 0.6,
    beta: float = 0.6,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    final: str = "zero",
) -> Grid:
    """Even quantiles of a Beta(alpha, beta) distribution over sigma (Lee et al., 2024)."""

    def warp(u: Tensor) -> Tensor:
        from scipy.special import betaincinv

        return 1 - torch.from_numpy(betaincinv(alpha, beta, (1 - u).numpy()))

    return _grid(
        _even(
            lambda schedule, t: torch.exp(-schedule.log_snr(t) / 2),
            lambda schedule, u: schedule.time(-2 * u.log()),
            sigma_min,
            sigma_max,
            warp,
        ),
        steps,
        final,
    )


def kl_optimal(
    steps: int,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    final: str = "zero",
) -> Grid:
    """Even in arctan sigma, which is best for Gaussian data (Sabour et al., 2024, eq. 15)."""
    return _grid(
        _even(
            lambda schedule, t: torch.atan(torch.exp(-schedule.log_snr(t) / 2)),
            lambda schedule, u: schedule.time(-2 * torch.tan(u).log()),
            sigma_min,
            sigma_max,
        ),
        steps,
        final,
    )


def linear_quadratic(steps: int, threshold: float = 0.025, first: int | None = None) -> Grid:
    """`first` even steps over the first `threshold` of a flow, then ever larger ones.

    It is even, then quadratic, in sigma / (alpha + sigma), which is the time of a flow; `first` is
    half of the steps if None. Source: Polyak et al., 2024 (Movie Gen); ComfyUI.
    """
    _positive(steps)
    if first is None:
        first = max(steps // 2, 1)
    if not 1 <= first <= steps or not 0 < threshold * steps <= first:
        raise UsageError(
            f"{steps} steps cannot begin with {first} that cover {threshold}: these have to be the "
            "smaller ones"
        )
    after = max(steps - first, 1)
    i = torch.arange(steps + 1, dtype=torch.float64)
    grown = (first - threshold * steps) * ((i - first).clamp(min=0) / after) ** 2
    share = 1 - (threshold * i + grown) / first if steps > first else 1 - i / steps

    def grid(schedule: Schedule) -> Tensor:
        start = schedule.at(schedule.high)
        level = share * (start.sigma / (start.alpha + start.sigma))
        times = schedule.time(2 * (torch.log1p(-level) - level.log()))
        times[0] = schedule.high
        return times

    return grid


# --- tables of levels -----------------------------------------------------------------------------


def ays_sd15(steps: int, *, final: str = "discard") -> Grid:
    """Align Your Steps for Stable Diffusion 1.5 (Sabour et al., 2024).

    Its eleven noise levels, interpolated in log sigma to other numbers of steps.
    """
    return _aligned(
        steps, final, (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
    )


def ays_sdxl(steps: int, *, final: str = "discard") -> Grid:
    """Align Your Steps for Stable Diffusion XL, see `ays_sd15` (Sabour et al., 2024)."""
    return _aligned(
        steps, final, (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.38, 0.234, 0.113, 0.029)
    )


def ays_svd(steps: int, *, final: str = "discard") -> Grid:
    """Align Your Steps for Stable Video Diffusion, sigma up to 700 (Sabour et al., 2024)."""
    return _aligned(
        steps, final, (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002)
    )


def _aligned(steps: int, final: str, levels: Sequence[float]) -> Grid:
    logs = torch.tensor(levels, dtype=torch.float64).log()

    def rule(schedule: Schedule, n: int) -> Tensor:
        place = torch.linspace(0, len(logs) - 1, n, dtype=torch.float64)
        left = place.long().clamp(max=len(logs) - 2)
        return _at_levels(schedule, torch.lerp(logs[left], logs[left + 1], place - left).exp())

    return _grid(rule, steps, final)


def times(values: Sequence[float] | Tensor) -> Grid:
    """These times, all of them: the last, where the run ends, is 0 for clean data.

    Source: diffusers' own list of timesteps, here as t.
    """
    listed = _listed(values, "times")
    return lambda schedule: listed.clone()


def sigmas(values: Sequence[float] | Tensor) -> Grid:
    """These levels of sigma / alpha, all of them: the last, where the run ends, is 0 for clean data.

    Source: the sigmas of k-diffusion (Crowson, 2022).
    """
    listed = _listed(values, "sigmas")
    return lambda schedule: _at_levels(schedule, listed)


def indices(values: Sequence[int] | Tensor) -> Grid:
    """These indices of a table, the largest first, then clean data.

    Source: diffusers' own list of timesteps.
    """
    listed = _listed(values, "indices")
    return _grid(lambda schedule, n: _entries(schedule, listed), 1)


def _listed(values: Any, what: str) -> Tensor:
    if isinstance(values, int | float | str):
        raise UsageError(f"{what} are a list of numbers, not {values!r}")
    return torch.as_tensor(values, dtype=torch.float64).cpu()


# --- parts of grids -------------------------------------------------------------------------------


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


def partial(grid: Grid, share: float) -> Grid:
    """The part of a grid below this share of its first time, which is where it begins instead.

    With the level at hand exactly, whatever the number of steps; a first step that would be shorter than a third of
    the one it is cut out of is one with the next.
    """
    if not 0 < share <= 1:
        raise UsageError(f"a share of a grid is above 0 and at most 1, not {share}")

    def begun(schedule: Schedule) -> Tensor:
        times = grid(schedule)
        if share == 1:
            return times
        start = times[-1] + share * (times[0] - times[-1])
        below = int((times >= start).sum())
        step, cut = times[below - 1] - times[below], start - times[below]
        if cut < step / 3 and below + 1 < len(times):
            below += 1
        return torch.cat([start.reshape(1), times[below:]])

    return begun


# --- what the rules share -------------------------------------------------------------------------


def _grid(rule: Rule, steps: int, final: str = "zero", whole: bool = False) -> Grid:
    """A grid by a rule, with its end; `whole` rounds the times to entries of a table."""
    _positive(steps)
    out, low = pick("end of a grid", FINALS, final)

    def grid(schedule: Schedule) -> Tensor:
        end = schedule.low if low else 0.0
        made = rule(schedule, steps + out)
        times = made[: len(made) - out]
        if times[-1] <= end:
            times = rule(schedule, steps + 1)[:steps]
        if whole:
            # halves to even, as numpy does; the decimals are those of float64
            times = _entries(schedule, schedule.index(times).mul(1e6).round().div(1e6).round())
        return torch.cat([times, times.new_full((1,), end)])

    return grid


def _even(
    forward: Callable[[Schedule, Tensor], Tensor],
    inverse: Callable[[Schedule, Tensor], Tensor],
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    warp: Callable[[Tensor], Tensor] = lambda u: u,
) -> Rule:
    """Times from schedule.high to schedule.low, or from sigma_max to sigma_min, even in forward(t),
    or at warp(u) for even u from 0 to 1.

    Where there is no signal at the first time and forward(t) is infinite, it is counted as if
    log-SNR were `FAINT` there.
    """

    def rule(schedule: Schedule, n: int) -> Tensor:
        ends = torch.tensor([schedule.high, schedule.low], dtype=torch.float64)
        for place, sigma in enumerate((sigma_max, sigma_min)):
            if sigma is not None:
                ends[place] = schedule.time(_double(-2 * math.log(sigma)))
        if not ends[0] >= ends[1]:
            raise UsageError(
                f"the grid would begin at sigma {sigma_max} and end at {sigma_min}: sigma_max has "
                "to be the larger"
            )
        first, last = forward(schedule, ends)
        if first.isinf():
            first = forward(schedule, schedule.time(_double(FAINT)))
        u = warp(torch.linspace(0, 1, n, dtype=torch.float64))
        times = inverse(schedule, torch.lerp(first, last, u))
        # the ends as they are given, not as they come back from the inverse
        times[-1], times[0] = ends[1], ends[0]
        return times

    return rule


def _double(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _entries(schedule: Schedule, index: Tensor) -> Tensor:
    """The times of these indices of a table, which must strictly decrease."""
    total = schedule.entries
    index = index.double()
    if len(index) == 0 or index[0] >= total or index[-1] < 0 or not bool((index.diff() < 0).all()):
        raise UsageError(
            f"a grid on {schedule.name} needs indices that strictly decrease within 0 to "
            f"{total - 1}, not {index.tolist()[:9]}: take fewer steps, or another offset"
        )
    return (index + 1) / total


def _at_levels(schedule: Schedule, sigma: Tensor) -> Tensor:
    """The times at which the schedule has these levels of sigma / alpha."""
    times = schedule.time(-2 * sigma.log())
    if not bool((times.diff() < 0).all()):
        raise UsageError(
            f"levels of sigma from {sigma[0]:.4g} to {sigma[-1]:.4g} do not strictly decrease on "
            f"{schedule.name}: several are the same or outside of what it has"
        )
    return times


def _sections(total: int, counts: Sequence[int]) -> list[int]:
    """`total` indices in even sections, of each so many, spread from its first to its last."""
    size, extra = divmod(total, len(counts))
    found, start = [], 0
    for number, count in enumerate(counts):
        length = size + (number < extra)
        if count > length:
            raise UsageError(f"{count} steps do not fit into a section of {length} entries")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        # summed up, not multiplied: the roundings of the original
        found += [start + round(at) for at in accumulate(repeat(stride, count - 1), initial=0.0)]
        start += length
    return found


def _strided(total: int, count: int) -> list[int]:
    """The indices of the first whole stride that gives exactly `count` of them."""
    for stride in range(1, total):
        if len(range(0, total, stride)) == count:
            return list(range(0, total, stride))
    raise UsageError(
        f"no whole stride gives exactly {count} of {total} entries: take {count} as it is"
    )


def _table(schedule: Schedule, steps: int) -> int:
    """The length of the schedule's table, which must have at least `steps` entries."""
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
    "simple": simple,
    "quadratic": quadratic,
    "logsnr": logsnr,
    "exponential": logsnr,
    "polyexponential": polyexponential,
    "karras": karras,
    "beta": beta,
    "kl_optimal": kl_optimal,
    "sgm_uniform": sgm_uniform,
    "linear_quadratic": linear_quadratic,
    "ays_sd15": ays_sd15,
    "ays_sdxl": ays_sdxl,
    "ays_svd": ays_svd,
}
"""The grids that a number of steps makes."""

LISTS: dict[str, Callable[..., Grid]] = {
    "times": times,
    "sigmas": sigmas,
    "indices": indices,
    "respaced": respaced,
}
"""The grids that a list makes, and the text of a respacing."""


def find(name: str) -> Callable[..., Grid]:
    """What makes the grid of a name: a row of `NAMES` or `LISTS`; or the respacing that the name
    is, whatever the number of steps.

    Raises:
        UsageError: unknown name (the nearest is named).
    """
    if RESPACED.fullmatch(name):
        return lambda steps=None: respaced(name)
    return pick("grid", {**NAMES, **LISTS}, name)


def from_name(name: str, steps: int | str | Sequence[float] | Tensor = 20, **params: Any) -> Grid:
    """The grid of that name with so many steps, e.g. from_name("karras", 20, rho=7).

    What makes one of `LISTS` takes the place of the number: from_name("indices", [900, 500, 100]).
    A respacing is a name, and says its own number: from_name("ddim50").

    Raises:
        UsageError: unknown name (the nearest is named), or parameters that it does not take.
    """
    return make("grid", {name: find(name)}, name, steps, **params)
