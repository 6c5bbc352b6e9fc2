"""The loop: reproducible, resumable, and explicit about what went wrong."""

import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mdiff.core import (
    Denoiser,
    State,
    grids,
    guidance,
    noise,
    sample,
    samplers,
    sampling,
    schedules,
    steps,
)
from mdiff.core.errors import NonFiniteError, UsageError

SHAPES = [(3, 17), (2, 5, 7), (2, 3, 4, 5)]
SAMPLERS = {
    **{name: samplers.from_name(name) for name in samplers.NAMES},
    "ddim, eta 0.7": samplers.DDIM(eta=0.7),
}
GRID = grids.trailing(12)
each_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
each_shape = pytest.mark.parametrize("shape", SHAPES)


def denoiser(schedule: schedules.Schedule | None = None) -> Denoiser:
    def net(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x) * (0.5 + t.reshape(-1, *[1] * (x.ndim - 1)))

    return Denoiser(net, schedule or schedules.linear(), predicts="v")


def run(seeds: list[int], shape: tuple[int, ...], sampler: samplers.Sampler | str) -> Tensor:
    return sample(denoiser(), noise.from_seeds(seeds, shape), sampler=sampler, grid=GRID)


@each_shape
@each_sampler
def test_a_sample_is_bit_equal_alone_and_in_any_batch(
    sampler: samplers.Sampler, shape: tuple[int, ...]
) -> None:
    together = run([3, 1, 4, 15], shape, sampler)
    for k, seed in enumerate([3, 1, 4, 15]):
        assert torch.equal(run([seed], shape, sampler)[0], together[k])
    assert torch.equal(run([4, 3], shape, sampler), together[[2, 0]])


@each_shape
@each_sampler
def test_interrupted_and_resumed_is_bit_equal(
    sampler: samplers.Sampler, shape: tuple[int, ...], tmp_path: Path
) -> None:
    expected = run([3, 1], shape, sampler)
    for stop in (1, 7, 12):
        states = steps(denoiser(), noise.from_seeds([3, 1], shape), sampler=sampler, grid=GRID)
        state = next(state for state in states if state.index == stop)
        states.close()
        save_file(state.save(), tmp_path / "state.safetensors")
        restored = State.restore(load_file(tmp_path / "state.safetensors"))
        assert (restored.index, restored.total, restored.t) == (stop, 12, state.t)
        # the streams given along do not matter: the state has its own
        fresh = noise.from_seeds([8, 9], shape)
        found = sample(denoiser(), fresh, sampler=sampler, grid=GRID, resume=restored)
        assert torch.equal(found, expected)


