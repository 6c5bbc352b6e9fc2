"""The eyes of metrics, where the training of the scorer finds them."""

from mdiff.core.nn.efficientnet import WIDTH, features

__all__ = ["WIDTH", "features"]
