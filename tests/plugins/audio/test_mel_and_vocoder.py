"""The mel front end against its definition, and its inversion against the sound."""

import math

import pytest
import torch

from mdiff.plugins.audio.nets.mel import (
    BANDS,
    BINS,
    FLOOR,
    HOP,
    RATE,
    WINDOW,
    filterbank,
    log_mel,
    magnitude,
)
from mdiff.plugins.audio.nets.vocoder import MelInverter, griffin_lim, tracked_phase


def tone(frequency: float, seconds: float = 1.28) -> torch.Tensor:
    t = torch.arange(round(seconds * RATE), dtype=torch.float64) / RATE
    harmonics = [0.5**k * torch.sin(2 * math.pi * frequency * (k + 1) * t) for k in range(5)]
    return (0.2 * sum(harmonics) * torch.exp(-t)).float()[None]


def test_magnitude_is_the_windowed_transform() -> None:
    wave = torch.randn(1, 40 * HOP, generator=torch.Generator().manual_seed(0))
    found = magnitude(wave)
    assert found.shape == (1, BINS, 40)
    frame = 20  # far from the edges: centred at 20 hops
    piece = wave[0, frame * HOP - WINDOW // 2 : frame * HOP + WINDOW // 2]
    expected = torch.fft.rfft(piece * torch.hann_window(WINDOW)).abs()
    torch.testing.assert_close(found[0, :, frame], expected, rtol=1e-4, atol=1e-3)


def test_filters_are_slaney() -> None:
    bank = filterbank()
    assert bank.shape == (BANDS, BINS)
    # linear below 1 kHz: centres 46.4 Hz apart, (15 + 27 ln 8 / ln 6.4) / 65 mels of 66.67 Hz each
    step = (15 + 27 * math.log(8) / math.log(6.4)) / (BANDS + 1) * 200 / 3
    centres = bank.argmax(dim=1) * RATE / WINDOW
    for k in range(15):
        assert abs(centres[k] - (k + 1) * step) <= RATE / WINDOW / 2 + 1e-3
    # area normalisation: the peak of the triangle is 2 / width
    assert bank[5].max() <= 2 / (2 * step) + 1e-6


def test_log_mel_moves_with_the_gain_and_stops_at_the_floor() -> None:
    wave = tone(440.0)
    loud, quiet = log_mel(wave), log_mel(wave / 2)
    high = quiet > math.log(FLOOR) + 0.1
    torch.testing.assert_close(
        loud[high] - quiet[high], torch.full_like(loud[high], math.log(2)), rtol=1e-3, atol=1e-3
    )
    assert log_mel(torch.zeros(1, 1600)).eq(math.log(FLOOR)).all()


@pytest.mark.parametrize("frequency", [130.81, 440.0, 1046.5])
def test_inversion_keeps_pitch_and_spectrum(frequency: float) -> None:
    wave = tone(frequency)
    target = magnitude(wave)
    found = griffin_lim(torch.log(target.clamp(min=FLOOR)))
    assert found.shape == wave.shape
    error = (magnitude(found) - target).norm() / target.norm()
    assert error < 0.15
    spectrum = torch.fft.rfft(
        found[0] * torch.hann_window(found.shape[1]), 4 * found.shape[1]
    ).abs()
    peak = spectrum.argmax() * RATE / (4 * found.shape[1])
    assert abs(peak - frequency) < 1.0
    assert torch.equal(found, griffin_lim(torch.log(target.clamp(min=FLOOR))))


def test_first_phase_already_turns_with_the_tone() -> None:
    frequency = 440.0
    phase = tracked_phase(magnitude(tone(frequency)))
    bin_of = round(frequency * WINDOW / RATE)
    step = (phase[0, bin_of, 41:60] - phase[0, bin_of, 40:59]) % (2 * math.pi)
    expected = (2 * math.pi * frequency * HOP / RATE) % (2 * math.pi)
    torch.testing.assert_close(step, torch.full_like(step, expected), atol=0.05, rtol=0)


def test_network_shape() -> None:
    net = MelInverter(channels=16, hidden=32, blocks=1)
    assert net(torch.randn(2, BANDS, 30)).shape == (2, BINS, 30)
