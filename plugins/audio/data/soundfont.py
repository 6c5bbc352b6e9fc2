"""Clips rendered from a General MIDI soundfont: a `Clip` with its attributes in, a waveform out.

A waveform is a float32 array of `SAMPLES` samples at `RATE` Hz, mono, within -1..1. The synthesiser
runs at three times that rate and is low-passed on the way down, so that no partial folds back.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any, final

import numpy as np
import torch
import torchaudio
from numpy.typing import NDArray

from mdiff.core.errors import MissingError
from mdiff.plugins.audio.data.captions import Clip
from mdiff.plugins.audio.data.instruments import DRUMS, INSTRUMENTS, KITS, PATTERNS, TRIADS

RATE = 16_000
SAMPLES = 40_960  # 2.56 s
SECONDS = SAMPLES / RATE
PEAK = 0.95  # no clip goes beyond
LEVEL = 0.16  # root mean square of the loudest 0.4 s, which a note at velocity 100 is brought to,
HEADROOM = 0.8  # unless its peak would then be higher than this

_SYNTH_RATE = 3 * RATE
_DRUM_BANK = 128
_FADE = round(0.02 * RATE)

Wave = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key pressed at `start` and let go at `end` seconds."""

    key: int
    velocity: int
    start: float
    end: float


@final
class SoundFont:
    """A loaded soundfont; `render` turns a clip into a waveform, the same one every time.

    Args:
        path: the .sf2 file.
        synthesiser: the folder that holds the package tinysoundfont.

    Raises:
        MissingError: the synthesiser does not load on this machine.
    """

    def __init__(self, path: Path, synthesiser: Path) -> None:
        sys.path.insert(0, str(synthesiser))
        try:
            tinysoundfont = import_module("tinysoundfont")
        except ImportError as error:
            raise MissingError(
                f"the synthesiser in {synthesiser} does not load here ({error}): delete that "
                "folder, so that it is fetched for this machine"
            ) from error
        finally:
            sys.path.remove(str(synthesiser))
        self._synth: Any = tinysoundfont.Synth(gain=-12.0, samplerate=_SYNTH_RATE)
        self._font: int = self._synth.sfload(str(path))
        self._gain = cache(self._measure_gain)

    def render(self, clip: Clip, seed: int) -> Wave:
        """The clip's waveform; `seed` draws its onset (0-60 ms) and how long a note is held."""
        keys, bank, program = score(clip, seed)
        gain = self._gain(_probes(clip, keys), bank, program)
        return finish(gain * self._play(keys, bank, program))

    def _play(self, keys: Iterable[Key], bank: int, program: int) -> Wave:
        events = sorted(
            [(key.start, 1, key.key, key.velocity) for key in keys]
            + [(key.end, 0, key.key, 0) for key in keys]
        )
        self._synth.sounds_off(0)
        self._synth.generate(_SYNTH_RATE // 4)  # what still sounds of the clip before dies away
        self._synth.program_select(0, self._font, bank, program, bank == _DRUM_BANK)
        parts, now, total = [], 0, 3 * SAMPLES
        for time, on, key, velocity in events:
            at = min(round(time * _SYNTH_RATE), total)
            if at > now:
                parts.append(self._generate(at - now))
                now = at
            if on:
                self._synth.noteon(0, key, velocity)
            else:
                self._synth.noteoff(0, key)
        if now < total:
            parts.append(self._generate(total - now))
        return resample(np.concatenate(parts).reshape(-1, 2).mean(axis=1), _SYNTH_RATE)

    def _generate(self, samples: int) -> Wave:
        return np.frombuffer(self._synth.generate(samples), dtype=np.float32).copy()

    def _measure_gain(self, probes: tuple[int, ...], bank: int, program: int) -> float:
        """What brings these keys, struck at velocity 100, to `LEVEL` or `HEADROOM`."""
        waves = [
            self._play([Key(key=key, velocity=100, start=0, end=2)], bank, program)
            for key in probes
        ]
        level = float(np.median([loudest(wave) for wave in waves]))
        peak = max(float(np.abs(wave).max()) for wave in waves)
        if peak == 0.0:
            raise ValueError(f"the soundfont has no sound in bank {bank}, program {program}")
        return min(LEVEL / level, HEADROOM / peak)


def _probes(clip: Clip, keys: list[Key]) -> tuple[int, ...]:
    """The keys whose loudness stands for the clip's: a whole instrument has one gain, so that its
    notes keep their balance; a drum has its own, since a triangle in a mix is all but silent."""
    if clip.kind != "drums":
        notes = INSTRUMENTS[clip.instrument].notes
        return tuple(notes[round(k * (len(notes) - 1) / 6)] for k in range(7))
    return (36, 38) if clip.name else (keys[0].key,)


def resample(wave: Wave, rate: int) -> Wave:
    """The waveform brought from `rate` to `RATE`."""
    if rate == RATE:
        return wave
    tensor = torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32))
    resampled: Wave = torchaudio.functional.resample(
        tensor, rate, RATE, lowpass_filter_width=32
    ).numpy()
    return resampled


