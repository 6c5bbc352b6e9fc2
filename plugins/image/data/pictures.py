"""Icons into training pictures: put on a white ground, centred, made small."""

from functools import reduce

from PIL import Image, ImageChops

from mdiff.core import icons
from mdiff.core.errors import MdiffError

SIDE = 128
"""Pixels of a side of a picture."""
FILLED = 0.88
"""The longer side of what is drawn, as a part of the picture's side."""
LEAST_SEEN = 0.03
"""The part of a picture that has to differ from its ground (by a tenth of the range)."""


def picture(image: Image.Image) -> Image.Image:
    """A `SIDE` x `SIDE` RGB picture of an RGBA image on white: what is drawn fills `FILLED` of it.

    Raises:
        MdiffError: nothing is drawn in the image, or next to nothing can be seen on white.
    """
    drawn = icons.trimmed(image)
    side = round(max(drawn.size) / FILLED)
    ground = Image.new("RGBA", (side, side), "white")
    ground.alpha_composite(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
    small = ground.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    darkest = reduce(ImageChops.darker, small.split())
    if sum(darkest.histogram()[:230]) < LEAST_SEEN * SIDE**2:
        raise MdiffError("it cannot be seen on white")
    return small
