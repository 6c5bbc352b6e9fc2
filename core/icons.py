"""Icon sets inside packages: which picture shows which emoji, how it is opened or drawn, and whom its licence names.

There are two kinds: folders of files named by code points, and Iconify sets, one JSON file of SVG by key. A picture is
opened or drawn when it is asked for. Neither Pillow nor what draws SVG is imported before that.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdiff.core.errors import MdiffError, MissingError

if TYPE_CHECKING:
    from PIL.Image import Image

SETS: Mapping[str, str] = {
    "fluent-3d": "npm:@lobehub/fluent-emoji-3d@1.1.0",
    "fluent-flat": "npm:@iconify-json/fluent-emoji-flat@1.2.6",
    "fluent-contrast": "npm:@iconify-json/fluent-emoji-high-contrast@1.2.6",
    "noto": "npm:@iconify-json/noto@1.2.9",
    "noto-v1": "npm:@iconify-json/noto-v1@1.2.5",
    "fxemoji": "npm:@iconify-json/fxemoji@1.2.2",
    "fluent-gradient": "npm:@iconify-json/fluent-emoji@1.2.7",
    "twemoji": "npm:@iconify-json/twemoji@1.2.5",
    "emojione": "npm:@iconify-json/emojione@1.2.3",
    "emojione-monotone": "npm:@iconify-json/emojione-monotone@1.2.1",
}
"""The packages of the sets."""
RESVG = "pip:resvg-py==0.5.0"
"""The package that draws SVG."""

_FLUENT = "Copyright (c) Microsoft Corporation, Fluent Emoji, github.com/microsoft/fluentui-emoji"
_EMOJIONE = "Ranks.com Inc., EmojiOne 2, emojione.com; packed by Iconify"
_NOTO = "Google Inc, Noto Emoji, github.com/googlefonts/noto-emoji"
CREDITS: Mapping[str, tuple[str, str]] = {
    "fluent-3d": ("MIT", f"{_FLUENT}; packed by LobeHub"),
    "fluent-flat": ("MIT", f"{_FLUENT}; packed by Iconify"),
    "fluent-contrast": ("MIT", f"{_FLUENT}; packed by Iconify"),
    "noto": ("Apache-2.0", f"{_NOTO}; packed by Iconify"),
    "noto-v1": ("Apache-2.0", f"{_NOTO} (its first version); packed by Iconify"),
    "fxemoji": ("Apache-2.0", "Mozilla, FxEmoji, github.com/mozilla/fxemoji; packed by Iconify"),
    "fluent-gradient": ("MIT", f"{_FLUENT}; packed by Iconify"),
    "twemoji": (
        "CC-BY-4.0",
        "Twitter, Inc and other contributors, Twemoji, github.com/twitter/twemoji; packed by Iconify",
    ),
    "emojione": ("CC-BY-4.0", _EMOJIONE),
    "emojione-monotone": ("CC-BY-4.0", _EMOJIONE),
}
"""The licence of each set, and whom to name."""

LICENCE_TEXTS = """
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

## CC-BY-4.0

Creative Commons Attribution 4.0 International; the licence, with its disclaimer of warranties, is at
https://creativecommons.org/licenses/by/4.0/. Who passes the pictures on names their authors and says what was changed.
"""
"""What the licences ask to go along with every copy."""

DRAWN = 256
"""Pixels of a side at which vectors are drawn before they are made small."""
FAINT = 8
"""Opacity (of 255) up to which a pixel counts as empty: soft shadows do not move the centre."""

Draw = Callable[[str], bytes]
"""SVG text -> the bytes of a PNG file, `DRAWN` wide."""
Icons = Mapping[str, "Callable[[], Image]"]
"""Code of an emoji -> what opens or draws its picture, RGBA; it raises `MdiffError` where that fails."""


def code_of(emoji: str) -> str:
    """The code points of an emoji, as the sets write them: "1f9d1-200d-1f680"."""
    return "-".join(f"{ord(c):04x}" for c in emoji if c != "\ufe0f")


def files(folder: Path) -> Icons:
    """Pictures named by code points."""
    return {
        path.stem.replace("-fe0f", ""): partial(_opened, path)
        for path in sorted(folder.glob("*.webp"))
    }


def vectors(package: Path, keys: Mapping[str, str], draw: Draw) -> Icons:
    """Icons of an Iconify set.

    Args:
        keys: code -> key in the set; those that the set does not have are passed over.
    """
    icons = json.loads((package / "icons.json").read_text("utf-8"))
    return {
        code: partial(_drawn, icons, key, draw)
        for code, key in keys.items()
        if key in icons["icons"]
    }


def codes(package: Path) -> dict[str, str]:
    """Code -> key, of an Iconify set that says so itself."""
    table = json.loads((package / "chars.json").read_text("utf-8"))
    return {code.replace("-fe0f", ""): key for code, key in table.items()}


def svg(icons: Mapping[str, Any], key: str) -> str:
    """The SVG text of one icon of an Iconify set, whose sizes are stated for all icons or for one."""
    icon = icons["icons"][key]
    standard = {"left": 0, "top": 0, "width": 16, "height": 16}
    size = {name: icon.get(name, icons.get(name, value)) for name, value in standard.items()}
    box = " ".join(str(value) for value in size.values())
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    shape = f'width="{size["width"]}" height="{size["height"]}" viewBox="{box}"'
    return f"<svg {names} {shape}>{icon['body']}</svg>"


def drawer(package: Path) -> Draw:
    """What draws SVG, out of the unpacked package `RESVG`; no font is used.

    Raises:
        MissingError: the package does not load here.
    """
    sys.path.insert(0, str(package))
    try:
        resvg = import_module("resvg_py")
    except ImportError as error:
        install = RESVG.removeprefix("pip:")
        raise MissingError(
            f"SVG pictures cannot be drawn ({error}): pip install {install}"
        ) from error
    finally:
        sys.path.remove(str(package))
    return lambda text: bytes(
        resvg.svg_to_bytes(svg_string=text, width=DRAWN, skip_system_fonts=True)
    )


def opened(data: bytes) -> Image:
    """An image of any mode as RGBA.

    Raises:
        MdiffError: not an image.
    """
    from PIL import Image

    try:
        with Image.open(BytesIO(data)) as image:
            return image.convert("RGBA")
    except (OSError, SyntaxError) as error:  # Pillow's PNG reader raises SyntaxError
        raise MdiffError(f"not an image: {error}") from error


def trimmed(image: Image) -> Image:
    """What is drawn in an RGBA image, without what is empty or `FAINT` around it.

    Raises:
        MdiffError: nothing is drawn in it.
    """
    box = image.getchannel("A").point([255 * (value > FAINT) for value in range(256)]).getbbox()
    if box is None:
        raise MdiffError("nothing is drawn")
    return image.crop(box)


def _opened(path: Path) -> Image:
    return opened(path.read_bytes())


def _drawn(icons: Mapping[str, Any], key: str, draw: Draw) -> Image:
    try:
        return opened(draw(svg(icons, key)))
    except ValueError as error:  # what resvg raises
        raise MdiffError(f"not an SVG that can be drawn: {error}") from error
