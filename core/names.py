"""Tables of named things: a row is found by its name, and made with its parameters.

A row says in its docstring what it is, in the first paragraph, and where it comes from: a citation
in brackets, with its year or the code that is cited, or what follows "Source:".
"""

import inspect
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

from mdiff.core.errors import UsageError, nearest

T = TypeVar("T")


def pick(kind: str, table: Mapping[str, T], name: str) -> T:
    """The row `name` of a table of `kind` ("sampler", ...).

    Raises:
        UsageError: there is no such row; the message names the nearest.
    """
    if name not in table:
        raise UsageError(f"unknown {kind} {name!r}{nearest(name, table)}")
    return table[name]


def make(
    kind: str, table: Mapping[str, Callable[..., T]], name: str, /, *args: Any, **params: Any
) -> T:
    """Calls the row `name` of a table of functions.

    Raises:
        UsageError: there is no such row, or it does not take these parameters.
    """
    row = pick(kind, table, name)
    signature = inspect.signature(row)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    form = f"it is {name}{inspect.Signature(bare)}"
    try:
        given = signature.bind(*args, **params).arguments
    except TypeError as error:
        raise UsageError(f"{kind} {name!r}: {error}; {form}") from None
    for key, value in given.items():
        words, refused = _REFUSED.get(signature.parameters[key].annotation, ("", ()))
        if isinstance(value, refused):
            raise UsageError(f"{kind} {name!r}: {key} should be {words}, it is {value!r}; {form}")
    return row(*args, **params)


_REFUSED: Mapping[Any, tuple[str, tuple[type, ...]]] = {
    float: ("a number", (str, list, dict)),
    int: ("a whole number", (str, list, dict, float)),
    str: ("text", (bool, int, float, list, dict)),
    bool: ("true or false", (str, float, list, dict)),
}
"""By the type that a parameter has: what to call it, and what a file or a command line may have said instead."""


class Described(NamedTuple):
    """What a row says of itself, each one line; empty where it does not say."""

    line: str
    source: str


def about(row: Any) -> Described:
    """What the docstring of a function or a class says it is, and its source."""
    text = inspect.getdoc(row.func if isinstance(row, partial) else row) or ""
    first = " ".join(text.partition("\n\n")[0].split())
    found = _CITED.search(first) or _NAMED.search(text) or _CITED.search(text)
    line = _NAMED.sub("", _CITED.sub("", first, count=1)).strip().removesuffix(".")
    return Described(line=line, source=" ".join(found[1].split()) if found else "")


_CITED = re.compile(r"\s*\(([^()]*\b(?:(?:1[5-9]|20)\d\d[a-z]?|k-diffusion|diffusers)\b[^()]*)\)")
_NAMED = re.compile(r"\s*Source:\s+(.+?)\.?(?=\n\n|\Z)", re.DOTALL)