def loudest(wave: Wave, seconds: float = 0.4) -> float:
    """Root mean square of the loudest stretch of that length."""
    width = min(round(seconds * RATE), len(wave))
    energy = np.concatenate([[0.0], np.cumsum(np.square(wave, dtype=np.float64))])
    return float(np.sqrt(max(0.0, (energy[width:] - energy[:-width]).max()) / width))


def finish(wave: Wave) -> Wave:
    """Cut or pad to `SAMPLES`, fade the last 20 ms out, and hold the peak at `PEAK` or below."""
    out = np.zeros(SAMPLES, dtype=np.float32)
    out[: min(SAMPLES, len(wave))] = wave[:SAMPLES]
    out[-_FADE:] *= np.linspace(1.0, 0.0, _FADE, dtype=np.float32)
    peak = float(np.abs(out).max())
    return out * np.float32(PEAK / peak) if peak > PEAK else out


Score = tuple[list[Key], int, int]  # keys, bank, program


def _root(clip: Clip) -> int:
    if clip.midi is None:
        raise ValueError(f"a {clip.kind} clip without a note")
    return clip.midi


def _held(clip: Clip, notes: Iterable[int], rng: Random) -> Score:
    start = rng.uniform(0.0, 0.06)
    end = start + rng.uniform(1.7, 2.0)
    keys = [Key(key=note, velocity=clip.velocity, start=start, end=end) for note in notes]
    return keys, 0, INSTRUMENTS[clip.instrument].program


def _note(clip: Clip, rng: Random) -> Score:
    return _held(clip, [_root(clip)], rng)


def _chord(clip: Clip, rng: Random) -> Score:
    # Three notes together are louder than one: a third off each keeps the chord at its level.
    softer = max(1, round(clip.velocity * 0.66))
    keys, bank, program = _held(clip, [_root(clip) + step for step in TRIADS[clip.quality]], rng)
    return (
        [Key(key=k.key, velocity=softer, start=k.start, end=k.end) for k in keys],
        bank,
        program,
    )


def _arpeggio(clip: Clip, rng: Random) -> Score:
    steps = [*TRIADS[clip.quality], 12]
    if clip.direction == "descending":
        steps.reverse()
    beat = 60 / (clip.tempo or 120)
    start = rng.uniform(0.0, 0.06)
    keys = [
        Key(
            key=_root(clip) + step,
            velocity=clip.velocity,
            start=start + k * beat,
            end=min(start + (k + 0.95) * beat, SECONDS - 0.3) if k < 3 else 2.2,
        )
        for k, step in enumerate(steps)
    ]
    return keys, 0, INSTRUMENTS[clip.instrument].program


def _drums(clip: Clip, rng: Random) -> Score:
    kits = list(KITS.values())
    start = rng.uniform(0.0, 0.06)
    if not clip.name:
        drum = DRUMS[clip.instrument]
        key, kit = divmod(clip.take, drum.kits)
        hit = Key(key=drum.keys[key], velocity=clip.velocity, start=start, end=2.2)
        return [hit], _DRUM_BANK, kits[kit]
    pattern = PATTERNS[clip.name]
    step = 60 / (clip.tempo or 120) / pattern.steps_per_beat
    strength = {"X": 1.0, "x": 0.7}
    hits = []
    for key, line in pattern.lines.items():
        for k in range(int((SECONDS - start) / step) + 1):
            mark = line[k % len(line)]
            if mark in strength:
                at = start + k * step
                velocity = round(clip.velocity * strength[mark] * rng.uniform(0.92, 1.0))
                hits.append(Key(key=key, velocity=velocity, start=at, end=at + 0.9 * step))
    return hits, _DRUM_BANK, kits[clip.take]


_SCORES: dict[str, Callable[[Clip, Random], Score]] = {
    "note": _note,
    "chord": _chord,
    "arpeggio": _arpeggio,
    "drums": _drums,
}


def score(clip: Clip, seed: int) -> Score:
    """What is played for the clip: the keys, and the bank and program they are played on."""
    return _SCORES[clip.kind](clip, Random(seed))
