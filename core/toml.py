"""TOML text of a table: what `tomllib` reads back as the same table."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def dumps(table: Mapping[str, Any]) -> str:
    """The TOML document of nested mappings, lists, texts, numbers and truth values; None is left out.

    Tables of tables get headers, lists of tables `[[headers]]`, and everything else stands on a line of its own.

    Raises:
        TypeError: a value that TOML has no form for.
    """
    return "\n".join(_lines(table, ())).lstrip("\n") + "\n"


def _lines(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    given = {name: value for name, value in table.items() if value is not None}
    # what stands under no header of its own comes first, or it would belong to the last header
    last = {name: value for name, value in given.items() if isinstance(value, Mapping)}
    rows = {name: value for name, value in given.items() if _is_rows(value)}
    lines = [f"{_key(name)} = {value(given[name])}" for name in given if name not in last | rows]
    for name, inner in last.items():
        header = (*path, name)
        body = _lines(inner, header)
        # a header that only leads to others says nothing
        bare = bool(body) and body[0] == ""
        lines += body if bare else ["", f"[{_dotted(header)}]", *body]
    for name, inner in rows.items():
        for row in inner:
            lines += ["", f"[[{_dotted((*path, name))}]]", *_lines(row, (*path, name))]
    return lines


def value(item: Any) -> str:
    """A value on one line. Raises as `dumps`."""
    if isinstance(item, bool):
        return str(item).lower()
    if isinstance(item, int):
        return str(item)
    if isinstance(item, float):
        return repr(item) if math.isfinite(item) else str(item)
    if isinstance(item, str):
        return json.dumps(item, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(item, Mapping):
        pairs = (f"{_key(k)} = {value(v)}" for k, v in item.items() if v is not None)
        return f"{{ {', '.join(pairs)} }}" if item else "{}"
    if isinstance(item, Sequence):
        return f"[{', '.join(map(value, item))}]"
    raise TypeError(f"TOML has no form for {item!r}")


def _is_rows(item: Any) -> bool:
    return (
        isinstance(item, list | tuple) and bool(item) and all(isinstance(r, Mapping) for r in item)
    )


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else value(name)


def _dotted(path: Sequence[str]) -> str:
    return ".".join(map(_key, path))
