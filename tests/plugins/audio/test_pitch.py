"""The note of a sound: of tones with harmonics of any shape, in noise, out of tune, and beside others."""

import math

import pytest
import torch
from torch import Tensor

from mdiff.plugins.audio.pitch import NOTES, frequency, salience, standing_out

RATE = 16_000


def tone(midi: float, harmonics: int = 12, odd: bool = False, seconds: float = 1.0) -> Tensor:
    """A tone (1, samples) whose harmonics fade, or the odd ones of it alone, as of a clarinet."""
    time = torch.arange(round(seconds * RATE)) / RATE
    wave = torch.zeros_like(time)
    for k in range(1, 2 * harmonics, 2) if odd else range(1, harmonics + 1):
        if k * frequency(midi) < RATE / 2:
            wave += torch.sin(2 * math.pi * k * frequency(midi) * time + k * k) / k
    return 0.2 * wave.unsqueeze(0)


def heard(waves: Tensor) -> list[int]:
    return [NOTES[k] for k in salience(waves, RATE).argmax(1)]


def test_frequencies() -> None:
    assert frequency(69) == 440 and math.isclose(frequency(60), 261.6256, abs_tol=1e-3)


@pytest.mark.parametrize("shape", [{}, {"odd": True}, {"harmonics": 4}, {"harmonics": 30}])
def test_every_note_is_heard(shape: dict[str, int]) -> None:
    notes = range(33, 97)
    assert heard(torch.cat([tone(midi, **shape) for midi in notes])) == list(notes)


def test_noise_loudness_and_tuning_do_not_matter() -> None:
    notes = range(36, 90, 3)
    clean = torch.cat([tone(midi + 0.25) for midi in notes])
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    assert heard(clean) == heard(1e-3 * clean) == heard(clean + 0.05 * noise) == list(notes)


def test_salience_is_a_cosine() -> None:
    waves = torch.cat([tone(60), torch.zeros(1, RATE), torch.randn(1, RATE)])
    found = salience(waves, RATE)
    assert found.shape == (3, len(NOTES)) and found.isfinite().all()
    assert 0.3 < float(found[0].max()) <= 1 and float(found[2].max()) < 0.3
    assert not found[1].any()


def test_the_note_stands_out_where_it_is_played() -> None:
    waves = torch.cat([tone(48), tone(60), tone(49), tone(48) + tone(55)])
    found = standing_out(waves, RATE, 48)
    assert found[0] > 0 and (found[1:3] < 0).all() and found[0] > found[3]


@pytest.mark.parametrize("midi", [12, NOTES[0] - 1, NOTES[-1] + 1, 131])
def test_a_note_that_cannot_be_told_never_stands_out(midi: int) -> None:
    """C0 to B9 can be written."""
    assert standing_out(torch.cat([tone(60), tone(108)]), RATE, midi).tolist() == [0, 0]


def test_the_outermost_notes() -> None:
    for midi in (NOTES[0], NOTES[-1]):
        assert standing_out(tone(midi), RATE, midi) > standing_out(tone(60), RATE, midi)


def test_a_short_sound() -> None:
    assert heard(tone(69, seconds=0.1)) == [69]
