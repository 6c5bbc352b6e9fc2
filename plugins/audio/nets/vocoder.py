"""Mel inversion: log-mel -> waveform, by a network for magnitudes and an iteration for phases.

The network (ConvNeXt blocks over time, as in Vocos: Siuzdak, 2023) restores the 513 magnitudes that 64 mel bands
blurred; the phases come from the fast Griffin-Lim iteration (Perraudin et al., 2013), which needs no training and no
random start. Everything runs at 100 frames a second, which is why it is cheap.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdiff.plugins.audio.nets.mel import BANDS, BINS, FLOOR, HOP, WINDOW


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution over time, then a two-layer perceptron per frame; x (B, C, T) -> (B, C, T)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand = nn.Linear(channels, hidden)
        self.contract = nn.Linear(hidden, channels)
        self.scale = nn.Parameter(torch.full((channels,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.depthwise(x).transpose(1, 2))
        h = self.scale * self.contract(F.gelu(self.expand(h)))
        return x + h.transpose(1, 2)


class MelInverter(nn.Module):
    """Log-mel (B, 64, T) -> log magnitudes (B, 513, T)."""

    def __init__(self, *, channels: int = 256, hidden: int = 640, blocks: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv1d(BANDS, channels, 7, padding=3)
        self.blocks = nn.Sequential(*[ConvNeXtBlock(channels, hidden) for _ in range(blocks)])
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.head = nn.Linear(channels, BINS)

    def forward(self, mel: Tensor) -> Tensor:
        h = self.blocks(self.stem((mel + 5.0) / 4.0))  # about zero mean, unit variance
        return (self.head(self.norm(h.transpose(1, 2))) * 4.0 - 5.0).transpose(1, 2)


def tracked_phase(magnitude: Tensor) -> Tensor:
    """First phases (B, 513, T) for magnitudes (B, 513, T): every bin turns with the frequency of its nearest peak.

    Single pass spectrogram inversion (Beauregard et al., 2015): the frequency of a peak is refined by a parabola
    through its log magnitudes, its phase advances by that frequency each hop, its neighbours alternate in sign, as the
    lobe of a Hann window does.
    """
    log = torch.log(magnitude.clamp(min=FLOOR))
    left, middle, right = log[:, :-2], log[:, 1:-1], log[:, 2:]
    peak = F.pad((middle >= left) & (middle > right), (0, 0, 1, 1))
    bend = left - 2 * middle + right
    offset = torch.where(bend < -1e-6, 0.5 * (left - right) / bend, 0.0).clamp(-0.5, 0.5)
    offset = F.pad(offset, (0, 0, 1, 1))
    bins = torch.arange(BINS, device=log.device).reshape(1, -1, 1).expand_as(log)
    below = torch.where(peak, bins, -BINS).cummax(dim=1).values
    above = torch.where(peak, bins, 2 * BINS).flip(1).cummin(dim=1).values.flip(1)
    nearest = torch.where(bins - below <= above - bins, below, above).clamp(0, BINS - 1)
    frequency = (bins + offset).gather(1, nearest)
    turns = (frequency * (HOP / WINDOW)).double().cumsum(dim=-1) + 0.5 * (bins - nearest)
    return (2 * torch.pi * (turns % 1.0)).to(magnitude.dtype)


def griffin_lim(log_magnitude: Tensor, iterations: int = 32) -> Tensor:
    """Log magnitudes (B, 513, T) -> waveform (B, 160 T) whose magnitudes are near them; deterministic.

    The fast iteration (Perraudin et al., 2013, momentum 0.99), started from `tracked_phase`, which on rendered notes
    is worth more than twice the iterations. torchaudio's `griffinlim` does not take a first phase.
    """
    magnitude = log_magnitude.exp()
    magnitude = torch.where(magnitude > 2 * FLOOR, magnitude, 0.0)
    length = magnitude.shape[-1] * HOP
    # a centred transform of N samples has N / hop + 1 frames: `mel.magnitude` leaves out the last
    magnitude = F.pad(magnitude, (0, 1), mode="replicate")
    window = torch.hann_window(WINDOW, device=magnitude.device)
    spectrum = torch.polar(magnitude, tracked_phase(magnitude))
    last = torch.zeros_like(spectrum)
    for _ in range(iterations):
        wave = torch.istft(spectrum, WINDOW, HOP, window=window, length=length)
        found = torch.stft(wave, WINDOW, HOP, window=window, return_complex=True)
        ahead = found - last * (0.99 / 1.99)
        spectrum = magnitude * ahead / ahead.abs().clamp(min=1e-16)
        last = found
    return torch.istft(spectrum, WINDOW, HOP, window=window, length=length)
