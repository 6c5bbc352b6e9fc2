"""Tables of named things: a row is found by its name, and made with its parameters."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

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
    kind: str, table: Mapping[str, Callable[..., T]], name: str, *args: Any, **params: Any
) -> T:
    """Calls the row `name` of a table of functions.

    Raises:
        UsageError: there is no such row, or it does not take these parameters.
    """
    row = pick(kind, table, name)
    signature = inspect.signature(row)
    try:
        signature.bind(*args, **params)
    except TypeError as error:
        raise UsageError(f"{kind} {name!r}: {error}; it is {name}{signature}") from None
    return row(*args, **params)
