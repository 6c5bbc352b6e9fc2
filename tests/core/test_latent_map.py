"""The linear map from latents to coarse data: it inverts what is linear, and is least squares otherwise."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdiff.core import latent_map
from mdiff.core.errors import UsageError
from mdiff.core.nn.autoencoder import AutoencoderKL, DiagonalGaussian

MIX = torch.tensor([[1.0, 0.5, 0.0], [0.0, 2.0, 0.3], [0.4, 0.0, -1.0]])


class Mixed(nn.Module):
    """A stand-in for an autoencoder, whose latents are means of places, mixed."""

    def __init__(self, mix: Tensor, factor: int = 2) -> None:
        super().__init__()
        self.mix, self.factor = nn.Parameter(mix), factor

    def encode(self, x: Tensor) -> DiagonalGaussian:
        means = F.interpolate(x, size=[n // self.factor for n in x.shape[2:]], mode="area")
        z = torch.einsum("bc...,cz->bz...", means, self.mix) + 0.5
        return DiagonalGaussian(mean=z, log_variance=torch.zeros_like(z))


def noise(count: int, channels: int = 3, axes: int = 2, batch: int = 1) -> Iterator[Tensor]:
    draw = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield 2 * torch.rand(batch, channels, *[8] * axes, generator=draw) - 1


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_what_is_linear_is_inverted(axes):
    found = latent_map.fit(Mixed(MIX), noise(8, axes=axes))
    table = torch.tensor(found.table)
    assert torch.allclose(table[:3], MIX.inverse(), atol=1e-3)
    assert torch.allclose(table[3], -0.5 * MIX.inverse().sum(0), atol=1e-3)
    assert found.explained == pytest.approx(1, abs=1e-6)
    (x,) = noise(1, axes=axes)
    coarse = latent_map.apply(Mixed(MIX).encode(x).mean, found.table)
    assert torch.allclose(coarse, F.interpolate(x, scale_factor=0.5, mode="area"), atol=1e-3)


def test_what_latents_do_not_say_is_not_explained():
    first = torch.tensor([[1.0], [0.0], [0.0]])
    assert latent_map.fit(Mixed(first), noise(30)).explained == pytest.approx(1 / 3, abs=0.03)


def test_a_channel_that_is_always_the_same_does_no_harm():
    found = latent_map.fit(Mixed(torch.cat([torch.eye(3), torch.zeros(3, 2)], 1)), noise(4))
    assert found.explained == pytest.approx(1, abs=1e-6)
    assert max(abs(v) for row in found.table for v in row) < 2


def test_data_that_is_always_the_same_is_explained():
    found = latent_map.fit(Mixed(torch.eye(3)), [torch.full((1, 3, 8, 8), 0.25)])
    assert found.explained == pytest.approx(1)
    shown = latent_map.apply(torch.full((1, 3, 2, 2), 0.75), found.table)
    assert torch.allclose(shown, torch.tensor(0.25), atol=1e-3)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_map_of_a_network_is_that_of_least_squares(channels):
    torch.manual_seed(0)
    net = AutoencoderKL(
        axes=2, in_channels=channels, latent=4, channels=8, multipliers=(1, 2), blocks=1, groups=4
    )
    found = latent_map.fit(net, noise(3, channels, batch=2))
    with torch.no_grad():
        x = torch.cat(list(noise(3, channels, batch=2)))
        z = net.encode(x).mean
    rows = torch.cat([z, torch.ones_like(z[:, :1])], 1).movedim(1, -1).reshape(-1, 5).double()
    wanted = F.avg_pool2d(x, 2).movedim(1, -1).reshape(-1, channels).double()
    solution = torch.linalg.lstsq(rows, wanted).solution
    assert torch.allclose(rows @ torch.tensor(found.table).double(), rows @ solution, atol=5e-3)
    assert 0 < found.explained < 1


def test_too_little_data():
    for samples in ([], noise(2)):
        with pytest.raises(UsageError, match="needs more data"):
            latent_map.fit(Mixed(torch.eye(3), factor=8), samples)


@pytest.mark.parametrize("table", [[[1.0]] * 4, [], [[1.0, 2.0]] * 4 + [[1.0]]])
def test_a_table_for_other_latents(table):
    with pytest.raises(UsageError, match="latent_map should be 5 rows of one length"):
        latent_map.apply(torch.zeros(1, 4, 8), table)
