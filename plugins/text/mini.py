"""The network of ``text/mini`` and the encoder object that models take.

A BERT of MiniLM's sizes over part of its vocabulary, whose matrices and token table are four-bit numbers in
groups of 32. Its pooled vector imitates MiniLM sentence embeddings (Reimers and Gurevych 2019, arXiv:1908.10084;
distilled as in 2020, arXiv:2004.09813). Its token states keep every token's identity, so that "C4" and "C#4" stay
apart for whoever attends to them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from mdiff.core import weights
from mdiff.core.hooks import File, TextStates
from mdiff.plugins.text.tokens import LENGTH, padded

HEAD = 32  # width of one attention head
GROUP, LEVELS, CLIP = 32, 7, 0.9  # weights that share a scale; levels to either side of zero
EPS = 1e-12
FOLDER = Path(__file__).parent / "weights"
NETWORK = File(
    name="mini.safetensors",
    sha256="6212928c6d392c96b339949ba8e78ad3978f860cf7515c8eb8dd0f759613ced0",
    size=11_275_576,
    module="network",
)
TOKENIZER = File(
    name="mini-tokenizer.json",
    sha256="9e37ffc2656d53bdea3ed50cd080212f7ce2a0de8b4849d78cb1a18762c30672",
    size=367_930,
    module="tokenizer",
)


def four_bit(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Matrix (R, C) -> levels -7..7 (R, C / 32, 32) and half-precision scales (R, C / 32, 1), as floats.

    The scale leaves the outermost tenth to be clipped, which on bell-shaped weights costs less than coarser steps.
    """
    groups = weight.unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True) * (CLIP / LEVELS)
    scale = scale.clamp(min=1e-7).half().float()
    return (groups / scale).round().clamp(-LEVELS, LEVELS), scale


def rounded(weight: Tensor) -> Tensor:
    """The matrix as its four-bit file has it; the gradient passes as if nothing were rounded."""
    levels, scale = four_bit(weight.detach())
    return weight + ((levels * scale).flatten(-2) - weight.detach())


def pack(weight: Tensor) -> dict[str, Tensor]:
    """Matrix (R, C) -> `levels` (R, C / 2), two to the byte, the first in the low half, and `scale` (R, C / 32)."""
    levels, scale = four_bit(weight)
    low, high = (levels.flatten(-2) + 8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return {"levels": low | high << 4, "scale": scale.squeeze(-1).half()}


def unpack(levels: Tensor, scale: Tensor) -> Tensor:
    """The inverse of `pack`, float32."""
    both = torch.stack([levels & 15, levels >> 4], dim=-1).flatten(-2).float() - 8
    return (both.unflatten(-1, (-1, GROUP)) * scale.float().unsqueeze(-1)).flatten(-2)


class Linear(nn.Linear):
    """A linear layer that trains as what its four-bit file will hold."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, rounded(self.weight) if self.training else self.weight, self.bias)


class Block(nn.Module):
    """BERT's layer: attention and MLP on (B, L, D), each followed by its norm."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)
        self.norm_attention = nn.LayerNorm(width, eps=EPS)
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width)
        self.norm_mlp = nn.LayerNorm(width, eps=EPS)

    def forward(self, h: Tensor, readable: Tensor | None) -> Tensor:
        """``readable`` (B, 1, 1, L): true where a token may be attended to; None: everywhere."""
        q, k, v = (
            part.unflatten(-1, (-1, HEAD)).transpose(1, 2) for part in self.qkv(h).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=readable)
        h = self.norm_attention(h + self.out(mixed.transpose(1, 2).flatten(2)))
        return self.norm_mlp(h + self.down(F.gelu(self.up(h))))


class MiniNet(nn.Module):
    """Token ids -> pooled vector and token states, both of the same width."""

    def __init__(
        self, vocabulary: int, width: int = 384, depth: int = 6, hidden: int = 1536
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(LENGTH, width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(depth))
        nn.init.normal_(self.token.weight, std=0.05)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> TextStates:
        """``ids`` (B, L); ``mask`` (B, L), true at real tokens, None when there is no padding."""
        embedded = self.token(ids)
        if self.training:
            embedded = rounded(embedded)
        h = self.norm(embedded + self.position.weight[: ids.shape[1]])
        readable = None if mask is None else mask.unflatten(1, (1, 1, -1))
        for block in self.blocks:
            h = block(h, readable)
        if mask is None:
            mask = torch.ones_like(ids, dtype=torch.bool)
        real = mask.unsqueeze(-1)
        pooled = (h.float() * real).sum(1) / real.sum(1)
        # The embedding comes back at equal strength: identity survives whatever the blocks do.
        tokens = (_standardised(h) + _standardised(embedded)) * 0.5**0.5
        return TextStates(F.normalize(pooled, dim=-1), tokens.masked_fill(~real, 0), mask)


class MiniEncoder:
    """A frozen network with its tokenizer: what `mdiff.core.hooks.TextEncoder` asks for."""

    def __init__(self, net: MiniNet, tokenizer: Tokenizer) -> None:
        self.net = net.eval().requires_grad_(False)
        self.tokenizer = tokenizer

    @property
    def width(self) -> int:
        """D of the token states."""
        return self.net.token.embedding_dim

    @property
    def pooled_width(self) -> int:
        """P of the pooled vector."""
        return self.net.token.embedding_dim

    def to(self, device: torch.device | str) -> Self:
        """Moves the network; states come out on that device from now on."""
        self.net.to(device)
        return self

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> TextStates:
        """Pooled vectors (B, P) of norm 1, token states (B, L, D) of about unit scale, mask (B, L).

        L is the longest text's length, at most 64: longer texts are cut. Token 0 of every text is
        a start token, so the empty text has states too. States of padding are zero.
        """
        ids, mask = padded(self.tokenizer, texts)
        device = self.net.token.weight.device
        return self.net(ids.to(device), mask.to(device))


def shipped() -> MiniEncoder:
    """The encoder of this package, float32 on the CPU.

    Raises:
        MissingError, IntegrityError: a file is absent, or is not the one that models learnt with.
    """
    return from_bytes(
        weights.verified(FOLDER / NETWORK.name, NETWORK),
        weights.verified(FOLDER / TOKENIZER.name, TOKENIZER),
    )


def from_bytes(network: bytes, tokenizer: bytes) -> MiniEncoder:
    """An encoder from a safetensors file and a tokenizer.json; sizes are read off the tensors."""
    state = weights.parse(network, NETWORK.name)
    for name in [key.removesuffix(".levels") for key in state if key.endswith(".levels")]:
        state[name] = unpack(state.pop(f"{name}.levels"), state.pop(f"{name}.scale"))
    vocabulary, width = state["token.weight"].shape
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    net = MiniNet(vocabulary, width, depth, hidden=len(state["blocks.0.up.weight"]))
    weights.fill(net, state, NETWORK.name)
    return MiniEncoder(net, Tokenizer.from_str(tokenizer.decode()))


def _standardised(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])
