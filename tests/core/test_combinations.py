"""Every sampler on every schedule with every kind of prediction, over 1, 2 and 3 axes in turn.

Each run is finite, the same for the same seed, the same for a sample alone and in a batch, and the same if it is
saved, restored and gone on with; or it is refused in one line that says why.
"""

import zlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mdiff.core import Denoiser, State, grids, noise, samplers, schedules, steps
from mdiff.core.denoiser import PREDICTS
from mdiff.core.errors import UsageError
from mdiff.core.schedules import Schedule

SHAPES = [(2, 6), (2, 3, 4), (2, 2, 3, 2)]
SEEDS = [7, 8]
NEED = {"betas": {"table": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]}}
SCHEDULES: dict[str, Schedule] = {
    name: schedules.from_name(name, **NEED.get(name, {}))
    for name in schedules.NAMES
    if name != "zero_terminal"
}
SCHEDULES["zero_terminal"] = schedules.from_name(
    "zero_terminal", schedule=schedules.scaled_linear()
)


# where t = 1 holds no signal, noise says nothing of the data, and some steps have no limit
NO_SIGNAL = {"flow", "zero_terminal"}
SAYS_NOISE = {"eps", "score"}
NEEDS_SIGNAL = {"euler_maruyama", "annealed_langevin", "pndm", "plms"}


def refused(sampler: str, schedule: str, predicts: str) -> bool:
    return schedule in NO_SIGNAL and (predicts in SAYS_NOISE or sampler in NEEDS_SIGNAL)


def net(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x) * (0.3 + 0.1 * t.reshape(-1, *[1] * (x.ndim - 1)))


def combinations(sampler: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    for schedule in SCHEDULES:
        for predicts in PREDICTS:
            turn = zlib.crc32(f"{sampler} {schedule} {predicts}".encode())
            yield schedule, predicts, SHAPES[turn % len(SHAPES)]


def run(denoise: Denoiser, sampler: str, seeds: list[int], shape: tuple[int, ...]) -> list[State]:
    streams = noise.from_seeds(seeds, shape)
    return list(steps(denoise, streams, sampler=sampler, grid=grids.linear(4)))


@pytest.mark.parametrize("sampler", samplers.NAMES)
def test_every_schedule_and_prediction(sampler: str) -> None:
    for name, predicts, shape in combinations(sampler):
        schedule = SCHEDULES[name]
        denoise = Denoiser(net, schedule, predicts=predicts)
        where = f"{sampler} on {name} with {predicts}, {len(shape) - 1} axes"
        try:
            states = run(denoise, sampler, SEEDS, shape)
        except UsageError as error:
            assert refused(sampler, name, predicts) and "signal" in str(error), f"{where}: {error}"
            continue
        assert not refused(sampler, name, predicts), where
        end = states[-1].x
        assert end.isfinite().all(), where
        assert torch.equal(end, run(denoise, sampler, SEEDS, shape)[-1].x), where
        assert torch.equal(end[1:], run(denoise, sampler, SEEDS[1:], shape)[-1].x), where
        halfway = State.restore(states[1].save())
        streams = noise.from_seeds(SEEDS, shape)
        *_, last = steps(denoise, streams, sampler=sampler, grid=grids.linear(4), resume=halfway)
        assert torch.equal(end, last.x), where
