"""Is what a model made what was asked for? Notes and instruments, checked by listening networks.

    python -m mdiff.plugins.audio.data.evaluate --data DIR [--classifier FILE]
    python -m mdiff.plugins.audio.data.evaluate --data DIR --model audio --out DIR

Without `--model` the data set's own held-out clips are judged: what a perfect model would get. With
one, a sound is made for every held-out pair of instrument and note, asked for by its plain caption;
those that are in the folder already are not made again.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mdiff.core import host, pipeline, registry, request
from mdiff.plugins.audio import io
from mdiff.plugins.audio.data.captions import Clip, plain
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


def made(model: str, out: Path, **fields: object) -> Iterator[tuple[Clip, Wave]]:
    """What a model makes of `asked`, clip k with seed k; `fields` are request fields (steps, guidance, ...)."""
    here = host.current()
    models = registry.load(here)
    card = models.resolve(model)
    clips = asked()
    requests = [
        request.resolve(card, {"text": plain(clip), "seed": k, **fields}, here)
        for k, clip in enumerate(clips)
    ]
    outputs = pipeline.run(pipeline.plan(requests, models, out), here, resume=True)
    for clip, output in zip(clips, outputs, strict=True):
        yield clip, io.read(output.path, rate=RATE, channels=1)["audio"][0].numpy()


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
    parser.add_argument("--model", help="judge what this model makes instead")
    parser.add_argument("--out", type=Path, help="folder of what it makes")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    classifier = load_classifier(options.classifier or options.data / "classifier.safetensors")
    if bool(options.model) != bool(options.out):
        parser.error("--model and --out go together")
    fields = {"steps": options.steps, "guidance": options.guidance}
    clips = made(options.model, options.out, **fields) if options.model else real(options.data)
    result = evaluate(clips, NoteReader(), classifier)
    print(table(result), file=sys.stderr)
    print(result.to_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
