"""Sound files: a sample {"audio": float32 (channels, samples), "rate": Hz} to a file with its
record inside, and back.

A file is as loud as its sample. A sample that goes beyond full scale is scaled down as a whole, and
a line of the log says so; nothing is ever clipped. The same sample gives the same bytes, except in
an .ogg, whose encoder draws a serial number. Neither torch nor soundfile is imported before a file
is touched.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdiff.core import record
from mdiff.core.errors import IntegrityError, MdiffError, MissingError, NonFiniteError, UsageError
from mdiff.core.hooks import Media

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

log = logging.getLogger("mdiff")

BLOCK = 65_536  # frames; libsndfile's Vorbis encoder overruns its stack when given minutes at once


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a kind of file holds: encoding, most channels, rates in Hz, and these as text."""

    subtype: str
    channels: int
    rates: Container[int]
    rates_text: str


MPEG_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)

KINDS: Mapping[str, Kind] = {
    ".wav": Kind(subtype="PCM_16", channels=1024, rates=range(1, 2**31), rates_text="any rate"),
    ".flac": Kind(
        subtype="PCM_16", channels=8, rates=range(1, 655_351), rates_text="up to 655350 Hz"
    ),
    # beyond this rate libsndfile does not fail, it crashes
    ".ogg": Kind(
        subtype="VORBIS", channels=255, rates=range(1, 192_001), rates_text="up to 192000 Hz"
    ),
    ".mp3": Kind(
        subtype="MPEG_LAYER_III",
        channels=2,
        rates=MPEG_RATES,
        rates_text=f"one of {', '.join(map(str, MPEG_RATES))} Hz",
    ),
}


def write(
    path: Path, sample: Mapping[str, Any], made: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    """Writes a sample into a file of the kind that its suffix names, with the record `made` inside.

    Raises:
        UsageError: not (channels, samples), or channels or a rate that the file cannot hold.
        NonFiniteError: the sample has a NaN or an infinity.
        MdiffError: the system refused.
    """
    import soundfile

    audio, rate = sample["audio"].detach().float().cpu(), int(sample["rate"])
    if audio.ndim != 2 or 0 in audio.shape:
        raise UsageError(f"sound is (channels, samples) with some of each, not {(*audio.shape,)}")
    suffix = path.suffix.lower()
    kind = KINDS[suffix]
    if len(audio) > kind.channels or rate not in kind.rates:
        raise UsageError(
            f"a {suffix} file holds up to {kind.channels} channels at {kind.rates_text}, "
            f"not {len(audio)} at {rate} Hz: write .wav"
        )
    frames = within_full_scale(audio).T.numpy()
    form = suffix[1:].upper()
    try:
        with soundfile.SoundFile(path, "w", rate, len(audio), kind.subtype, format=form) as file:
            file.comment = record.short(made)
            for start in range(0, len(frames), BLOCK):
                file.write(frames[start : start + BLOCK])
    except soundfile.LibsndfileError as error:
        raise MdiffError(f"cannot write a {suffix} file: {error.error_string}") from error


def within_full_scale(audio: Tensor) -> Tensor:
    """Sound with no sample beyond 1: itself, or itself scaled down, which is logged in a line.

    Raises:
        NonFiniteError: a NaN or an infinity.
    """
    peak = float(audio.abs().max())
    if not math.isfinite(peak):
        raise NonFiniteError(
            "the sound has a NaN or an infinity and was not written: try another precision or seed"
        )
    if peak <= 1:
        return audio
    log.warning(
        "the sound peaks at %.2f of full scale: lowered by %.1f dB", peak, 20 * math.log10(peak)
    )
    return audio / peak


def read(path: Path, rate: int | None = None, channels: int | None = None) -> dict[str, Any]:
    """The sample in a sound file, in its own rate and channels unless told otherwise.

    Raises:
        MissingError: no such file.
        UsageError: not a sound file, or one without sound.
        IntegrityError: it holds a NaN or an infinity.
    """
    import soundfile
    import torch

    if not path.is_file():
        raise MissingError(f"no file {str(path)!r}: give the path of a sound file")
    try:
        frames, found = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise UsageError(
            f"{path} is not a sound file that can be read ({error.error_string.strip(' .')}): "
            f"give a {', '.join(KINDS)} file"
        ) from error
    audio = torch.from_numpy(frames).T.contiguous()
    if audio.numel() == 0:
        raise UsageError(f"{path} holds no sound: give a file with at least one sample")
    if not bool(audio.isfinite().all()):
        raise IntegrityError(f"{path} holds a NaN or an infinity: export it again")
    if channels is not None:
        audio = mixed(audio, channels)
    if rate is not None:
        audio = resampled(audio, found, rate)
    return {"audio": audio, "rate": rate or found}


def mixed(audio: Tensor, channels: int) -> Tensor:
    """Sound (C, N) in so many channels: their mean in one, one in many copies.

    Raises:
        UsageError: several channels into several others: there is no one way.
    """
    if len(audio) == channels:
        return audio
    if channels == 1:
        return audio.mean(dim=0, keepdim=True)
    if len(audio) > 1:
        raise UsageError(f"{len(audio)} channels do not become {channels}: mix them to 1 first")
    return audio.repeat(channels, 1)


def resampled(audio: Tensor, rate: int, new_rate: int) -> Tensor:
    """Sound (C, N) at another rate: (C, ceil(N new_rate / rate))."""
    from torchaudio.functional import resample

    if rate == new_rate:
        return audio
    # a long Kaiser window: -0.02 dB at 0.9 of the lower band's edge, below -140 dB from the edge on
    return resample(
        audio,
        rate,
        new_rate,
        lowpass_filter_width=64,
        rolloff=0.9475937167399596,
        resampling_method="sinc_interp_kaiser",
        beta=14.769656459379492,
    )


def read_record(path: Path) -> dict[str, Any] | None:
    """The record in the comment of a sound file; None where there is none."""
    import soundfile

    try:
        with soundfile.SoundFile(path) as file:
            return record.parse(file.comment)
    except (OSError, soundfile.LibsndfileError):
        return None


def thumbnail(sample: Mapping[str, Any]) -> Image:
    """A picture of a sample: its spectrogram."""
    from mdiff.plugins.audio import spectrogram

    return spectrogram.thumbnail(sample)


MEDIA = tuple(
    Media(
        suffix=suffix,
        write=write,
        read=read,
        read_record=read_record,
        default=suffix == ".wav",
        thumbnail=thumbnail,
    )
    for suffix in KINDS
)
"""The kinds of file of this modality."""
