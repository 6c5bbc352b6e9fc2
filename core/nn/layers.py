"""Blocks from which diffusion networks are built, over 1, 2 or 3 axes.

The number of axes picks a convolution from one table; everything else is written once. Attribute names are those
of the OpenAI / CompVis lineage (`in_layers`, `emb_layers`, `transformer_blocks`), as in most public checkpoints.

Norms are torch's own in every precision: they accumulate in float32 whatever they are given, so that a cast to
float32 around them, which references write, changes nothing.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdiff.core.names import pick

CONV: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}
POOL: dict[int, Callable[[Tensor, int], Tensor]] = {
    1: F.avg_pool1d,
    2: F.avg_pool2d,
    3: F.avg_pool3d,
}
RESAMPLE: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "halve": lambda x: POOL[x.ndim - 2](x, 2),
    "double": lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
}
PADDING: dict[str, tuple[int, tuple[int, ...]]] = {
    "symmetric": (1, ()),
    "end": (0, (0, 1)),
}
"""What a convolution of stride 2 sees beyond the edges: its own padding, and zeros (before, after) put on each axis."""


def zero(module: nn.Module) -> nn.Module:
    """Sets all parameters to zero, so that a residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def timestep_embedding(
    t: Tensor,
    width: int,
    max_period: float = 10_000.0,
    *,
    sine_first: bool = False,
    frequency_shift: int = 0,
) -> Tensor:
    """Sinusoids of t, (B,) -> (B, width), of the frequencies max_period^(-i / (width / 2 - frequency_shift)).

    Source: DDPM (Ho et al., 2020) has sines first and shift 1, the lowest frequency being 1 / max_period itself;
    Improved DDPM (Nichol and Dhariwal, 2021) has cosines first and shift 0, which is what is given where not said.
    """
    half = width // 2
    i = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(i * (-math.log(max_period) / (half - frequency_shift)))
    angles = t.float().reshape(-1, 1) * frequencies
    waves = [angles.cos(), angles.sin()]
    return torch.cat(waves[::-1] if sine_first else waves, dim=1)


def served(rows: Tensor, x: Tensor) -> Tensor:
    """Conditions (B, ...) for x (n B, ...) of which n rows in a row belong to each, as frames do to their clip."""
    count = len(x) // len(rows)
    return rows if count == 1 else rows.repeat_interleave(count, dim=0)


