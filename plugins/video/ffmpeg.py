"""Films through the ffmpeg program that imageio-ffmpeg brings: frames and sound into a file, and back out of it.

Frames go through pipes one at a time, no shell is between, an exit status other than 0 raises with the last line that
ffmpeg said, and no process outlives its use.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from math import ceil
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any

from mdiff.core.errors import IntegrityError, MdiffError, MissingError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SCALE = "flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp+bitexact"
"""How swscale changes colours: the exact way, which is the same on every processor."""
BT709 = (
    f"scale=out_color_matrix=bt709:out_range=tv:{SCALE},"
    "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709"
)
"""Filters from RGB to what players take for granted, and say so in the file."""
EXACT = ("-fflags", "+bitexact", "-flags:v", "+bitexact", "-flags:a", "+bitexact", "-threads", "1")
"""Arguments with which the same frames give the same bytes."""
LOCAL = ("-protocol_whitelist", "file,pipe,fd")
"""A file may name other files, as playlists do: none from a network is opened."""


@cache
def program() -> str:
    """The path of ffmpeg.

    Raises:
        MissingError: there is none.
    """
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        return str(get_ffmpeg_exe())
    except (ImportError, RuntimeError) as error:
        raise MissingError(
            "films need the ffmpeg program: pip install --force-reinstall imageio-ffmpeg"
        ) from error


@dataclass
class Process:
    """ffmpeg at work: its pipes and, once it is `ended`, what it said."""

    pipes: subprocess.Popen[bytes]
    said: IO[bytes]

    def ended(self) -> tuple[int, list[str]]:
        """Its exit status and the lines of its standard error, when it is done."""
        status = self.pipes.wait()
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").splitlines()
        return status, [line.strip() for line in lines if line.strip()]


@contextmanager
def running(*arguments: str, stdin: int = subprocess.DEVNULL) -> Iterator[Process]:
    """Starts ffmpeg; when the block is left, however that is, it runs no more.

    Raises:
        MissingError: there is no ffmpeg, or it cannot be started.
    """
    command = [program(), "-hide_banner", "-nostdin", *arguments]
    with TemporaryFile() as said:  # a pipe that nobody reads would fill and stop it
        try:
            pipes = subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=said)
        except OSError as error:
            raise MissingError(f"cannot start {command[0]}: {error.strerror}") from error
        try:
            yield Process(pipes, said)
        finally:
            pipes.kill()
            for pipe in (pipes.stdin, pipes.stdout):
                try:
                    if pipe is not None:
                        pipe.close()
                except BrokenPipeError:  # what was still to be written to one that has ended
                    pass
            pipes.wait()


def why(status: int, lines: Sequence[str]) -> str:
    """What went wrong, in a few words: the last line that says something, without the part of ffmpeg that said it."""
    if status < 0:
        return f"ffmpeg was ended by signal {-status}"
    said = [re.sub(r"^(\[.*?\] *)+|^Error opening (in|out)put files: ", "", line) for line in lines]
    telling = [
        line for line in said if line and line != "Conversion failed!" and line[:6] != "frame="
    ]
    return telling[-1].rstrip(".") if telling else f"ffmpeg's exit status is {status}"


# --- writing --------------------------------------------------------------------------------------


def encode(
    path: Path,
    frames: Iterable[bytes],
    *,
    size: tuple[int, int],
    rate: Fraction,
    alpha: bool,
    arguments: Sequence[str],
    sound: tuple[Path, int, int] | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Writes a file of frames.

    Args:
        frames: each height x width x 3 bytes, or 4 with alpha.
        size: height, width.
        arguments: of the encoder and the container.
        sound: a file of interleaved float32 values, its rate in Hz, its channels.
        texts: metadata of the file.

    Raises:
        MdiffError: ffmpeg failed.
    """
    heard = () if sound is None else ("-f", "f32le", "-ar", f"{sound[1]}", "-ac", f"{sound[2]}")
    command = [
        *("-v", "error", "-f", "rawvideo", "-pix_fmt", "rgba" if alpha else "rgb24"),
        *("-s", f"{size[1]}x{size[0]}", "-framerate", str(rate), "-i", "pipe:0"),
        *(() if sound is None else (*heard, "-i", f"file:{sound[0]}")),
        *arguments,
        *(part for name, text in (texts or {}).items() for part in ("-metadata", f"{name}={text}")),
        *EXACT,
        *("-y", f"file:{path}"),
    ]
    with running(*command, stdin=subprocess.PIPE) as process:
        pipe = process.pipes.stdin
        assert pipe is not None
        try:
            for frame in frames:
                pipe.write(frame)
            pipe.close()
        except BrokenPipeError:  # it has failed, and says below why
            pass
        status, lines = process.ended()
    if status:
        raise MdiffError(f"cannot write {path.name}: {why(status, lines)}")


