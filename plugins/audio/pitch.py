"""Which note a sound plays, without a network: a comb of its harmonics laid over its spectrum.

A joint embedding of texts and sounds knows an instrument well and its low notes badly, but a note is an exact thing to
ask for, and can be read off a sound.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

NOTES = range(21, 109)
"""The MIDI notes that are told apart: a piano's keys."""
WINDOW, HOP = 4096, 1024
_STEPS = 3
"""Combs of a note, a third of a semitone apart: an instrument may be a little out of tune."""
_HARMONICS = (1, 2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31)
"""Of a comb: the first, and those whose numbers are prime, so that none is another note's alone."""
_HIGHEST_HARMONIC = 5000.0
"""In Hz: none above it but the first."""


def frequency(midi: float) -> float:
    """Of a note, in Hz: 69 is 440."""
    return 440.0 * 2 ** ((midi - 69) / 12)


@cache
def _combs(rate: int) -> Tensor:
    """(notes, _STEPS, bins): what the square root of a spectrum is multiplied with, each of length 1."""
    bins = torch.arange(WINDOW // 2 + 1) * (rate / WINDOW)
    rows = []
    for midi in NOTES:
        for step in range(_STEPS):
            first = frequency(midi + (step - _STEPS // 2) / _STEPS)
            ratio = bins / first
            wave = torch.cos(2 * math.pi * ratio)
            comb = torch.zeros_like(bins)
            for k in _HARMONICS:
                if k > 1 and k * first > min(_HIGHEST_HARMONIC, rate / 2):
                    break
                away = (ratio - k).abs()
                comb += torch.where(away < 0.25, wave, torch.where(away < 0.75, wave / 2, 0.0))
            comb = comb / bins.clamp(min=first / 4).sqrt()
            rows.append(comb / comb.clamp(min=0).norm())
    return torch.stack(rows).unflatten(0, (-1, _STEPS))


def salience(waves: Tensor, rate: int) -> Tensor:
    """How much of waves (B, samples) each of `NOTES` explains, (B, notes), at most 1.

    A spectrum like a sawtooth's, on harmonics whose numbers are prime, so that a note is not heard for those an octave
    or a twelfth above it. Source: SWIPE' (Camacho and Harris, 2008), with the mean over frames by their loudness.
    """
    waves = F.pad(waves.float(), (0, max(0, WINDOW - waves.shape[1])))
    window = torch.hann_window(WINDOW, device=waves.device)
    spectrum = torch.stft(waves, WINDOW, HOP, window=window, return_complex=True).abs()
    root = spectrum.sqrt()  # (B, bins, frames)
    whole = root.pow(2).sum((1, 2)).sqrt().clamp(min=1e-12)
    combs = _combs(rate).to(waves.device)
    found = torch.einsum("nsk,bkt->bnst", combs, root).sum(-1).amax(-1)
    return found / (whole.unsqueeze(1) * math.sqrt(spectrum.shape[-1]))


def standing_out(waves: Tensor, rate: int, midi: int) -> Tensor:
    """How much more of waves (B, samples) a note explains than the best of the others, (B,): above 0 it is heard.

    Nothing stands out of what is not among `NOTES`: zeros.
    """
    if midi not in NOTES:
        return waves.new_zeros(len(waves))
    found = salience(waves, rate)
    others = found.clone()
    others[:, NOTES.index(midi)] = -torch.inf
    return found[:, NOTES.index(midi)] - others.amax(1)
