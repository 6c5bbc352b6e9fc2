"""The audio data set as a recipe: from three kinds of package to `waves.npy` and `index.jsonl`.

    python -m mdiff.plugins.audio.data.recipe --sources DIR --out DIR

`plan` lists the clips that a soundfont renders and says which notes are held out; `build` adds the
recorded ones and writes everything. The same seed gives the same bytes.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from random import Random

import numpy as np
import torch

from mdiff.core.errors import MissingError
from mdiff.plugins.audio.data import recordings
from mdiff.plugins.audio.data.captions import Clip, to_row
from mdiff.plugins.audio.data.instruments import (
    ARPEGGIO_INSTRUMENTS,
    CHORD_INSTRUMENTS,
    DRUMS,
    INSTRUMENTS,
    KITS,
    PATTERNS,
    TRIADS,
)
from mdiff.plugins.audio.data.soundfont import SAMPLES, SoundFont, Wave

SEED = 20_26
VELOCITIES = (45, 80, 115)
CHORD_VELOCITIES = (60, 105)
ARPEGGIO_TEMPOS = (90, 150)
HIT_VELOCITIES = (45, 70, 95, 120)
TEMPOS = (70, 85, 100, 115, 130, 150, 175)
HELD_OUT = 0.1  # of the notes of every instrument, rounded up

# Debian package -> what to look for in it, by the name under which `build` wants it.
_SOURCES = {
    "soundfont": ("fluid-soundfont-gm", "FluidR3_GM.sf2"),
    "opensfx": ("openttd-opensfx", "opensfx.cat"),
    "sonic_pi": ("sonic-pi-samples", "sonic-pi/samples"),
    "strums": ("hydrogen-drumkits-effects", "belofilms_GuitarStrums"),
}


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


def locate(sources: Path) -> dict[str, Path]:
    """Where each source lies under the folder; one that is absent is fetched and unpacked there.

    Raises MissingError where a package cannot be had.
    """
    found: dict[str, Path] = {}
    for name, (package, tail) in _SOURCES.items():
        hits = _search(sources, tail)
        if not hits:
            _fetch(package, sources)
            hits = _search(sources, tail)
        if not hits:
            raise MissingError(f"package {package} holds no {tail}; try another version of it")
        found[name] = hits[0]
    return found


def _search(folder: Path, tail: str) -> list[Path]:
    return sorted(folder.glob(f"**/{tail}"))


def _fetch(package: str, sources: Path) -> None:
    sources.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["apt-get", "download", package], cwd=sources, check=True)
        for archive in sorted(sources.glob(f"{package}_*.deb")):
            subprocess.run(["dpkg-deb", "-x", str(archive), str(sources)], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise MissingError(
            f"Debian package {package} is not under {sources} and could not be fetched; where apt "
            f"runs: apt-get update && apt-get download {package}, then dpkg-deb -x it there"
        ) from error


def build(sources: Path, out: Path, seed: int = SEED) -> list[Clip]:
    """Render and read every clip; write `waves.npy` (int16, N x SAMPLES), `index.jsonl` and
    `LICENSES.md` to `out`. Returns the clips in row order."""
    where = locate(sources)
    font = SoundFont(where.pop("soundfont"))
    jobs: list[tuple[Clip, recordings.Read]] = [
        (clip, partial(font.render, clip, seed + index)) for index, clip in enumerate(plan(seed))
    ]
    jobs += recordings.clips(**where)
    out.mkdir(parents=True, exist_ok=True)
    waves = np.lib.format.open_memmap(
        out / "waves.npy", mode="w+", dtype=np.int16, shape=(len(jobs), SAMPLES)
    )
    with (out / "index.jsonl").open("w", encoding="utf-8") as index:
        for row, (clip, read) in enumerate(jobs):
            waves[row] = to_pcm(read())
            index.write(json.dumps({"row": row, **to_row(clip)}) + "\n")
    waves.flush()
    kept = [clip for clip, _ in jobs]
    (out / "LICENSES.md").write_text(licences(kept), encoding="utf-8")
    return kept


def to_pcm(wave: Wave) -> np.ndarray:
    """float32 within -1..1 to int16, rounded."""
    return np.round(wave * 32767).astype(np.int16)


def licences(clips: list[Clip]) -> str:
    """Which source and licence every clip comes from, as a Markdown page."""
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mdiff.plugins.audio.data.recipe", description=__doc__)
    parser.add_argument("--sources", type=Path, required=True, help="folder of unpacked packages")
    parser.add_argument("--out", type=Path, required=True, help="where the data set goes")
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    clips = build(options.sources, options.out, options.seed)
    kinds = Counter(f"{clip.kind}/{clip.split}" for clip in clips)
    print(json.dumps({"out": str(options.out), "clips": len(clips), **kinds}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
