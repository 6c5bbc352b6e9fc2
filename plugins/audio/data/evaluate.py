"""Is what a model made what was asked for? Notes and instruments, checked by listening networks.

    python -m mdiff.plugins.audio.data.evaluate --data DIR --classifier FILE [--generated DIR]

Without `--generated` the data set's own held-out clips are judged: what a perfect model would get.
A folder of generated clips holds WAV files and an `index.jsonl`, each line a clip's attributes (as
in the data set's index) and the name of its `file`. `asked` lists the clips to generate.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray

from mdiff.core.errors import MissingError
from mdiff.plugins.audio.data.captions import Clip, from_row
from mdiff.plugins.audio.data.recipe import held_out
from mdiff.plugins.audio.data.store import load, to_float
from mdiff.plugins.audio.metrics import (
    RATE,
    Heard,
    InstrumentNet,
    NoteReader,
    Report,
    found_note,
    load_classifier,
    report,
)

Wave = NDArray[np.float32]


def asked() -> list[Clip]:
    """One clip for every held-out pair of instrument and note: what to ask a model for."""
    return [
        Clip(kind="note", instrument=name, midi=midi, split="held_out")
        for name, midi in sorted(held_out())
    ]


def evaluate(
    clips: Iterable[tuple[Clip, Wave]], reader: NoteReader, classifier: InstrumentNet
) -> Report:
    """Judge single notes: each clip says what was asked, each waveform (mono, `RATE`) what came."""
    return report(_listen(clips, reader, classifier))


def _listen(
    clips: Iterable[tuple[Clip, Wave]], reader: NoteReader, classifier: InstrumentNet
) -> Iterator[Heard]:
    for clip, wave in clips:
        if clip.midi is None:
            raise ValueError(f"no note was asked for in {clip}")
        yield Heard(
            instrument=clip.instrument,
            midi=clip.midi,
            heard_instrument=classifier.hear(wave),
            heard_midi=found_note(reader.posterior(wave)),
        )


def real(data: Path) -> Iterator[tuple[Clip, Wave]]:
    """The held-out clips of a data set."""
    clips, waves = load(data)
    for clip, wave in zip(clips, waves, strict=True):
        if clip.kind == "note" and clip.split == "held_out":
            yield clip, to_float(wave)


def generated(folder: Path) -> Iterator[tuple[Clip, Wave]]:
    """The clips of a folder of WAV files with an index; raises MissingError where it has none."""
    index = folder / "index.jsonl"
    if not index.is_file():
        raise MissingError(f"{folder} has no index.jsonl with a clip and its `file` in each line")
    for line in index.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        wave, rate = soundfile.read(folder / row["file"], dtype="float32", always_2d=True)
        if rate != RATE:
            raise ValueError(f"{row['file']} is at {rate} Hz; the listeners want {RATE} Hz")
        yield replace(from_row(row), split="held_out"), wave.mean(axis=1)


def table(result: Report, top: int = 12) -> str:
    """The report as a person reads it."""
    lines = [
        f"clips                {result.clips}",
        f"right note           {result.note_accuracy:7.1%}",
        f"right but for octave {result.octave_errors:7.1%}",
        f"right instrument     {result.instrument_accuracy:7.1%}",
        f"both                 {result.both:7.1%}",
    ]
    if result.confusions:
        lines.append("asked for, heard, times:")
        lines += [f"  {a:26} {b:26} {n}" for a, b, n in result.confusions[:top]]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mdiff.plugins.audio.data.evaluate", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that the recipe wrote")
    parser.add_argument("--classifier", type=Path, help="default: classifier.safetensors in --data")
    parser.add_argument("--generated", type=Path, help="folder of generated clips to judge instead")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    classifier = load_classifier(options.classifier or options.data / "classifier.safetensors")
    clips = generated(options.generated) if options.generated else real(options.data)
    result = evaluate(clips, NoteReader(), classifier)
    print(table(result), file=sys.stderr)
    print(result.to_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
