"""Data sets: folders as people have them, read into examples, and folders that a plugin builds.

    pictures/                      metadata.jsonl   {"file_name": "a.png", "text": "a red kite", "split": "train"}
      a.png  a.txt                 a.txt            one wording of the caption a line, the plain one first
      dogs/b.png  cats/c.png       class folders    where nothing else is said of a file

A folder is media files, found in all its subfolders. What is known of a file comes from `metadata.jsonl` or
`metadata.csv` in a folder above it, from the text file of the same stem beside it where the metadata has no text, and
from its class folder where there is neither; where all files lie in folders named train, test and the like, those are
the splits. A data set that a plugin builds is such a folder too, so there is one way to read data. Reading is strict:
a folder in which something does not fit is refused, with the first problem; `scan` lists them all.
"""

import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path, PurePosixPath
from shutil import rmtree
from typing import Any, NamedTuple

from mdiff.core import packages, record
from mdiff.core.errors import MdiffError, MissingError, UsageError, cause, nearest
from mdiff.core.hooks import DataSet, Example
from mdiff.core.host import Host

METADATA = "metadata.jsonl"
LICENCES = "LICENSES.md"
SPLITS = ("train", "held_out", "test", "val", "valid", "validation", "dev")
"""Names of folders that are splits, where all files lie in such folders."""

_COLUMNS = ("file_name", "text", "texts", "label", "split")


def examples(folder: Path, suffixes: Collection[str]) -> list[Example]:
    """The examples of a folder, sorted by their paths in it.

    Args:
        suffixes: of the files that count, with their dots, in any case: ".png", ".jpg".

    Raises:
        MissingError: there is no such folder, or no such file in it.
        UsageError: the first thing that does not fit, and how many more there are.
    """
    seen = scan(folder, suffixes)
    if seen.problems:
        first, *others = seen.problems
        more = f"; `mdiff data check {folder}` lists {len(others)} more" if others else ""
        raise type(first)(f"{first}{more}")
    return seen.examples


class Scan(NamedTuple):
    """What a folder holds, and all that does not fit, in the order in which one would mend it."""

    examples: list[Example]
    problems: list[MdiffError]


def scan(folder: Path, suffixes: Collection[str]) -> Scan:
    """The examples of a folder, as far as they can be read, and every problem."""
    if not folder.is_dir():
        hint = ": it is a file, give the folder that it is in" if folder.is_file() else ""
        return Scan([], [MissingError(f"there is no folder {str(folder)!r}{hint}")])
    wanted = {suffix.lower() for suffix in suffixes}
    files = _files(folder)
    media = [f for f in files if f.suffix.lower() in wanted and f.name not in _READERS]
    if not media:
        return Scan(
            [], [MissingError(f"{folder} holds no file of the kinds {', '.join(sorted(wanted))}")]
        )
    split = all(name.parts[0] in SPLITS for name in media)
    plain = {n: Example(path=folder / n, split=n.parts[0] if split else "train") for n in media}
    rows, problems = _metadata(folder, files, plain, wanted)
    captions, unreadable = _captions(folder, media, [] if ".txt" in wanted else files)
    found: dict[PurePosixPath, Example] = {}
    for name in media:
        row = rows.get(name, plain[name])
        found[name] = replace(row, texts=row.texts or captions.get(name.with_suffix(""), ()))
    found |= _classes({n: e for n, e in found.items() if n not in rows and not e.texts}, int(split))
    problems += unreadable.values()
    bare = [n for n, e in found.items() if not e.texts and n.with_suffix("") not in unreadable]
    if bare and any(example.texts for example in found.values()):
        problems.append(
            UsageError(
                f"{len(bare)} of {len(media)} files in {folder} have no caption, such as {bare[0]}: write "
                f"{bare[0].with_suffix('.txt')}, or give it a text in {METADATA}, or take it out"
            )
        )
    return Scan(list(found.values()), problems)


def summary(found: Sequence[Example]) -> list[str]:
    """Lines that say what a training would see: files by kind, captions, classes, splits, facts."""
    texts = [text for example in found for text in example.texts]
    facts = Counter(name for example in found for name in example.facts)
    counts = {
        "kinds": Counter(example.path.suffix.lower() for example in found),
        "splits": Counter(example.split for example in found),
        "classes": Counter(example.label for example in found if example.label is not None),
        "facts": facts,
    }
    lines = [f"files     {len(found)}"]
    lines += [f"{name:9} {_counted(count)}" for name, count in counts.items() if count]
    if texts:
        per = len(texts) / sum(bool(example.texts) for example in found)
        lines.append(
            f"captions  {len(texts)}, {per:.3g} a file, {len(set(texts))} different; e.g. {texts[0]!r}"
        )
    return lines


