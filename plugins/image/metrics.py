"""Are the pictures like real ones, and of what was asked for? The metrics of `mdiff eval`.

All look at features of EfficientNet-Lite0, by which figures are named. Whether the right caption is found is told by
the scorer that `mdiff.plugins.image.data.scorer` trains apart from any generator (`mdiff.core.seeing`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdiff.core import distances, seeing
from mdiff.core.hooks import Example, Metric, text_encoder
from mdiff.core.nn import efficientnet
from mdiff.core.seeing import AMONG, ENCODER, Scorer, found_among

__all__ = ["ENCODER", "METRICS", "Scorer", "found_among"]

Rows = NDArray[Any]

_seen = seeing.Seen()


def features(sample: Mapping[str, Any]) -> Tensor:
    """The features of a sample (1280,)."""
    return _seen(sample, "image", lambda: sample["image"])


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
    net, encode = seeing.scorer(), text_encoder(ENCODER).encode

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