# --- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Film:
    """What ffmpeg says of a file with moving pictures.

    Attributes:
        size: height, width in square pixels, as it is to be seen.
        rate: frames a second; of the average where frames last for different times.
        steady: every frame lasts equally long.
        seconds: of the whole file, to a hundredth; 0 where it does not say.
        decoder: arguments before the input.
        colours: arguments of the filter that makes RGB.
        sound: Hz and channels, None without.
        texts: metadata, with names in lower case.
    """

    path: Path
    size: tuple[int, int]
    rate: Fraction
    steady: bool
    seconds: float
    alpha: bool
    decoder: tuple[str, ...] = ()
    colours: str = ""
    sound: tuple[int, int] | None = None
    texts: Mapping[str, str] = field(default_factory=dict)


def look(path: Path) -> Film:
    """What is in a file, from its head and its first frame.

    Raises:
        UsageError: nothing that ffmpeg can read, no moving picture in it, or no frame.
    """
    source = ("-v", "info", *LOCAL, "-i", f"file:{path}")
    shown = ("-map", "0:V:0", "-vf", "showinfo", "-frames:v", "1", "-f", "null", "-")
    with running(*source, *shown, "-f", "ffmetadata", "pipe:1") as process:
        assert process.pipes.stdout is not None
        texts = process.pipes.stdout.read().decode(errors="replace")
        status, lines = process.ended()
    said = "\n".join(lines)
    before = said.split("Stream mapping:")[0]
    if not re.search(r"^Input #0", before, re.MULTILINE):
        raise UsageError(
            f"{path} is not a clip that can be read ({why(status, lines)}): give an MP4, WebM, GIF, "
            "WebP, MOV, MKV or AVI file"
        )
    video = re.search(r"^Stream #0:\d+.*?: Video: (?!.*attached pic)(.*)$", before, re.MULTILINE)
    audio = re.search(
        r"^Stream #0:\d+.*?: Audio: .*?(\d+) Hz, (\w+(?:\.\d)?)", before, re.MULTILINE
    )
    if video is None:
        what = "sound and no moving picture" if audio else "no moving picture"
        raise UsageError(f"{path} holds {what}: give a clip")
    frame = re.search(r"\bfmt:(\w+).*?sar:(\d+)/(\d+) s:(\d+)x(\d+)", said)
    if frame is None:
        failed = f" ({why(status, lines)})" if status else ""
        raise UsageError(f"{path} holds no frame{failed}: give a clip with at least one")
    form, wide, high, width, height = frame[1], *map(int, frame.groups()[1:])
    base = re.search(r"config in time_base: .*?frame_rate: (\d+)/(\d+)", said)
    steady, rate = _rate(
        base and (int(base[1]), int(base[2])), re.search(r"([\d.]+k?) fps", video[1])
    )
    clear = re.search(r"^alpha_mode\s*: 1", before, re.MULTILINE | re.IGNORECASE)
    codec = video[1].split()[0].strip(",")
    length = re.search(r"Duration: (\d+):(\d+):([\d.]+)", before)
    untold = "yuv" in form and re.search(r"color_space:unknown", said)
    return Film(
        path=path,
        size=(height, max(1, round(width * wide / high)) if wide and high else width),
        rate=rate,
        steady=steady,
        seconds=sum(
            float(part) * unit for part, unit in zip(length.groups(), (3600, 60, 1), strict=True)
        )
        if length
        else 0.0,
        alpha=bool(clear) or bool(re.match(r"(yuva|rgba|argb|bgra|abgr|gbrap|ya\d|pal8)", form)),
        # ffmpeg's own decoders of these know nothing of alpha
        decoder=("-c:v", {"vp8": "libvpx", "vp9": "libvpx-vp9"}[codec])
        if clear and codec in ("vp8", "vp9")
        else (),
        # large films that say nothing are of the newer standard, as players take it
        colours=":in_color_matrix=bt709" if untold and height >= 720 else "",
        sound=(int(audio[1]), 1 if audio[2] == "mono" else 2) if audio else None,
        texts={name.lower(): text for name, text in _texts(texts)},
    )


def _rate(base: tuple[int, int] | None, said: re.Match[str] | None) -> tuple[bool, Fraction]:
    """Whether the rate holds for every frame, and the rate: the exact one if it is the average, which is rounded."""
    average = float(said[1].replace("k", "e3")) if said else 0.0
    if base and all(base):
        exact = Fraction(*base)
        if not average or abs(average - exact) <= max(0.006, 0.005 * average):
            return True, exact
    return False, rate_of(average) if average else Fraction(25)