def unreadable(
    found: Iterable[Example], readers: Mapping[str, Callable[[Path], object]]
) -> Iterator[str]:
    """A line for each file that its reader, by suffix, cannot read."""
    for example in found:
        try:
            readers[example.path.suffix.lower()](example.path)
        except Exception as error:  # noqa: BLE001 (decoders raise what they like)
            yield f"cannot read {example.path}: {cause(error)}"


def datasets(host: Host) -> dict[str, DataSet]:
    """The data sets that can be built, by `plugin/name`."""
    answers = host.each("mdiff_datasets")
    return {f"{r.name}/{name}": made for r, sets in answers for name, made in sets.items()}


def write_metadata(folder: Path, found: Iterable[Example]) -> None:
    """Writes `metadata.jsonl` for examples in a folder: `examples` gives the same back.

    Raises:
        UsageError: a file is not in the folder, or a fact has the name of a column.
        MdiffError: the system refused.
    """
    rows = []
    for example in found:
        if not example.path.is_relative_to(folder):
            raise UsageError(f"{example.path} is not in {folder}")
        if clash := sorted(set(example.facts).intersection(_COLUMNS)):
            raise UsageError(f"a fact cannot be named {clash[0]!r}: it is a column of {METADATA}")
        row: dict[str, Any] = {"file_name": example.path.relative_to(folder).as_posix()}
        if example.texts:
            row |= (
                {"text": example.texts[0]} if len(example.texts) == 1 else {"texts": example.texts}
            )
        if example.label is not None:
            row["label"] = example.label
        rows.append({**row, "split": example.split, **example.facts})
    rows.sort(key=lambda row: row["file_name"])
    with record.atomic_write(folder / METADATA) as path:
        path.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )


def build(
    dataset: DataSet, out: Path, say: Callable[[str], None], cache: Path | None = None
) -> None:
    """Builds a data set into a folder, which appears when all of it is there.

    Args:
        say: told each package that is asked for.
        cache: where packages are kept; `packages.cache_folder()` where None.

    Raises:
        UsageError: the folder is not empty.
        MissingError: a package cannot be had.
        MdiffError: the system refused, or the builder left out a file that a data set must have.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty: name a new folder, or delete it first")

    def fetch(spec: str) -> Path:
        say(f"package {spec}")
        return packages.fetch(spec, cache)

    record.make_folder(out.resolve().parent)
    aside = out.resolve().parent / f".{out.name}-unfinished"
    rmtree(aside, ignore_errors=True)  # of a process that was killed
    record.make_folder(aside)
    try:
        dataset.build(aside, fetch)
        for name in (METADATA, LICENCES):
            if not (aside / name).is_file():
                raise MdiffError(f"the builder of this data set wrote no {name}: tell its author")
        try:
            os.rename(aside, out)
        except OSError as error:
            raise MdiffError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        rmtree(aside, ignore_errors=True)


def _files(folder: Path) -> list[PurePosixPath]:
    """Relative paths of all files, sorted; hidden ones left out, links followed, each folder once."""
    names: list[PurePosixPath] = []
    seen: set[str] = set()
    for at, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(at)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = PurePosixPath(Path(at).relative_to(folder).as_posix())
        names += [here / name for name in files if not name.startswith(".")]
    return sorted(names, key=str)


def _captions(
    folder: Path, media: Iterable[PurePosixPath], files: Iterable[PurePosixPath]
) -> tuple[dict[PurePosixPath, tuple[str, ...]], dict[PurePosixPath, MdiffError]]:
    """The wordings in text files beside media and what is wrong with the others, by path without suffix."""
    texts, problems = {}, {}
    stems = {name.with_suffix("") for name in media}
    for name in files:
        stem = name.with_suffix("")
        if name.suffix.lower() == ".txt" and stem in stems:
            try:
                lines = (line.strip() for line in _read(folder, name).splitlines())
                texts[stem] = tuple(line for line in lines if line)
            except MdiffError as error:
                problems[stem] = error
    return texts, problems


def _classes(plain: Mapping[PurePosixPath, Example], level: int) -> dict[PurePosixPath, Example]:
    """Files of which nothing is said, with their folder at a level as label where there are two such folders."""
    labels = {name: name.parts[level] for name in plain if len(name.parts) > level + 1}
    if len(set(labels.values())) < 2:
        return {}
    return {name: replace(plain[name], label=label) for name, label in labels.items()}


def _metadata(
    folder: Path,
    files: Iterable[PurePosixPath],
    plain: Mapping[PurePosixPath, Example],
    wanted: Collection[str],
) -> tuple[dict[PurePosixPath, Example], list[MdiffError]]:
    """`plain` examples with what metadata files say of them, and what is wrong with those."""
    rows: dict[PurePosixPath, Example] = {}
    problems: list[MdiffError] = []
    for name in files:
        if name.name not in _READERS:
            continue
        try:
            text = _read(folder, name)
        except MdiffError as error:
            problems.append(error)
            continue
        for number, row in _READERS[name.name](text):
            try:
                if isinstance(row, str):
                    raise UsageError(row)
                path = _place(name.parent, row)
                if path in rows:
                    raise UsageError(f"{path} has a row already")
                if path in plain:
                    rows[path] = _example(plain[path], row)
                elif path.suffix.lower() in wanted or not (folder / path).is_file():
                    raise UsageError(f"there is no file {path}")
            except UsageError as error:
                problems.append(UsageError(f"{folder / name}, line {number}: {error}"))
    return rows, problems


def _place(parent: PurePosixPath, row: Mapping[str, Any]) -> PurePosixPath:
    """The file that a row is about, relative to the data set's folder."""
    name = row.get("file_name")
    if not isinstance(name, str) or not name.strip():
        hint = "" if "file_name" in row else f"; its columns are {', '.join(row)}"
        raise UsageError(f"the row should have a file_name{hint}")
    path = PurePosixPath(os.path.normpath(parent / name))
    if path.is_absolute() or path.parts[:1] == ("..",):
        raise UsageError(f"{name} leads out of the folder")
    return path


