"""A stranger's plugin, copied by conftest.py into a package `mdiff_toy`: lists of numbers."""

import json
from pathlib import Path

from mdiff.core import record
from mdiff.core.hooks import Components, Media, Metric, PluginInfo, hookimpl

EVENTS = []


@hookimpl
def mdiff_info():
    return PluginInfo(name="toy", api=(1, 0), modality="toy", summary="Lists of numbers")


@hookimpl
def mdiff_build(card, device, dtype):
    from mdiff_toy.model import build

    return build(card.config, device, dtype)


@hookimpl
def mdiff_components():
    def lazy(steps):
        from mdiff.core import grids

        return grids.linear(steps)

    return Components(grids={"lazy": lazy})


@hookimpl
def mdiff_train(card, model, part, settings):
    from mdiff_toy.model import task

    return task(model, part, settings)


@hookimpl
def mdiff_recipes():
    return {"default": Path(__file__).with_name("default.toml")}


@hookimpl
def mdiff_media():
    return [
        Media(
            suffix=".txt",
            write=write,
            read=read,
            read_record=read_record,
            default=True,
            thumbnail=thumbnail,
        ),
        Media(suffix=".csv", write=write_csv, read=read_csv, read_record=lambda path: None),
    ]


@hookimpl
def mdiff_text_encoders():
    from mdiff_toy.model import Encoder

    return {"letters": Encoder}


@hookimpl
def mdiff_metrics():
    def mean():
        return Metric(
            summary="mean of the numbers",
            better="higher",
            measure=lambda sample, example: [float(sample["values"].mean())],
            score=lambda rows, reference: float(rows.mean()),
        )

    return {"mean": mean}


@hookimpl
def mdiff_commands():
    import click

    return [click.Command("hello", callback=lambda: click.echo("hello from toy"))]


@hookimpl
def mdiff_event(event):
    EVENTS.append(event.name)


def write(path, sample, made, options):
    values = [round(value, options["digits"]) for value in sample["values"].tolist()]
    Path(path).write_text(json.dumps(values) + "\n" + record.short(made) + "\n")


def read(path):
    import torch

    return {"values": torch.tensor(json.loads(Path(path).read_text().splitlines()[0]))}


def read_record(path):
    lines = Path(path).read_text().splitlines()
    return record.parse(lines[1]) if len(lines) > 1 else None


def write_csv(path, sample, made, options):
    Path(path).write_text(",".join(map(repr, sample["values"].tolist())))


def read_csv(path):
    import torch

    return {"values": torch.tensor([float(v) for v in Path(path).read_text().split(",")])}


def thumbnail(sample):
    """A row of greys, as many as numbers."""
    from PIL import Image

    greys = bytes(max(0, min(255, round(128 + 32 * v))) for v in sample["values"].tolist())
    return Image.frombytes("L", (len(greys), 1), greys)
