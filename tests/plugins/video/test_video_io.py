"""Clips in files: what goes in comes out, at its exact rate and size, with its record; what is wrong is said."""

import logging
import math
import signal
import stat
import subprocess
import sys
import zipfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from PIL import Image
from torch import Tensor

from mdiff.core import record
from mdiff.core.errors import (
    IntegrityError,
    MdiffError,
    MissingError,
    NonFiniteError,
    UsageError,
)
from mdiff.plugins.video import ffmpeg, io, pictures
from mdiff.plugins.video.pictures import Note

RECORD = {
    "schema": 1,
    "mdiff": "0.1",
    "model": "video/x",
    "seed": 7,
    "request": {"text": "dög; a=b #1 \\ \n 'q' \"x\""},
}
FILMS = [suffix for suffix, kind in io.KINDS.items() if kind.video]
LOSSLESS = (".webp", ".zip")
CLEAR = [suffix for suffix, kind in io.KINDS.items() if kind.alpha]
TRUE = {".gif": 28.0, ".webp": 58.0, ".zip": 58.0}
"""Decibels, PSNR at least; films 39, at 8 bits without loss 58.9."""


def clip(frames: int = 16, height: int = 24, width: int = 32, channels: int = 3) -> Tensor:
    """Waves that move, all over the colours; the fourth channel is a disc that moves."""
    t = torch.arange(frames).view(-1, 1, 1).float()
    y, x = torch.arange(height).view(1, -1, 1).float(), torch.arange(width).view(1, 1, -1).float()
    values = [
        (torch.sin((x + 2 * t) / 9) + 1) / 2,
        (torch.cos((y - t) / 8) + 1) / 2,
        (x + y) / (height + width),
        ((x - 16 - t).square() + (y - 12).square() < 60).float(),
    ]
    return torch.stack([value.expand(frames, height, width) for value in values[:channels]])


def ramp(frames: int, edge: int = 16) -> Tensor:
    """Frames that are as bright as their number says."""
    return (torch.arange(frames) / frames).view(1, -1, 1, 1).expand(3, frames, edge, edge)


def numbers(video: Tensor, frames: int) -> list[int]:
    """Which frames of a ramp these are."""
    return (video.mean((0, 2, 3)) * frames).round().int().tolist()


def psnr(one: Tensor, other: Tensor) -> float:
    return float(-10 * torch.log10((one - other).square().mean()))


def save(path: Path, video: Tensor, fps: Any = 8, **more: Any) -> Path:
    io.write(path, {"video": video, "fps": fps, **more}, RECORD, {})
    return path