def _example(plain: Example, row: Mapping[str, Any]) -> Example:
    text, texts, label, split = (row.get(name) for name in _COLUMNS[1:])
    several = [] if texts is None else texts
    if not isinstance(several, list) or not all(isinstance(t, str) for t in several):
        raise UsageError("texts should be a list of texts; in a .csv there is only text")
    if text is not None and not isinstance(text, str):
        raise UsageError(f"text should be a text and is {text!r}")
    if isinstance(label, bool) or not isinstance(label, str | int | None):
        raise UsageError(f"label should be a name or a whole number and is {label!r}")
    if not isinstance(split, str | None):
        raise UsageError(f"split should be a name and is {split!r}")
    # as in text files, what a list has twice counts twice
    wordings = (
        t.strip() for t in ([text, *(t for t in several if t != text)] if text else several)
    )
    return replace(
        plain,
        texts=tuple(t for t in wordings if t),
        label=None if label in (None, "") else str(label),
        split=split or plain.split,
        facts={name: value for name, value in row.items() if name not in _COLUMNS},
    )


Row = tuple[int, Mapping[str, Any] | str]
"""The number of a line, and its columns or what is wrong with it."""


def _jsonl(text: str) -> Iterator[Row]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON value")

    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line, parse_constant=refuse)
            except ValueError as error:
                yield number, f"not JSON: {error}"
            else:
                yield number, row if isinstance(row, dict) else "the row should be an object: {...}"


def _csv(text: str) -> Iterator[Row]:
    """Rows under a line of headings; an empty cell says nothing."""
    reader = csv.DictReader(StringIO(text, newline=""), strict=True)
    if "file_name" not in (headings := reader.fieldnames or ()):
        yield 1, f"the headings should have file_name{nearest('file_name', headings)}"
        return
    try:
        for row in reader:
            if None in row or None in row.values():
                yield (
                    reader.line_num,
                    f"the row should have {len(headings)} columns, as the headings",
                )
            else:
                yield reader.line_num, {name: cell for name, cell in row.items() if cell}
    except csv.Error as error:
        yield reader.line_num, f"not CSV: {error}"


_READERS: Mapping[str, Callable[[str], Iterator[Row]]] = {METADATA: _jsonl, "metadata.csv": _csv}


def _read(folder: Path, name: PurePosixPath) -> str:
    try:
        return (folder / name).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{folder / name} is not UTF-8 text (byte {error.start}): save it as UTF-8"
        ) from None
    except OSError as error:
        raise MdiffError(f"cannot read {folder / name}: {error.strerror or error}") from None


def _counted(counts: Counter[str], most: int = 12) -> str:
    """`dogs 12, cats 3`: the commonest first, and how many more there are."""
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    said = ", ".join(f"{name} {count}" for name, count in ordered[:most])
    return said + (f" and {len(ordered) - most} more" if len(ordered) > most else "")
