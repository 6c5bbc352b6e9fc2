"""Clips in files: a sample {"video": float32 (C, T, H, W) in [0, 1], "fps": frames a second} to a file with its record
inside, and back.

C is 3, or 4 with alpha. A sample may have sound too: "audio", (channels, samples), at "rate" Hz. It begins with the
clip and is cut, or made silent, where the clip ends. Clips are 8 bits deep. The same sample gives the same bytes.

    .mp4 .mov .mkv  H.264 as every player takes it (yuv420p, BT.709), sound AAC
    .webm           VP9, sound Opus, alpha
    .gif            256 colours chosen from all of the clip, alpha of 0 or 1, up to 50 frames a second
    .webp           lossless, alpha, up to 60 frames a second
    .zip            lossless: a PNG file for each frame, alpha

Rates are fractions, kept exactly by every kind. No size is ever changed. H.264 has even sizes only: where one is odd,
the last row or column is there twice, the file says so in its description, and `read` takes it away again.

Neither torch nor Pillow nor ffmpeg is imported before a file is touched.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mdiff.core import record
from mdiff.core.errors import MdiffError, MissingError, NonFiniteError, UsageError
from mdiff.core.hooks import Media
from mdiff.plugins.video import ffmpeg, pictures
from mdiff.plugins.video.ffmpeg import rate_of
from mdiff.plugins.video.pictures import Note

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor

log = logging.getLogger("mdiff")

VALUES = 2**29
"""Numbers in a clip that is read, 2 GiB of float32: more is refused, since it would fill the memory."""
TEXT = 30_000
"""Characters of a record inside a file."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a kind of file holds, and ffmpeg's arguments for it.

    Attributes:
        edge: the most pixels along an edge.
        rate: the most frames a second.
        alpha: whether it can be transparent.
        even: whether edges are a multiple of 2.
        sound: arguments of the encoder of sound; empty where there is none.
        video: arguments of the encoder of frames; empty where ffmpeg has no part in it.
    """

    edge: int = 16_384
    rate: int = 1000
    alpha: bool = False
    even: bool = False
    sound: tuple[str, ...] = ()
    video: tuple[str, ...] = ()


H264 = Kind(
    even=True,
    sound=("-c:a", "aac", "-b:a", "192k"),
    video=(
        "-vf",
        ffmpeg.BT709,
        "-c:v",
        "libx264",
        "-preset",
        "medium",
        "-crf",
        "16",
        "-pix_fmt",
        "yuv420p",
    ),
)
VP9 = ("-vf", ffmpeg.BT709, "-c:v", "libvpx-vp9", "-crf", "18", "-b:v", "0", "-auto-alt-ref", "0")
KINDS: Mapping[str, Kind] = {
    ".mp4": replace(H264, video=(*H264.video, "-movflags", "+faststart")),
    ".webm": Kind(alpha=True, sound=("-c:a", "libopus", "-b:a", "128k"), video=VP9),
    ".gif": Kind(edge=65_535, rate=50, alpha=True),
    ".webp": Kind(edge=16_383, rate=60, alpha=True),
    ".zip": Kind(alpha=True, edge=2**20),
    # without the last flag this container drops the description
    ".mov": replace(H264, video=(*H264.video, "-movflags", "+faststart+use_metadata_tags")),
    ".mkv": H264,
}


# --- writing --------------------------------------------------------------------------------------


def write(
    path: Path, sample: Mapping[str, Any], made: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    """Writes a sample into a file of the kind that its suffix names, with the record `made` inside.

    Raises:
        UsageError: no clip, or alpha, a size, a rate or sound that the file cannot hold.
        NonFiniteError: the sample has a NaN or an infinity.
        MissingError: there is no ffmpeg.
        MdiffError: the system refused, or ffmpeg failed. Nothing is left at `path` then.
    """
    suffix = path.suffix.lower()
    kind = KINDS[suffix]
    video, rate = checked(sample["video"]), rate_of(sample["fps"])
    _, count, height, width = video.shape
    if len(video) == 4 and not kind.alpha:
        raise UsageError(f"a {suffix} file holds no alpha: write .webm, .webp or .zip")
    if max(height, width) > kind.edge:
        raise UsageError(
            f"an edge in a {suffix} file has at most {kind.edge} pixels, this clip has {width} x {height}: write .zip"
        )
    if rate > kind.rate:
        raise UsageError(
            f"a {suffix} file goes up to {kind.rate} frames a second, this clip has {float(rate):g}: write .mp4"
        )
    sound = None
    if sample.get("audio") is not None:
        if kind.sound:
            sound = _lasting(sample["audio"], int(sample["rate"]), count / rate)
        else:
            log.warning("a %s file holds no sound: it is left out", suffix)
    note = Note(count, (height, width), rate)
    try:
        if kind.video:
            _write_film(path, video, note, made, kind, sound, int(sample.get("rate") or 0))
        elif suffix == ".zip":
            pictures.write_zip(path, _frames(video), rate=rate, made=made)
        else:
            save = {".gif": pictures.write_gif, ".webp": pictures.write_webp}[suffix]
            save(path, _frames(video), text=record.short(made, TEXT), note=note)
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise MdiffError(f"cannot write {path.name}: {error.strerror or error}") from error
        raise


def checked(video: Tensor) -> Tensor:
    """A clip that can be shown: itself, on the CPU. Raises as `write`."""
    video = video.detach().cpu()
    if video.ndim != 4 or video.shape[0] not in (3, 4):
        raise UsageError(
            f"a clip is (3 or 4 channels, frames, height, width), not {(*video.shape,)}"
        )
    if 0 in video.shape:
        raise UsageError(
            f"a clip has at least one frame and one pixel, and this one is {(*video.shape,)}"
        )
    if not bool(video.isfinite().all()):
        raise NonFiniteError(
            "the clip has a NaN or an infinity and was not written: try another precision or seed"
        )
    return video


def _frames(video: Tensor) -> Iterator[NDArray[Any]]:
    """The frames of a clip, (height, width, channels) of 8 bits, one after another."""
    for frame in video.unbind(1):
        pixels = (frame.float().clamp(0, 1) * 255).round().byte()
        yield pixels.permute(1, 2, 0).contiguous().numpy()


def _write_film(
    path: Path,
    video: Tensor,
    note: Note,
    made: Mapping[str, Any],
    kind: Kind,
    sound: Tensor | None,
    hertz: int,
) -> None:
    import numpy as np

    height, width = note.size
    more = [(0, edge % 2 if kind.even else 0) for edge in note.size]
    alpha = len(video) == 4
    arguments = [*kind.video, *(kind.sound if sound is not None else ())]
    if not kind.even:
        arguments += ["-pix_fmt", "yuva420p" if alpha else "yuv420p"]
    padded = (np.pad(frame, [*more, (0, 0)], mode="edge").tobytes() for frame in _frames(video))
    with TemporaryDirectory() as folder:
        heard = None
        if sound is not None:
            heard = (Path(folder) / "sound.f32", hertz, len(sound))
            heard[0].write_bytes(sound.T.contiguous().numpy().astype("<f4").tobytes())
        ffmpeg.encode(
            path,
            padded,
            size=(height + more[0][1], width + more[1][1]),
            rate=note.rate,
            alpha=alpha,
            arguments=arguments,
            sound=heard,
            texts={"comment": record.short(made, TEXT), "description": str(note)},
        )


def _lasting(audio: Tensor, rate: int, seconds: Fraction) -> Tensor:
    """Sound (channels, N) cut to or made silent up to so many seconds; lowered as a whole if it goes beyond 1."""
    import torch.nn.functional as F

    audio = audio.detach().float().cpu()
    if audio.ndim != 2 or len(audio) not in (1, 2) or not 1000 <= rate <= 384_000:
        raise UsageError(
            f"sound of a clip is (1 or 2 channels, samples) at 1000 to 384000 Hz, not {(*audio.shape,)} at {rate} Hz"
        )
    if not bool(audio.isfinite().all()):
        raise NonFiniteError(
            "the sound has a NaN or an infinity and was not written: try another precision or seed"
        )
    length = round(seconds * rate)
    audio = F.pad(audio[:, :length], (0, max(0, length - audio.shape[1])))
    return audio / audio.abs().max().clamp(min=1)


# --- reading --------------------------------------------------------------------------------------


def read(
    path: Path,
    *,
    start: float = 0.0,
    frames: int | None = None,
    fps: float | Fraction | None = None,
    size: int | tuple[int, int] | None = None,
    channels: int = 3,
    audio: bool = False,
    still: bool = False,
) -> dict[str, Any]:
    """The sample in a file, or a part of it; frames that are not asked for are not kept.

    Args:
        start: seconds; the frame nearest to it is the first.
        frames: so many; None for all.
        fps: frames a second: what is to be seen at those times; None for the file's own.
        size: of a square's edge or (height, width): resized until it covers that, and the middle cut out.
        channels: 3, on white where it is transparent, or 4.
        audio: whether the sound is wanted too, at its own rate, as long as the frames; files without have no "audio".
        still: whether a still picture is a clip of one frame.

    Raises:
        MissingError: no such file, or no ffmpeg.
        UsageError: not a clip, one that is shorter than asked for, or one too long to hold (`VALUES`).
        IntegrityError: a damaged file.
        MdiffError: ffmpeg was ended.
    """
    import numpy as np
    import torch

    if not path.is_file():
        raise MissingError(f"no file {str(path)!r}: give the path of a clip")
    if channels not in (3, 4) or start < 0 or (frames is not None and frames < 1):
        raise UsageError(
            "a clip is read with 3 or 4 channels, from 0 seconds on, and one frame at least"
        )
    found = _looked(path, still)
    film = found if isinstance(found, ffmpeg.Film) else None
    rate = found.rate if fps is None else rate_of(fps)
    whole = found.size if film is None else _true_size(film)
    shape = whole if size is None else (size, size) if isinstance(size, int) else size
    most = max(1, VALUES // (channels * shape[0] * shape[1]))
    wanted = frames if frames is not None else ceil((found.seconds - start) * rate - 0.5)
    too_long = UsageError(
        f"{path} is too long: {wanted} frames of {shape[1]} x {shape[0]} pixels, and {most} can be held: cut it, "
        "or make it smaller"
    )
    if wanted > most:
        raise too_long
    kept: list[NDArray[Any]] = []
    source = (
        ffmpeg.frames(found, start, rate)
        if isinstance(found, ffmpeg.Film)
        else pictures.frames(found, start, rate)
    )
    with closing(source):
        for frame in islice(source, frames or most + 1):
            cut = frame[: whole[0], : whole[1]]
            kept.append(_in_channels(cut if size is None else _fitted(cut, shape), channels))
    if len(kept) > most:
        raise too_long
    if len(kept) < (frames or 1):
        after = f" after {start:g} s" if start else ""
        raise UsageError(
            f"{path} has {len(kept)} frames{after} at {float(rate):g} a second, not {frames or 'one'}"
        )
    stacked = torch.from_numpy(np.stack(kept))
    kept.clear()
    sample: dict[str, Any] = {
        "video": stacked.permute(3, 0, 1, 2).float().contiguous() / 255,
        "fps": rate,
    }
    if audio and film is not None and film.sound is not None:
        lasts = len(stacked) / rate
        heard = torch.from_numpy(ffmpeg.heard(film, start, float(lasts)).T.copy())
        sample |= {"audio": _lasting(heard, film.sound[0], lasts), "rate": film.sound[0]}
    return sample


def _looked(path: Path, still: bool) -> ffmpeg.Film | pictures.Animation:
    """What is in a file, by how it begins, whatever it is called: a film or pictures."""
    with path.open("rb") as file:
        head = file.read(12)
    if head[:4] == b"PK\3\4":
        return pictures.look_in_zip(path)
    return pictures.look(path, still) if pictures.is_picture(head) else ffmpeg.look(path)


def _true_size(film: ffmpeg.Film) -> tuple[int, int]:
    """Height and width without what was added to make them even, as long as the file still is what it says."""
    said = pictures.noted(film.texts.get("description", ""))
    if said is not None and tuple(edge + edge % 2 for edge in said.size) == film.size:
        return said.size
    return film.size


def _fitted(frame: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    import numpy as np
    from PIL import Image, ImageOps

    fit = ImageOps.fit(Image.fromarray(frame), (size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(fit)


def _in_channels(frame: NDArray[Any], channels: int) -> NDArray[Any]:
    """A frame (H, W, 3 or 4) in 3 channels, on white, or in 4."""
    import numpy as np

    if frame.shape[2] == channels:
        return frame
    if channels == 4:
        return np.concatenate([frame, np.full_like(frame[..., :1], 255)], axis=2)
    alpha = frame[..., 3:].astype(np.float32) / 255
    return np.rint(255 + alpha * (frame[..., :3] - np.float32(255))).astype(np.uint8)


def read_record(path: Path) -> dict[str, Any] | None:
    """The record in a file; None where there is none."""
    if not path.is_file():
        return None
    for found in (pictures.read_record_in_zip(path), pictures.read_record(path)):
        if found is not None:
            return found
    try:
        return record.parse(ffmpeg.look(path).texts.get("comment", ""))
    except MdiffError:
        return None


# --- looking --------------------------------------------------------------------------------------


def strip(sample: Mapping[str, Any], count: int = 8, width: int = 128) -> Image:
    """Frames from the first to the last side by side, `count` of them or all, each at most `width` pixels wide."""
    from PIL import Image

    video = checked(sample["video"])
    total = video.shape[1]
    count = min(count, total)
    places = [round(k * (total - 1) / max(1, count - 1)) for k in range(count)]
    shown = [Image.fromarray(frame) for frame in _frames(video[:, places])]
    scale = min(1.0, width / shown[0].width)
    wide, high = (max(1, round(edge * scale)) for edge in shown[0].size)
    page = Image.new(shown[0].mode, (count * (wide + GAP) - GAP, high), "white")
    for k, picture in enumerate(shown):
        page.paste(picture.resize((wide, high), Image.Resampling.LANCZOS), (k * (wide + GAP), 0))
    return page


GAP = 2
"""Pixels between frames."""


def thumbnail(sample: Mapping[str, Any]) -> Image:
    """A sample as a picture to look at: four of its frames. Raises as `write`."""
    return strip(sample, count=4, width=62)


MEDIA = tuple(
    Media(
        suffix=suffix,
        write=write,
        read=read,
        read_record=read_record,
        default=suffix == ".mp4",
        thumbnail=thumbnail,
    )
    for suffix in KINDS
)
"""The kinds of file of this modality."""