def rate_of(fps: float | Fraction | str) -> Fraction:
    """A number of frames a second as the fraction that is meant: 23.976 is 24000/1001.

    Raises:
        UsageError: no number, or none from 1/1000 to 1000.
    """
    try:
        exact = Fraction(fps)
    except (ValueError, TypeError, OverflowError, ZeroDivisionError):
        raise UsageError(
            f"frames a second are a number such as 24 or 30000/1001, not {fps!r}"
        ) from None
    if not Fraction(1, 1000) <= exact <= 1000:
        raise UsageError(f"a clip has from 1/1000 to 1000 frames a second, not {fps}")
    if isinstance(fps, Fraction) or exact.denominator == 1 or exact < 20:
        return exact.limit_denominator(1_000_000 if isinstance(fps, Fraction) else 1001)
    film = Fraction(round(exact * Fraction(1001, 1000)) * 1000, 1001)
    # of television's rates, 0.1 % below whole ones, people give three digits, or two
    near = film.numerator % 1000 == 0 and abs(exact - film) <= Fraction(6, 1000)
    return (
        film
        if near and abs(exact - round(exact)) > Fraction(1, 100)
        else exact.limit_denominator(1001)
    )


def _texts(text: str) -> Iterator[tuple[str, str]]:
    """Names and values in ffmpeg's metadata form, which has a backslash before what means something to it."""
    lines = re.findall(r"(?:[^\n\\]|\\.)+", text, re.DOTALL)
    for line in lines[1:]:
        name, mark, value = line.partition("=")
        if mark:
            yield name, re.sub(r"\\(.)", r"\1", value, flags=re.DOTALL)


def frames(film: Film, start: float, rate: Fraction) -> Generator[NDArray[Any], None, None]:
    """Frames (height, width, 3 or 4) of 8 bits: at each time of the rate what is to be seen then.

    Args:
        start: seconds; the nearest frame is the first.

    Raises:
        IntegrityError: the file is damaged, or ends too early.
        MdiffError: ffmpeg was ended.
    """
    import numpy as np

    height, width = film.size
    timed = [f"settb={1 / film.rate},setpts=N"] if film.steady else ["setpts=PTS-STARTPTS"]
    if rate != film.rate or not film.steady:
        timed.append(f"fps={rate}:round={'up' if film.steady else 'near'}")
    filters = ",".join([*timed, f"scale={width}:{height}:{SCALE}{film.colours}"])
    # half a frame earlier: rounded times would leave the first one out
    begin = max(0.0, start - float(1 / film.rate) / 2)
    shape = (height, width, 4 if film.alpha else 3)
    command = [
        *("-v", "error", *(("-ss", f"{begin:.6f}") if begin else ()), *film.decoder, *LOCAL),
        # decoders that share frames among threads (Theora's) mix them up now and then
        *(
            "-threads",
            "1",
            "-i",
            f"file:{film.path}",
            "-map",
            "0:V:0",
            "-vf",
            filters,
            "-fps_mode",
            "passthrough",
        ),
        *("-f", "rawvideo", "-pix_fmt", "rgba" if film.alpha else "rgb24", "pipe:1"),
    ]
    count, length = 0, height * width * shape[2]
    with running(*command) as process:
        pipe = process.pipes.stdout
        assert pipe is not None
        while len(data := pipe.read(length)) == length:
            yield np.frombuffer(data, np.uint8).reshape(shape)
            count += 1
        status, lines = process.ended()
    if status < 0:
        raise MdiffError(f"cannot read {film.path}: {why(status, lines)}")
    if status or data:
        raise IntegrityError(f"{film.path} is damaged ({why(status, lines)}): copy it again")
    expected = ceil((film.seconds - start - 0.011) * rate)
    if count < expected and lines:  # a file whose sound is longer says nothing
        raise IntegrityError(
            f"{film.path} ends after {count} of {expected} frames ({why(status, lines)}): copy it again"
        )


def heard(film: Film, start: float, seconds: float) -> NDArray[Any]:
    """The sound of a film, float32 (samples, channels), about as long as asked for or shorter.

    Raises:
        IntegrityError: it is damaged.
        MdiffError: ffmpeg was ended.
    """
    import numpy as np

    assert film.sound is not None
    rate, channels = film.sound
    command = [
        *("-v", "error", *(("-ss", f"{start:.6f}") if start else ()), *LOCAL),
        *("-i", f"file:{film.path}", "-map", "0:a:0", "-t", f"{seconds:.6f}"),
        *("-ac", f"{channels}", "-ar", f"{rate}", "-f", "f32le", "pipe:1"),
    ]
    with running(*command) as process:
        assert process.pipes.stdout is not None
        data = process.pipes.stdout.read()
        status, lines = process.ended()
    if status:
        kind = MdiffError if status < 0 else IntegrityError
        raise kind(f"cannot read the sound of {film.path}: {why(status, lines)}")
    return np.frombuffer(data, "<f4").reshape(-1, channels)
