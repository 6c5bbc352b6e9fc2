"""What a sound looks like: its log-mel spectrogram, with seconds and Hz along the edges."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mdiff.plugins.audio import io
from mdiff.plugins.audio.nets.mel import HOP, RATE, log_mel

WIDTH, HEIGHT = 256, 160
LEFT, BELOW = 26, 14
"""Pixels of the whole, and of the edges with figures."""
FLOOR, CEILING = -8.0, 1.5
"""Natural logs that are black and white: about -82 dB and 0 dB of a full-scale sine."""
COLOURS = torch.tensor(
    [[0, 0, 0], [66, 20, 110], [160, 45, 110], [235, 110, 60], [250, 200, 80], [255, 255, 240]]
).float()
"""From silence to the loudest, evenly."""
MARKS = (500, 1000, 2000, 4000)
"""Hz."""


def thumbnail(sample: Mapping[str, Any]) -> Image.Image:
    """The spectrogram of a sample, all channels as one, the same colour for the same level in each."""
    audio, rate = sample["audio"].detach().float().cpu(), int(sample["rate"])
    wave = io.resampled(io.mixed(audio, 1), rate, RATE)
    frames = max(8, math.ceil(wave.shape[1] / HOP))
    mel = log_mel(F.pad(wave, (0, frames * HOP - wave.shape[1])))[0]
    return drawn(mel, wave.shape[1] / RATE)


def drawn(mel: Tensor, seconds: float) -> Image.Image:
    """A log-mel (bands, frames) as a picture; it may be coarser than that of a sample."""
    page = Image.new("RGB", (WIDTH, HEIGHT), (255, 255, 255))
    plot = (WIDTH - LEFT, HEIGHT - BELOW)
    page.paste(_coloured(mel.flip(0)).resize(plot, Image.Resampling.BILINEAR), (LEFT, 0))
    draw, font, ink = ImageDraw.Draw(page), ImageFont.load_default(10), (32, 32, 32)
    for hertz in MARKS:
        y = round(plot[1] * (1 - _mel(hertz) / _mel(RATE / 2)))
        draw.line([(LEFT - 3, y), (LEFT - 1, y)], fill=ink)
        draw.text((LEFT - 5, y), f"{hertz / 1000:g}k", fill=ink, font=font, anchor="rm")
    for part in (0.0, 0.5, 1.0):
        place, anchor = LEFT + part * (plot[0] - 1), {0.0: "la", 0.5: "ma", 1.0: "ra"}[part]
        draw.text(
            (place, plot[1] + 2), f"{part * seconds:.2g} s", fill=ink, font=font, anchor=anchor
        )
    return page


def _coloured(mel: Tensor) -> Image.Image:
    """Levels (H, W) as a picture, by `COLOURS`."""
    place = ((mel - FLOOR) / (CEILING - FLOOR)).clamp(0, 1) * (len(COLOURS) - 1)
    low = place.floor().long().clamp(max=len(COLOURS) - 2)
    colours = torch.lerp(COLOURS[low], COLOURS[low + 1], (place - low).unsqueeze(-1))
    return Image.fromarray(colours.round().byte().numpy())


def _mel(hertz: float) -> float:
    """Slaney's scale: linear up to 1 kHz, logarithmic above."""
    return hertz / 200 * 3 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000) / math.log(6.4)
