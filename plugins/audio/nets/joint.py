"""Joint text-audio embedding: two towers into one unit sphere, trained by contrast.

AudioLDM conditions on CLAP's embedding of the sound while training and on its embedding of the text when asked; this
is the small one trained here, with a frozen text encoder on the text side. Source: CLAP (Wu et al., 2023).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdiff.core.nn.layers import TransformerBlock
from mdiff.plugins.audio.nets.mel import BANDS


class AudioTower(nn.Module):
    """Log-mel (B, 64, T) -> (B, width): convolutions that keep the pitch axis, then attention over time."""

    def __init__(self, width: int, channels: int = 32) -> None:
        super().__init__()
        c = channels
        # (bands, time): bands are halved three times, so that pitch stays on an axis of 8 places
        self.convs = nn.Sequential(
            nn.Conv2d(1, c, (5, 9), stride=(1, 4), padding=(2, 4)),
            nn.GroupNorm(8, c),
            nn.GELU(),
            nn.Conv2d(c, 2 * c, 3, stride=2, padding=1),
            nn.GroupNorm(8, 2 * c),
            nn.GELU(),
            nn.Conv2d(2 * c, 3 * c, 3, stride=2, padding=1),
            nn.GroupNorm(8, 3 * c),
            nn.GELU(),
            nn.Conv2d(3 * c, 4 * c, 3, stride=2, padding=1),
            nn.GroupNorm(8, 4 * c),
            nn.GELU(),
        )
        self.merge = nn.Linear(4 * c * (BANDS // 8), 256)
        self.attend = nn.Linear(256, 1)
        self.project = nn.Sequential(nn.Linear(512, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, mel: Tensor) -> Tensor:
        h = self.convs((mel[:, None] + 5.0) / 4.0)
        h = F.gelu(self.merge(h.flatten(1, 2).transpose(1, 2)))
        weights = self.attend(h).softmax(dim=1)
        return self.project(torch.cat([(weights * h).sum(1), h.amax(1)], dim=1))


class TextTower(nn.Module):
    """Token states (B, L, D) of the frozen text encoder, mask (B, L) -> (B, width)."""

    def __init__(self, width: int, tokens: int, channels: int = 192, depth: int = 1) -> None:
        super().__init__()
        self.stem = nn.Linear(tokens, channels)
        self.query = nn.Parameter(torch.randn(1, 1, channels) * 0.02)
        self.blocks = nn.ModuleList(TransformerBlock(channels, heads=4) for _ in range(depth))
        self.norm = nn.LayerNorm(channels)
        self.project = nn.Sequential(nn.Linear(channels, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        h = torch.cat([self.query.expand(len(tokens), -1, -1), self.stem(tokens)], dim=1)
        mask = F.pad(mask, (1, 0), value=True)
        for block in self.blocks:
            h = block(h, mask=mask)
        return self.project(self.norm(h[:, 0]))


class JointEmbedding(nn.Module):
    """The two towers and their temperature. `width` is 512 as in CLAP; `tokens` is the text encoder's width."""

    def __init__(self, *, tokens: int, width: int = 512) -> None:
        super().__init__()
        self.audio = AudioTower(width)
        self.text = TextTower(width, tokens)
        self.log_scale = nn.Parameter(torch.tensor(2.66))  # ln(1 / 0.07)

    def embed_audio(self, mel: Tensor) -> Tensor:
        """Log-mel (B, 64, T) -> unit vectors (B, width)."""
        return F.normalize(self.audio(mel), dim=-1)

    def embed_text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Token states (B, L, D) and mask (B, L) -> unit vectors (B, width)."""
        return F.normalize(self.text(tokens, mask), dim=-1)
