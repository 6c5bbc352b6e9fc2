"""Clips made of pictures, through Pillow: animated GIF and WebP (and PNG), and PNG files in a zip.

Such files say how long each picture stays, in hundredths or thousandths of a second, so that an exact rate has to be
told beside them (`note`), or guessed from them (`explained`).
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from itertools import accumulate, pairwise
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mdiff.core import record
from mdiff.core.errors import IntegrityError, MdiffError, UsageError
from mdiff.plugins.video.ffmpeg import rate_of

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

FORMATS = ("GIF", "WEBP", "PNG", "JPEG", "BMP", "TIFF")
"""What is read here: kinds of picture, of which the first three can move."""
DESCRIPTION, EXIF_PART, COMMENT = 0x010E, 0x8769, 0x9286
"""EXIF tags: ImageDescription, the part that holds the next, UserComment."""
ASCII = b"ASCII\0\0\0"
"""How a UserComment begins."""
LEAST = 20
"""Milliseconds: what stays for less is shown for 100 by browsers, which is what its makers saw."""
LIST = "clip.json"
"""The file in a zip that says how fast its pictures go by, and holds the record."""


class Note(NamedTuple):
    """What a file cannot say otherwise: how many frames, height and width, frames a second."""

    frames: int
    size: tuple[int, int]
    rate: Fraction

    def __str__(self) -> str:
        height, width = self.size
        return f"{self.frames} frames of {width} x {height} pixels, {self.rate} a second"


_NOTE = re.compile(
    r"(\d{1,9}) frames of (\d{1,6}) x (\d{1,6}) pixels, (\d{1,9}(?:/[1-9]\d{0,8})?) a second"
)


def noted(text: str) -> Note | None:
    """The note in a text; None without, or with one that cannot be."""
    if (found := _NOTE.search(text)) is None:
        return None
    count, width, height, rate = int(found[1]), int(found[2]), int(found[3]), Fraction(found[4])
    return Note(count, (height, width), rate) if count and width and height and rate else None


# --- writing --------------------------------------------------------------------------------------


def write_gif(path: Path, frames: Iterable[NDArray[Any]], *, text: str, note: Note) -> None:
    """Writes a GIF whose palette is of all frames together, dots of its colours for those between (Floyd-Steinberg).

    Palettes of Pillow's maximum coverage, moved to the means of what they stand for, have less error than those of
    ffmpeg's palettegen where there are many colours, and no more elsewhere. What is half transparent or more is
    transparent. `text` and `note` are lines of its comment.
    """
    import numpy as np
    from PIL.Image import Dither, Quantize, fromarray

    arrays = list(frames)
    clear = arrays[0].shape[2] == 4
    every = len(arrays) * arrays[0][..., 0].size // PALETTE_PIXELS | 1
    seen = np.concatenate(
        [frame[..., :3].reshape(-1, 3)[k % every :: every] for k, frame in enumerate(arrays)]
    )
    seen = seen.astype(np.int32) @ (1 << 16, 1 << 8, 1)
    while len((found := np.unique(seen, return_counts=True))[0]) > PALETTE_COLOURS:
        seen = seen[::3]
    # as often as they are seen, and each at least once
    seen = np.repeat(found[0], np.maximum(1, found[1] * 2 * PALETTE_COLOURS // len(seen)))
    seen = np.stack([seen >> 16, seen >> 8 & 255, seen & 255], axis=1).astype(np.uint8)
    palette = fromarray(seen[None]).quantize(256 - clear, Quantize.MAXCOVERAGE, kmeans=1)
    pictures = []
    for frame in arrays:
        colours = fromarray(frame[..., :3]).quantize(palette=palette, dither=Dither.FLOYDSTEINBERG)
        if clear:
            hidden = fromarray(frame[..., 3]).point(lambda alpha: 255 * (alpha < 128))
            colours.paste(255, mask=hidden)
        pictures.append(colours)
    more = {"transparency": 255, "disposal": 2} if clear else {}
    comment = f"{text}\n{note}".encode()
    _save(path, pictures, note, 10, format="GIF", optimize=False, comment=comment, **more)


PALETTE_PIXELS, PALETTE_COLOURS = 2**20, 2**14
"""A palette is chosen by at most so many pixels of a clip and colours among them: more take minutes."""


def write_webp(
    path: Path, frames: Iterable[NDArray[Any]], *, text: str, note: Note, effort: int = 4
) -> None:
    """Writes an animated WebP that loses nothing; `text` in its EXIF description, `note` in the comment.

    `effort` is 0, for a file that is a fifth larger in a tenth of the time, to 6.
    """
    from PIL.Image import Exif, fromarray

    exif = Exif()
    exif[DESCRIPTION] = text
    exif.get_ifd(EXIF_PART)[COMMENT] = ASCII + str(note).encode()
    pictures = [fromarray(frame) for frame in frames]
    how = {"lossless": True, "method": effort, "quality": 80 if effort else 0}
    _save(path, pictures, note, 1, format="WEBP", exif=exif, **how)


def _save(path: Path, pictures: Sequence[Image], note: Note, unit: int, **settings: Any) -> None:
    """Saves pictures that go round and round, each of which ends at its time rounded to units of milliseconds."""
    ends = [unit * round(1000 * k / note.rate / unit) for k in range(len(pictures) + 1)]
    stays = [end - begin for begin, end in pairwise(ends)]
    first, *others = pictures
    first.save(path, save_all=True, append_images=others, duration=stays, loop=0, **settings)


def write_zip(
    path: Path, frames: Iterable[NDArray[Any]], *, rate: Fraction, made: Mapping[str, Any]
) -> None:
    """Writes a zip of PNG files, 000000.png and so on, and of `LIST`."""
    from PIL.Image import fromarray

    with zipfile.ZipFile(path, "w") as file:  # PNG files are as small as they get: stored
        for k, frame in enumerate(frames):
            buffer = BytesIO()
            fromarray(frame).save(buffer, format="PNG")
            file.writestr(zipfile.ZipInfo(f"{k:06}.png"), buffer.getvalue())
        about = {"fps": str(rate), "mdiff": dict(made)}
        file.writestr(zipfile.ZipInfo(LIST), json.dumps(about, indent=1) + "\n")


# --- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Animation:
    """A file of pictures.

    Attributes:
        size: height, width.
        rate: frames a second.
        ends: when each picture is over, in seconds from the start.
        names: of the pictures, where each is a file in a zip.
    """

    path: Path
    size: tuple[int, int]
    rate: Fraction
    ends: tuple[Fraction, ...]
    names: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return float(self.ends[-1])


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Says of a damaged file what Pillow says, which raises whatever it likes."""
    try:
        yield
    except MdiffError:
        raise
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise IntegrityError(f"{path} is damaged ({said}): copy it again") from error


