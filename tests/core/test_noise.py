"""Noise: a seed is one stream of numbers, wherever and with whomever it is drawn."""

import math
import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from mdiff.core import noise, schedules
from mdiff.core.errors import UsageError

SHAPES = [(1, 20), (3, 5, 7), (2, 3, 4, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sample_is_the_same_alone_and_in_any_batch(shape: tuple[int, ...]) -> None:
    together = noise.from_seeds([3, 1, 4], shape)
    drawn = [together.draw() for _ in range(3)]
    for k, seed in enumerate([3, 1, 4]):
        alone = noise.from_seeds([seed], shape)
        for batch in drawn:
            assert torch.equal(alone.draw()[0], batch[k])


def test_small_seeds_are_those_of_torch() -> None:
    expected = torch.randn(4, 4, generator=torch.Generator().manual_seed(7))
    assert torch.equal(noise.from_seeds([7], (4, 4)).draw()[0], expected)


def test_precision_changes_no_number() -> None:
    single, double, half = (
        noise.from_seeds([1], (40,)).draw(dtype=dtype)
        for dtype in (None, torch.float64, torch.bfloat16)
    )
    assert single.dtype == torch.float32 and double.dtype == torch.float64
    assert torch.equal(single.double(), double) and torch.equal(single.bfloat16(), half)


def test_state_round_trip() -> None:
    streams = noise.from_seeds([1, 2, 3], (2, 9))
    streams.draw()
    state = streams.state()
    following = [streams.draw() for _ in range(2)]
    restored = noise.Noise.restore(state)
    assert restored.shape == (2, 9)
    assert all(torch.equal(restored.draw(), expected) for expected in following)
    # what was drawn since did not reach into the state
    assert torch.equal(noise.Noise.restore(state).draw(), following[0])


def test_global_state_is_untouched() -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    noise.from_seeds([1], (100,)).draw()
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate() and (before[2] == np.random.get_state()[1]).all()


def test_wide_seeds_differ() -> None:
    seeds = [5, 5 + 2**32, 5 + 2**33, 5 + 2**40, 5 + 2**63, 2**64 - 1]
    drawn = noise.from_seeds(seeds, (8,)).draw()
    assert len({tuple(row.tolist()) for row in drawn}) == len(seeds)


def test_it_is_normal() -> None:
    drawn = noise.from_seeds(range(50), (1000,)).draw()
    assert abs(drawn.mean()) < 0.02 and abs(drawn.std() - 1) < 0.02
    assert np.abs(np.corrcoef(drawn.numpy()) - np.eye(50)).max() < 0.16


@pytest.mark.parametrize("seeds", [[], [-1], [2**64]])
def test_impossible_seeds_are_refused(seeds: list[int]) -> None:
    with pytest.raises(UsageError, match="seed"):
        noise.from_seeds(seeds, (3,))


# --- Brownian paths -------------------------------------------------------------------------------

COSINE = schedules.cosine()
TIMES = [COSINE.at(t) for t in (1.0, 0.9, 0.71, 0.5, 0.3, 0.1, 0.001)]


def test_fresh_noise_between_times_is_the_next_draw() -> None:
    fresh, drawn = noise.from_seeds([1, 2], (3, 4)), noise.from_seeds([1, 2], (3, 4))
    for _ in range(2):
        assert torch.equal(fresh.between(TIMES[0], TIMES[1]), drawn.draw())


@pytest.mark.parametrize("shape", SHAPES)
def test_increments_of_a_path_add_up(shape: tuple[int, ...]) -> None:
    snr = [math.exp(t.log_snr) for t in TIMES]
    paths = noise.brownian([3, 2**64 - 1], shape)
    total = torch.zeros(2, *shape)
    for t, s, a, b in zip(TIMES, TIMES[1:], snr, snr[1:], strict=False):
        total += paths.between(t, s) * math.sqrt(b - a)
    whole = noise.brownian([3, 2**64 - 1], shape).between(TIMES[0], TIMES[-1])
    torch.testing.assert_close(total / math.sqrt(snr[-1] - snr[0]), whole, rtol=0, atol=2e-3)


def test_a_path_does_not_depend_on_the_batch_nor_on_what_was_asked_before() -> None:
    shape, seeds = (2, 6), [3, 1, 4]
    together = noise.brownian(seeds, shape)
    for t, s in [(1, 2), (0, 4), (2, 3), (1, 2), (5, 6), (2, 3)]:
        batch = together.between(TIMES[t], TIMES[s])
        for k, seed in enumerate(seeds):
            alone = noise.brownian([seed], shape).between(TIMES[t], TIMES[s])
            assert torch.equal(alone[0], batch[k])


def test_paths_are_normal_and_their_increments_independent() -> None:
    paths = noise.brownian(range(4), (5000,))
    # within an octave, across some, from where no signal is left
    ends = [COSINE.at(t) for t in (1.0, 0.9, 0.5, 0.49, 0.485, 0.001)]
    rows = torch.cat([paths.between(t, s) for t, s in pairwise(ends)])
    assert rows.mean(1).abs().max() < 0.06 and (rows.std(1) - 1).abs().max() < 0.04
    assert np.abs(np.corrcoef(rows.numpy()) - np.eye(len(rows))).max() < 0.06
    assert abs((rows**4).mean() - 3) < 0.1


def test_paths_keep_streams_precision_and_state() -> None:
    paths, streams = (
        noise.brownian([1, 2**63 + 5], (2, 9)),
        noise.from_seeds([1, 2**63 + 5], (2, 9)),
    )
    double = paths.between(TIMES[1], TIMES[2], dtype=torch.float64)
    assert torch.equal(double.float(), paths.between(TIMES[1], TIMES[2]))
    # the path has a source of its own
    assert torch.equal(paths.draw(), streams.draw())
    restored = noise.Noise.restore(paths.state())
    assert torch.equal(restored.draw(), streams.draw())
    assert torch.equal(restored.between(TIMES[1], TIMES[2]), double.float())
    assert not noise.Noise.restore(streams.state()).paths


def test_paths_leave_the_global_state_alone() -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    noise.brownian([1], (100,)).between(TIMES[0], TIMES[3])
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate() and (before[2] == np.random.get_state()[1]).all()
    with pytest.raises(UsageError, match="seed"):
        noise.brownian([], (3,))
