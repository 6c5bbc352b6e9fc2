"""Data sets for text-to-video models, built out of packages that hold free pictures."""

from collections.abc import Callable, Mapping
from pathlib import Path

from mdiff.core import hooks, icons

PACKAGES = {
    "fluent-3d": icons.SETS["fluent-3d"],
    "fluent-flat": icons.SETS["fluent-flat"],
    "resvg": icons.RESVG,
}
"""What `motion` is made of, and with: the last one draws the SVG files."""


def _motion(folder: Path, fetch: Callable[[str], Path]) -> None:
    from mdiff.plugins.video.data.clips import build

    build(folder, fetch)


DATASETS: Mapping[str, hooks.DataSet] = {
    "motion": hooks.DataSet(
        summary="4000 clips of 187 things that move, bounce, turn, grow, shrink and pass each other, with six "
        "captions each, 16 frames of 64 x 64",
        build=_motion,
        packages=tuple(PACKAGES.values()),
        licences="MIT pictures",
    )
}
