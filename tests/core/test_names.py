"""What rows of tables say of themselves."""

from functools import partial
from importlib import import_module

import pytest

from mdiff.core.names import Described, about
from mdiff.core.pipeline import OWN


def test_what_and_where_from_are_read_from_the_docstring():
    def cited():
        """A rule (of sorts) for x (Ho et al., 2020, eq. 3).

        More of it (Lin et al., 2023).
        """

    def named():
        """A rule for
        x.

        Args:
            y: not (Lin, 2023) this. Source: an old
                book.
        """

    class Later:
        """A rule for x.

        As in a paper (Lin et al., 2023).
        """

    assert about(cited) == Described("A rule (of sorts) for x", "Ho et al., 2020, eq. 3")
    assert about(partial(cited, 1)) == about(cited)
    assert about(named) == Described("A rule for x", "an old book")
    assert about(Later) == Described("A rule for x", "Lin et al., 2023")
    assert about(lambda: 0) == Described("", "")


@pytest.mark.parametrize("kind", OWN)
def test_every_component_has_a_line_and_a_source(kind: str) -> None:
    module = import_module(f"mdiff.core.{kind}")
    rows = {**module.NAMES, **(module.LISTS if kind == "grids" else {})}
    said = {name: about(row) for name, row in rows.items()}
    assert not {name: row for name, row in said.items() if not (row.line and row.source)}
    assert max(len(row.line) for row in said.values()) <= 120
