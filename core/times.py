r"""The times that training visits: a law over [0, 1], and how evenly a batch is spread over it.

A law is its quantile function u -> t of uniform numbers u, so every spread of the u (independent, stratified, ...) goes
with every law and leaves it what it is: only sums over a batch become less noisy. All randomness comes from the
generator that is given.

A draw has weights besides times. They are 1 unless some times are drawn more often than a law says, to be counted less:
the mean of weight * loss is the mean of the loss under that law.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mdiff.core.errors import UsageError
from mdiff.core.grids import Grid
from mdiff.core.names import make, pick
from mdiff.core.schedules import Schedule


class Draw(NamedTuple):
    """Times for a batch and what each counts, both (B,) float64."""

    t: Tensor
    weight: Tensor


Times = Callable[[Schedule, int, torch.Generator], Draw]
"""times(schedule, B, generator) -> Draw"""


# --- how evenly -----------------------------------------------------------------------------------


def _uniform(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, dtype=torch.float64, generator=generator, device=generator.device)


def _places(u: Tensor) -> Tensor:
    return torch.arange(len(u), dtype=u.dtype, device=u.device)


def independent(n: int, generator: torch.Generator) -> Tensor:
    """n uniform numbers that know nothing of each other (Ho et al., 2020, alg. 1)."""
    return _uniform(n, generator)


def low_discrepancy(n: int, generator: torch.Generator) -> Tensor:
    """A comb of n teeth, 1 / n apart, at one random offset (Kingma et al., 2021: VDM)."""
    u = _uniform(1, generator).expand(n)
    return (u + _places(u) / n) % 1


def stratified(n: int, generator: torch.Generator) -> Tensor:
    """One number at random in each of n equal cells (McKay et al., 1979)."""
    u = _uniform(n, generator)
    return (u + _places(u)) / n


def antithetic(n: int, generator: torch.Generator) -> Tensor:
    """Half the batch at u and half at 1 - u: entries i and T - 1 - i of a table (Song et al., 2021: DDIM)."""
    u = _uniform(n // 2 + n % 2, generator)
    return torch.cat([u, 1 - u])[:n]


SPREADS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "independent": independent,
    "low_discrepancy": low_discrepancy,
    "stratified": stratified,
    "antithetic": antithetic,
}


# --- laws -----------------------------------------------------------------------------------------


def _law(quantile: Callable[[Schedule, Tensor], Tensor], spread: str) -> Times:
    """The times of a quantile function, inside the range where networks are evaluated."""
    numbers = pick("spread", SPREADS, spread)

    def times(schedule: Schedule, n: int, generator: torch.Generator) -> Draw:
        # the ends of [0, 1] come up too rarely to matter, but they may be infinite
        t = quantile(schedule, numbers(n, generator)).clamp(schedule.low, schedule.high)
        return Draw(t, torch.ones_like(t))

    return times


def _entry(u: Tensor, count: int) -> Tensor:
    return (u * count).long().clamp(max=count - 1)


def uniform(spread: str = "independent") -> Times:
    """Uniform in t, from schedule.low to schedule.high (Song et al., 2021: score SDE, eq. 7)."""
    return _law(lambda schedule, u: schedule.low + (schedule.high - schedule.low) * u, spread)


def entries(spread: str = "independent") -> Times:
    """Uniform over the entries of a table (Ho et al., 2020, alg. 1).

    Raises:
        UsageError: (when used) the schedule is continuous.
    """
    return _law(
        lambda schedule, u: (_entry(u, schedule.entries) + 1).to(u) / schedule.entries, spread
    )


def log_normal(mean: float = -1.2, std: float = 1.2, spread: str = "independent") -> Times:
    """ln(sigma / alpha) ~ N(mean, std^2) (Karras et al., 2022, table 1: EDM)."""
    return _law(
        lambda schedule, u: schedule.time(-2 * (mean + std * torch.special.ndtri(u))), spread
    )


def log_uniform(spread: str = "independent") -> Times:
    """Uniform in log-SNR between the ends of the schedule (Song and Ermon, 2019, section 4.2: geometric levels)."""

    def quantile(schedule: Schedule, u: Tensor) -> Tensor:
        first, last = schedule.log_snr(u.new_tensor([schedule.low, schedule.high]))
        if not math.isfinite(last):
            raise UsageError(
                f"{schedule.name} has no signal at its end, where log-SNR is infinite: take times "
                "of another law"
            )
        return schedule.time(torch.lerp(first, last, u))

    return _law(quantile, spread)


def logit_normal(mean: float = 0.0, std: float = 1.0, spread: str = "independent") -> Times:
    """logit(t) ~ N(mean, std^2), for flows (Esser et al., 2024, eq. 19)."""
    return _law(lambda schedule, u: torch.sigmoid(mean + std * torch.special.ndtri(u)), spread)


def mode(scale: float = 1.29, spread: str = "independent") -> Times:
    """More at t = 1/2 the higher the scale, with tails that reach both ends (Esser et al., 2024, eq. 20).

    Raises:
        UsageError: scale outside [-1, 2 / (pi - 2)], where the map is not monotone.
    """
    if not -1 <= scale <= 2 / (math.pi - 2):
        raise UsageError(f"scale {scale} is not between -1 and {2 / (math.pi - 2):.4f}")
    return _law(
        lambda schedule, u: 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u), spread
    )


def visited(
    grid: Grid, mean: float | None = None, std: float = 1.0, spread: str = "independent"
) -> Times:
    """The times of a grid that a sampler leaves from, for consistency models (Song et al., 2023, alg. 2).

    Uniform over them; or, with a mean, as likely as a step's stretch of ln(sigma / alpha) is under N(mean, std^2) (Song
    and Dhariwal, 2024, section 3.5).
    """

    def quantile(schedule: Schedule, u: Tensor) -> Tensor:
        t = grid(schedule).to(u)
        if mean is None:
            return t[_entry(u, len(t) - 1)]
        # ln(sigma / alpha) falls along the grid, to -inf at clean data
        mass = -torch.special.ndtr((-schedule.log_snr(t) / 2 - mean) / std).diff()
        return t[_choose(u, mass)]

    return _law(quantile, spread)


# --- importance -----------------------------------------------------------------------------------


def _choose(u: Tensor, mass: Tensor) -> Tensor:
    """The quantile function of a law over 0 ... T - 1 with probabilities in proportion to `mass`."""
    total = mass.cumsum(0)
    # a mass of 0 is never chosen, not even where u is on an edge
    return torch.searchsorted(total, u * total[-1], right=True).clamp(max=len(mass) - 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class LossHistory:
    """The last losses seen at each entry of a table.

    Attributes:
        losses: (T, K) float64, the last K in any order.
        counts: (T,) int64, how many there have ever been.
    """

    losses: Tensor
    counts: Tensor

    @staticmethod
    def empty(entries: int, length: int = 10) -> "LossHistory":
        """No loss yet, and room for the last `length` of each of `entries`."""
        return LossHistory(
            losses=torch.zeros(entries, length, dtype=torch.float64),
            counts=torch.zeros(entries, dtype=torch.int64),
        )

    def add(self, t: Tensor, losses: Tensor) -> "LossHistory":
        """The history after a batch: its times (B,), entries of the table, and its losses (B,) before any weight.

        It brings both to the CPU, which waits for an accelerator: once a step, after the step.
        """
        kept, counts = self.losses.clone(), self.counts.clone()
        for i, loss in zip(self._index(t).tolist(), losses.tolist(), strict=True):
            kept[i, counts[i] % kept.shape[1]] = loss
            counts[i] += 1
        return LossHistory(losses=kept, counts=counts)

    def probabilities(self, uniform: float = 0.001) -> Tensor:
        """(T,): in proportion to the root of the mean square, mixed with `uniform` of the uniform law.

        Uniform altogether until every entry has all the losses there is room for.
        """
        count, length = self.losses.shape
        flat = torch.full((count,), 1 / count, dtype=torch.float64)
        if int(self.counts.min()) < length:
            return flat
        root = self.losses.square().mean(1).sqrt()
        return root / root.sum() * (1 - uniform) + flat * uniform

    def _index(self, t: Tensor) -> Tensor:
        return (t.double().cpu() * len(self.losses)).round().long() - 1


def importance(history: LossHistory, uniform: float = 0.001, spread: str = "independent") -> Times:
    """Entries in proportion to the root of their mean squared loss (Nichol and Dhariwal, 2021, eq. 18).

    Make it anew whenever the history has grown.

    Raises:
        UsageError: (when used) the schedule is not a table of the history's length.
    """
    numbers = pick("spread", SPREADS, spread)
    p = history.probabilities(uniform)

    def times(schedule: Schedule, n: int, generator: torch.Generator) -> Draw:
        if schedule.entries != len(p):
            raise UsageError(
                f"the history has {len(p)} entries and {schedule.name} has {schedule.entries}: "
                "begin with LossHistory.empty(schedule.entries)"
            )
        chosen = _choose(numbers(n, generator).cpu(), p)
        return Draw((chosen + 1).double() / len(p), 1 / (len(p) * p[chosen]))

    return times


NAMES: dict[str, Callable[..., Times]] = {
    "uniform": uniform,
    "entries": entries,
    "log_normal": log_normal,
    "log_uniform": log_uniform,
    "logit_normal": logit_normal,
    "mode": mode,
    "visited": visited,
    "importance": importance,
}


def from_name(name: str, **params: Any) -> Times:
    """The times of that name, e.g. from_name("log_normal", mean=-0.4, std=1.0).

    Raises:
        UsageError: unknown name (the nearest is named), or parameters that it does not take.
    """
    return make("distribution of times", NAMES, name, **params)