def run_ffmpeg(*arguments: Any) -> None:
    command = [ffmpeg.program(), "-v", "error", "-y", *map(str, arguments)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


# --- writing and reading back ---------------------------------------------------------------------


@pytest.mark.parametrize("suffix", io.KINDS)
@pytest.mark.parametrize(
    ("fps", "exact", "size"),
    [
        (8, Fraction(8), (24, 32)),
        (23.976, Fraction(24000, 1001), (23, 31)),  # odd edges
        (Fraction(25, 3), Fraction(25, 3), (24, 31)),
        (Fraction(30000, 1001), Fraction(30000, 1001), (24, 32)),
    ],
)
def test_what_is_written_comes_back(
    tmp_path: Path, suffix: str, fps: Any, exact: Fraction, size: tuple[int, int]
) -> None:
    video = clip(16, *size)
    path = save(tmp_path / f"a{suffix}", video, fps)
    sample = io.read(path)
    assert set(sample) == {"video", "fps"}
    assert sample["fps"] == exact
    assert sample["video"].dtype == torch.float32 and sample["video"].shape == video.shape
    assert 0 <= sample["video"].min() and sample["video"].max() <= 1
    assert psnr(sample["video"], video) > TRUE.get(suffix, 39.0)
    assert io.read_record(path) == RECORD
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", LOSSLESS)
def test_lossless_files_hold_eight_bits_exactly(tmp_path: Path, suffix: str) -> None:
    video = torch.rand(3, 3, 7, 5, generator=torch.Generator().manual_seed(0))
    back = io.read(save(tmp_path / f"a{suffix}", video))["video"]
    assert torch.equal((back * 255).round(), (video * 255).round())


@pytest.mark.parametrize("suffix", io.KINDS)
def test_same_sample_same_bytes(tmp_path: Path, suffix: str) -> None:
    sound = {"audio": tone(8000, 1.0), "rate": 8000} if io.KINDS[suffix].sound else {}
    one, two = (save(tmp_path / f"{n}{suffix}", clip(), 24, **sound).read_bytes() for n in "ab")
    assert one == two


@pytest.mark.parametrize("suffix", CLEAR)
def test_alpha_is_kept_and_lies_on_white(tmp_path: Path, suffix: str) -> None:
    video = clip(channels=4)
    path = save(tmp_path / f"a{suffix}", video, 10)
    back = io.read(path, channels=4)["video"]
    assert psnr(back[3], video[3]) > 45
    assert psnr(back[:3] * video[3], video[:3] * video[3]) > 33
    white = io.read(path)["video"]
    assert white.shape[0] == 3 and white[:, :, video[3, 0] == 0][:, 0].min() > 0.97


def test_opaque_files_have_full_alpha_where_it_is_asked_for(tmp_path: Path) -> None:
    for suffix in io.KINDS:
        path = save(tmp_path / f"a{suffix}", clip(3))
        back = io.read(path, channels=4)["video"]
        assert back.shape[0] == 4 and bool((back[3] == 1).all())


@pytest.mark.parametrize("suffix", io.KINDS)
def test_frames_that_are_alike_all_come_back(tmp_path: Path, suffix: str) -> None:
    still = clip(1)
    for number, video in enumerate([still, still.expand(3, 9, 24, 32), clip(16)[:, [0] * 8 + [9]]]):
        sample = io.read(save(tmp_path / f"{number}{suffix}", video, 23.976))
        assert sample["fps"] == Fraction(24000, 1001)
        assert sample["video"].shape == video.shape


@pytest.mark.parametrize("suffix", io.KINDS)
def test_the_smallest_clip(tmp_path: Path, suffix: str) -> None:
    video = torch.full((3, 2, 1, 1), 0.5)
    back = io.read(save(tmp_path / f"a{suffix}", video))["video"]
    assert back.shape == video.shape and (back - video).abs().max() < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_is_written(tmp_path: Path, dtype: torch.dtype) -> None:
    video = clip(2).to(dtype)
    found = io.read(save(tmp_path / "a.zip", video))["video"]
    torch.testing.assert_close(found, video.float(), atol=0.5 / 255 + 1e-6, rtol=0)


@pytest.mark.parametrize("suffix", io.KINDS)
def test_long_records_leave_their_hash(tmp_path: Path, suffix: str) -> None:
    made = {**RECORD, "request": {"text": "wörd " * 10_000}}
    path = tmp_path / f"a{suffix}"
    io.write(path, {"video": clip(2), "fps": 8}, made, {})
    found = io.read_record(path)
    assert found is not None and found["seed"] == 7
    assert found == made if suffix == ".zip" else found["record"] == record.digest(made)


def test_files_without_a_record_have_none(tmp_path: Path) -> None:
    run_ffmpeg("-f", "lavfi", "-i", "testsrc=s=32x24:d=0.2", tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_bytes(b"nothing of the kind")
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as file:
        file.writestr("clip.json", "[]")
    for name in ("a.mp4", "b.mp4", "c.zip", "d.mp4"):
        assert io.read_record(tmp_path / name) is None


def test_the_film_is_what_players_take(tmp_path: Path) -> None:
    path = save(tmp_path / "a.mp4", clip(16, 23, 31), 24)
    film = ffmpeg.look(path)
    assert film.size == (24, 32)  # 4:2:0 H.264 has even edges
    with ffmpeg.running("-i", str(path)) as process:
        said = " ".join(process.ended()[1])
    assert "h264 (High)" in said and "yuv420p(tv, bt709, progressive)" in said
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # faststart
    # what is added is the last row and column again
    sample = io.read(path)["video"]
    whole = next(ffmpeg.frames(film, 0.0, film.rate))
    assert sample.shape[2:] == (23, 31)
    last = torch.from_numpy(whole.copy()).float() / 255
    assert (last[-1] - last[-2]).abs().mean() < 0.03


def test_a_film_made_smaller_is_not_cut(tmp_path: Path) -> None:
    path = save(tmp_path / "a.mp4", clip(4, 23, 31), 24)
    run_ffmpeg("-i", path, "-vf", "scale=64:48", "-map_metadata", "0", tmp_path / "b.mp4")
    assert io.read(tmp_path / "b.mp4")["video"].shape[2:] == (48, 64)


# --- sound ----------------------------------------------------------------------------------------


def tone(rate: int, seconds: float, channels: int = 1) -> Tensor:
    past = torch.arange(int(rate * seconds)) / rate
    tones = [0.5 * torch.sin(2 * math.pi * 440 * (c + 1) * past) for c in range(channels)]
    return torch.stack(tones) * (past > 0.1)


@pytest.mark.parametrize("suffix", FILMS)
@pytest.mark.parametrize("seconds", [0.3, 2.0])
@pytest.mark.parametrize("channels", [1, 2])
def test_sound_lasts_as_long_as_the_clip(
    tmp_path: Path, suffix: str, seconds: float, channels: int
) -> None:
    rate = 48_000
    audio = tone(rate, seconds, channels)
    path = save(tmp_path / f"a{suffix}", clip(16), 24, audio=audio, rate=rate)
    sample = io.read(path, audio=True)
    assert "audio" not in io.read(path)
    assert sample["rate"] == rate and sample["video"].shape[1] == 16
    assert sample["audio"].shape == (channels, rate * 16 // 24)
    wanted = torch.zeros(channels, rate * 16 // 24)
    length = min(wanted.shape[1], audio.shape[1])
    wanted[:, :length] = audio[:, :length]
    assert (sample["audio"] - wanted).square().mean().sqrt() < 0.01  # in its place, too


def test_sound_keeps_its_rate_and_stays_within_full_scale(tmp_path: Path) -> None:
    path = save(tmp_path / "a.mp4", clip(16), 24, audio=4 * tone(16_000, 1.0), rate=16_000)
    sample = io.read(path, audio=True)
    assert sample["rate"] == 16_000
    assert sample["audio"].abs().max() == pytest.approx(1, abs=0.05)


def test_sound_of_a_part(tmp_path: Path) -> None:
    audio = tone(48_000, 2.0)
    path = save(tmp_path / "a.mp4", clip(48), 24, audio=audio, rate=48_000)
    sample = io.read(path, start=0.5, frames=12, audio=True)
    assert sample["audio"].shape == (1, 24_000)
    wanted = audio[:, 24_000:48_000]
    assert (sample["audio"] - wanted).square().mean().sqrt() < 0.02


def test_sound_that_a_file_cannot_hold_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for suffix in (".gif", ".webp", ".zip"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="mdiff"):
            path = save(tmp_path / f"a{suffix}", clip(2), 24, audio=tone(8000, 1.0), rate=8000)
        said = f"a {suffix} file holds no sound: it is left out"
        assert [entry.getMessage() for entry in caplog.records] == [said]
        assert "audio" not in io.read(path, audio=True)


@pytest.mark.parametrize("shape", [(8000,), (3, 8000), (1, 1, 8000)])
def test_other_sound_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"sound of a clip is \(1 or 2 channels, samples\)"):
        save(tmp_path / "a.mp4", clip(2), audio=torch.zeros(shape), rate=8000)
    assert not (tmp_path / "a.mp4").exists()


# --- a part of a clip -----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", io.KINDS)
def test_a_window_in_another_rate(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a{suffix}", ramp(48), 24)
    for asked, wanted in [
        ({"fps": 8}, list(range(0, 48, 3))),
        ({"fps": 48, "frames": 6}, [0, 0, 1, 1, 2, 2]),
        ({"fps": 10, "frames": 5}, [0, 2, 4, 7, 9]),
        ({"start": 5 / 24, "frames": 3}, [5, 6, 7]),
        ({"start": 1.9}, [46, 47]),
        ({"start": 0.5, "fps": 12, "frames": 4}, [12, 14, 16, 18]),
    ]:
        sample = io.read(path, **asked)
        assert numbers(sample["video"], 48) == wanted, asked
        assert sample["fps"] == asked.get("fps", 24)


def test_frames_are_cut_from_the_middle(tmp_path: Path) -> None:
    video = torch.zeros(3, 2, 32, 64)
    video[0, :, :, 16:48] = 1
    path = save(tmp_path / "a.zip", video)
    square = io.read(path, size=16)["video"]
    assert square.shape == (3, 2, 16, 16) and square[0].min() > 0.9
    assert io.read(path, size=(8, 16))["video"].shape == (3, 2, 8, 16)


def test_what_is_too_long_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(io, "VALUES", 3 * 24 * 32 * 10)
    for suffix in (".mp4", ".gif"):
        path = save(tmp_path / f"a{suffix}", clip(48), 24)
        with pytest.raises(UsageError, match="too long: 48 frames of 32 x 24 pixels, and 10 can"):
            io.read(path)
        with pytest.raises(UsageError, match="too long: 1000 frames"):
            io.read(path, frames=1000)
        assert io.read(path, start=1.0, frames=10)["video"].shape[1] == 10
        assert io.read(path, size=8)["video"].shape == (3, 48, 8, 8)


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".zip"])
def test_more_than_there_is(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a{suffix}", clip(16), 24)
    with pytest.raises(UsageError, match=f"a{suffix} has 16 frames at 24 a second, not 1000"):
        io.read(path, frames=1000)
    with pytest.raises(UsageError, match="has 0 frames after 9 s at 24 a second, not one"):
        io.read(path, start=9)
    for wrong in ({"frames": 0}, {"start": -1.0}, {"channels": 1}):
        with pytest.raises(UsageError, match="read with 3 or 4 channels, from 0 seconds on"):
            io.read(path, **wrong)


# --- files of other makers ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("a.avi", ["-c:v", "mpeg4", "-q:v", "2"]),
        ("a.m4v", []),
        ("a.ts", []),
        ("a.ogv", ["-q:v", "9"]),
        ("a.bin", ["-f", "matroska"]),  # known by what is in it
    ],
)
def test_films_that_people_have(tmp_path: Path, name: str, settings: list[str]) -> None:
    video = ramp(24, 32)
    source = save(tmp_path / "source.mp4", video, Fraction(24000, 1001))
    run_ffmpeg("-i", source, *settings, tmp_path / name)
    sample = io.read(tmp_path / name)
    assert sample["fps"] == Fraction(24000, 1001)
    assert sample["video"].shape == video.shape
    assert numbers(sample["video"], 24) == list(range(24))


def test_frames_that_last_for_different_times(tmp_path: Path) -> None:
    source = save(tmp_path / "a.mkv", ramp(40), 20)
    # of the second half every other frame is left out
    chosen = "select='lt(n,20)+not(mod(n,2))'"
    run_ffmpeg("-i", source, "-vf", chosen, "-fps_mode", "passthrough", tmp_path / "b.mp4")
    sample = io.read(tmp_path / "b.mp4", fps=10)
    assert numbers(sample["video"], 40) == pytest.approx(list(range(0, 40, 2)), abs=1)


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    source = save(tmp_path / "a.mkv", clip(3))
    run_ffmpeg("-i", source, "-vf", "setsar=2/1", tmp_path / "b.mp4")
    assert io.read(tmp_path / "b.mp4")["video"].shape == (3, 3, 24, 64)


@pytest.mark.parametrize(
    ("stays", "fps", "frames"),
    [
        ([100] * 5, Fraction(10), 5),
        ([40, 40, 50, 40, 40, 40, 40], Fraction(24), 7),  # rounded to hundredths
        ([30] * 7, Fraction(100, 3), 7),
        ([100, 100, 300], Fraction(10), 5),  # the last one stays
        ([100, 500, 200, 100], Fraction(10), 9),
        ([0, 0, 0], Fraction(10), 3),  # as browsers show it
    ],
)
def test_animations_that_people_have(
    tmp_path: Path, stays: list[int], fps: Fraction, frames: int
) -> None:
    shown = [Image.new("RGB", (8, 8), (40 * k, 0, 0)) for k in range(len(stays))]
    path = tmp_path / "a.gif"
    shown[0].save(path, save_all=True, append_images=shown[1:], duration=stays)
    sample = io.read(path)
    assert sample["fps"] == fps and sample["video"].shape == (3, frames, 8, 8)


def test_pictures_in_a_zip_go_by_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        for k in (10, 9, 1):
            Image.new("RGB", (4, 4), (20 * k, 0, 0)).save(tmp_path / f"{k}.png")
            file.write(tmp_path / f"{k}.png", f"frames/{k}.png")
    with pytest.raises(UsageError, match='put a clip.json with {"fps": "24"} into it'):
        io.read(path)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("clip.json", '{"fps": 12.5}')
    sample = io.read(path)
    assert sample["fps"] == Fraction(25, 2)
    assert (sample["video"][0, :, 0, 0] * 255 / 20).round().tolist() == [1, 9, 10]


@pytest.mark.parametrize(
    ("fps", "exact"),
    [
        (23.976, Fraction(24000, 1001)),
        (23.98, Fraction(24000, 1001)),
        (29.97, Fraction(30000, 1001)),
        (59.94, Fraction(60000, 1001)),
        ("30000/1001", Fraction(30000, 1001)),
        (24, Fraction(24)),
        (24.0, Fraction(24)),
        (12.5, Fraction(25, 2)),
        (25 / 3, Fraction(25, 3)),
        (0.1, Fraction(1, 10)),
    ],
)
def test_rates_are_the_ones_meant(fps: Any, exact: Fraction) -> None:
    assert ffmpeg.rate_of(fps) == exact


@pytest.mark.parametrize("fps", [0, -8, 2000, math.nan, math.inf, "fast", "1/0", None])
def test_rates_that_are_none(fps: Any) -> None:
    with pytest.raises(UsageError, match="frames a second"):
        ffmpeg.rate_of(fps)


def test_notes_are_read_as_they_are_written() -> None:
    note = Note(16, (24, 32), Fraction(24000, 1001))
    assert str(note) == "16 frames of 32 x 24 pixels, 24000/1001 a second"
    assert pictures.noted(f"x\n{note}\ny") == note
    assert pictures.noted("0 frames of 32 x 24 pixels, 8 a second") is None
    assert pictures.noted("a film") is None


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "video", "fps", "message"),
    [
        (".mp4", torch.zeros(3, 0, 8, 8), 8, "at least one frame and one pixel, .*3, 0, 8, 8"),
        (".mp4", torch.zeros(3, 2, 0, 8), 8, "at least one frame and one pixel"),
        (".mp4", torch.zeros(3, 8, 8), 8, r"a clip is \(3 or 4 channels, frames, height, width\)"),
        (".mp4", torch.zeros(1, 2, 8, 8), 8, "3 or 4 channels"),
        (".mp4", torch.zeros(4, 2, 8, 8), 8, "a .mp4 file holds no alpha: write .webm"),
        (".mp4", torch.zeros(3, 1, 1, 16_386), 8, "at most 16384 pixels, .* 16386 x 1: write .zip"),
        (".mp4", torch.zeros(3, 2, 8, 8), 0, "from 1/1000 to 1000 frames a second, not 0"),
        (".gif", torch.zeros(3, 2, 8, 8), 60, "up to 50 frames a second, this clip has 60: write"),
    ],
)
def test_what_cannot_be_written_is_said(
    tmp_path: Path, suffix: str, video: Tensor, fps: Any, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        save(tmp_path / f"a{suffix}", video, fps)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_clip_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    video = clip()
    video[0, 3, 2, 1] = value
    with pytest.raises(NonFiniteError, match="NaN or an infinity and was not written"):
        save(tmp_path / "a.mp4", video)
    assert not list(tmp_path.iterdir())


def test_what_is_no_clip_is_said(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", torch.zeros(1000).numpy(), 16_000)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "still.mp4", format="WEBP")
    cover = ["-map", "0", "-map", "1", "-disposition:1", "attached_pic"]
    run_ffmpeg("-i", tmp_path / "a.wav", "-i", tmp_path / "a.png", *cover, tmp_path / "a.mp3")
    run_ffmpeg("-i", tmp_path / "a.wav", tmp_path / "sound.mp4")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_bytes(b"not a film at all " * 20)
    list_of_others = "#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.mp4").write_text(list_of_others)
    with zipfile.ZipFile(tmp_path / "bare.zip", "w") as file:
        file.writestr("a.txt", "")
    for name, message in {
        "a.wav": "holds sound and no moving picture: give a clip",
        "a.mp3": "holds sound and no moving picture",
        "sound.mp4": "holds sound and no moving picture",
        "a.png": "is a still picture: give a clip",
        "still.mp4": "is a still picture",
        "empty.mp4": r"is not a clip that can be read \(Invalid data found .*\): give an MP4",
        "text.mp4": "is not a clip that can be read",
        "list.mp4": "list.mp4 ",
        "bare.zip": "holds no picture: give a zip of PNG files",
    }.items():
        with pytest.raises(UsageError, match=message) as caught:
            io.read(tmp_path / name)
        assert "\n" not in str(caught.value) and name in str(caught.value)
    with pytest.raises(MissingError, match="no file .*none.mp4"):
        io.read(tmp_path / "none.mp4")


def test_a_still_picture_is_a_clip_where_it_may_be(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 6), (255, 0, 0, 0)).save(tmp_path / "a.png")
    video = io.read(tmp_path / "a.png", still=True)["video"]
    assert video.shape == (3, 1, 6, 8) and bool((video == 1).all())


