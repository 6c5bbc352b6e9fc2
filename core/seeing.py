"""What metrics of pictures and of frames see: their features, and which caption fits.

Features are the 1280 of EfficientNet-Lite0 (`nn.efficientnet`): figures are named after it, as they compare with none
on other features. Whether the right caption is found is told by a `Scorer`, two small heads over those features and the
pooled vectors of `text/mini`, trained apart from any generator.
"""

from collections.abc import Callable, Hashable, Mapping
from functools import cache
from typing import Any, final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mdiff.core import host, registry, weights
from mdiff.core.nn import efficientnet

SCORER = "image/emoji-scorer"
"""The scorer that ships, by its entry under [evaluators] in the registry.toml of the plugin that brings it."""
ENCODER, TEXT_WIDTH = "text/mini", 384
WIDTH, HIDDEN = 256, 384
AMONG = 100
"""Captions of which the right one is to be found, where nothing else is said."""

Rows = NDArray[Any]


class Seen:
    """The features of what is in the sample that was looked at last: all metrics look at one before the next comes."""

    def __init__(self) -> None:
        self.sample: Mapping[str, Any] | None = None
        self.features: dict[Hashable, Tensor] = {}

    def __call__(
        self, sample: Mapping[str, Any], part: Hashable, image: Callable[[], Tensor]
    ) -> Tensor:
        """The features (1280,) of a part of a sample, a picture (C, H, W) in [0, 1] that `image` gives."""
        if self.sample is not sample:
            self.sample, self.features = sample, {}
        if part not in self.features:
            self.features[part] = efficientnet.features([image()])[0]
        return self.features[part]


@final
class Scorer(nn.Module):
    """How well pictures and captions fit: cosines of what the two heads make of their vectors.

    `image` maps features (B, 1280), and `text` pooled vectors (B, 384), to unit vectors (B, 256).
    """

    def __init__(self) -> None:
        super().__init__()
        self.eye = nn.Sequential(
            nn.LayerNorm(efficientnet.WIDTH),
            nn.Linear(efficientnet.WIDTH, HIDDEN),
            nn.GELU(),
            nn.Dropout(0.3),
            nn.Linear(HIDDEN, WIDTH),
        )
        self.ear = nn.Linear(TEXT_WIDTH, WIDTH)
        self.sharpness = nn.Parameter(
            torch.tensor(2.7)
        )  # the logarithm of what cosines are multiplied by

    def image(self, features: Tensor) -> Tensor:
        return F.normalize(self.eye(features), dim=-1)

    def text(self, pooled: Tensor) -> Tensor:
        return F.normalize(self.ear(pooled), dim=-1)


@cache
def scorer(name: str = SCORER) -> Scorer:
    """A scorer that ships with a plugin, by its entry.

    Raises:
        MissingError: the plugin, or the file, is not there.
        IntegrityError: it is not what its entry says.
    """
    module = host.current().record(name.split("/")[0]).value
    card = registry.network(module, "evaluators", name)
    (file,) = card.files
    net = Scorer()
    weights.fill(net, weights.read(card.root / file.name, file), file.name)
    return net.eval().requires_grad_(False)


def found_among(rows: Rows, reference: Rows, among: int = AMONG) -> float:
    """The chance that a picture's own caption fits it best among `among`, of which the others are drawn from the
    reference: over all draws at once.

    A row is the unit vectors of a picture and its caption, side by side. Of M other captions, all different, h fit at
    least as well as its own: none of these is among n drawn with the chance C(M - h, n) / C(M, n).
    """
    half = rows.shape[1] // 2
    captions = np.unique(reference[:, half:].round(6), axis=0)
    fits = rows[:, :half] @ captions.T
    # A caption that is there for its own picture, too, is no other one.
    other = rows[:, half:] @ captions.T < 1 - 1e-5
    own = (rows[:, :half] * rows[:, half:]).sum(1)
    above = (other & (fits >= own[:, None])).sum(1)
    many = other.sum(1)
    drawn = np.minimum(among - 1, many)
    k = np.arange(among - 1)
    factors = (many - above)[:, None] - k, np.maximum(many[:, None] - k, 1)
    chances = np.where(k < drawn[:, None], np.maximum(factors[0], 0) / factors[1], 1.0).prod(1)
    return float(chances.mean())
