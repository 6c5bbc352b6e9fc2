"""Rows: what `Task.read` makes of a data set, made once and kept on the disk, and which of them a step sees.

A task turns an example into rows, mappings of tensors. `prepare` writes each named tensor of all rows as one `.npy`
array into a folder whose name is a hash of everything that they were made of, so that the next run finds them, and
`Rows` draws batches from there. Sample j of a step is number step * total + j of an endless sequence of permutations,
so each row comes once in an epoch, in an order that the number of processes has no part in.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import lru_cache
from hashlib import sha256
from itertools import islice
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import IO, Any, Self, final

import numpy as np
import torch
from torch import Tensor

from mdiff.core import record
from mdiff.core.errors import MdiffError, UsageError, cause
from mdiff.core.hooks import Example, Task
from mdiff.core.training.draws import Draws, generator

VERSION = 1
"""Of the files: another makes all rows again."""

INDEX = "index.json"
LOADED = 2 * 2**30
"""Bytes up to which the rows are read into memory, where that is less than a quarter of it."""

_TOLD = 10  # bad files that get a line each
_PACE = 10.0  # seconds between two lines of progress
_SPAN = 1024  # rows whose order is drawn at once, where an epoch has fewer

Say = Callable[[str], None]


@final
class Rows:
    """The rows of a data set, and the order in which they are drawn.

    Attributes:
        tensors: name -> (rows, ...), in memory or mapped from the disk.
        examples: what the rows were made of.
        sources: (rows,) which example each row was made of.
        skipped: files that could not be used, and why.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        seed: int,
        examples: Sequence[Example] = (),
        sources: Sequence[int] = (),
        weights: Tensor | None = None,
        skipped: Mapping[str, str] | None = None,
    ) -> None:
        """With `weights` (rows,) each sample is a draw of its own, a row as likely as its weight is large."""
        self.tensors = dict(tensors)
        self.seed = seed
        self.examples = tuple(examples)
        self.sources = tuple(sources)
        self.skipped = dict(skipped or {})
        self._count = len(next(iter(self.tensors.values())))
        self._bounds = None if weights is None else weights.double().cumsum(0)
        self._together = max(1, _SPAN // self._count)
        self._orders = lru_cache(maxsize=4)(self._permutations)

    def __len__(self) -> int:
        return self._count

    def draw(self, draws: Draws) -> dict[str, Tensor]:
        """The rows of a step's samples that are asked for: name -> (b, ...), on the draws' device."""
        # In the order of the file, because a mapped file is read in pages; then back.
        ordered, back = self.which(draws).sort()
        back = back.argsort()
        return {
            name: tensor.index_select(0, ordered).index_select(0, back).to(draws.device)
            for name, tensor in self.tensors.items()
        }

    def which(self, draws: Draws) -> Tensor:
        """The numbers (b,) of those rows. The generator of the draws is not moved."""
        if self._bounds is not None:
            own = generator(self.seed, "rows", draws.step)
            points = torch.rand(draws.total, dtype=torch.float64, generator=own)[draws.mine]
            places = torch.searchsorted(self._bounds, points * self._bounds[-1], right=True)
            return places.clamp(max=len(self) - 1)
        numbers = torch.arange(draws.total)[draws.mine] + draws.step * draws.total
        span = self._together * len(self)
        rows = torch.empty_like(numbers)
        for block in (numbers // span).unique().tolist():
            here = numbers // span == block
            rows[here] = self._orders(block)[numbers[here] % span]
        return rows

    def cursor(self, step: int, total: int) -> dict[str, int]:
        """Where in the data a step of `total` samples begins: the epoch, and how many of its rows were seen."""
        epoch, place = divmod(step * total, len(self))
        return {"epoch": epoch, "place": place}

    def _permutations(self, block: int) -> Tensor:
        """The orders of some epochs in a row, one after another: those of few rows are drawn together."""
        own = generator(self.seed, "epochs", block)
        order = torch.rand(self._together, len(self), dtype=torch.float64, generator=own).argsort(1)
        return order.flatten()


def prepare(
    examples: Sequence[Example], task: Task, cache: Path, *, seed: int, say: Say, workers: int = 1
) -> Rows:
    """The rows of these examples: made and written to `cache`, or found there.

    A file that cannot be read is left out, with a line for each of the first ones and a count.

    Args:
        cache: a folder for these rows alone: others in it, and what killed processes left, go when new ones are made.
        seed: of the order in which rows are drawn.
        say: told how it goes on.
        workers: threads that read; more than one where `task.read` allows it.

    Raises:
        UsageError: no example can be used, or `task.weigh` gives weights that are no weights.
        MdiffError: rows differ in their names, shapes or types, or the system refused.
    """
    if not examples:
        raise UsageError("there are no examples to make rows of")
    root = Path(os.path.commonpath([example.path.parent for example in examples]))
    folder = cache / _key(examples, root, task)[:16]
    index = _index(folder)
    if index is None:
        index = _make(examples, root, task, folder, say, workers)
    else:
        left_out = f", {len(index['skipped'])} files left out" if index["skipped"] else ""
        say(f"{len(index['sources'])} rows found in {folder}{left_out}")
    weights = None if task.weigh is None else _weights(examples, index["sources"], task.weigh)
    return Rows(
        _load(folder, index["tensors"]),
        seed=seed,
        examples=examples,
        sources=index["sources"],
        weights=weights,
        skipped=index["skipped"],
    )


def _key(examples: Sequence[Example], root: Path, task: Task) -> str:
    """sha256 of everything that rows are made of, as far as it can be told without reading the files."""
    described = [
        [_name(e, root), *_stat(e.path), list(e.texts), e.label, e.split, dict(e.facts)]
        for e in examples
    ]
    made_of = {"version": VERSION, "made_by": dict(task.made_by), "examples": described}
    return sha256(record.canonical(made_of).encode()).hexdigest()


def _name(example: Example, root: Path) -> str:
    return example.path.relative_to(root).as_posix()


def _stat(path: Path) -> tuple[int, int]:
    """Size and time of change; a file that has gone is reported when it is read."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _index(folder: Path) -> dict[str, Any] | None:
    """The index of a folder of rows; None where it is absent or not whole."""
    try:
        index = json.loads((folder / INDEX).read_text())
        count, _ = len(index["sources"]), index["skipped"]
        for name, size in index["tensors"].items():
            path = folder / f"{name}.npy"
            if path.stat().st_size != size or len(np.load(path, mmap_mode="r")) != count:
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return index


def _load(folder: Path, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    small = sum(sizes.values()) < min(LOADED, memory // 4)
    # "c": pages come from the file when they are wanted, and nothing is ever written back
    arrays = {
        name: np.load(folder / f"{name}.npy", mmap_mode=None if small else "c") for name in sizes
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _weights(
    examples: Sequence[Example], sources: Sequence[int], weigh: Callable[[Example], float]
) -> Tensor:
    """The weight of each row (rows,): that of its example, shared among the rows of that."""
    each = torch.tensor([float(weigh(example)) for example in examples], dtype=torch.float64)
    for example, weight in zip(examples, each.tolist(), strict=True):
        if not 0 <= weight < float("inf"):
            raise UsageError(f"the weight of {example.path} is {weight}: it should be 0 or more")
    source = torch.tensor(sources)
    weights = (each / source.bincount(minlength=len(examples)).clamp(min=1))[source]
    if not weights.any():
        raise UsageError("all examples have the weight 0: at least one should be seen")
    return weights


def _make(
    examples: Sequence[Example], root: Path, task: Task, folder: Path, say: Say, workers: int
) -> dict[str, Any]:
    """Reads all examples and writes their rows into `folder`, which appears when all are there; gives its index."""
    record.make_folder(folder.parent)
    _sweep(folder.parent, _ASIDE)
    aside = Path(mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    sources: list[int] = []
    skipped: dict[str, str] = {}
    told = time.monotonic()
    try:
        with _Writer(aside) as writer:
            for number, rows in enumerate(_read(examples, task, workers)):
                name = _name(examples[number], root)
                if isinstance(rows, str):
                    skipped[name] = rows
                    if len(skipped) <= _TOLD:
                        say(f"left out {name}: {rows}")
                    continue
                for row in rows:
                    writer.add(name, row)
                sources += [number] * len(rows)
                if time.monotonic() - told > _PACE:
                    told = time.monotonic()
                    say(f"read {number + 1} of {len(examples)} files")
            if not sources:
                first, reason = next(iter(skipped.items()))
                raise UsageError(
                    f"none of the {len(examples)} files can be used: {first}: {reason}"
                )
            sizes = writer.finish(len(sources))
        index = {"tensors": sizes, "sources": sources, "skipped": skipped}
        with record.atomic_write(aside / INDEX) as path:
            path.write_text(json.dumps(index))
        _sweep(folder.parent, _ROWS)  # what was not whole, or serves no more
        os.rename(aside, folder)
    except OSError as error:
        if _index(folder) is None:  # else another process was first, with the same rows
            raise MdiffError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        rmtree(aside, ignore_errors=True)
    left_out = f"; {len(skipped)} of {len(examples)} files could not be used" if skipped else ""
    say(f"{len(sources)} rows of {len(examples) - len(skipped)} files kept in {folder}{left_out}")
    return index


_ROWS = re.compile(r"[0-9a-f]{16}")
_ASIDE = re.compile(r"\.[0-9a-f]{16}-\w+")


def _sweep(cache: Path, names: re.Pattern[str]) -> None:
    """Removes the folders of such names."""
    for path in cache.iterdir():
        if names.fullmatch(path.name):
            rmtree(path, ignore_errors=True)


_Row = dict[str, np.ndarray[Any, Any]]


def _read(examples: Sequence[Example], task: Task, workers: int) -> Iterator[list[_Row] | str]:
    """The rows of each example in turn, or in a line why it has none; a few examples are read ahead."""

    def one(example: Example) -> list[_Row] | str:
        try:
            with torch.no_grad():
                tensors = [dict(row) for row in task.read(example)]
        except Exception as error:  # noqa: BLE001 (decoders raise what they like)
            return cause(error)
        if not tensors:
            return "no rows come of it"
        for row in tensors:
            for name, value in row.items():
                if value.is_floating_point() and not value.isfinite().all():
                    return f"a value of {name!r} is not finite"
        return [{name: _array(name, value) for name, value in row.items()} for row in tensors]

    if workers <= 1:
        yield from map(one, examples)
        return
    with ThreadPoolExecutor(workers) as pool:
        todo = iter(examples)
        ahead = [pool.submit(one, example) for example in islice(todo, 2 * workers)]
        while ahead:
            yield ahead.pop(0).result()
            ahead += [pool.submit(one, example) for example in islice(todo, 1)]


def _array(name: str, value: Tensor) -> np.ndarray[Any, Any]:
    if value.dtype == torch.bfloat16:
        raise MdiffError(
            f"{name!r} is bfloat16, which rows cannot be: `Task.read` should give float16 or float32"
        )
    return value.detach().cpu().contiguous().numpy()


class _Writer:
    """Appends rows to one `.npy` file for each name; how many there are is known at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.first = ""
        self.forms: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        self.files: dict[str, IO[bytes]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add(self, source: str, row: _Row) -> None:
        """Raises:
        MdiffError: the row is not like the first one.
        """
        forms = {name: (array.dtype, array.shape) for name, array in row.items()}
        if not self.files:
            self.first, self.forms = source, forms
            for name in row:
                self.files[name] = self._stack.enter_context(
                    (self.folder / f"{name}.npy").open("wb")
                )
                self._header(name, 0)
        elif forms != self.forms:
            ours, theirs = (
                ", ".join(_said(name, *form) for name, form in f.items())
                for f in (forms, self.forms)
            )
            raise MdiffError(
                f"{source} gives rows of {ours}, and {self.first} of {theirs}: all should be alike"
            )
        for name, array in row.items():
            self.files[name].write(array.tobytes())

    def finish(self, count: int) -> dict[str, int]:
        """Writes the number of rows into the headers; gives the size of each file."""
        for name, file in self.files.items():
            file.seek(0)
            self._header(name, count)
            file.flush()
            os.fsync(file.fileno())
        return {name: os.fstat(file.fileno()).st_size for name, file in self.files.items()}

    def _header(self, name: str, count: int) -> None:
        """numpy leaves room in a header for any length of the first axis, so its size does not depend on it."""
        dtype, shape = self.forms[name]
        said = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": (count, *shape),
        }
        np.lib.format.write_array_header_1_0(self.files[name], said)


def _said(name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> str:
    return f"{name} {dtype} {shape}"
