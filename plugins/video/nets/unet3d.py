"""The network of video-diffusion-pytorch: a space-time UNet, net(x, t, vector=...) -> output of x's shape.

It follows Video Diffusion Models (Ho et al., 2022) and differs from it, and so from the core's UNet, in its blocks:
norms come after convolutions, attention within frames is linear on every level, one skip leads from level to level,
and one around the whole. Frames are folded into the batch, so that its convolutions, (1, k, k) in the checkpoints, are
those of pictures. Source: github.com/lucidrains/video-diffusion-pytorch, versions 0.6 and 0.7.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdiff.core.errors import UsageError
from mdiff.core.nn.layers import (
    FramePositions,
    SelfAttention,
    along_frames,
    folded,
    served,
    timestep_embedding,
    unfolded,
)
from mdiff.core.nn.unet import each_frame

HEADS = 8
"""Of attention, where nothing else is said."""
ROTATED = 32
"""Channels of a head that are rotated at most."""
LINEAR_WIDTH = MIDDLE_WIDTH = 32
"""Channels of the heads of attention within frames, whatever those along frames have."""


class ChannelNorm(nn.Module):
    """x (B, C, *axes) with the channels of each position to a root mean square of 1, times a scale (0.7)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = channels**0.5
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor, frames: int) -> Tensor:
        weight = self.weight * self.scale
        return F.normalize(x, dim=1) * weight.reshape(-1, *[1] * (x.ndim - 2))


class ClipNorm(nn.GroupNorm):
    """A norm of groups of channels over all frames of a clip (0.6)."""

    def forward(self, x: Tensor, frames: int) -> Tensor:  # type: ignore[override]
        return folded(super().forward(unfolded(x, frames)))


class Block(nn.Module):
    """Convolution, norm, scale and shift, SiLU."""

    def __init__(self, channels: int, out_channels: int, groups: int | None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm = ChannelNorm(out_channels) if groups is None else ClipNorm(groups, out_channels)

    def forward(self, x: Tensor, frames: int, modulation: Tensor | None = None) -> Tensor:
        x = self.norm(self.conv(x), frames)
        if modulation is not None:
            scale, shift = served(modulation, x).chunk(2, dim=1)
            x = x * (scale + 1) + shift
        return F.silu(x)


class Residual(nn.Module):
    """Two blocks, the first of which is modulated by the embedding (B, E) where there is one."""

    def __init__(
        self, channels: int, out_channels: int, *, embedding: int | None, groups: int | None
    ) -> None:
        super().__init__()
        self.emb = nn.Linear(embedding, 2 * out_channels) if embedding is not None else None
        self.block1 = Block(channels, out_channels, groups)
        self.block2 = Block(out_channels, out_channels, groups)
        same = channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, frames: int, emb: Tensor | None = None) -> Tensor:
        modulation = None
        if self.emb is not None and emb is not None:
            modulation = self.emb(F.silu(emb)).unsqueeze(-1).unsqueeze(-1)
        h = self.block2(self.block1(x, frames, modulation), frames)
        return h + self.skip(x)


class LinearAttention(nn.Module):
    """Attention of tokens (B, L, C) in time linear in L: softmax(q) over channels, softmax(k) over tokens.

    Source: Efficient Attention (Shen et al., 2021).
    """

    def __init__(self, channels: int, *, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.width = width
        self.qkv = nn.Linear(channels, 3 * heads * width, bias=False)
        self.proj_out = nn.Linear(heads * width, channels)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3)
        q, k, v = qkv.unbind(dim=2)
        summary = k.softmax(dim=-2).transpose(-2, -1) @ v
        h = (q.softmax(dim=-1) * self.width**-0.5) @ summary
        return self.proj_out(h.transpose(1, 2).flatten(2))


class Attend(nn.Module):
    """Attention after a norm of each position, with a residual connection: within frames, or along them."""

    def __init__(self, channels: int, attention: nn.Module, *, along: bool) -> None:
        super().__init__()
        self.along = along
        self.norm = nn.LayerNorm(channels, bias=False)
        self.attention = attention

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        h = along_frames(tokens, bias, self.attention) if self.along else self.attention(tokens)
        return x + h.transpose(1, 2).reshape(x.shape)


