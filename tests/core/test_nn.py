"""Networks: published parameter counts, shapes over 1, 2 and 3 axes, conditions, gradients."""

import pytest
import torch

from mdiff.core.errors import UsageError
from mdiff.core.nn.autoencoder import AutoencoderKL
from mdiff.core.nn.unet import UNet

AUDIOLDM = {
    "axes": 2,
    "in_channels": 8,
    "out_channels": 8,
    "multipliers": [1, 2, 3, 5],
    "blocks": 2,
    "attention": [1, 2, 3],
    "transformer": True,
    "vector": 512,
}


def parameters(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("channels", "head_width", "millions"),
    [(128, 32, 185.04), (192, 32, 415.95), (256, 64, 739.14)],
)
def test_audioldm_published_sizes(channels: int, head_width: int, millions: float) -> None:
    with torch.device("meta"):
        net = UNet(**AUDIOLDM, channels=channels, head_width=head_width)
    assert round(parameters(net) / 1e6, 2) == millions


def test_audioldm_published_autoencoder() -> None:
    with torch.device("meta"):
        net = AutoencoderKL(axes=2, in_channels=1, latent=8, channels=128, multipliers=[1, 2, 4])
    assert round(parameters(net) / 1e6, 2) == 55.38


def test_stable_diffusion_size() -> None:
    with torch.device("meta"):
        net = UNet(
            axes=2,
            in_channels=4,
            out_channels=4,
            channels=320,
            multipliers=[1, 2, 4, 4],
            attention=[0, 1, 2],
            head_width=40,
            transformer=True,
            context=768,
        )
    assert parameters(net) == 859_520_964


def small(axes: int, **options: object) -> UNet:
    torch.manual_seed(0)
    net = UNet(
        axes=axes,
        in_channels=3,
        out_channels=2,
        channels=16,
        multipliers=[1, 2],
        blocks=1,
        attention=[1],
        head_width=8,
        groups=8,
        **options,  # type: ignore[arg-type]
    )
    for parameter in net.parameters():  # also the branches that start at zero
        torch.nn.init.normal_(parameter, std=0.1)
    return net.eval()


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("transformer", [False, True])
def test_shapes_and_batch(axes: int, transformer: bool) -> None:
    net = small(axes, transformer=transformer, context=5 if transformer else None, scale_shift=True)
    x, t = torch.randn(3, 3, *[4] * axes), torch.tensor([1.0, 500.0, 999.0])
    context = torch.randn(3, 7, 5) if transformer else None
    out = net(x, t, context=context)
    assert out.shape == (3, 2, *[4] * axes)
    for k in range(3):
        alone = net(
            x[k : k + 1], t[k : k + 1], context=context if context is None else context[k : k + 1]
        )
        torch.testing.assert_close(alone, out[k : k + 1], rtol=1e-4, atol=1e-4)


def test_conditions_matter_and_missing_ones_are_named() -> None:
    net = small(1, vector=6, classes=4)
    x, t = torch.randn(1, 3, 8), torch.tensor([3.0])
    given = {"vector": torch.zeros(1, 6), "label": torch.tensor([1])}
    base = net(x, t, **given)
    for name, value in (("vector", torch.ones(1, 6)), ("label", torch.tensor([2]))):
        assert (net(x, t, **given | {name: value}) - base).abs().max() > 1e-4
        with pytest.raises(UsageError, match=f"needs the condition '{name}'"):
            net(x, t, **{k: v for k, v in given.items() if k != name})
    with pytest.raises(UsageError, match="multiple of 2"):
        net(torch.randn(1, 3, 7), t, **given)


def test_untrained_output_is_zero() -> None:
    net = UNet(axes=2, in_channels=1, out_channels=1, channels=32, multipliers=[1])
    assert net(torch.randn(2, 1, 4, 4), torch.tensor([0.0, 9.0])).abs().max() == 0


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_autoencoder_shapes_and_gradients(axes: int) -> None:
    net = AutoencoderKL(
        axes=axes, in_channels=1, latent=2, channels=8, multipliers=[1, 2], blocks=1, groups=4
    )
    x = torch.randn(2, 1, *[8] * axes)
    posterior = net.encode(x)
    assert posterior.mean.shape == (2, 2, *[4] * axes)
    z = posterior.sample(torch.randn(posterior.mean.shape))
    (net.decode(z).square().mean() + posterior.kl()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_kl_is_zero_only_at_the_standard_normal() -> None:
    from mdiff.core.nn.autoencoder import DiagonalGaussian

    zero = torch.zeros(2, 3, 4)
    assert DiagonalGaussian(mean=zero, log_variance=zero).kl() == 0
    # KL of N(1, e) per element: (1 + e - 1 - 1) / 2
    found = DiagonalGaussian(mean=zero + 1, log_variance=zero + 1).kl()
    torch.testing.assert_close(found, torch.tensor(12 * (torch.e - 1) / 2))
