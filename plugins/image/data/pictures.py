"""Icons into training pictures: drawn large, put on a white ground, centred, made small."""

import sys
from collections.abc import Callable, Mapping
from functools import reduce
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops

from mdiff.core.errors import MdiffError, MissingError

SIDE = 128
"""Pixels of a side of a picture."""
FILLED = 0.88
"""The longer side of what is drawn, as a part of the picture's side."""
DRAWN = 256
"""Pixels of a side at which vectors are drawn before they are made small."""
LEAST_SEEN = 0.03
"""The part of a picture that has to differ from its ground (by a tenth of the range)."""
FAINT = 8
"""Opacity (of 255) up to which a pixel counts as empty: soft shadows do not move the centre."""

Draw = Callable[[str], bytes]
"""SVG text -> the bytes of a PNG file, `DRAWN` wide."""


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
    """What draws SVG, out of the unpacked package of resvg-py; no font is used.

    Raises:
        MissingError: the package does not load here.
    """
    sys.path.insert(0, str(package))
    try:
        resvg = import_module("resvg_py")
    except ImportError as error:
        raise MissingError(
            f"SVG pictures cannot be drawn ({error}): pip install resvg-py==0.5.0"
        ) from error
    finally:
        sys.path.remove(str(package))
    return lambda text: bytes(
        resvg.svg_to_bytes(svg_string=text, width=DRAWN, skip_system_fonts=True)
    )


def opened(data: bytes) -> Image.Image:
    """An image of any mode as RGBA.

    Raises:
        MdiffError: not an image.
    """
    try:
        with Image.open(BytesIO(data)) as image:
            return image.convert("RGBA")
    except (OSError, SyntaxError) as error:  # Pillow's PNG reader raises SyntaxError
        raise MdiffError(f"not an image: {error}") from error


def picture(image: Image.Image) -> Image.Image:
    """A `SIDE` x `SIDE` RGB picture of an RGBA image on white: what is drawn fills `FILLED` of it.

    Raises:
        MdiffError: nothing is drawn in the image, or next to nothing can be seen on white.
    """
    box = image.getchannel("A").point([255 * (value > FAINT) for value in range(256)]).getbbox()
    if box is None:
        raise MdiffError("nothing is drawn")
    drawn = image.crop(box)
    side = round(max(drawn.size) / FILLED)
    ground = Image.new("RGBA", (side, side), "white")
    ground.alpha_composite(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
    small = ground.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    darkest = reduce(ImageChops.darker, small.split())
    if sum(darkest.histogram()[:230]) < LEAST_SEEN * SIDE**2:
        raise MdiffError("it cannot be seen on white")
    return small
