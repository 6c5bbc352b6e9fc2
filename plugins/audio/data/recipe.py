"""The data set `audio/mini-sounds`: 2.56 s clips with captions, from packages to FLAC files.

    mdiff data build audio/mini-sounds --out FOLDER

`plan` lists the clips that a soundfont renders and says which notes are held out; `build` adds the
recorded ones and writes everything. The same packages give the same samples.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray

from mdiff.core.errors import MissingError
from mdiff.core.hooks import DataSet
from mdiff.plugins.audio.data import recordings
from mdiff.plugins.audio.data.captions import Clip, plain, to_row, wordings
from mdiff.plugins.audio.data.instruments import (
    ARPEGGIO_INSTRUMENTS,
    CHORD_INSTRUMENTS,
    DRUMS,
    INSTRUMENTS,
    KITS,
    PATTERNS,
    TRIADS,
)
from mdiff.plugins.audio.data.soundfont import RATE, SoundFont, Wave

SEED = 20_26
VELOCITIES = (45, 80, 115)
CHORD_VELOCITIES = (60, 105)
ARPEGGIO_TEMPOS = (90, 150)
HIT_VELOCITIES = (45, 70, 95, 120)
TEMPOS = (70, 85, 100, 115, 130, 150, 175)
HELD_OUT = 0.1  # of the notes of every instrument, rounded up

SYNTHESISER = "pip:tinysoundfont==0.3.7"
# argument of `recordings.clips`, or the soundfont -> its package, and what to look for in there
SOURCES = {
    "soundfont": ("apt:fluid-soundfont-gm", "FluidR3_GM.sf2"),
    "opensfx": ("apt:openttd-opensfx", "opensfx.cat"),
    "sonic_pi": ("apt:sonic-pi-samples", "sonic-pi/samples"),
    "strums": ("apt:hydrogen-drumkits-effects", "belofilms_GuitarStrums"),
}

Fetch = Callable[[str], Path]


def held_out(seed: int = SEED) -> frozenset[tuple[str, int]]:
    """The (instrument, MIDI note) pairs that no training clip plays alone.

    A tenth of each instrument's notes, never its lowest or highest and never two neighbours, spread
    so that no note of the scale is held out of many instruments at once.
    """
    rng = Random(seed)
    pairs: set[tuple[str, int]] = set()
    times: Counter[int] = Counter()
    for name, instrument in INSTRUMENTS.items():
        inner = list(instrument.notes)[1:-1]
        rng.shuffle(inner)
        inner.sort(key=lambda note: times[note])  # stable: the shuffle settles ties
        chosen: list[int] = []
        wanted = -(-len(instrument.notes) // round(1 / HELD_OUT))
        for note in inner:
            if len(chosen) < wanted and all(abs(note - other) > 1 for other in chosen):
                chosen.append(note)
        times.update(chosen)
        pairs.update((name, note) for note in chosen)
    return frozenset(pairs)


def plan(seed: int = SEED) -> list[Clip]:
    """Every clip that the soundfont renders, in the order of the data set."""
    clips = [*_notes(held_out(seed)), *_chords(), *_arpeggios(), *_hits(), *_beats()]
    return [replace(clip, source="fluid-soundfont-gm", licence="MIT") for clip in clips]


def _notes(held: frozenset[tuple[str, int]]) -> Iterator[Clip]:
    for name, instrument in INSTRUMENTS.items():
        for midi, velocity in product(instrument.notes, VELOCITIES):
            split = "held_out" if (name, midi) in held else "train"
            yield Clip(kind="note", instrument=name, midi=midi, velocity=velocity, split=split)


def _roots(name: str, span: int) -> list[int]:
    """One root for each pitch class, as low as the instrument and C3 allow."""
    low = min(max(INSTRUMENTS[name].low, 48), INSTRUMENTS[name].high - span - 11)
    return list(range(low, low + 12))


def _chords() -> Iterator[Clip]:
    for name, quality in product(CHORD_INSTRUMENTS, TRIADS):
        # Two voicings: each pitch class once low, and once an octave up where it still fits.
        roots = _roots(name, 7)
        higher = [root + 12 for root in roots if root + 19 <= INSTRUMENTS[name].high]
        for midi, velocity in product([*roots, *higher], CHORD_VELOCITIES):
            yield Clip(
                kind="chord",
                instrument=name,
                midi=midi,
                velocity=velocity,
                quality=quality,
            )


def _arpeggios() -> Iterator[Clip]:
    directions = ("ascending", "descending")
    for name, quality, direction in product(ARPEGGIO_INSTRUMENTS, TRIADS, directions):
        for midi, tempo in product(_roots(name, 12), ARPEGGIO_TEMPOS):
            yield Clip(
                kind="arpeggio",
                instrument=name,
                midi=midi,
                velocity=90,
                quality=quality,
                direction=direction,
                tempo=tempo,
            )


def _hits() -> Iterator[Clip]:
    for name, drum in DRUMS.items():
        for take, velocity in product(range(drum.kits * len(drum.keys)), HIT_VELOCITIES):
            yield Clip(kind="drums", instrument=name, velocity=velocity, take=take)


def _beats() -> Iterator[Clip]:
    for name, tempo, take in product(PATTERNS, TEMPOS, range(len(KITS))):
        yield Clip(kind="drums", name=name, tempo=tempo, velocity=100, take=take)


def locate(fetch: Fetch) -> dict[str, Path]:
    """Where each of `SOURCES` lies.

    Raises:
        MissingError: a package cannot be had, or does not hold what it should.
    """
    found: dict[str, Path] = {}
    for name, (package, path) in SOURCES.items():
        hits = sorted(fetch(package).glob(f"**/{path}"))
        if not hits:
            raise MissingError(f"{package} holds no {path}: it has to be another version of it")
        found[name] = hits[0]
    return found


def jobs(fetch: Fetch) -> list[tuple[Clip, recordings.Read]]:
    """Every clip in the order of the data set, with the function that makes its waveform."""
    where = locate(fetch)
    font = SoundFont(where.pop("soundfont"), fetch(SYNTHESISER))
    rendered = [
        (clip, partial(font.render, clip, SEED + index)) for index, clip in enumerate(plan())
    ]
    return [*rendered, *recordings.clips(**where)]


def build(folder: Path, fetch: Fetch) -> None:
    """Renders and reads every clip; writes `sounds/*.flac`, `metadata.jsonl` and `LICENSES.md`.

    Raises:
        MissingError: a package cannot be had.
    """
    import soundfile

    (folder / "sounds").mkdir(parents=True)
    kept = jobs(fetch)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as index:
        for row, (clip, read) in enumerate(kept):
            name = f"sounds/{file_name(clip, row)}"
            soundfile.write(folder / name, to_pcm(read()), RATE, subtype="PCM_16")
            index.write(json.dumps({"file_name": name, **described(clip, row)}) + "\n")
    page = licences([clip for clip, _ in kept])
    (folder / "LICENSES.md").write_text(page, encoding="utf-8")


def file_name(clip: Clip, row: int) -> str:
    """ "00042-a-flute-playing-c-sharp-4.flac"."""
    words = re.sub(r"[^a-z0-9]+", "-", plain(clip).lower().replace("#", "-sharp-")).strip("-")
    return f"{row:05d}-{words}.flac"


def described(clip: Clip, row: int) -> dict[str, object]:
    """What the metadata say of a clip: its wordings, its label where it has an instrument, and all its attributes."""
    label = {"label": clip.instrument} if clip.instrument else {}
    return {"texts": wordings(clip, row), **label, **to_row(clip)}


def to_pcm(wave: Wave) -> NDArray[np.int16]:
    """float32 within -1..1 to int16, rounded."""
    return np.round(wave * 32767).astype(np.int16)


def licences(clips: list[Clip]) -> str:
    """How many clips come from which source under which licence, as a Markdown page."""
    counts = Counter((clip.source, clip.licence) for clip in clips)
    rows = [f"| {source} | {licence} | {n} |" for (source, licence), n in sorted(counts.items())]
    return "\n".join(
        [
            "# Sources of the audio data set",
            "",
            "| Debian package | licence | clips |",
            "|---|---|---|",
            *rows,
            "",
            "FluidR3 GM soundfont: Frank Wen and others. OpenSFX: its credits stand inside the",
            "catalogue, sound by sound; ShareAlike sounds are left out. Guitar strums: Gabriel",
            "Verdugo Soto (belofilms). Sonic Pi samples: public domain (CC0).",
            "",
        ]
    )


DATA_SET = DataSet(
    summary="7,177 clips of 2.56 s at 16 kHz: 39 instruments note by note, chords, arpeggios, drums, strums, effects",
    build=build,
    packages=(*(package for package, _ in SOURCES.values()), SYNTHESISER),
    licences="MIT, CC0-1.0 and CC-BY-3.0",
)
