"""Sound files: what is written comes back, as loud as it was, with its record; what is wrong is said."""

import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from mdiff.core import record
from mdiff.core.errors import IntegrityError, MissingError, NonFiniteError, UsageError
from mdiff.plugins.audio.io import (
    KINDS,
    MEDIA,
    mixed,
    read,
    read_record,
    resampled,
    within_full_scale,
    write,
)

RECORD = {"schema": 1, "mdiff": "0.1", "model": "audio/x", "seed": 7, "request": {"text": "dög"}}
STEP = 1 / 32768  # of 16 bits


def tone(
    rate: int = 16_000, seconds: float = 0.5, pitch: float = 440.0, gain: float = 0.5
) -> Tensor:
    seconds_past = torch.arange(int(rate * seconds), dtype=torch.float64) / rate
    return gain * torch.sin(2 * math.pi * pitch * seconds_past).float()[None]


def save(path: Path, audio: Tensor, rate: int = 16_000, made: dict[str, Any] = RECORD) -> Path:
    write(path, {"audio": audio, "rate": rate}, made, {})
    return path


@pytest.mark.parametrize("suffix", KINDS)
@pytest.mark.parametrize("channels", [1, 2])
def test_what_is_written_comes_back(tmp_path: Path, suffix: str, channels: int) -> None:
    audio = torch.cat([tone(pitch=300.0 * (c + 1)) for c in range(channels)])
    path = save(tmp_path / f"a{suffix}", audio)
    sample = read(path)
    assert sample["rate"] == 16_000
    assert sample["audio"].dtype == torch.float32
    assert sample["audio"].shape == audio.shape
    lossless = suffix in (".wav", ".flac")
    error = (sample["audio"] - audio).square().mean().sqrt()
    assert error <= (STEP if lossless else 0.02)
    # as loud as it was, to a tenth of a decibel
    assert sample["audio"].square().mean() == pytest.approx(0.125, rel=0.02)
    assert read_record(path) == RECORD


def test_more_than_full_scale_is_lowered_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loud = tone(gain=2.0)
    with caplog.at_level(logging.WARNING, logger="mdiff"):
        path = save(tmp_path / "a.wav", loud)
    assert [r.getMessage() for r in caplog.records] == [
        "the sound peaks at 2.00 of full scale: lowered by 6.0 dB"
    ]
    torch.testing.assert_close(read(path)["audio"], loud / loud.abs().max(), atol=2 * STEP, rtol=0)
    caplog.clear()
    full = tone(gain=1.0)
    assert within_full_scale(full) is full
    assert not caplog.records


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_sound_is_refused(tmp_path: Path, value: float) -> None:
    audio = tone()
    audio[0, 100] = value
    with pytest.raises(NonFiniteError, match="NaN or an infinity and was not written"):
        save(tmp_path / "a.wav", audio)
    assert not (tmp_path / "a.wav").exists()
    soundfile.write(tmp_path / "b.wav", audio.T.numpy(), 16_000, subtype="FLOAT")
    with pytest.raises(IntegrityError, match="b.wav holds a NaN"):
        read(tmp_path / "b.wav")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_is_written(tmp_path: Path, dtype: torch.dtype) -> None:
    audio = tone().to(dtype)
    found = read(save(tmp_path / "a.wav", audio))["audio"]
    torch.testing.assert_close(found, audio.float(), atol=STEP, rtol=0)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3"])
def test_same_sample_same_bytes(tmp_path: Path, suffix: str) -> None:
    a, b = (save(tmp_path / f"{name}{suffix}", tone()).read_bytes() for name in "ab")
    assert a == b


@pytest.mark.parametrize("suffix", KINDS)
def test_long_records_leave_their_hash(tmp_path: Path, suffix: str) -> None:
    made = {**RECORD, "request": {"text": "word " * 1000}}
    path = save(tmp_path / f"a{suffix}", tone(), made=made)
    found = read_record(path)
    assert found is not None
    assert found["seed"] == 7
    assert found["record"] == record.digest(made)


def test_files_without_a_record_have_none(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(10), 8000)
    (tmp_path / "b.wav").write_bytes(b"nothing of the kind")
    assert read_record(tmp_path / "a.wav") is None
    assert read_record(tmp_path / "b.wav") is None
    assert read_record(tmp_path / "c.wav") is None