class Level(nn.Module):
    """Two residual blocks with attention after `early` of them; `sample` changes the resolution afterwards."""

    def __init__(
        self,
        blocks: Sequence[Residual],
        attention: Sequence[Attend],
        sample: nn.Module | None = None,
        early: int = 2,
    ) -> None:
        super().__init__()
        self.early = early
        self.blocks = nn.ModuleList(blocks)
        self.attention = nn.ModuleList(attention)
        self.sample = nn.Identity() if sample is None else sample

    def forward(self, x: Tensor, frames: int, emb: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """What comes before the change of resolution, and after it."""
        for number, block in enumerate(self.blocks, 1):
            x = block(x, frames, emb)
            if number == self.early:
                for attend in self.attention:
                    x = attend(x, bias)
        return x, self.sample(x)


class Unet3D(nn.Module):
    """The UNet of a checkpoint.

    Args:
        in_channels, out_channels: of data and output.
        channels: width of the first level; level i has channels * multipliers[i].
        heads, head_width: of attention along frames.
        vector: width of a condition vector, which goes beside the embedding of the time.
        kernel: of the first convolution.
        linear: attention within frames on every level, and not in the middle alone.
        groups: of the norms of version 0.6; None: those of 0.7.

    `nothing` (1, V) is the condition vector of no condition.

    Call: net(x (B, C, T, H, W), t (B,), vector=(B, V), clips=(B, T)) gives (B, C, T, H, W), clips as in the core's
    UNet. H and W must be divisible by `factor`.

    Raises:
        UsageError: an axis does not divide, or a condition that it was built with is missing.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        out_channels: int | None = None,
        channels: int = 64,
        multipliers: Sequence[int] = (1, 2, 4, 8),
        heads: int = HEADS,
        head_width: int = 32,
        vector: int | None = None,
        kernel: int = 7,
        linear: bool = True,
        groups: int | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.levels = len(multipliers)
        self.factor = 2 ** (self.levels - 1)
        time = 4 * channels
        residual = partial(Residual, embedding=time + (vector or 0), groups=groups)

        def within(c: int) -> list[Attend]:
            if not linear:
                return []
            attention = LinearAttention(c, heads=heads, width=LINEAR_WIDTH)
            return [Attend(c, attention, along=False)]

        def along(c: int) -> Attend:
            attention = SelfAttention(
                c,
                heads=heads,
                width=head_width,
                rotary=min(ROTATED, head_width),
                bias=(False, False),
            )
            return Attend(c, attention, along=True)

        widths = [channels * m for m in multipliers]
        before = [channels, *widths[:-1]]
        last = self.levels - 1
        self.time_embed = nn.Sequential(nn.Linear(channels, time), nn.GELU(), nn.Linear(time, time))
        self.nothing = nn.Parameter(torch.randn(1, vector)) if vector is not None else None
        self.positions = FramePositions(heads)
        self.stem = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2)
        self.stem_attention = along(channels)
        levels = list(enumerate(zip(before, widths, strict=True)))
        self.down = nn.ModuleList(
            Level(
                [residual(a, b), residual(b, b)],
                [*within(b), along(b)],
                nn.Conv2d(b, b, 4, 2, 1) if level < last else None,
            )
            for level, (a, b) in levels
        )
        c = widths[-1]
        whole = SelfAttention(c, heads=heads, width=MIDDLE_WIDTH, bias=(False, False))
        self.middle = Level(
            [residual(c, c), residual(c, c)], [Attend(c, whole, along=False), along(c)], early=1
        )
        self.up = nn.ModuleList(
            Level(
                [residual(2 * b, a), residual(a, a)],
                [*within(a), along(a)],
                nn.ConvTranspose2d(a, a, 4, 2, 1) if level > 0 else None,
            )
            for level, (a, b) in reversed(levels)
        )
        self.last = Residual(2 * channels, channels, embedding=None, groups=groups)
        self.out = nn.Conv2d(channels, out_channels or in_channels, 1)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        vector: Tensor | None = None,
        clips: Tensor | None = None,
    ) -> Tensor:
        if any(size % self.factor for size in x.shape[3:]):
            raise UsageError(
                f"sizes {tuple(x.shape[3:])} do not fit this network: both must be multiples of {self.factor}"
            )
        if (self.nothing is None) != (vector is None):
            verb = "needs" if vector is None else "does not take"
            raise UsageError(f"this Unet3D {verb} the condition 'vector'")
        frames = x.shape[2]
        bias = self.positions(frames, clips, x)
        if clips is not None:
            t, vector = t.repeat_interleave(frames), each_frame(vector, clips)
        sinusoids = timestep_embedding(t, self.channels, sine_first=True, frequency_shift=1)
        emb = self.time_embed(sinusoids.to(x.dtype))
        if vector is not None:
            emb = torch.cat([emb, vector.to(x.dtype)], dim=1)
        h = self.stem_attention(self.stem(folded(x)), bias)
        around, skips = h, []
        for level in self.down:
            kept, h = level(h, frames, emb, bias)
            skips.append(kept)
        _, h = self.middle(h, frames, emb, bias)
        for level in self.up:
            _, h = level(torch.cat([h, skips.pop()], dim=1), frames, emb, bias)
        h = self.last(torch.cat([h, around], dim=1), frames)
        return unfolded(self.out(h), frames)
