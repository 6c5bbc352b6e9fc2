"""The UNet of DDPM's lineage over 1, 2 or 3 axes: net(x, t, **cond) -> output of x's shape (or another channel count).

DDPM, Improved DDPM, ADM, latent diffusion, Stable Diffusion, AudioLDM and Video Diffusion Models are this network with
other arguments. Layout and names (`time_embed`, `input_blocks`, `middle_block`, `output_blocks`, `out`) follow the
OpenAI lineage, so that checkpoints need little renaming (`layouts.py`).
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from mdiff.core.errors import UsageError
from mdiff.core.nn.layers import (
    CONV,
    AttentionBlock,
    Downsample,
    FrameAttention,
    FramePositions,
    ResBlock,
    SpatialTransformer,
    Upsample,
    folded,
    frame_places,
    patched,
    served,
    timestep_embedding,
    unfolded,
    unpatched,
    zero,
)


class _Blocks(nn.ModuleList):
    """A row of blocks that take (x, emb, context); attention along frames takes (x, frames), the stem x alone."""

    def forward(
        self, x: Tensor, emb: Tensor, context: Tensor | None, frames: Tensor | None = None
    ) -> Tensor:
        for block in self:
            if isinstance(block, FrameAttention):
                x = block(x, frames)
            elif isinstance(block, tuple(CONV.values())):
                x = block(x)
            else:
                x = block(x, emb, context)
        return x


def each_frame(value: Tensor | None, clips: Tensor) -> Tensor | None:
    """A condition of clips (B, G, ...) for frames folded into the batch (B T, ...), by the clip of each, (B, T)."""
    if value is None:
        return None
    if value.ndim < 2 or len(value) != len(clips):
        raise UsageError(
            f"a condition of {tuple(value.shape)} for clips {tuple(clips.shape)}: give one for each clip of a row"
        )
    rows = torch.arange(len(clips), device=clips.device).unsqueeze(1)
    return value[rows, clips].flatten(0, 1)


def _two_layers(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, out), nn.SiLU(), nn.Linear(out, out))


class UNet(nn.Module):
    """UNet with a time embedding, and optionally a condition vector, a class and a context to attend to.

    Args:
        axes: 1 (audio), 2 (images, spectrograms) or 3: those of convolutions.
        out_channels: twice those of the data where the variance is learned (Improved DDPM).
        channels: width of the first level; level i has channels * multipliers[i].
        blocks: residual blocks per level on the way down (one more on the way up).
        attention: levels (0 is full resolution) with attention after each residual block.
        attention_up_last: on the way up, after the last block of such a level only (score SDE).
        attention_middle: attention between the two blocks in the middle.
        heads, head_width: heads of every attention or, where that is None, the channels of each head.
        transformer: spatial transformers (latent diffusion) instead of plain attention blocks (DDPM, ADM).
        depth: blocks of a transformer, one number or one per level; the middle has the last level's.
        context: width of the tokens that transformers attend to; None means they attend to themselves (AudioLDM).
        vector: width of a condition vector, called FiLM condition in AudioLDM: a linear map of it to the width of the
            time embedding is concatenated to that embedding.
        vector_added: a map of two layers of that vector is added to the time embedding instead (SDXL).
        classes: number of class labels, whose embedding is added to the time embedding (ADM).
        scale_shift: residual blocks modulated by scale and shift (Improved DDPM, ADM) instead of a sum.
        resample_residual: levels are joined by residual blocks that resample (ADM) instead of convolutions.
        padding: of convolutions that halve, a row of `layers.PADDING`; "end" in DDPM.
        groups, eps: of all norms but those of spatial transformers, whose eps is 1e-6; DDPM's is that too.
        sine_first, frequency_shift: of `timestep_embedding`; true and 1 in DDPM.
        dropout: before the last convolution of a residual block.
        patch: values along each axis that are one position of the first level, as channels: a first level at half
            the resolution or less, for a fraction of the work (Hoogeboom et al., 2023: simple diffusion).
        frame_heads: heads of attention along an axis more, that of frames, which stands before the others in x; no
            convolution, norm or other attention crosses it (Ho et al., 2022: Video Diffusion). None: there is no such.
        frame_levels: levels with attention along frames, after the other attention; it is in the middle too.
        frame_rotary: it tells frames apart by `layers.rotated` instead of `layers.RelativePositions`.
        frame_index: each frame is told its place in its clip too, 0 for the first, as the time is told, so that where a
            thing is to be in it need not be worked out from how many frames come before and after.

    Call: net(x (B, in_channels, *axes), t (B,), vector=(B, V), context=(B, M, K), label=(B,)) gives
    (B, out_channels, *axes). Every axis must be divisible by `factor`.

    With frames x is (B, in_channels, T, *axes) for any T. Then clips=(B, T) may say that a row holds several clips, 0
    to G - 1, and of which each frame is. They do not see each other, and other conditions are (B, G, ...), of each one.

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
        multipliers: Sequence[float] = (1, 2, 2, 2),
        blocks: int = 2,
        attention: Sequence[int] = (),
        attention_up_last: bool = False,
        attention_middle: bool = True,
        heads: int | None = None,
        head_width: int = 64,
        transformer: bool = False,
        depth: int | Sequence[int] = 1,
        context: int | None = None,
        vector: int | None = None,
        vector_added: bool = False,
        classes: int | None = None,
        scale_shift: bool = False,
        resample_residual: bool = False,
        padding: str = "symmetric",
        groups: int = 32,
        eps: float = 1e-5,
        sine_first: bool = False,
        frequency_shift: int = 0,
        dropout: float = 0.0,
        patch: int = 1,
        frame_heads: int | None = None,
        frame_levels: Sequence[int] = (),
        frame_rotary: bool = False,
        frame_index: bool = False,
    ) -> None:
        super().__init__()
        conv = CONV[axes]
        self.axes = axes
        self.blocks = blocks
        self.levels = len(multipliers)
        self.patch = patch
        self.factor = patch * 2 ** (self.levels - 1)
        self.sinusoids = partial(
            timestep_embedding,
            width=channels,
            sine_first=sine_first,
            frequency_shift=frequency_shift,
        )
        wanted = {"vector": vector, "context": context, "label": classes}
        self.conditions = [name for name, size in wanted.items() if size is not None]
        width = 4 * channels
        added, beside = (vector, None) if vector_added else (None, vector)
        self.time_embed = _two_layers(channels, width)
        self.film_emb = nn.Linear(beside, width) if beside is not None else None
        self.vector_embed = _two_layers(added, width) if added is not None else None
        self.label_emb = nn.Embedding(classes, width) if classes is not None else None
        self.frame_positions = (
            FramePositions(frame_heads, relative=not frame_rotary) if frame_heads else None
        )
        self.frame_embed = _two_layers(channels, width) if frame_heads and frame_index else None
        if self.frame_embed is not None:
            zero(self.frame_embed[-1])
        depths = [depth] * self.levels if isinstance(depth, int) else depth
        residual = partial(
            ResBlock,
            axes,
            embedding=width if beside is None else 2 * width,
            groups=groups,
            dropout=dropout,
            scale_shift=scale_shift,
            eps=eps,
        )

        def attend(c: int, level: int) -> nn.Module:
            count = heads or max(1, c // head_width)
            if not transformer:
                return AttentionBlock(c, heads=count, groups=groups, eps=eps)
            return SpatialTransformer(
                axes, c, heads=count, context=context, depth=depths[level], groups=groups
            )

        def along(c: int) -> list[nn.Module]:
            """Attention along frames, where there are any."""
            if frame_heads is None:
                return []
            return [
                FrameAttention(c, heads=frame_heads, rotary=frame_rotary, groups=groups, eps=eps)
            ]

        def halve(c: int) -> nn.Module:
            if resample_residual:
                return residual(c, c, resample="halve")
            return Downsample(axes, c, padding=padding)

        def double(c: int) -> nn.Module:
            return residual(c, c, resample="double") if resample_residual else Upsample(axes, c)

        widths = [int(channels * m) for m in multipliers]
        last = self.levels - 1
        c = widths[0]
        self.input_blocks = nn.ModuleList(
            [_Blocks([conv(in_channels * patch**axes, c, 3, padding=1)])]
        )
        row: list[nn.Module]
        skips = [c]
        for level in range(self.levels):
            for _ in range(blocks):
                row = [residual(c, widths[level])]
                c = widths[level]
                if level in attention:
                    row.append(attend(c, level))
                if level in frame_levels:
                    row += along(c)
                self.input_blocks.append(_Blocks(row))
                skips.append(c)
            if level < last:
                self.input_blocks.append(_Blocks([halve(c)]))
                skips.append(c)
        middle = [attend(c, last)] if attention_middle else []
        self.middle_block = _Blocks([residual(c, c), *middle, *along(c), residual(c, c)])
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(self.levels)):
            for i in range(blocks + 1):
                row = [residual(c + skips.pop(), widths[level])]
                c = widths[level]
                if level in attention and (i == blocks or not attention_up_last):
                    row.append(attend(c, level))
                if level in frame_levels:
                    row += along(c)
                if level > 0 and i == blocks:
                    row.append(double(c))
                self.output_blocks.append(_Blocks(row))
        self.out = nn.Sequential(
            nn.GroupNorm(groups, c, eps=eps),
            nn.SiLU(),
            zero(conv(c, out_channels * patch**axes, 3, padding=1)),
        )

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        vector: Tensor | None = None,
        context: Tensor | None = None,
        label: Tensor | None = None,
        clips: Tensor | None = None,
    ) -> Tensor:
        sizes = tuple(x.shape[-self.axes :])
        if any(size % self.factor for size in sizes):
            raise UsageError(
                f"sizes {sizes} do not fit this network: every axis must be a multiple of {self.factor}"
            )
        given = {"vector": vector, "context": context, "label": label}
        for name, value in given.items():
            if (name in self.conditions) != (value is not None):
                verb = "needs" if value is None else "does not take"
                raise UsageError(f"this UNet {verb} the condition {name!r}")
        frames = place = None
        if self.frame_positions is not None:
            count = x.shape[2]
            frames = self.frame_positions(count, clips, x)
            if self.frame_embed is not None:
                place = frame_places(count, clips, x).flatten()
            if clips is not None:
                t = t.repeat_interleave(count)
                vector, context, label = (each_frame(value, clips) for value in given.values())
            x = folded(x)
        elif clips is not None:
            raise UsageError("this UNet does not take the condition 'clips'")
        emb = self.time_embed(self.sinusoids(t).to(x.dtype))
        if self.label_emb is not None:
            emb = emb + self.label_emb(label)
        if self.vector_embed is not None and vector is not None:
            emb = emb + self.vector_embed(vector.to(x.dtype))
        if self.frame_embed is not None and place is not None:
            emb = served(emb, x) + self.frame_embed(self.sinusoids(place).to(x.dtype))
        if self.film_emb is not None and vector is not None:
            emb = torch.cat([emb, served(self.film_emb(vector.to(x.dtype)), emb)], dim=1)
        skips = []
        h = x if self.patch == 1 else patched(x, self.patch)
        for block in self.input_blocks:
            h = block(h, emb, context, frames)
            skips.append(h)
        h = self.middle_block(h, emb, context, frames)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb, context, frames)
        out = self.out(h)
        out = out if self.patch == 1 else unpatched(out, self.patch)
        return out if frames is None else unfolded(out, frames.shape[-1])
