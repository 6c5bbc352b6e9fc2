"""The teacher: MiniLM-L6 sentence embeddings in plain torch (post-norm BERT, mean pooled).

Facts from the published configuration of sentence-transformers/all-MiniLM-L6-v2: width 384, 12
heads, erf GELU, LayerNorm epsilon 1e-12, mean over tokens, L2 norm. The shipped encoder never
needs it: it is there for training and for comparison.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load
from tokenizers import Tokenizer
from torch import Tensor

from mdiff.plugins.text.sources import teacher_files

WIDTH, HEADS, DEPTH, LENGTH = 384, 12, 6, 128


class Teacher:
    """The teacher's sentence embeddings; bfloat16 is exact enough for labels, and faster."""

    def __init__(self, sources: Path, dtype: torch.dtype = torch.float32) -> None:
        weights, tokenizer = teacher_files(sources)
        self.weights = {
            key: value.to(dtype)
            for key, value in load(weights).items()
            if value.is_floating_point()
        }
        self.tokenizer = Tokenizer.from_str(tokenizer.decode())
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(LENGTH)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], batch_tokens: int = 4096) -> Tensor:
        """L2-normalised embeddings (B, 384), float32, in the order of ``texts``."""
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        pooled = torch.empty(len(texts), WIDTH)
        for rows, batch in equal_lengths(ids, batch_tokens):
            pooled[rows] = F.normalize(self._forward(batch).mean(1).float(), dim=-1)
        return pooled

    def _forward(self, ids: Tensor) -> Tensor:
        """Last hidden states (B, L, 384) of token ids (B, L) without padding."""
        w = self.weights
        positions = w["embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = w["embeddings.word_embeddings.weight"][ids] + positions
        x = self._norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        for layer in range(DEPTH):
            at = f"encoder.layer.{layer}."
            q, k, v = (
                self._linear(x, f"{at}attention.self.{name}")
                .unflatten(-1, (HEADS, -1))
                .transpose(1, 2)
                for name in ("query", "key", "value")
            )
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            mixed = self._linear(mixed, f"{at}attention.output.dense")
            x = self._norm(x + mixed, f"{at}attention.output.LayerNorm")
            hidden = F.gelu(self._linear(x, f"{at}intermediate.dense"))
            x = self._norm(x + self._linear(hidden, f"{at}output.dense"), f"{at}output.LayerNorm")
        return x

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(
            x, (WIDTH,), self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], 1e-12
        )


def equal_lengths(
    ids: Sequence[Sequence[int]], batch_tokens: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of texts of one length, so that nothing is padded: (rows (B,), ids (B, L))."""
    by_length: dict[int, list[int]] = {}
    for row, sequence in enumerate(ids):
        by_length.setdefault(len(sequence), []).append(row)
    for length, rows in sorted(by_length.items()):
        size = max(1, batch_tokens // length)
        for start in range(0, len(rows), size):
            chunk = rows[start : start + size]
            yield torch.tensor(chunk), torch.tensor([ids[row] for row in chunk])