def is_picture(head: bytes) -> bool:
    """Whether a file that begins so is of `FORMATS`, however damaged it is."""
    return head.startswith(_HEADS) or head[:4] + head[8:12] == b"RIFFWEBP"


_HEADS = (b"GIF8", b"\x89PNG", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")


def look(path: Path, still: bool = False) -> Animation:
    """What is in a file of `FORMATS`.

    Args:
        still: whether a still picture is a clip of one frame.

    Raises:
        UsageError: a still picture.
        IntegrityError: a damaged one.
    """
    from PIL import Image

    stays: list[int] = []
    with _decoding(path), Image.open(path, formats=FORMATS) as file:
        said = noted("\n".join(_texts(file)))
        if not getattr(file, "is_animated", False) and (still or said is None):
            if not still:
                raise UsageError(f"{path} is a still picture: give a clip")
            return Animation(
                path=path, size=(file.height, file.width), rate=Fraction(1), ends=(Fraction(1),)
            )
        if file.format == "WEBP" and path.stat().st_size < _riff_size(path):
            raise IntegrityError(f"{path} ends too early: copy it again")
        for k in range(getattr(file, "n_frames", 1)):
            file.seek(k)
            file.load()
            stay = round(file.info.get("duration", 0))
            stays.append(stay if stay >= LEAST or (said and stay) else 100)
        unit = 10 if file.format == "GIF" else 1
        size = (file.height, file.width)
    times = list(accumulate(stays))
    if said is not None and _agrees(said, times, unit):
        rate, count = said.rate, said.frames
        ends = (*(Fraction(round(time * rate / 1000)) for time in times[:-1]), Fraction(count))
        return Animation(path=path, size=size, rate=rate, ends=tuple(end / rate for end in ends))
    seconds = tuple(Fraction(time, 1000) for time in times)
    return Animation(path=path, size=size, rate=explained(stays, unit), ends=seconds)


def _riff_size(path: Path) -> int:
    """Bytes of a WebP file by its own account: its decoder is content with less."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8)[4:], "little")


def _agrees(said: Note, times: Sequence[int], unit: int) -> bool:
    """Whether pictures end where frames of a note do, in ms rounded to units, and the last one where all do."""
    if len(times) == 1:  # of pictures that are all the same one is left
        return True
    step = 1000 / said.rate
    inside = all(abs(time - step * round(time / step)) <= unit for time in times)
    return inside and abs(times[-1] - step * said.frames) <= 2 * unit


def explained(stays: Sequence[int], unit: int) -> Fraction:
    """The rate that pictures go by which stay so long, in ms rounded to units.

    It is the simplest one that explains all ends but the last, which is often held; else one that shows every picture,
    if that is slow enough; else the average.
    """
    if len(set(stays[:-1] or stays)) == 1:
        return Fraction(1000, stays[0])
    times, half = list(accumulate(stays)), Fraction(unit, 2)
    low = max(1000 * k / (time + half) for k, time in enumerate(times[:-1], 1))
    high = min(1000 * k / (time - half) for k, time in enumerate(times[:-1], 1))
    if low <= high:
        return simplest(low, high)
    step = gcd(*stays)
    return Fraction(1000, step) if step >= LEAST else rate_of(1000 * len(times) / times[-1])


def simplest(low: Fraction, high: Fraction) -> Fraction:
    """The fraction with the smallest denominator from low to high, both above 0."""
    whole = -(-low.numerator // low.denominator)
    if whole <= high:
        return Fraction(round((low + high) / 2)) if high - low > 1 else Fraction(whole)
    return whole - 1 + 1 / simplest(1 / (high - whole + 1), 1 / (low - whole + 1))


def look_in_zip(path: Path) -> Animation:
    """What is in a zip of pictures, taken in the order of the numbers in their names.

    Raises:
        UsageError: no picture in it, or nothing that says how fast they go by.
        IntegrityError: a damaged file.
    """
    with _decoding(path), zipfile.ZipFile(path) as file:
        names = [
            name for name in file.namelist() if name.lower().endswith((".png", ".jpg", ".webp"))
        ]
        if not names:
            raise UsageError(f"{path} holds no picture: give a zip of PNG files")
        names.sort(
            key=lambda name: [int(part) if part.isdigit() else part for part in _PARTS.split(name)]
        )
        about = _about(file)
        if "fps" not in about:
            raise UsageError(
                f'{path} does not say how fast it is: put a {LIST} with {{"fps": "24"}} into it'
            )
        rate = rate_of(about["fps"])
        with _opened(file, names[0]) as picture:
            size = (picture.height, picture.width)
    ends = tuple(k / rate for k in range(1, len(names) + 1))
    return Animation(path=path, size=size, rate=rate, ends=ends, names=tuple(names))


_PARTS = re.compile(r"(\d+)")


def _about(file: zipfile.ZipFile) -> dict[str, Any]:
    """What `LIST` in a zip says; empty without."""
    if LIST not in file.namelist() or file.getinfo(LIST).file_size > 2**24:
        return {}
    found = json.loads(file.read(LIST))
    return found if isinstance(found, dict) else {}


@contextmanager
def _opened(file: zipfile.ZipFile, name: str) -> Iterator[Image]:
    from PIL import Image

    with file.open(name) as inside, Image.open(inside, formats=FORMATS) as picture:
        yield picture


def frames(clip: Animation, start: float, rate: Fraction) -> Generator[NDArray[Any], None, None]:
    """Frames (height, width, 4) of 8 bits: at each time of the rate what is to be seen then.

    Args:
        start: seconds; the nearest frame is the first.

    Raises:
        IntegrityError: a damaged file, or pictures of different sizes.
    """
    import numpy as np

    time = Fraction(round(Fraction(start) * clip.rate)) / clip.rate
    with _decoding(clip.path), _pictures(clip) as picture:
        for k, end in enumerate(clip.ends):
            if time >= end:
                continue
            shown = np.asarray(picture(k))
            if shown.shape[:2] != clip.size:
                raise IntegrityError(
                    f"{clip.path}: {clip.names[k]} has another size than {clip.names[0]}"
                )
            while time < end:
                yield shown
                time += 1 / rate


@contextmanager
def _pictures(clip: Animation) -> Iterator[Callable[[int], Image]]:
    """Gives a function to the picture of a number, in RGBA."""
    from PIL import Image

    if clip.names:
        with zipfile.ZipFile(clip.path) as archive:

            def inside(k: int) -> Image.Image:
                with _opened(archive, clip.names[k]) as picture:
                    return picture.convert("RGBA")

            yield inside
    else:
        with Image.open(clip.path, formats=FORMATS) as file:

            def at(k: int) -> Image.Image:
                file.seek(k)
                return file.convert("RGBA")

            yield at


def _texts(file: Image) -> Iterator[str]:
    """The texts in an open picture, the record first."""
    comment = file.info.get("comment", b"")
    yield from (comment if isinstance(comment, str) else comment.decode("ascii", "replace")).split(
        "\n"
    )
    exif = file.getexif()
    yield str(exif.get(DESCRIPTION, ""))
    about = exif.get_ifd(EXIF_PART).get(COMMENT, b"")
    yield about.decode("ascii", "replace") if isinstance(about, bytes) else str(about)


def read_record(path: Path) -> dict[str, Any] | None:
    """The record in a file of `FORMATS`; None without."""
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as file:
            return next((found for text in _texts(file) if (found := record.parse(text))), None)
    except Exception:  # noqa: BLE001 (damaged files make decoders raise anything)
        return None


def read_record_in_zip(path: Path) -> dict[str, Any] | None:
    """The record in a zip of pictures; None without."""
    try:
        with zipfile.ZipFile(path) as file:
            return record.parse(json.dumps(_about(file).get("mdiff")))
    except Exception:  # noqa: BLE001 (damaged files raise anything)
        return None
