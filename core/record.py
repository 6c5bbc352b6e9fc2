"""The reproducibility record: what it takes to make one output again, and how files reach the disk
whole.

A record is a plain mapping of JSON values without dates, so that the same request gives the same
bytes. It goes inside the output where the container can hold it, and into `<file>.json` beside it
always; the sidecar adds the file's own hash, which is what says that the output is complete.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import mdiff
from mdiff.core.errors import IntegrityError, MdiffError, MissingError, UsageError
from mdiff.core.hooks import Media, ModelCard, Request

SCHEMA = 1
LIMIT = 2045
"""Bytes that fit a WAV comment: a longer one vanishes without a word."""


def make(request: Request, card: ModelCard, *, dist: str, dist_version: str, threads: int) -> dict:
    """The record of one output; `dist` is the distribution that the model's plugin came in."""
    return {
        "schema": SCHEMA,
        "mdiff": mdiff.__version__,
        "torch": installed("torch"),
        "plugin": {"name": card.plugin, "dist": dist, "version": dist_version},
        "model": card.id,
        "weights": {file.name: file.sha256 for file in card.files},
        "request": values(request),
        "seed": request.seed,
        "device": request.device,
        "precision": request.precision,
        "threads": threads,
    }


def installed(dist: str) -> str:
    """Version of an installed distribution, read from its metadata; "none" where there is none."""
    try:
        return version(dist)
    except PackageNotFoundError:
        return "none"


def canonical(value: Any) -> str:
    """The one JSON text of a value: ASCII, sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(record: Mapping[str, Any]) -> str:
    """sha256 of a record, whether or not it carries the sidecar's entry about the file."""
    bare = {k: v for k, v in record.items() if k != "file"}
    return hashlib.sha256(canonical(bare).encode()).hexdigest()


def key(request: Request) -> str:
    """Twelve hexadecimal digits that name a request: equal requests have equal keys."""
    return hashlib.sha256(canonical(values(request)).encode()).hexdigest()[:12]


def values(request: Request) -> dict[str, Any]:
    """A request as JSON values. What records of the first versions did not have is left out while
    it is empty, so that their keys stay.
    """
    said = asdict(request)
    names = list(said)
    later = names[names.index("options") + 1 :]
    return {k: v for k, v in said.items() if k not in later or v not in (None, {})}


def sha256(path: str) -> str:
    """The hash of a file that a request names.

    Raises:
        MissingError: it is not there, or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise MissingError(f"cannot read {path or repr(path)}: {error.strerror}") from error


def short(record: Mapping[str, Any], limit: int = LIMIT) -> str:
    """A record as ASCII text of at most `limit` bytes: all of it if it fits, else a summary with
    the hash of all.
    """
    text = canonical(record)
    if len(text) <= limit:
        return text
    summary = {name: record[name] for name in ("schema", "mdiff", "model", "seed")}
    return canonical({**summary, "record": digest(record)})


def parse(text: str) -> dict[str, Any] | None:
    """The record in a text field of a file, whole or a summary; None where the text is something
    else.
    """
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) and "schema" in value and "model" in value else None


def sidecar(path: Path) -> Path:
    """`<file>.json`, beside the file."""
    return path.with_name(path.name + ".json")


def read_sidecar(path: Path) -> dict[str, Any] | None:
    """The record beside a file; None where there is none that can be read."""
    try:
        return parse(sidecar(path).read_text())
    except (OSError, UnicodeDecodeError):
        return None


def complete(path: Path, record: Mapping[str, Any]) -> bool:
    """Whether an output is there and whole, made of the same request and weights as this record."""
    beside = read_sidecar(path)
    if beside is None or not path.is_file():
        return False
    if any(beside.get(name) != record[name] for name in ("request", "weights")):
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest() == beside.get("file", {}).get("sha256")


def find(path: Path, media: list[Media]) -> dict[str, Any]:
    """The whole record of an output: from inside the file if it is whole there, else from the
    sidecar.

    Raises:
        MissingError: no such file, or no record in it or beside it.
        IntegrityError: the sidecar is not the record whose hash the file holds.
    """
    if not path.is_file():
        raise MissingError(f"no file {str(path)!r}")
    readers = [m.read_record for m in media if m.suffix == path.suffix.lower()]
    inside = next((found for read in readers if (found := read(path))), None)
    if inside is not None and "request" in inside:
        return inside
    beside = read_sidecar(path)
    if beside is None:
        where = f"only a summary (record {inside['record'][:12]})" if inside else "no record"
        raise MissingError(f"{path} holds {where} and {sidecar(path).name} is not beside it")
    if inside is not None and inside["record"] != digest(beside):
        raise IntegrityError(f"{sidecar(path)} is not the record that was written into {path.name}")
    return beside


def request_of(record: Mapping[str, Any]) -> Request:
    """The request inside a record.

    Raises:
        UsageError: the record was written by a version with another schema.
    """
    known = {f.name for f in fields(Request)}
    if record["schema"] != SCHEMA or not known.issuperset(record.get("request", {"?": 0})):
        raise UsageError(
            f"this record is of mdiff {record.get('mdiff')}, and {mdiff.__version__} does not know "
            "its form: install that version to run it again"
        )
    return Request(**record["request"])


def make_folder(folder: Path) -> None:
    """Makes a folder and tries to write into it, so that no one waits for what cannot be kept.

    Raises:
        MdiffError: the system refused.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise MdiffError(f"cannot write into {folder}: {error.strerror}") from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Gives a temporary path in the same folder and with the same suffix; renames it to `path` when
    all is written.

    Whatever happens in between, `path` is the old file or the new one, and the temporary one is
    gone.

    Raises:
        MdiffError: the system refused: full disk, no permission, not a folder.
    """
    temporary = path.with_name(f".{secrets.token_hex(6)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    except OSError as error:
        raise MdiffError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def output(path: Path, record: Mapping[str, Any]) -> Iterator[Path]:
    """`atomic_write` for an output and its sidecar: both appear when both are written, or neither.

    The sidecar adds the size and hash of the file to the record.
    """
    with atomic_write(sidecar(path)) as beside, atomic_write(path) as temporary:
        yield temporary
        data = temporary.read_bytes()
        about = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        beside.write_text(json.dumps({**record, "file": about}, indent=2) + "\n")


def flush(path: Path) -> None:
    """Waits until a file, or the list of files of a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
