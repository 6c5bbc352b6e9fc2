"""The log-mel front end of AudioLDM: waveform -> ln of 64 Slaney mel bands, 16 kHz, hop 160, window 1024.

Source: AudioLDM (Liu et al., 2023), section 4: magnitude spectrogram, Hann window, bands 0-8000 Hz, floor 1e-5.
"""

import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor

RATE = 16_000
HOP = 160
WINDOW = 1024
BANDS = 64
BINS = WINDOW // 2 + 1
FLOOR = 1e-5


def magnitude(wave: Tensor) -> Tensor:
    """Short-time magnitude: wave (B, N), N a multiple of 160 -> (B, 513, N / 160)."""
    wave = F.pad(wave, (WINDOW // 2, WINDOW // 2 - HOP), mode="reflect")
    window = torch.hann_window(WINDOW, device=wave.device)
    return torch.stft(wave, WINDOW, HOP, window=window, center=False, return_complex=True).abs()


def filterbank() -> Tensor:
    """Slaney mel filters (64, 513) with area normalisation."""
    bank = torchaudio.functional.melscale_fbanks(
        BINS, 0.0, RATE / 2, BANDS, RATE, norm="slaney", mel_scale="slaney"
    )
    return bank.T.contiguous()


def log_mel(wave: Tensor) -> Tensor:
    """Natural log of the mel magnitudes: wave (B, N) in [-1, 1] -> (B, 64, N / 160)."""
    return to_log_mel(magnitude(wave))


def to_log_mel(magnitude: Tensor) -> Tensor:
    """Magnitudes (B, 513, T) -> natural log of the mel magnitudes (B, 64, T)."""
    return torch.log(torch.clamp(filterbank().to(magnitude) @ magnitude, min=FLOOR))
