"""Sampling: one loop, as a generator of states.

`steps` yields a `State` after each step; progress, previews, cancelling and saving belong to
whoever consumes it. `sample` is the shortest consumer. A state that was saved and restored goes on
bit for bit as if never interrupted.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from mdiff.core import grids, samplers
from mdiff.core.denoiser import Denoise, Guided, Prediction
from mdiff.core.errors import NonFiniteError, UsageError
from mdiff.core.grids import Grid
from mdiff.core.noise import Noise
from mdiff.core.samplers import Memory, Sampler
from mdiff.core.schedules import Schedule, Time

_CHECK_EVERY = 16
"""Steps between two looks at whether x is finite, on devices that a look makes the host wait for."""


@dataclass(frozen=True, kw_only=True)
class State:
    """A run after `index` of `total` steps.

    Attributes:
        t: the time of x.
        x: (B, C, *axes).
        x0: what the denoiser last said, for previews; None in a restored state.
        sampler_state, noise_state: what the next step needs besides x.
    """

    index: int
    total: int
    t: float
    x: Tensor
    x0: Tensor | None
    sampler_state: Memory
    noise_state: Mapping[str, Tensor]

    def save(self) -> dict[str, Tensor]:
        """All that the rest of the run depends on, as tensors that share no memory."""
        parts: dict[str, Tensor | float] = {
            "index": self.index,
            "total": self.total,
            "t": self.t,
            "x": self.x,
            **{f"sampler.{name}": value for name, value in self.sampler_state.items()},
            **{f"noise.{name}": value for name, value in self.noise_state.items()},
        }
        return {
            name: value.clone().contiguous()
            if isinstance(value, Tensor)
            else torch.tensor(value, dtype=torch.float64)
            for name, value in parts.items()
        }

    @staticmethod
    def restore(saved: Mapping[str, Tensor]) -> "State":
        """The state that `save` made these tensors of."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}

        return State(
            index=int(saved["index"]),
            total=int(saved["total"]),
            t=float(saved["t"]),
            x=saved["x"],
            x0=None,
            sampler_state={k: v if v.ndim else v.item() for k, v in part("sampler.").items()},
            noise_state=part("noise."),
        )


@torch.no_grad()
def steps(
    denoise: Denoise,
    noise: Noise,
    *,
    sampler: str | Sampler = "dpmpp_2m",
    grid: Grid | None = None,
    x: Tensor | None = None,
    resume: State | None = None,
) -> Iterator[State]:
    """The states of a run, one after each step.

    Args:
        denoise: the denoiser; its schedule is that of the run.
        noise: the streams, one per sample; they are copied and stay where they are.
        sampler: a name of `samplers.NAMES`, or a sampler.
        grid: the times to visit, `grids.karras(20)` if None.
        x: the start, (B, C, *axes) at the first time of the grid; if None, drawn from the prior,
            which is N(0, max(1, sigma)^2 I): unit variance where the schedule preserves it,
            sigma_max where it explodes.
        resume: a state of an earlier run with the same arguments, to go on from.

    Raises:
        UsageError: unknown sampler, a grid that does not descend within [0, 1], an x or a state
            that does not fit.
        NonFiniteError: the denoiser gave a NaN or an infinity; the message names the step and the
            noise level.
    """
    sampler = samplers.from_name(sampler) if isinstance(sampler, str) else sampler
    times = along(denoise.schedule, grid or grids.karras(20))
    total = len(times) - 1
    noise = Noise.restore(resume.noise_state if resume else noise.state())
    memory: Memory = {}
    first = 0
    if resume is not None:
        at = times[resume.index].value if resume.total == total else math.nan
        if not math.isclose(resume.t, at, abs_tol=1e-12):
            raise UsageError(
                f"the state is at t = {resume.t} after {resume.index} of {resume.total} steps, not "
                f"on this grid of {total}: resume with the grid that it was saved with"
            )
        first, x, memory = resume.index, resume.x, resume.sampler_state
    elif x is None:
        x = noise.draw(denoise.device) * max(1.0, times[0].sigma)
    if x.shape != (len(noise.generators), *noise.shape):
        raise UsageError(
            f"x is {tuple(x.shape)}, and the noise is for {(len(noise.generators), *noise.shape)}"
        )
    observed, said = _observe(denoise)
    sums: list[Tensor] = []
    # sums of half a precision overflow
    kind = torch.float32 if torch.finfo(x.dtype).bits < 32 else None
    every = 1 if x.device.type == "cpu" else _CHECK_EVERY
    for index in range(first, total):
        x, memory = sampler.step(observed, x, times[index], times[index + 1], memory, noise)
        # one pass, and not finite if any x0 was not, since every step adds x0 to x
        sums.append(x.sum(dtype=kind))
        if len(sums) == every or index + 1 == total:
            _check(sums, times, index)
            sums.clear()
        yield State(
            index=index + 1,
            total=total,
            t=times[index + 1].value,
            x=x,
            x0=said.pop(),
            sampler_state=memory,
            noise_state=noise.state(),
        )


def sample(
    denoise: Denoise,
    noise: Noise,
    *,
    sampler: str | Sampler = "dpmpp_2m",
    grid: Grid | None = None,
    x: Tensor | None = None,
    resume: State | None = None,
    on_step: Callable[[State], None] | None = None,
) -> Tensor:
    """The sample (B, C, *axes) at the end of the run that `steps` describes.

    `on_step` sees every state on the way.
    """
    end = x if resume is None else resume.x
    for state in steps(denoise, noise, sampler=sampler, grid=grid, x=x, resume=resume):
        end = state.x
        if on_step is not None:
            on_step(state)
    return cast(Tensor, end)  # a grid has at least one step


def along(schedule: Schedule, grid: Grid) -> list[Time[float]]:
    """The schedule along the grid, as Python floats: computed once, and no device is waited for."""
    t = grid(schedule).double().cpu()
    if t.ndim != 1 or len(t) < 2 or not bool((t.diff() < 0).all()) or t[0] > 1 or t[-1] < 0:
        raise UsageError(
            "a grid is one row of two or more strictly decreasing times within [0, 1], "
            f"not {t.tolist()}"
        )
    return [Time(*row) for row in zip(*(entry.tolist() for entry in schedule.at(t)), strict=True)]


def _observe(denoise: Denoise) -> tuple[Guided, deque[Tensor]]:
    """The same denoiser, and where to find the x0 that it said last."""
    said: deque[Tensor] = deque(maxlen=1)

    def rule(inner: Denoise, x: Tensor, t: Time[float]) -> Prediction:
        answer = inner(x, t)
        said.append(answer.x0)
        return answer

    return Guided(inner=denoise, rule=rule), said


def _check(sums: list[Tensor], times: list[Time[float]], index: int) -> None:
    """Raises for the first of the steps up to `index` whose sum over x is not finite."""
    values = [sums[0].item()] if len(sums) == 1 else torch.stack(sums).tolist()
    for step, value in enumerate(values, index + 1 - len(values)):
        if not math.isfinite(value):
            t = times[step]
            raise NonFiniteError(
                f"a NaN or an infinity in step {step + 1} of {len(times) - 1} (t = {t.value:.4g}, "
                f"sigma = {t.sigma:.4g}): try --precision fp32, or less guidance"
            )
