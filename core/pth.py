"""PyTorch checkpoints (.pth, .pt, .bin, .ckpt) read without executing them.

A checkpoint is a pickle: a program that builds a value on a stack and may call any function there is. Here the program
is walked by a small machine of our own that knows the few opcodes and the few functions which a state dict needs, and
refuses everything else by name. Both forms are read: the zip archive of PyTorch 1.6 and later, and the row of pickles
and storages before it.

Sources: the opcodes of pickle protocols 0 to 5 (docs of the Python module `pickletools`); the layouts that
`torch.save` writes (torch.serialization).
"""

import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdiff.core.errors import IntegrityError, MissingError

MAGIC = 0x1950A86A20F9469CFC6C
"""The number that begins a checkpoint of before PyTorch 1.6."""

DEPTH = 64
"""Containers within containers beyond which a value is refused: it may hold itself."""

STORAGES: Mapping[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
}

DTYPES = {
    name: value
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype) and not name.startswith("q")
}


def tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name; those in nested tables and lists have dotted names ("model.conv.weight").

    Tensors that share memory in the file share it here.

    Raises:
        MissingError: the file cannot be read.
        IntegrityError: as `read`, or there is no tensor in it.
    """
    found = dict(_leaves(read(path), path.name))
    if not found:
        raise IntegrityError(f"{path} holds no tensor")
    return found


def read(path: Path) -> Any:
    """The value in a checkpoint: tensors, numbers and texts in dicts, lists and tuples.

    Raises:
        MissingError: the file cannot be read.
        IntegrityError: it is no checkpoint, it is cut short, or it needs more than a state dict does; what it asks for
            is named, and nothing of it has run.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MissingError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return _zip(data, path.name) if data[:2] == b"PK" else _row(data, path.name)
    except IntegrityError:
        raise
    except Exception as error:  # whatever a broken file leads to
        raise IntegrityError(
            f"{path} is no whole PyTorch checkpoint ({type(error).__name__}: {error})"
        ) from error


def _leaves(
    value: Any, name: str, prefix: str = "", depth: int = 0
) -> Iterator[tuple[str, Tensor]]:
    if depth > DEPTH:
        raise IntegrityError(f"{name} nests deeper than {DEPTH}: it is no state dict")
    if isinstance(value, Tensor):
        yield prefix or "tensor", value
    elif isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from _leaves(inner, name, f"{prefix}.{key}" if prefix else str(key), depth + 1)


def _zip(data: bytes, name: str) -> Any:
    """An archive: `<top>/data.pkl`, and each storage's bytes as `<top>/data/<key>`."""
    with zipfile.ZipFile(BytesIO(data)) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        program = next((n for n in sizes if n.split("/")[1:] == ["data.pkl"]), None)
        if program is None:
            raise IntegrityError(f"{name} is a zip archive but no PyTorch checkpoint (no data.pkl)")
        top = program.removesuffix("data.pkl")
        if archive.read(f"{top}byteorder") != b"little" if f"{top}byteorder" in sizes else False:
            raise IntegrityError(f"{name} was written on a big-endian machine: save it on another")
        storages: dict[str, bytearray] = {}

        def storage(key: str, size: int) -> bytearray:
            if key not in storages:
                entry = f"{top}data/{key}"
                if sizes.get(entry, -1) < size:
                    raise IntegrityError(
                        f"{name}: storage {key} should have {size} bytes and has {sizes.get(entry)}"
                    )
                storages[key] = bytearray(archive.read(entry))
            return storages[key]

        return _Machine(name, archive.read(program), storage).run()


def _row(data: bytes, name: str) -> Any:
    """Pickles in a row: magic number, version, about the system, the value, keys of storages; then the storages, each
    its number of items and its bytes.

    The value comes before the bytes of its tensors, so it is walked twice: for their sizes, then for them.
    """

    def nothing(key: str, size: int) -> bytearray:
        raise IntegrityError(f"{name} is no PyTorch checkpoint: a storage is where none belongs")

    at = 0
    head = []
    for _ in range(3):
        machine = _Machine(name, data, nothing, at)
        head.append(machine.run())
        at = machine.at
    if head[0] != MAGIC:
        raise IntegrityError(f"{name} is no PyTorch checkpoint: it does not begin like one")
    if isinstance(head[2], dict) and not head[2].get("little_endian", True):
        raise IntegrityError(f"{name} was written on a big-endian machine: save it on another")
    sizes: dict[str, int] = {}

    def blank(key: str, size: int) -> bytearray:
        sizes[key] = max(size, sizes.get(key, 0))
        return bytearray(0)

    first = _Machine(name, data, blank, at, shapes_only=True)
    first.run()
    keys = _Machine(name, data, nothing, first.at)
    order = keys.run()
    where = keys.at
    storages: dict[str, bytearray] = {}
    for key in order:
        (count,) = struct.unpack_from("<q", data, where)
        size = first.widths[key] * count
        storages[key] = bytearray(data[where + 8 : where + 8 + size])
        where += 8 + size
        if count < 0 or len(storages[key]) < max(size, sizes.get(key, 0)):
            raise IntegrityError(f"{name} is cut short: storage {key} is not whole")
    return _Machine(name, data, lambda key, size: storages[key], at).run()


