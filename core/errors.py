"""The error tree: each class is one kind of failure and carries the exit code of the command line.

A message is one line: what was wrong, what would be right, and the command that mends it where
there is one.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class MdiffError(Exception):
    """Anything that went wrong while running (exit code 1)."""

    exit_code = 1


class UsageError(MdiffError):
    """The caller asked for something that is not on offer (exit code 2)."""

    exit_code = 2


class MissingError(MdiffError):
    """A model, plugin or file that is not there (exit code 3); the message says how to get it."""

    exit_code = 3


class IntegrityError(MdiffError):
    """A file that is not what its card says: size, hash, names or shapes (exit code 4)."""

    exit_code = 4


class NonFiniteError(MdiffError):
    """A NaN or an infinity turned up; the message names the step and the noise level."""


class PluginError(MdiffError):
    """A plugin failed in a hook; the message names the plugin, the hook and the cause."""


def cause(error: BaseException) -> str:
    """What went wrong in one line: the message of an error of ours, the kind and the message of any other."""
    said = str(error) if isinstance(error, MdiffError) else f"{type(error).__name__}: {error}"
    return " ".join(said.split())


def nearest(name: str, known: Iterable[str]) -> str:
    """The clause that ends a message about an unknown name: `; did you mean 'x'?`, else all the
    known names.
    """
    names = sorted(known)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}" if names else "; there are none"
