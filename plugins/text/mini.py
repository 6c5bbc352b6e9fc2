"""The network of ``text/mini`` and the encoder object that models take.

A pre-norm transformer over BPE tokens. Its pooled vector imitates MiniLM sentence embeddings
(Reimers and Gurevych 2019, arXiv:1908.10084; distilled as in 2020, arXiv:2004.09813). Its token
states keep every token's identity, so that "C4" and "C#4" stay apart for whoever attends to them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from mdiff.core import weights
from mdiff.core.hooks import File, TextStates
from mdiff.plugins.text.tokens import LENGTH, padded

HEAD = 64  # width of one attention head
FOLDER = Path(__file__).parent / "weights"
NETWORK = File(
    name="mini.safetensors",
    sha256="dc0f066d7b39603e9b6c521d8d3498ed3b88aa196cde047e04f92614c91f8aaf",
    size=11_266_896,
    module="network",
)
TOKENIZER = File(
    name="mini-tokenizer.json",
    sha256="23d93453095b37ea33fbe1b8204c89033d45f1be7a479891884c5e67c6dd3918",
    size=393_729,
    module="tokenizer",
)


class Block(nn.Module):
    """Pre-norm attention and MLP on (B, L, D); both branches start at zero."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        for last in (self.out, self.down):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, h: Tensor, readable: Tensor | None) -> Tensor:
        """``readable`` (B, 1, 1, L): true where a token may be attended to; None: everywhere."""
        q, k, v = (
            part.unflatten(-1, (-1, HEAD)).transpose(1, 2)
            for part in self.qkv(self.norm_attention(h)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=readable)
        h = h + self.out(mixed.transpose(1, 2).flatten(2))
        return h + self.down(F.gelu(self.up(self.norm_mlp(h))))


class MiniNet(nn.Module):
    """Token ids -> pooled vector and token states."""

    def __init__(
        self,
        vocabulary: int,
        width: int = 256,
        depth: int = 4,
        hidden: int = 768,
        pooled: int = 384,
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(depth))
        # How much a token weighs in the pooled vector: by what it is, and by what it means here.
        self.salience = nn.Embedding(vocabulary, 1)
        self.weigh = nn.Linear(width, 1, bias=False)
        self.readout = nn.Linear(width, pooled)
        nn.init.normal_(self.position.weight, std=0.02)
        nn.init.zeros_(self.salience.weight)
        nn.init.zeros_(self.weigh.weight)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> TextStates:
        """``ids`` (B, L); ``mask`` (B, L), true at real tokens, None when there is no padding."""
        embedded = self.token(ids)
        h = embedded + self.position.weight[: ids.shape[1]]
        readable = None if mask is None else mask.unflatten(1, (1, 1, -1))
        for block in self.blocks:
            h = block(h, readable)
        if mask is None:
            mask = torch.ones_like(ids, dtype=torch.bool)
        score = (self.salience(ids) + self.weigh(h)).squeeze(-1).float()
        share = score.masked_fill(~mask, -torch.inf).softmax(-1).to(h.dtype)
        pooled = self.readout(torch.einsum("bl,bld->bd", share, h))
        # The embedding comes back at equal strength: identity survives whatever the blocks do.
        tokens = (_standardised(h) + _standardised(embedded)) * 0.5**0.5
        tokens = tokens.masked_fill(~mask.unsqueeze(-1), 0)
        return TextStates(F.normalize(pooled.float(), dim=-1), tokens, mask)


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
        return self.net.readout.out_features

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
    """An encoder from a safetensors file and a tokenizer.json; sizes are read off the tensors.

    The token table is kept as whole numbers from -127 to 127 and a scale per row.
    """
    state = weights.parse(network, NETWORK.name)
    state["token.weight"] = state.pop("token.levels").float() * state.pop("token.scale")
    net = like(state, len(state["token.weight"]))
    weights.fill(net, state, NETWORK.name)
    return MiniEncoder(net, Tokenizer.from_str(tokenizer.decode()))


def like(state: Mapping[str, Tensor], vocabulary: int) -> MiniNet:
    """An untrained network of the sizes of a state dict, but for its vocabulary."""
    return MiniNet(
        vocabulary,
        width=state["token.weight"].shape[1],
        depth=len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
        hidden=state["blocks.0.up.weight"].shape[0],
        pooled=state["readout.weight"].shape[0],
    )


def _standardised(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])
