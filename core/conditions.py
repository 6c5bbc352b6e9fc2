"""Texts as conditions of networks: what a batch of them looks like, whoever encoded them."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from mdiff.core.hooks import TextEncoder, TextStates


def token_states(encoder: TextEncoder, texts: Sequence[str], length: int) -> Tensor:
    """What a network attends to (B, length, D), float32: token states, cut off or filled up with zeros.

    Every text has as many tokens, as Stable Diffusion's have 77, so that texts of a batch and the two halves of
    guidance go together.
    """
    return of_length(encoder.encode(texts), length)


def of_length(states: TextStates, length: int) -> Tensor:
    """`token_states` of texts that are encoded already."""
    tokens = states.tokens.float().masked_fill(~states.mask.unsqueeze(-1), 0)[:, :length]
    return F.pad(tokens, (0, 0, 0, length - tokens.shape[1]))


def spread(texts: Sequence[str], count: int) -> list[str]:
    """So many of the texts, from the first to the last evenly; some of them twice where there are fewer."""
    return [texts[round(i * (len(texts) - 1) / max(1, count - 1))] for i in range(count)]