class ResBlock(nn.Module):
    """Residual block: (norm, SiLU, conv) twice, with the embedding between them.

    `scale_shift` modulates the second norm as norm(h) (1 + scale) + shift (ADM); otherwise the embedding is added.
    `embedding` None makes a block without time, as autoencoders use. `resample`, a row of `RESAMPLE`, halves or
    doubles every axis on both ways through the block (ADM). Shapes: x (B, C, *axes), emb (B, E), or fewer
    that are `served`.
    """

    def __init__(
        self,
        axes: int,
        channels: int,
        out_channels: int,
        *,
        embedding: int | None,
        groups: int = 32,
        dropout: float = 0.0,
        scale_shift: bool = False,
        eps: float = 1e-5,
        resample: str = "",
    ) -> None:
        super().__init__()
        conv = CONV[axes]
        self.scale_shift = scale_shift
        self.resample = resample
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, channels, eps=eps),
            nn.SiLU(),
            conv(channels, out_channels, 3, padding=1),
        )
        if embedding is not None:
            width = 2 * out_channels if scale_shift else out_channels
            self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, width))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, out_channels, eps=eps),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero(conv(out_channels, out_channels, 3, padding=1)),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else conv(channels, out_channels, 1)

    def forward(
        self, x: Tensor, emb: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        norm, activation, conv = self.in_layers
        resample = RESAMPLE[self.resample]
        x, h = resample(x), conv(resample(activation(norm(x))))
        if emb is None:
            return self.skip_connection(x) + self.out_layers(h)
        e = served(self.emb_layers(emb).to(h.dtype), h)
        e = e.reshape(*e.shape, *[1] * (h.ndim - 2))
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
            h = self.out_layers[1:](h)
        else:
            h = self.out_layers(h + e)
        return self.skip_connection(x) + h


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over q (B, H, L, D), k and v (B, H, S, D): (B, H, L, D).

    `mask` is True where a token may look, or is added to the logits; it broadcasts to (B, H, L, S). In bf16 on a CPU
    plain products are faster than what is fused: 1.2 to 1.7 times, and two to five times backwards.
    """
    if q.dtype is torch.bfloat16 and q.device.type == "cpu":
        if not (torch.is_grad_enabled() and q.requires_grad):
            if mask is None:
                return _blockwise(q, k, v)
        elif q.shape[-2] * k.shape[-2] <= LOGITS:
            return _plain(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


LOGITS = 2**20
"""So many are made at once by plain products: what processors keep close by."""


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        logits = (
            logits.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else logits + mask
        )
    return logits.softmax(-1).to(v.dtype) @ v


def _blockwise(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same without a mask, block by block in the same memory: several heads, or some rows of one."""
    batch, heads, length, width = q.shape
    seen = k.shape[2]
    rows = min(length, max(1, LOGITS // seen))
    many = max(1, LOGITS // (rows * seen))
    q, k, v = ((q * width**-0.5).flatten(0, 1), k.flatten(0, 1).transpose(1, 2), v.flatten(0, 1))
    out = q.new_empty(len(q), length, v.shape[2])
    room = q.new_empty(2, min(many, len(q)) * rows * seen)
    for head in range(0, len(q), many):
        heads_of = slice(head, head + many)
        for row in range(0, length, rows):
            part = q[heads_of, row : row + rows]
            shape = (*part.shape[:2], seen)
            logits, weights = room[:, : math.prod(shape)].unflatten(1, shape)
            torch.bmm(part, k[heads_of], out=logits)
            torch.softmax(logits, -1, out=weights)
            out[heads_of, row : row + rows] = weights @ v[heads_of]
    return out.unflatten(0, (batch, heads))


class AttentionBlock(nn.Module):
    """Self-attention over all positions of x (B, C, *axes), with a residual connection.

    The rows of `qkv` are [head][q, k, v][channel]. Source: ADM (Dhariwal and Nichol, 2021); with one head it is DDPM's.
    """

    def __init__(self, channels: int, *, heads: int, groups: int = 32, eps: float = 1e-5) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels, eps=eps)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj_out = zero(nn.Linear(channels, channels))

    def forward(
        self, x: Tensor, emb: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        # attention is fused only where the channels of a head lie side by side, as they do in tokens (B, L, C)
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        qkv = self.qkv(tokens).unflatten(-1, (self.heads, 3, -1)).transpose(1, 2)
        q, k, v = qkv.unbind(dim=3)
        h = attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.proj_out(h).transpose(1, 2).reshape(x.shape)


class CrossAttention(nn.Module):
    """Multi-head attention of tokens (B, L, C) to a context (B, M, K); without one, to themselves.

    A context of fewer rows is `served`.
    """

    def __init__(self, channels: int, *, heads: int, context: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context or channels, channels, bias=False)
        self.to_v = nn.Linear(context or channels, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        source = x if context is None else context
        q, k, v = (
            served(a.unflatten(-1, (self.heads, -1)).transpose(1, 2), x)
            for a in (self.to_q(x), self.to_k(source), self.to_v(source))
        )
        attend = None if mask is None else served(mask, x).reshape(x.shape[0], 1, 1, -1)
        h = attention(q, k, v, attend)
        return self.to_out(h.transpose(1, 2).flatten(2))


class SelfAttention(nn.Module):
    """Multi-head attention of tokens (B, L, C) among themselves, at positions that a bias or a rotation tells apart.

    The rows of `qkv` are [q, k, v][head][channel]; heads are `width` wide. `rotary` channels of each are `rotated`.
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        width: int,
        rotary: int = 0,
        bias: tuple[bool, bool] = (True, True),
    ) -> None:
        super().__init__()
        self.heads = heads
        self.rotary = rotary
        self.qkv = nn.Linear(channels, 3 * heads * width, bias=bias[0])
        self.proj_out = nn.Linear(heads * width, channels, bias=bias[1])

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """What the tokens say to each other, (B, L, C); `bias` is added to the logits, (B or 1, heads or 1, L, L)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3)
        q, k, v = qkv.unbind(dim=2)
        if self.rotary:
            q, k = rotated(q, self.rotary), rotated(k, self.rotary)
        h = attention(q, k, v, bias)
        return self.proj_out(h.transpose(1, 2).flatten(2))


def rotated(x: Tensor, channels: int, period: float = 10_000.0) -> Tensor:
    """Tokens (..., L, D) of which pairs among the first channels are turned by angles that grow with the position.

    Pair i turns by period^(-2 i / channels) a position, so that products of two tokens depend on how far apart they
    are. Source: rotary position embedding (Su et al., 2021).
    """
    exact = x.dtype if x.dtype is torch.float64 else torch.float32
    position = torch.arange(x.shape[-2], dtype=torch.float32, device=x.device)
    i = torch.arange(0, channels, 2, dtype=torch.float32, device=x.device)
    angles = (position.unsqueeze(-1) * period ** (-i / channels)).to(exact)
    # a pair is a complex number, which one product turns: memory is read and written once
    pairs = x[..., :channels].to(exact).unflatten(-1, (-1, 2))
    if x.shape[-1] % 2:
        pairs = pairs.contiguous()
    turned = torch.view_as_complex(pairs) * torch.polar(torch.ones_like(angles), angles)
    first = torch.view_as_real(turned).flatten(-2).to(x.dtype)
    return first if channels == x.shape[-1] else torch.cat([first, x[..., channels:]], dim=-1)


class RelativePositions(nn.Module):
    """What each head adds to the logits of two tokens for how far apart they are: (1, heads, L, L) for L tokens.

    Half of the buckets are for tokens after the one that looks. Half of those are exact, the others grow evenly in the
    logarithm up to `farthest`, beyond which all are alike. Source: T5 (Raffel et al., 2020).
    """

    def __init__(self, heads: int, *, buckets: int = 32, farthest: int = 32) -> None:
        super().__init__()
        self.buckets = buckets
        self.farthest = farthest
        self.embedding = nn.Embedding(buckets, heads)

    def forward(self, length: int) -> Tensor:
        place = torch.arange(length, device=self.embedding.weight.device)
        after = place - place.unsqueeze(-1)
        half = self.buckets // 2
        exact = half // 2
        far = after.abs()
        growth = math.log(self.farthest / exact)
        # T5's own order of operations in float32: bounds between buckets fall where its do
        scaled = torch.log(far.clamp(min=1).float() / exact) / growth * (half - exact)
        bucket = torch.where(far < exact, far, (exact + scaled.long()).clamp(max=half - 1))
        bucket = bucket + (after > 0) * half
        return self.embedding(bucket).permute(2, 0, 1).unsqueeze(0)


class FramePositions(nn.Module):
    """The bias of all attention along frames: for how far apart two frames are, and -inf between clips.

    Call: (frames T, clips (B, T) or None, x) gives (B or 1, heads or 1, T, T) of the type of x, where `clips` says
    which of several clips each frame is of. Frames of one do not see those of another, so a still is a clip of one
    frame (Ho et al., 2022, section 3.1).
    """

    def __init__(self, heads: int, *, relative: bool = True, farthest: int = 32) -> None:
        super().__init__()
        self.relative = RelativePositions(heads, farthest=farthest) if relative else None

    def forward(self, frames: int, clips: Tensor | None, x: Tensor) -> Tensor:
        bias = x.new_zeros(1, 1, 1, 1).expand(1, 1, frames, frames)
        if self.relative is not None:
            bias = self.relative(frames).to(x.dtype)
        if clips is None:
            return bias
        apart = clips.unsqueeze(1) != clips.unsqueeze(2)
        return bias.masked_fill(apart.unsqueeze(1), float("-inf"))


def frame_places(frames: int, clips: Tensor | None, x: Tensor) -> Tensor:
    """The place of each frame in its clip, (B, frames): 0 for the first; `clips` as in `FramePositions`."""
    if clips is None:
        return torch.arange(frames, device=x.device).expand(len(x), -1)
    alike = clips.unsqueeze(1) == clips.unsqueeze(2)
    return alike.tril(-1).sum(-1)


def patched(x: Tensor, side: int) -> Tensor:
    """x (B, C, *axes) -> (B, C side^n, *axes / side): each channel's values of a patch, one channel for each place."""
    n = x.ndim - 2
    for k in range(n):
        x = x.unflatten(2 + 2 * k, (-1, side))
    x = x.permute(0, 1, *range(3, 3 + 2 * n, 2), *range(2, 2 + 2 * n, 2))
    return x.flatten(1, 1 + n)


def unpatched(x: Tensor, side: int) -> Tensor:
    """The inverse of `patched`."""
    n = x.ndim - 2
    x = x.unflatten(1, (-1, *[side] * n))
    x = x.permute(0, 1, *(axis for k in range(n) for axis in (2 + n + k, 2 + k)))
    for k in range(n):
        x = x.flatten(2 + k, 3 + k)
    return x


def folded(x: Tensor) -> Tensor:
    """Clips (B, C, T, *axes) -> their frames in a row (B T, C, *axes)."""
    return x.transpose(1, 2).flatten(0, 1)


def unfolded(x: Tensor, frames: int) -> Tensor:
    """The inverse of `folded`."""
    return x.unflatten(0, (-1, frames)).transpose(1, 2)


def along_frames(x: Tensor, bias: Tensor, attend: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What `attend` makes of the tokens of each position through time, where frames are folded into the batch.

    Args:
        x: tokens of the positions of each frame, (B T, P, C).
        bias: (B or 1, heads or 1, T, T).
        attend: (tokens (B P, T, C), bias (B P or 1, ...)) -> tokens.
    """
    positions, frames = x.shape[1], bias.shape[-1]
    tokens = x.unflatten(0, (-1, frames)).transpose(1, 2).flatten(0, 1)
    if len(bias) > 1:
        bias = bias.repeat_interleave(positions, dim=0)
    return attend(tokens, bias).unflatten(0, (-1, positions)).transpose(1, 2).flatten(0, 1)


class FrameAttention(nn.Module):
    """Self-attention along the frames of clips, at each position by itself, with a residual connection.

    Frames are folded into the batch: x (B T, C, *axes), bias (B or 1, heads or 1, T, T) as `FramePositions` gives it.
    Source: the factorised attention of Video Diffusion Models (Ho et al., 2022, section 3).
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        rotary: bool = False,
        groups: int = 32,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        width = channels // heads
        self.norm = nn.GroupNorm(groups, channels, eps=eps)
        self.attention = SelfAttention(
            channels, heads=heads, width=width, rotary=width if rotary else 0
        )
        zero(self.attention.proj_out)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        h = along_frames(tokens, bias, self.attention)
        return x + h.transpose(1, 2).reshape(x.shape)


class FeedForward(nn.Module):
    """Gated feed-forward: Linear to twice the hidden width, x GELU(gate), Linear back (Shazeer, 2020)."""

    def __init__(self, channels: int, multiplier: int = 4) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * multiplier * channels)
        self.out = nn.Linear(multiplier * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h, gate = self.proj(x).chunk(2, dim=-1)
        return self.out(h * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context (to itself where there is none, as in AudioLDM), gated feed-forward."""

    def __init__(self, channels: int, *, heads: int, context: int | None = None) -> None:
        super().__init__()
        self.attn1 = CrossAttention(channels, heads=heads)
        self.attn2 = CrossAttention(channels, heads=heads, context=context)
        self.ff = FeedForward(channels)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        own = (
            mask if context is None else None
        )  # the mask belongs to whichever tokens attn2 looks at
        x = x + self.attn1(self.norm1(x), mask=own)
        x = x + self.attn2(self.norm2(x), context, mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of x (B, C, *axes). Source: latent diffusion (Rombach et al., 2022)."""

    def __init__(
        self,
        axes: int,
        channels: int,
        *,
        heads: int,
        context: int | None = None,
        depth: int = 1,
        groups: int = 32,
    ) -> None:
        super().__init__()
        conv = CONV[axes]
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = conv(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads=heads, context=context) for _ in range(depth)
        )
        self.proj_out = zero(conv(channels, channels, 1))

    def forward(
        self, x: Tensor, emb: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        h = self.proj_in(self.norm(x))
        tokens = h.flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(tokens.transpose(1, 2).reshape(h.shape))


class Downsample(nn.Module):
    """Halves every axis by a stride-2 convolution; `op` is the name public checkpoints use.

    `padding` is a row of `PADDING`: "symmetric", or zeros at the end of each axis only (DDPM; the first stage of
    latent diffusion).
    """

    def __init__(self, axes: int, channels: int, *, padding: str = "symmetric") -> None:
        super().__init__()
        own, beyond = pick("padding", PADDING, padding)
        self.beyond = beyond * axes
        self.op = CONV[axes](channels, channels, 3, stride=2, padding=own)

    def forward(
        self, x: Tensor, emb: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        return self.op(F.pad(x, self.beyond) if self.beyond else x)


class Upsample(nn.Module):
    """Doubles every axis by nearest neighbours, then convolves."""

    def __init__(self, axes: int, channels: int) -> None:
        super().__init__()
        self.conv = CONV[axes](channels, channels, 3, padding=1)

    def forward(
        self, x: Tensor, emb: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        return self.conv(RESAMPLE["double"](x))
