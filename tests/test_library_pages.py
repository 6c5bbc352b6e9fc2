"""The pages about mdiff as a library: every block of Python runs, in the order of its page."""

import re
from pathlib import Path
from types import ModuleType

import pytest

from mdiff.core import samplers

PAGES = sorted((Path(__file__).parents[1] / "docs" / "library").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_its_code_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers, "NAMES", dict(samplers.NAMES))
    text = page.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert blocks and text.startswith("# ")
    assert all(len(line) <= 120 for line in text.splitlines())
    module = ModuleType(f"page_{page.stem}")
    code = "\n".join(blocks)
    exec(compile(code, page.name, "exec"), vars(module))  # noqa: S102 (our own pages)


def test_the_pages_are_there() -> None:
    assert {page.stem for page in PAGES} == {"inpainting", "sampler", "two_moons"}
