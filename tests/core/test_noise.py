"""Noise: a seed is one stream of numbers, wherever and with whomever it is drawn."""

import random

import numpy as np
import pytest
import torch

from mdiff.core import noise
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