@pytest.mark.parametrize("suffix", io.KINDS)
@pytest.mark.parametrize("part", [0.6, 0.95])
def test_a_file_that_ends_too_early_is_said(tmp_path: Path, suffix: str, part: float) -> None:
    noise = torch.rand(3, 24, 48, 64, generator=torch.Generator().manual_seed(0))
    path = save(tmp_path / f"a{suffix}", noise, 24)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    with pytest.raises(IntegrityError, match="copy it again") as caught:
        io.read(path)
    assert "\n" not in str(caught.value) and "[" not in str(caught.value)


def fake(folder: Path, script: str) -> str:
    """A program in the place of ffmpeg."""
    path = folder / "fake"
    path.write_text(f"#!{sys.executable}\nimport os, signal, sys, time\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


DYING = "open(sys.argv[-1][5:], 'w').write('half'); sys.stdin.buffer.read(100)\n"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "print('[x @ 0x1] disk full\\nConversion failed!', file=sys.stderr); sys.exit(1)",
            "disk full",
        ),
        ("sys.exit(3)", "ffmpeg's exit status is 3"),
        ("os.kill(os.getpid(), signal.SIGKILL)", f"ended by signal {int(signal.SIGKILL)}"),
    ],
)
def test_an_encoder_that_fails_midway_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    program = fake(tmp_path, DYING + script)
    monkeypatch.setattr(ffmpeg, "program", lambda: program)
    video = torch.zeros(3, 16, 128, 128)  # more than a pipe takes
    with pytest.raises(MdiffError, match=rf"cannot write a.mp4: .*{message}"):
        save(tmp_path / "a.mp4", video)
    assert [entry.name for entry in tmp_path.iterdir()] == ["fake"]


