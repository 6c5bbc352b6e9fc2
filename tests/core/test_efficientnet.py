"""The eyes of metrics: the network as it was trained, near and far, grey and clear pictures."""

import math

import pytest
import torch
from torch import Tensor

from mdiff.core.nn import efficientnet


def picture(corners: bool, shift: int = 0) -> Tensor:
    """A blue disc or square on white, (3, 64, 64)."""
    y, x = (torch.arange(64) - 30 - shift).abs().float()[:, None], (torch.arange(64) - 34).abs()
    inside = torch.maximum(y, x) if corners else (x**2 + y**2).sqrt()
    return torch.where(
        inside < 15, torch.tensor([0.1, 0.3, 0.8])[:, None, None], torch.ones(3, 1, 1)
    )


def test_the_network_has_the_published_size_and_takes_every_tensor_of_the_file():
    assert sum(p.numel() for p in efficientnet.EfficientNetLite0().parameters()) == 4_652_008
    net = efficientnet.installed()
    assert efficientnet.features([picture(True), picture(False)]).shape == (2, 1280)
    assert not net.training and not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(
    ("size", "kernel", "stride"), [(224, 3, 2), (7, 5, 2), (8, 5, 1), (9, 3, 2)]
)
def test_padding_is_that_of_tensorflow(size, kernel, stride):
    """SAME: ceil(n / stride) places, of which the first begins at -floor(pad / 2)."""
    conv = efficientnet.Conv(1, 1, kernel, stride, bias=False)
    torch.nn.init.ones_(conv.weight)
    x = torch.zeros(1, 1, size, size)
    x[..., 0] = 1
    out = conv(x)
    places = math.ceil(size / stride)
    pad = max((places - 1) * stride + kernel - size, 0)
    assert out.shape[2:] == (places, places)
    sees_first = [
        k * stride - pad // 2 <= 0 < k * stride - pad // 2 + kernel for k in range(places)
    ]
    assert (out[0, 0, places // 2] > 0).tolist() == sees_first


def test_a_picture_moved_a_little_is_near_and_another_is_far():
    one, moved, other = efficientnet.features(
        [picture(False), picture(False, shift=1), picture(True)]
    )
    assert (one - moved).norm() < 0.5 * (one - other).norm()


def test_grey_and_clear_pictures_are_seen_on_white():
    grey = torch.rand(1, 32, 48)
    assert torch.equal(efficientnet.pixels(grey), efficientnet.pixels(grey.expand(3, -1, -1)))
    clear = torch.cat([torch.rand(3, 32, 32), torch.zeros(1, 32, 32)])
    assert torch.allclose(efficientnet.pixels(clear), torch.tensor(1.0))
    assert torch.allclose(efficientnet.pixels(torch.zeros(3, 8, 8)), torch.tensor(-127 / 128))
