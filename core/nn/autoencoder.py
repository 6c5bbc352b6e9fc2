"""AutoencoderKL over 1, 2 or 3 axes: data x -> Gaussian over latents z -> data.

Source: latent diffusion (Rombach et al., 2022), first stage with a KL penalty. Names follow the CompVis lineage.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mdiff.core.nn.layers import CONV, AttentionBlock, Downsample, ResBlock, Upsample


@dataclass(frozen=True, kw_only=True)
class DiagonalGaussian:
    """N(mean, exp(log_variance)) with a diagonal covariance; both (B, Z, *axes)."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + sigma * noise; noise (B, Z, *axes) is the caller's, so that no random state is touched here."""
        return self.mean + torch.exp(0.5 * self.log_variance) * noise

    def kl(self) -> Tensor:
        """KL to the standard normal, mean over the batch and sum over the rest, in nats."""
        terms = self.mean**2 + self.log_variance.exp() - 1 - self.log_variance
        return 0.5 * terms.flatten(1).sum(1).mean()


class AutoencoderKL(nn.Module):
    """Convolutional autoencoder that divides every axis by 2^(len(multipliers) - 1).

    Args:
        axes: 1, 2 or 3. channels, multipliers, blocks, groups: as in the UNet.
        latent: channels Z of a latent.
        attention: self-attention in the middle of encoder and decoder.
        padding: of the encoder's convolutions that halve, a row of `layers.PADDING`; "end" in Stable Diffusion.
    """

    def __init__(
        self,
        *,
        axes: int,
        in_channels: int,
        latent: int,
        channels: int,
        multipliers: Sequence[int] = (1, 2, 4),
        blocks: int = 2,
        groups: int = 32,
        attention: bool = True,
        padding: str = "symmetric",
    ) -> None:
        super().__init__()
        conv = CONV[axes]
        self.blocks = blocks
        self.levels = len(multipliers)
        self.factor = 2 ** (self.levels - 1)
        widths = [channels * m for m in multipliers]

        def residual(cin: int, cout: int) -> nn.Module:
            return ResBlock(axes, cin, cout, embedding=None, groups=groups, eps=1e-6)

        def middle(c: int) -> list[nn.Module]:
            attend = [AttentionBlock(c, heads=1, groups=groups, eps=1e-6)] if attention else []
            return [residual(c, c), *attend, residual(c, c)]

        down: list[nn.Module] = [conv(in_channels, widths[0], 3, padding=1)]
        c = widths[0]
        for level, width in enumerate(widths):
            for _ in range(blocks):
                down.append(residual(c, width))
                c = width
            if level < len(widths) - 1:
                down.append(Downsample(axes, c, padding=padding))
        down += [*middle(c), nn.GroupNorm(groups, c, eps=1e-6), nn.SiLU()]
        self.encoder = nn.Sequential(*down, conv(c, 2 * latent, 3, padding=1))
        self.quant_conv = conv(2 * latent, 2 * latent, 1)
        self.post_quant_conv = conv(latent, latent, 1)
        up: list[nn.Module] = [conv(latent, c, 3, padding=1), *middle(c)]
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                up.append(residual(c, width))
                c = width
            if level > 0:
                up.append(Upsample(axes, c))
        up += [nn.GroupNorm(groups, c, eps=1e-6), nn.SiLU()]
        self.decoder = nn.Sequential(*up, conv(c, in_channels, 3, padding=1))

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """x (B, in_channels, *axes) -> distribution over z (B, Z, *axes / factor)."""
        mean, log_variance = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return DiagonalGaussian(mean=mean, log_variance=log_variance.clamp(-30.0, 20.0))

    def decode(self, z: Tensor) -> Tensor:
        """z (B, Z, *axes / factor) -> x (B, in_channels, *axes)."""
        return self.decoder(self.post_quant_conv(z))
