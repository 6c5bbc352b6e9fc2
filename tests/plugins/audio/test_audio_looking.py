"""What a sound looks like: the right place in time and pitch, the same scale for every sound."""

import math
from pathlib import Path

import pytest
import soundfile
import torch
from PIL import Image

from mdiff.core import host as hosts
from mdiff.core import registry
from mdiff.core.denoiser import Denoiser
from mdiff.plugins.audio import commands, diffwave, io, spectrogram
from mdiff.plugins.audio.nets.diffwave import DiffWave


def tone(
    hertz: float, seconds: float = 1.0, rate: int = 16_000, level: float = 0.5
) -> torch.Tensor:
    t = torch.arange(round(seconds * rate)) / rate
    return level * torch.sin(2 * math.pi * hertz * t)[None]


def brightness(picture: Image.Image) -> torch.Tensor:
    """Of the plot without its edges: (rows from the top, columns)."""
    plot = picture.crop(
        (spectrogram.LEFT, 0, spectrogram.WIDTH, spectrogram.HEIGHT - spectrogram.BELOW)
    )
    grey = plot.convert("L")
    return torch.tensor(list(grey.tobytes())).reshape(grey.height, grey.width).float()


@pytest.mark.parametrize("hertz", spectrogram.MARKS)
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_a_tone_is_a_line_at_its_mark(hertz: int, rate: int) -> None:
    picture = spectrogram.thumbnail({"audio": tone(hertz, rate=rate), "rate": rate})
    assert picture.size == (spectrogram.WIDTH, spectrogram.HEIGHT)
    row = int(brightness(picture).mean(1).argmax())
    marks = [
        y
        for y in range(spectrogram.HEIGHT - spectrogram.BELOW)
        if picture.getpixel((spectrogram.LEFT - 2, y)) == (32, 32, 32)
    ]
    assert min(abs(row - y) for y in marks) <= 3
    nearest = min(marks, key=lambda y: abs(row - y))
    assert marks.index(nearest) == len(marks) - 1 - spectrogram.MARKS.index(hertz)


def test_when_it_sounds_is_where_it_shows() -> None:
    sound = torch.cat([torch.zeros(1, 8000), tone(1000, 0.5)], 1)
    columns = brightness(spectrogram.thumbnail({"audio": sound, "rate": 16_000})).mean(0)
    assert columns[: len(columns) // 2 - 12].max() == 0 < columns[len(columns) // 2 + 12 :].min()


def test_louder_is_brighter() -> None:
    peaks = [
        float(brightness(io.thumbnail({"audio": tone(1000, level=level), "rate": 16_000})).max())
        for level in (0.001, 0.03, 1.0)
    ]
    assert 0 < peaks[0] < peaks[1] < peaks[2]


@pytest.mark.parametrize("samples", [1, 100, 5000])
@pytest.mark.parametrize("channels", [1, 2])
def test_the_shortest_sounds_have_a_picture(samples: int, channels: int) -> None:
    picture = io.thumbnail({"audio": torch.zeros(channels, samples), "rate": 16_000})
    assert brightness(picture).max() == 0


def test_every_kind_of_sound_file_has_thumbnails() -> None:
    assert all(media.thumbnail is io.thumbnail for media in io.MEDIA)


def test_a_stage_of_diffwave_shows_its_waveform() -> None:
    net = DiffWave(layers=2, channels=8, cycle=2)
    config = {"betas": {"steps": 50}, "rate": 16_000}
    stage = diffwave.stage(net, config)
    assert isinstance(stage.denoiser, Denoiser) and stage.preview is not None
    x0 = torch.stack([tone(1000), tone(4000)])
    wanted = spectrogram.thumbnail({"audio": tone(1000), "rate": 16_000})
    assert stage.preview(x0).tobytes() == wanted.tobytes()
    assert stage.preview(x0.bfloat16()).size == wanted.size


def test_latents_show_by_the_map_of_the_card() -> None:
    card = registry.load(hosts.current()).resolve("audioldm-mini")
    built = hosts.current().call(
        "audio", "mdiff_build", card=card, device="cpu", dtype=torch.float32
    )
    preview = built.stages[0].preview
    loud, silent = torch.zeros(2, 4, 16, 16), torch.zeros(2, 4, 16, 16)
    for channel, (weight,) in enumerate(card.config["latent_map"][:-1]):
        loud[0, channel], silent[0, channel] = 3 * weight, -3 * weight
    assert brightness(preview(loud)).mean() > brightness(preview(silent)).mean() + 50


def test_a_sound_as_the_autoencoder_takes_it(tmp_path: Path) -> None:
    for samples, frames in ((100, 8), (16_000, 100), (16_001, 104)):
        path = tmp_path / "a.wav"
        soundfile.write(path, torch.zeros(samples).numpy(), 16_000)
        assert commands.heard(path, {}).shape == (1, 1, frames, 64)


def test_a_sheet_of_sounds(tmp_path: Path) -> None:
    from mdiff.core import looking

    picture = io.thumbnail({"audio": tone(500), "rate": 16_000})
    assert looking.fitted(picture, 256).tobytes() == picture.tobytes(), "as large as a tile"
