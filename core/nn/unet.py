"""The UNet of DDPM's lineage over 1, 2 or 3 axes: net(x, t, **cond) -> output of x's shape (or another channel count).

Layout and names (`time_embed`, `input_blocks`, `middle_block`, `output_blocks`, `out`) follow the OpenAI lineage,
shared by Improved DDPM, ADM, GLIDE, latent diffusion and AudioLDM, so that their checkpoints need little renaming.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mdiff.core.errors import UsageError
from mdiff.core.nn.layers import (
    CONV,
    AttentionBlock,
    Downsample,
    ResBlock,
    SpatialTransformer,
    Upsample,
    timestep_embedding,
    zero,
)


class _Blocks(nn.ModuleList):
    """A row of blocks that all take (x, emb, context); a bare convolution (the stem) takes x alone."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        for block in self:
            x = block(x, emb, context) if not isinstance(block, tuple(CONV.values())) else block(x)
        return x


class UNet(nn.Module):
    """UNet with a time embedding, and optionally a condition vector and a context to attend to.

    Args:
        axes: 1 (audio), 2 (images, spectrograms) or 3 (video).
        channels: width of the first level; level i has channels * multipliers[i].
        blocks: residual blocks per level on the way down (one more on the way up).
        attention: levels (0 is full resolution) with attention after each residual block; the middle always has it.
        head_width: channels of one attention head.
        transformer: spatial transformers (latent diffusion) instead of plain attention blocks (ADM).
        context: width of the tokens that transformers attend to; None means they attend to themselves (AudioLDM).
        vector: width of a condition vector, called FiLM condition in AudioLDM: a linear map of it to the width of the
            time embedding is concatenated to that embedding.
        classes: number of class labels, whose embedding is added to the time embedding (ADM).
        scale_shift: residual blocks modulated by scale and shift (ADM) instead of a sum.

    Call: net(x (B, in_channels, *axes), t (B,), vector=(B, V), context=(B, M, K), label=(B,)) gives
    (B, out_channels, *axes).
    Every axis must be divisible by 2^(len(multipliers) - 1).

    Raises:
        UsageError: an axis does not divide, or a condition that the network was built with is missing.
    """

    def __init__(
        self,
        *,
        axes: int,
        in_channels: int,
        out_channels: int,
        channels: int,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 2,
        attention: Sequence[int] = (),
        head_width: int = 64,
        transformer: bool = False,
        context: int | None = None,
        vector: int | None = None,
        classes: int | None = None,
        scale_shift: bool = False,
        groups: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.factor = 2 ** (len(multipliers) - 1)
        width = 4 * channels
        self.time_embed = nn.Sequential(
            nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.film_emb = nn.Linear(vector, width) if vector is not None else None
        self.label_emb = nn.Embedding(classes, width) if classes is not None else None
        embedding = width if vector is None else 2 * width

        def residual(cin: int, cout: int) -> nn.Module:
            return ResBlock(
                axes,
                cin,
                cout,
                embedding=embedding,
                groups=groups,
                dropout=dropout,
                scale_shift=scale_shift,
            )

        def attend(c: int) -> nn.Module:
            heads = max(1, c // head_width)
            if transformer:
                return SpatialTransformer(axes, c, heads=heads, context=context, groups=groups)
            return AttentionBlock(c, heads=heads, groups=groups)

        conv = CONV[axes]
        c = channels * multipliers[0]
        self.input_blocks = nn.ModuleList([_Blocks([conv(in_channels, c, 3, padding=1)])])
        skips = [c]
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                row = [residual(c, channels * multiplier)]
                c = channels * multiplier
                if level in attention:
                    row.append(attend(c))
                self.input_blocks.append(_Blocks(row))
                skips.append(c)
            if level < len(multipliers) - 1:
                self.input_blocks.append(_Blocks([Downsample(axes, c)]))
                skips.append(c)
        self.middle_block = _Blocks([residual(c, c), attend(c), residual(c, c)])
        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for i in range(blocks + 1):
                row = [residual(c + skips.pop(), channels * multiplier)]
                c = channels * multiplier
                if level in attention:
                    row.append(attend(c))
                if level > 0 and i == blocks:
                    row.append(Upsample(axes, c))
                self.output_blocks.append(_Blocks(row))
        self.out = nn.Sequential(
            nn.GroupNorm(groups, c), nn.SiLU(), zero(conv(c, out_channels, 3, padding=1))
        )

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        vector: Tensor | None = None,
        context: Tensor | None = None,
        label: Tensor | None = None,
    ) -> Tensor:
        if any(size % self.factor for size in x.shape[2:]):
            raise UsageError(
                f"sizes {tuple(x.shape[2:])} do not fit this network: every axis must be a multiple of {self.factor}"
            )
        for name, layer, value in (
            ("vector", self.film_emb, vector),
            ("label", self.label_emb, label),
        ):
            if (layer is None) != (value is None):
                verb = "needs" if value is None else "does not take"
                raise UsageError(f"this UNet {verb} the condition {name!r}")
        emb = self.time_embed(timestep_embedding(t, self.channels).to(x.dtype))
        if self.label_emb is not None:
            emb = emb + self.label_emb(label)
        if self.film_emb is not None and vector is not None:
            emb = torch.cat([emb, self.film_emb(vector.to(x.dtype))], dim=1)
        skips = []
        h = x
        for block in self.input_blocks:
            h = block(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb, context)
        return self.out(h)
