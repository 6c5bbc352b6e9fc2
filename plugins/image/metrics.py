"""Are the pictures like real ones, and of what was asked for? The metrics of `mdiff eval`.

All look through EfficientNet-Lite0 (`nets.efficientnet`), whose 1280 features a picture has: figures are named after
it, as they compare with none on other features. Whether the right caption is found is told by `Scorer`, two small heads
over those features and the pooled vectors of `text/mini`, which `mdiff.plugins.image.data.scorer` trains apart from any
generator.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mdiff.core import distances, registry, weights
from mdiff.core.hooks import Example, Metric, text_encoder
from mdiff.plugins.image.nets import efficientnet

SCORER = "image/emoji-scorer"
ENCODER, TEXT_WIDTH = "text/mini", 384
WIDTH, HIDDEN = 256, 384
AMONG = 100
"""Captions of which the right one is to be found."""

Rows = NDArray[Any]
Measure = Callable[[Mapping[str, Any], Example], Rows]


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
def scorer() -> Scorer:
    """The scorer that ships, by its entry under [evaluators] in registry.toml.

    Raises:
        MissingError: its file is not there.
        IntegrityError: it is not what its entry says.
    """
    card = registry.network("mdiff.plugins.image", "evaluators", SCORER)
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


class _Seen:
    """The features of the picture that was looked at last: all metrics look at one before the next comes."""

    sample: Mapping[str, Any] | None = None
    features: Tensor = torch.empty(0)


def features(sample: Mapping[str, Any]) -> Tensor:
    """The features of a sample (1280,)."""
    if _Seen.sample is not sample:
        _Seen.features = efficientnet.features([sample["image"]])[0]
        _Seen.sample = sample
    return _Seen.features


def _features(sample: Mapping[str, Any], example: Example) -> Rows:
    row: Rows = features(sample).numpy()
    return row


def _between_sets(**said: Any) -> Metric:
    """A metric that compares the features of what is made with those of held-out pictures."""
    efficientnet.installed()
    return Metric(measure=_features, reference="held_out", **said)


def fid() -> Metric:
    """Fréchet distance on EfficientNet-Lite0 features; it compares with no other FID.
    Source: Heusel et al. 2017, arXiv:1706.08500.
    """
    return _between_sets(
        summary="Frechet distance on EfficientNet-Lite0 features, to held-out pictures; 0 and up",
        better="lower",
        score=distances.frechet,
        least=50,
    )


def kid() -> Metric:
    """Kernel distance on EfficientNet-Lite0 features; it compares with no other KID.
    Source: Binkowski et al. 2018, arXiv:1801.01401.
    """
    return _between_sets(
        summary="kernel distance on EfficientNet-Lite0 features, to held-out pictures; about 0 and up",
        better="lower",
        score=distances.kernel,
        least=20,
    )


def precision() -> Metric:
    """The share of pictures that lie among real ones. Source: Kynkäänniemi et al. 2019, arXiv:1904.06991."""
    return _between_sets(
        summary="share of pictures within the manifold of held-out ones, EfficientNet-Lite0 features; 0 to 1",
        better="higher",
        score=distances.precision,
        least=20,
    )


def recall() -> Metric:
    """The share of real pictures that lie among those made. Source: Kynkäänniemi et al. 2019, arXiv:1904.06991."""
    return _between_sets(
        summary="share of held-out pictures within the manifold of those made, EfficientNet-Lite0 features; 0 to 1",
        better="higher",
        score=distances.recall,
        least=20,
    )


def memorisation() -> Metric:
    """How far pictures are from the nearest training picture, against how far training pictures are from each other.

    Well below what held-out pictures get: training pictures come out again.
    """
    efficientnet.installed()
    known: dict[int, tuple[Rows, float]] = {}

    def apart(train: Rows) -> float:
        """The median distance between neighbours in the training data, which is the same for every set of samples."""
        if id(train) not in known:
            known.clear()
            known[id(train)] = train, float(np.median(distances.nearest_other(train)))
        return known[id(train)][1]

    return Metric(
        summary="distance to the nearest training picture, in that between training pictures; 0 is a copy",
        better="higher",
        measure=_features,
        score=lambda rows, train: float(np.median(distances.nearest(rows, train))) / apart(train),
        reference="train",
        least=2,
    )


def retrieval() -> Metric:
    """The share of pictures whose caption is found among 100, by a contrastive scorer of our own."""
    efficientnet.installed()
    net, encode = scorer(), text_encoder(ENCODER).encode

    @torch.no_grad()
    def measure(sample: Mapping[str, Any], example: Example) -> Rows:
        seen = net.image(features(sample)[None])
        said = net.text(encode([example.texts[0]]).pooled.float())
        return torch.cat([seen, said], dim=1)[0].numpy()

    return Metric(
        summary=f"share of pictures whose caption is found among {AMONG} held-out ones; 0 to 1",
        better="higher",
        measure=measure,
        score=found_among,
        applies=lambda example: bool(example.texts),
        reference="held_out",
        least=2,
    )


METRICS: Mapping[str, Callable[[], Metric]] = {
    maker.__name__: maker for maker in (fid, kid, precision, recall, memorisation, retrieval)
}