@dataclass(frozen=True)
class _Storage:
    """Bytes of a storage, and the type of its items; None for bytes that a tensor gives a type to."""

    data: bytearray
    dtype: torch.dtype | None
    shapes_only: bool


class _Mark:
    """What MARK leaves on the stack."""


_MARK = _Mark()


@dataclass
class _Machine:
    """The stack machine of a pickle, over `program` from `at` on.

    Attributes:
        storage: (key, bytes at least) -> the bytes of a storage.
        shapes_only: tensors are left empty: their bytes are not there yet.
        widths: bytes an item of each storage, by key.
    """

    name: str
    program: bytes
    storage: Callable[[str, int], bytearray]
    at: int = 0
    shapes_only: bool = False
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)

    def run(self) -> Any:
        """The value that the program leaves."""
        while True:
            code = self.take(1)
            if code == b".":
                return self.stack.pop()
            if code not in OPCODES:
                raise IntegrityError(
                    f"{self.name} is no PyTorch checkpoint that can be read: unknown opcode {code!r} at {self.at - 1}"
                )
            OPCODES[code](self)

    def take(self, count: int) -> bytes:
        """The next bytes of the program."""
        part = self.program[self.at : self.at + count]
        if len(part) < count:
            raise IntegrityError(f"{self.name} is cut short")
        self.at += count
        return part

    def number(self, form: str) -> int:
        (value,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return int(value)

    def line(self) -> str:
        end = self.program.index(b"\n", self.at)
        return self.take(end + 1 - self.at)[:-1].decode()

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def since_mark(self) -> list[Any]:
        """What was pushed since the last MARK, which goes."""
        start = len(self.stack) - 1
        while self.stack[start] is not _MARK:
            start -= 1
            if start < 0:
                raise IntegrityError(f"{self.name} is no PyTorch checkpoint: a mark is missing")
        items = self.stack[start + 1 :]
        del self.stack[start:]
        return items

    def pop(self, count: int) -> list[Any]:
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def refuse(self, what: str) -> IntegrityError:
        return IntegrityError(
            f"{self.name} asks for {what}, which no state dict needs: it was not run. "
            "Save the tensors alone: torch.save(model.state_dict(), ...)"
        )

    def global_(self, module: str, name: str) -> None:
        """A thing by its name: one of `GLOBALS`, a type of storage or a dtype."""
        if (module, name) in GLOBALS:
            self.push(GLOBALS[module, name])
        elif module in ("torch", "torch.storage") and name in STORAGES:
            self.push(None if name == "UntypedStorage" else STORAGES[name])
        elif module == "torch" and name in DTYPES:
            self.push(DTYPES[name])
        else:
            raise self.refuse(f"{module}.{name}")

    def reduce(self) -> None:
        """Calls one of `GLOBALS`; nothing else is ever called."""
        function, arguments = self.pop(2)
        if not isinstance(function, _Global):
            raise self.refuse(f"a call of {function!r}")
        self.push(function.make(self, *arguments))

    def build(self) -> None:
        """A state for the object below it, which keeps none: `_metadata` of a state dict."""
        target, _ = self.pop(2)
        if not isinstance(target, dict):
            raise self.refuse(f"a state of a {type(target).__name__}")
        self.push(target)

    def persistent(self) -> None:
        """A storage, by ("storage", type, key, device, items)."""
        kind, dtype, key, _, count, *view = self.stack.pop()
        if kind != "storage" or not (dtype is None or isinstance(dtype, torch.dtype)) or any(view):
            raise self.refuse(f"a persistent {kind!r}")
        width = 1 if dtype is None else dtype.itemsize
        self.widths[key] = width
        self.push(_Storage(self.storage(key, width * count), dtype, self.shapes_only))

    def append(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise self.refuse(f"items of a {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(items)

    def set(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise self.refuse(f"items of a {type(self.stack[-1]).__name__}")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))


@dataclass(frozen=True)
class _Global:
    """A function that a checkpoint may call, and what is done instead: (machine, arguments) -> value."""

    name: str
    make: Callable[..., Any]


def _view(
    machine: _Machine,
    storage: _Storage,
    dtype: torch.dtype | None,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
) -> Tensor:
    """A tensor over a storage, checked to lie within it."""
    if not isinstance(storage, _Storage) or not isinstance(dtype, torch.dtype):
        raise machine.refuse("a tensor without a storage")
    if storage.shapes_only:
        return torch.empty(0)
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or any(not isinstance(n, int) or n < 0 for n in numbers):
        raise machine.refuse(f"a tensor of size {size} and stride {stride}")
    count = len(storage.data) // dtype.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 in size or count == 0:
        if 0 not in size:
            raise IntegrityError(f"{machine.name}: a tensor reaches beyond its storage")
        return torch.empty(size, dtype=dtype)
    if last >= count:
        raise IntegrityError(f"{machine.name}: a tensor reaches beyond its storage")
    whole = torch.frombuffer(storage.data, dtype=dtype, count=count)
    return whole.as_strided(size, stride, offset)


def _tensor_v2(
    machine: _Machine, storage: Any, offset: Any, size: Any, stride: Any, *_: Any
) -> Any:
    return _view(machine, storage, getattr(storage, "dtype", None), offset, size, stride)


def _tensor_v3(
    machine: _Machine,
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    _: Any,
    __: Any,
    dtype: Any,
    *___: Any,
) -> Any:
    return _view(machine, storage, dtype, offset, size, stride)


GLOBALS: Mapping[tuple[str, str], _Global] = {
    (one.name.rpartition(".")[0], one.name.rpartition(".")[2]): one
    for one in (
        _Global("collections.OrderedDict", lambda machine, items=(): dict(items)),
        _Global("_codecs.encode", lambda machine, text, code: str.encode(text, "latin-1")),
        _Global("torch.Size", lambda machine, items=(): tuple(items)),
        _Global("torch._utils._rebuild_tensor_v2", _tensor_v2),
        _Global("torch._utils._rebuild_tensor_v3", _tensor_v3),
        _Global("torch._utils._rebuild_parameter", lambda machine, data, *_: data),
    )
}
"""Everything that a checkpoint may call."""


def _long(machine: _Machine, form: str) -> None:
    machine.push(int.from_bytes(machine.take(machine.number(form)), "little", signed=True))


def _text(machine: _Machine, form: str, encoding: str = "utf-8") -> None:
    machine.push(machine.take(machine.number(form)).decode(encoding, "surrogatepass"))


def _bytes(machine: _Machine, form: str) -> None:
    machine.push(machine.take(machine.number(form)))


def _put(machine: _Machine, index: int) -> None:
    machine.memo[index] = machine.stack[-1]


def _float(machine: _Machine) -> None:
    (value,) = struct.unpack(">d", machine.take(8))
    machine.push(value)


def _stack_global(machine: _Machine) -> None:
    module, name = machine.pop(2)
    machine.global_(module, name)


OPCODES: Mapping[bytes, Callable[[_Machine], Any]] = {
    b"\x80": lambda m: m.take(1),  # PROTO
    b"\x95": lambda m: m.take(8),  # FRAME
    b"(": lambda m: m.push(_MARK),
    b"0": lambda m: m.pop(1),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"J": lambda m: m.push(m.number("<i")),  # BININT, BININT1, BININT2
    b"K": lambda m: m.push(m.number("<B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"\x8a": lambda m: _long(m, "<B"),  # LONG1, LONG4
    b"\x8b": lambda m: _long(m, "<i"),
    b"G": _float,
    b"X": lambda m: _text(m, "<I"),  # BINUNICODE, SHORT_, 8
    b"\x8c": lambda m: _text(m, "<B"),
    b"\x8d": lambda m: _text(m, "<Q"),
    b"T": lambda m: _text(m, "<i", "latin-1"),  # BINSTRING, SHORT_: Python 2 wrote them
    b"U": lambda m: _text(m, "<B", "latin-1"),
    b"B": lambda m: _bytes(m, "<I"),  # BINBYTES, SHORT_, 8
    b"C": lambda m: _bytes(m, "<B"),
    b"\x8e": lambda m: _bytes(m, "<Q"),
    b"}": lambda m: m.push({}),
    b"]": lambda m: m.push([]),
    b")": lambda m: m.push(()),
    b"t": lambda m: m.push(tuple(m.since_mark())),
    b"\x85": lambda m: m.push(tuple(m.pop(1))),
    b"\x86": lambda m: m.push(tuple(m.pop(2))),
    b"\x87": lambda m: m.push(tuple(m.pop(3))),
    b"l": lambda m: m.push(m.since_mark()),
    b"a": lambda m: m.append(m.pop(1)),
    b"e": lambda m: m.append(m.since_mark()),
    b"s": lambda m: m.set(m.pop(2)),
    b"u": lambda m: m.set(m.since_mark()),
    b"q": lambda m: _put(m, m.number("<B")),  # BINPUT, LONG_BINPUT, MEMOIZE
    b"r": lambda m: _put(m, m.number("<I")),
    b"\x94": lambda m: _put(m, len(m.memo)),
    b"h": lambda m: m.push(m.memo[m.number("<B")]),  # BINGET, LONG_BINGET
    b"j": lambda m: m.push(m.memo[m.number("<I")]),
    b"c": lambda m: m.global_(m.line(), m.line()),
    b"\x93": _stack_global,
    b"R": lambda m: m.reduce(),
    b"b": lambda m: m.build(),
    b"Q": lambda m: m.persistent(),
}
"""What each opcode does; those that are not here (INST, OBJ, NEWOBJ, EXT, text forms, ...) are refused."""