def test_what_is_saved_shares_no_memory(tmp_path: Path) -> None:
    state = next(steps(denoiser(), noise.from_seeds([3], (2, 9)), grid=GRID))
    same = replace(state, sampler_state={"x0": state.x, "turned": state.x.mT})
    save_file(same.save(), tmp_path / "state.safetensors")
    restored = State.restore(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(restored.sampler_state["turned"], state.x.mT)


@each_sampler
def test_states_stay_valid_after_the_run(sampler: samplers.Sampler) -> None:
    states = list(steps(denoiser(), noise.from_seeds([3], (2, 9)), sampler=sampler, grid=GRID))
    assert [state.index for state in states] == list(range(1, 13))
    for state in states:
        again = State.restore(state.save())
        found = sample(denoiser(), noise.from_seeds([3], (2, 9)), sampler=sampler, grid=GRID)
        resumed = sample(
            denoiser(), noise.from_seeds([3], (2, 9)), sampler=sampler, grid=GRID, resume=again
        )
        assert torch.equal(found, resumed)


@each_sampler
def test_a_seed_decides(sampler: samplers.Sampler) -> None:
    assert torch.equal(run([5], (3, 8), sampler), run([5], (3, 8), sampler))
    assert not torch.equal(run([5], (3, 8), sampler), run([6], (3, 8), sampler))


@each_sampler
def test_global_random_state_is_untouched(sampler: samplers.Sampler) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    run([1], (3, 8), sampler)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate() and (before[2] == np.random.get_state()[1]).all()


@each_sampler
def test_arguments_are_not_changed(sampler: samplers.Sampler) -> None:
    streams = noise.from_seeds([1, 2], (3, 8))
    x = streams.draw()
    copy, state = x.clone(), streams.state()
    once, twice = (sample(denoiser(), streams, sampler=sampler, grid=GRID, x=x) for _ in range(2))
    assert torch.equal(x, copy) and torch.equal(once, twice)
    assert all(torch.equal(state[k], v) for k, v in streams.state().items())


def test_the_prior_has_unit_variance_or_that_of_sigma() -> None:
    z = noise.from_seeds([1], (3, 8)).draw()
    for schedule, scale in ((schedules.linear(), 1.0), (schedules.ve(0.01, 50), 50.0)):
        seen: list[Tensor] = []

        def net(x: Tensor, t: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(x)
            return x

        sample(Denoiser(net, schedule), noise.from_seeds([1], (3, 8)), grid=grids.karras(3))
        torch.testing.assert_close(seen[0], z * scale)


def test_starting_part_of_the_way() -> None:
    schedule = schedules.linear()
    streams = noise.from_seeds([1, 2], (3, 8))
    x0 = streams.draw() * 0.1
    grid = grids.truncate(grids.karras(12), 0.3)
    first = grid(schedule)[0]
    x = schedule.diffuse(x0, first, streams.draw())
    states = list(steps(denoiser(), streams, grid=grid, x=x))
    assert first <= 0.3 and 1 < len(states) < 12 and states[-1].t == 0


def test_what_a_state_says() -> None:
    seen: list[State] = []
    x = sample(denoiser(), noise.from_seeds([1], (3, 8)), grid=GRID, on_step=seen.append)
    assert [(s.index, s.total) for s in seen] == [(k, 12) for k in range(1, 13)]
    assert [s.t for s in seen] == GRID(schedules.linear())[1:].tolist()
    assert all(s.x0 is not None and s.x0.shape == s.x.shape for s in seen)
    # the last step leads to what the denoiser said last
    assert seen[-1].x is x and torch.equal(x, seen[-1].x0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@each_sampler
def test_a_value_that_is_not_finite_is_reported_where_it_arose(
    sampler: samplers.Sampler, bad: float
) -> None:
    seen: list[State] = []
    asked: list[int] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        if t[0] < 0.6:
            asked.append(len(seen) + 1)
        y = x.clone()
        y[-1, 1] = torch.where(t[0] < 0.6, bad, y[-1, 1])
        return y

    denoise = Denoiser(net, schedules.linear(), predicts="v")
    streams = noise.from_seeds([1, 2], (3, 8))
    with pytest.raises(NonFiniteError) as caught:
        sample(denoise, streams, sampler=sampler, grid=grids.trailing(10), on_step=seen.append)
    # steps start at 1, 0.9, ... : the sixth is the first below 0.6, and some look ahead to it
    step = asked[0]
    assert step in (5, 6) and len(seen) == step - 1
    t = 1 - (step - 1) / 10
    sigma = schedules.linear().at(t).sigma
    assert f"step {step} of 10 (t = {t:.4g}, sigma = {sigma:.4g})" in str(caught.value)


def test_several_unread_steps_are_told_apart() -> None:
    times = [schedules.linear().at(t) for t in (1.0, 0.75, 0.5, 0.25, 0.0)]
    sums = [torch.tensor(value) for value in (1.0, float("nan"), float("nan"))]
    with pytest.raises(NonFiniteError, match=r"step 3 of 4 \(t = 0.5"):
        sampling._check(sums, times, index=3)


@each_sampler
def test_no_step_waits_for_the_device(sampler: samplers.Sampler) -> None:
    if isinstance(sampler, samplers.DPMAdaptive):
        return  # its steps depend on the error of the last
    # tensors on the device "meta" have no values: to read one is an error
    net = nn.Linear(8, 8, device="meta")
    denoise = Denoiser(lambda x, t, c: net(x) + c, schedules.linear(), predicts="v", time="index")
    guided = guidance.classifier_free(
        denoise,
        cond={"c": torch.ones(1, 8, device="meta")},
        uncond={"c": torch.zeros(1, 8, device="meta")},
        scale=3.0,
        rescale=0.5,
    )
    streams = noise.from_seeds([1, 2], (8,))
    x = streams.draw("meta")
    states = steps(guided, streams, sampler=sampler, grid=GRID, x=x)
    assert [next(states).index for _ in range(11)] == list(range(1, 12))


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8, dtype=torch.bfloat16)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(x)


def test_samples_stay_in_single_precision_and_without_gradients() -> None:
    denoise = Denoiser(Half(), schedules.linear(), predicts="v", time="index")

    def watched() -> Iterator[State]:
        for state in steps(denoise, noise.from_seeds([1], (8,)), grid=GRID):
            # the consumer's own code computes gradients as it did
            assert torch.is_grad_enabled()
            yield state

    assert all(s.x.dtype == torch.float32 and not s.x.requires_grad for s in watched())


def test_double_precision_stays_double() -> None:
    streams = noise.from_seeds([1], (8,))
    x = streams.draw(dtype=torch.float64)
    for sampler in SAMPLERS.values():
        assert sample(denoiser(), streams, sampler=sampler, grid=GRID, x=x).dtype == x.dtype


def test_misuse_is_refused() -> None:
    denoise, streams = denoiser(), noise.from_seeds([1, 2], (3, 8))
    with pytest.raises(UsageError, match="'euler'"):
        sample(denoise, streams, sampler="eular")
    for times in ([0.5], [0.5, 0.5], [0.1, 0.5], [1.1, 0.5], [0.5, -0.1], [[0.5, 0.1]]):
        with pytest.raises(UsageError, match="strictly decreasing"):
            sample(denoise, streams, grid=lambda schedule, times=times: torch.tensor(times))
    with pytest.raises(UsageError, match=r"\(1, 3, 8\)"):
        sample(denoise, streams, x=torch.zeros(1, 3, 8))
    state = next(steps(denoise, streams, grid=GRID))
    for other in (grids.trailing(11), grids.karras(12)):
        with pytest.raises(UsageError, match="resume with the grid"):
            sample(denoise, streams, grid=other, resume=state)


def test_importing_the_core_imports_no_torch() -> None:
    code = "import sys, mdiff.core, mdiff.core.errors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