@pytest.mark.parametrize(
    ("suffix", "subtype", "tolerance"),
    [
        (".wav", "PCM_U8", 1 / 127),
        (".wav", "PCM_16", STEP),
        (".wav", "PCM_24", 1e-6),
        (".wav", "PCM_32", 1e-7),
        (".wav", "FLOAT", 0),
        (".wav", "DOUBLE", 1e-7),
        (".flac", "PCM_24", 1e-6),
        (".aiff", "PCM_16", STEP),
    ],
)
def test_any_depth_and_channels_are_read(
    tmp_path: Path, suffix: str, subtype: str, tolerance: float
) -> None:
    audio = torch.cat([tone(11_025, pitch=200.0 * (c + 1)) for c in range(3)])
    path = tmp_path / f"a{suffix}"
    soundfile.write(path, audio.T.numpy(), 11_025, subtype=subtype)
    sample = read(path)
    assert sample["rate"] == 11_025
    torch.testing.assert_close(sample["audio"], audio, atol=tolerance, rtol=0)


def test_float_files_keep_what_is_beyond_full_scale(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(gain=3.0)[0].numpy(), 16_000, subtype="FLOAT")
    assert read(tmp_path / "a.wav")["audio"].abs().max() > 2.9


@pytest.mark.parametrize(("rate", "new"), [(44_100, 16_000), (16_000, 22_050), (48_000, 16_000)])
def test_resampling_keeps_the_tone_and_drops_what_would_fold(rate: int, new: int) -> None:
    found, expected = resampled(tone(rate), rate, new), tone(new)
    assert found.shape == expected.shape
    inside = slice(500, -500)
    torch.testing.assert_close(found[:, inside], expected[:, inside], atol=2e-4, rtol=0)
    high = 0.44 * min(rate, new)
    found, expected = resampled(tone(rate, pitch=high), rate, new), tone(new, pitch=high)
    torch.testing.assert_close(found[:, inside], expected[:, inside], atol=1e-3, rtol=0)
    if new < rate:
        folding = resampled(tone(rate, pitch=0.6 * new), rate, new)
        assert folding[:, inside].abs().max() < 1e-3


def test_reading_at_a_rate_and_in_channels(tmp_path: Path) -> None:
    stereo = torch.cat([tone(32_000), torch.zeros(1, 16_000)])
    path = save(tmp_path / "a.wav", stereo, 32_000)
    sample = read(path, rate=16_000, channels=1)
    assert sample["rate"] == 16_000
    assert sample["audio"].shape == (1, 8000)
    assert sample["audio"][:, 500:-500].abs().max() == pytest.approx(0.25, abs=1e-3)
    assert mixed(stereo, 2) is stereo
    assert torch.equal(mixed(stereo[:1], 2), stereo[:1].repeat(2, 1))
    with pytest.raises(UsageError, match="2 channels do not become 3"):
        mixed(stereo, 3)


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no file .*none.wav"):
        read(tmp_path / "none.wav")
    for name, data in (("empty.wav", b""), ("text.wav", b"not sound at all " * 20)):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UsageError, match=f"{name} is not a sound file") as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)
    soundfile.write(tmp_path / "silent.wav", np.zeros((0, 1)), 16_000)
    with pytest.raises(UsageError, match="silent.wav holds no sound"):
        read(tmp_path / "silent.wav")


@pytest.mark.parametrize(
    ("suffix", "channels", "rate", "message"),
    [
        (".mp3", 1, 10_000, "up to 2 channels at one of 8000, .* not 1 at 10000 Hz: write .wav"),
        (".mp3", 3, 16_000, "not 3 at 16000 Hz"),
        (".flac", 9, 16_000, "up to 8 channels"),
        (".ogg", 1, 500_000, "up to 192000 Hz"),
    ],
)
def test_what_a_kind_cannot_hold_is_said(
    tmp_path: Path, suffix: str, channels: int, rate: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        save(tmp_path / f"a{suffix}", torch.zeros(channels, 100), rate)


@pytest.mark.parametrize("shape", [(100,), (1, 0), (0, 100), (1, 1, 100)])
def test_other_shapes_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"sound is \(channels, samples\)"):
        save(tmp_path / "a.wav", torch.zeros(shape))


def test_minutes_of_ogg(tmp_path: Path) -> None:
    # given at once, so many frames overrun the encoder's stack and end the process
    path = save(tmp_path / "a.ogg", torch.zeros(1, 3_000_000), 8000)
    assert soundfile.info(path).frames == 3_000_000


def test_media() -> None:
    assert [(m.suffix, m.default) for m in MEDIA] == [
        (".wav", True),
        (".flac", False),
        (".ogg", False),
        (".mp3", False),
    ]


def test_the_record_is_read_without_torch(tmp_path: Path) -> None:
    path = save(tmp_path / "a.wav", tone())
    code = (
        "import sys; from pathlib import Path; from mdiff.plugins.audio.io import MEDIA;"
        f"print(MEDIA[0].read_record(Path({str(path)!r}))['seed'], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["7", "False"]
