"""Clips cut from recordings: OpenSFX effects, Sonic Pi samples and belofilms' guitar strums.

`clips` says what the sources hold, each clip with the function that reads its waveform.
"""

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from mdiff.plugins.audio.data.captions import Clip, parse_note
from mdiff.plugins.audio.data.soundfont import (
    HEADROOM,
    LEVEL,
    RATE,
    SAMPLES,
    Wave,
    finish,
    loudest,
    resample,
)
from mdiff.plugins.audio.data.sounds import DRUM_SAMPLES, OPENSFX, SONIC_PI

Read = Callable[[], Wave]

EFFECT_TAKES = 3
_ONSETS = (0.02, 0.0, 0.06)  # seconds before a sound that fits in one clip
_STRUM = re.compile(r"([a-g])(sharp|flat)? ?(major|minor|minor7b5|minro7b5)(?:_(up|down))?_(\d+)")
_QUALITY = {"minor7b5": "half-diminished", "minro7b5": "half-diminished"}


def clips(opensfx: Path, sonic_pi: Path, strums: Path) -> Iterator[tuple[Clip, Read]]:
    """Every recorded clip: `opensfx` is the catalogue file, the other two are folders."""
    yield from _effects_of_catalogue(opensfx)
    yield from _effects_of_folder(sonic_pi)
    yield from _strums(strums)


def catalogue(path: Path) -> Iterator[tuple[str, Wave, int]]:
    """Entries of an OpenTTD sound catalogue: description, waveform, sampling rate.

    The file is a table of (offset, size) pairs of 32-bit words, where the first offset also tells
    the table's length; at each offset stand one length byte, the description and a WAV file.
    The top bit of an offset is a flag.
    """
    data = path.read_bytes()
    (first,) = struct.unpack_from("<I", data)
    for entry in range((first & 0x7FFF_FFFF) // 8):
        (offset,) = struct.unpack_from("<I", data, 8 * entry)
        offset &= 0x7FFF_FFFF
        length = data[offset]
        text = data[offset + 1 : offset + length].decode("latin-1").rstrip("\0")
        wave, rate = _riff(data, offset + 1 + length)
        yield text, wave, rate


def _riff(data: bytes, at: int) -> tuple[Wave, int]:
    """The first channel of the 16-bit WAV file that starts at `at`, and its rate."""
    rate, channels, end = RATE, 1, at + 8 + struct.unpack_from("<I", data, at + 4)[0]
    at += 12
    while at < end:
        name, size = struct.unpack_from("<4sI", data, at)
        if name == b"fmt ":
            _, channels, rate = struct.unpack_from("<HHI", data, at + 8)
        if name == b"data":
            pcm = np.frombuffer(data, "<i2", size // 2, at + 8)
            return (pcm[::channels] / 32768).astype(np.float32), rate
        at += 8 + size + size % 2
    return np.zeros(0, dtype=np.float32), rate


def _effects_of_catalogue(path: Path) -> Iterator[tuple[Clip, Read]]:
    taken: set[str] = set()
    for text, wave, rate in catalogue(path):
        licence = _licence(text)
        title = text.lstrip('"')
        # The longest key wins: "Crash" is also how "Crashing tree" starts.
        keys = [key for key in OPENSFX if title.startswith(key) and key not in taken]
        if licence is None or not keys:
            continue
        key = max(keys, key=len)
        taken.add(key)
        base = Clip(
            kind="effect", name=OPENSFX[key].phrase, source="openttd-opensfx", licence=licence
        )
        yield from _takes(base, partial(resample, wave, rate))


def _licence(text: str) -> str | None:
    """The licence that a description states, or None where it is not one that we may use."""
    if "ShareAlike" in text:
        return None
    if "Creative Commons Zero" in text:
        return "CC0-1.0"
    return "CC-BY-3.0" if "Creative Commons Attribution 3.0" in text else None


def _effects_of_folder(folder: Path) -> Iterator[tuple[Clip, Read]]:
    for key, sound in SONIC_PI.items():
        base = Clip(kind="effect", name=sound.phrase, source="sonic-pi-samples", licence="CC0-1.0")
        yield from _takes(base, partial(_file, folder / f"{key}.flac"))
    for index, (key, drum) in enumerate(DRUM_SAMPLES.items()):
        base = Clip(
            kind="drums",
            instrument=drum,
            velocity=45 if key.endswith("_soft") else 110,
            take=100 + 10 * index,
            source="sonic-pi-samples",
            licence="CC0-1.0",
        )
        yield from _takes(base, partial(_file, folder / f"{key}.flac"))


def _takes(base: Clip, read: Read) -> Iterator[tuple[Clip, Read]]:
    for take in range(EFFECT_TAKES):
        yield replace(base, take=base.take + take), partial(_cut, read, take)


def _cut(read: Read, take: int) -> Wave:
    """One of `EFFECT_TAKES` crops of a long sound, or a short one after a short silence."""
    wave = read()
    spare = len(wave) - SAMPLES
    if spare > RATE // 4:
        start = take * spare // (EFFECT_TAKES - 1)
        wave = wave[start : start + SAMPLES]
    else:
        wave = np.pad(wave, (round(_ONSETS[take] * RATE), 0))
    return finish(_levelled(wave))


def _levelled(wave: Wave) -> Wave:
    """Brought to one loudness: what recordings have of their own says nothing of the sound."""
    level = max(loudest(wave), 1e-5)
    peak = max(float(np.abs(wave).max()), 1e-5)
    return wave * np.float32(min(LEVEL / level, HEADROOM / peak))


def _strums(folder: Path) -> Iterator[tuple[Clip, Read]]:
    for path in sorted(folder.glob("*.flac")):
        match = _STRUM.match(path.stem.lower())
        if match is None:
            continue
        letter, accidental, quality, direction, take = match.groups()
        clip = Clip(
            kind="strum",
            instrument="guitar",
            midi=parse_note(f"{letter} {accidental or ''} 3"),
            quality=_QUALITY.get(quality, quality),
            direction=direction or "",
            take=int(take),
            source="hydrogen-drumkits-effects",
            licence="CC-BY-3.0",
        )
        yield clip, partial(_strum, path)


def _strum(path: Path) -> Wave:
    return finish(_levelled(_file(path)[:SAMPLES]))


def _file(path: Path) -> Wave:
    import soundfile

    wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return resample(wave.mean(axis=1), rate)