def test_a_decoder_that_is_ended_midway_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    film = ffmpeg.look(save(tmp_path / "a.mp4", clip(16), 24))
    script = "sys.stdout.buffer.write(bytes(24*32*3)); sys.stdout.flush()\n"
    program = fake(tmp_path, f"{script}os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setattr(ffmpeg, "program", lambda: program)
    with pytest.raises(MdiffError, match="cannot read .*a.mp4: ffmpeg was ended by signal 9"):
        list(ffmpeg.frames(film, 0.0, film.rate))


def test_no_process_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = fake(
        tmp_path, "sys.stdout.buffer.write(b'x' * 9); sys.stdout.flush(); time.sleep(60)"
    )
    monkeypatch.setattr(ffmpeg, "program", lambda: program)
    with pytest.raises(KeyboardInterrupt), ffmpeg.running() as process:
        process.pipes.stdout.read(9)  # type: ignore[union-attr]
        raise KeyboardInterrupt
    assert process.pipes.returncode == -signal.SIGKILL


def test_no_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    ffmpeg.program.cache_clear()
    try:
        with pytest.raises(MissingError, match="pip install --force-reinstall imageio-ffmpeg"):
            save(tmp_path / "a.mp4", clip(2))
        save(tmp_path / "a.gif", clip(2))  # which needs none
    finally:
        ffmpeg.program.cache_clear()


@pytest.mark.parametrize("suffix", io.KINDS)
def test_a_folder_that_is_not_there(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(MdiffError, match=f"cannot write a{suffix}: No such file or directory"):
        save(tmp_path / "none" / f"a{suffix}", clip(2))


# --- looking, and the table -----------------------------------------------------------------------


def test_a_strip_has_frames_from_the_first_to_the_last() -> None:
    strip = io.strip({"video": ramp(16)}, count=4, width=16)
    assert strip.size == (4 * 16 + 3 * 2, 16)
    found = [strip.getpixel((k * 18 + 8, 8))[0] for k in range(4)]  # type: ignore[index]
    assert found == [round(255 * k / 16) for k in (0, 5, 10, 15)]
    assert io.strip({"video": ramp(1)}).size == (16, 16)
    assert max(io.thumbnail({"video": torch.zeros(4, 40, 90, 160)}).size) <= 256


def test_media() -> None:
    assert [m.suffix for m in io.MEDIA if m.default] == [".mp4"]
    assert [m.suffix for m in io.MEDIA] == list(io.KINDS)


def test_the_record_is_read_without_torch(tmp_path: Path) -> None:
    path = save(tmp_path / "a.mp4", clip(2))
    code = (
        "import sys; from pathlib import Path; from mdiff.plugins.video.io import MEDIA;"
        f"print(MEDIA[0].read_record(Path({str(path)!r}))['seed'], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["7", "False"]
