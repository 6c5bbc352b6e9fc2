"""DiffWave's network: a stack of dilated, gated residual layers over the raw waveform (Kong et al.,
2021).

A vocoder when it takes log-mel frames, class-conditional when it takes labels, unconditional
otherwise. Both public families of weights run here: what differs in their numbers is an option,
what differs only in the order of their tensors is put in this order by `formats/diffwave.py`. The
first half of a layer's 2C channels goes through the sigmoid and the second through tanh; of its
outputs the first half is the residual, the second the skip.

Inside, a sequence is an image of height 1 with its channels last in memory, (B, C, 1, N), and each
half of a layer's channels comes out of a convolution of its own: the processor's convolutions are
fastest so, and what comes between them reads and writes whole blocks of memory.
"""

import math
from collections.abc import Callable, Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdiff.core.errors import UsageError
from mdiff.core.names import pick

WIDTH = 128  # of the sinusoids, and of a class's vector
HIDDEN = 512


def _sinusoids(t: Tensor, exponent: float) -> Tensor:
    i = torch.arange(WIDTH // 2, device=t.device)
    angles = t[:, None] * 10.0 ** (i * exponent / (WIDTH // 2 - 1))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def rising(t: Tensor) -> Tensor:
    """Sines, then cosines of t 10^(4i/63), i = 0..63, as in the paper: t (B,) -> (B, 128).

    The fastest turns by 10^4 radians a step, so what lies between two whole steps is interpolated
    between theirs. Single precision rounds the large angles by as much as a hundredth of a radian:
    networks are trained with that, and it is the same here.
    """
    t = t.float()
    low, high = _sinusoids(t.floor(), 4.0), _sinusoids(t.ceil(), 4.0)
    return low + (high - low) * (t - t.floor())[:, None]


def falling(t: Tensor) -> Tensor:
    """Sines, then cosines of t 10^(-4i/63), i = 0..63, as in transformers: t (B,) -> (B, 128)."""
    return _sinusoids(t.float(), -4.0)


EMBEDDINGS: dict[str, Callable[[Tensor], Tensor]] = {"rising": rising, "falling": falling}


@final
class DiffusionEmbedding(nn.Module):
    """The step, (B,) and possibly fractional -> (B, 512)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.sinusoids = pick("step embedding", EMBEDDINGS, kind)
        self.projection1 = nn.Linear(WIDTH, HIDDEN)
        self.projection2 = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, t: Tensor) -> Tensor:
        e = self.sinusoids(t).to(self.projection1.weight.dtype)
        return F.silu(self.projection2(F.silu(self.projection1(e))))


@final
class Upsampler(nn.Module):
    """Log-mel frames to samples, the mel seen as an image: (B, M, F) -> (B, M, 1, F * hop)."""

    def __init__(self, strides: Sequence[int]) -> None:
        super().__init__()
        first, second = strides
        self.conv1 = self._conv(first)
        self.conv2 = self._conv(second)

    @staticmethod
    def _conv(stride: int) -> nn.ConvTranspose2d:
        return nn.ConvTranspose2d(
            1, 1, (3, 2 * stride), stride=(1, stride), padding=(1, stride // 2)
        )

    def forward(self, mel: Tensor) -> Tensor:
        h = F.leaky_relu(self.conv1(mel[:, None]), 0.4)
        return F.leaky_relu(self.conv2(h), 0.4).transpose(1, 2)


@final
class Conv(nn.Module):
    """A convolution along N: x (B, C, 1, N) -> (B, D, 1, N). Its weights are those of a Conv1d."""

    def __init__(
        self, channels: int, out_channels: int, kernel: int = 1, dilation: int = 1
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, channels, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.kaiming_normal_(self.weight)
        self.padding = (0, dilation * (kernel // 2))
        self.dilation = (1, dilation)

    def forward(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """Of all output channels, or of the `rows` among them."""
        weight, bias = self.weight[rows, :, None], self.bias[rows]
        return F.conv2d(x, weight, bias, padding=self.padding, dilation=self.dilation)


@final
class ResidualLayer(nn.Module):
    """One layer: x (B, C, 1, N), step (B, 512), condition -> the next x, and this layer's skip.

    The condition is (B, M, F) where the layer upsamples, else (B, K, 1, N), or (B, K, 1, 1) if it
    is the same everywhere.
    """

    def __init__(
        self,
        channels: int,
        dilation: int,
        condition: int | None,
        strides: Sequence[int] | None,
        residual_includes_time: bool,
    ) -> None:
        super().__init__()
        self.halves = slice(channels), slice(channels, None)
        self.residual_includes_time = residual_includes_time
        self.dilated_conv = Conv(channels, 2 * channels, 3, dilation)
        self.diffusion_projection = nn.Linear(HIDDEN, channels)
        self.spectrogram_upsampler = Upsampler(strides) if strides else None
        self.conditioner_projection = Conv(condition, 2 * channels) if condition else None
        self.output_projection = Conv(channels, 2 * channels)

    def forward(self, x: Tensor, step: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        timed = x + self.diffusion_projection(step)[:, :, None, None]
        gate, signal = (self.dilated_conv(timed, half) for half in self.halves)
        if self.conditioner_projection is not None and condition is not None:
            if self.spectrogram_upsampler is not None:
                condition = last(self.spectrogram_upsampler(condition)[..., : x.shape[-1]])
            gate = gate + self.conditioner_projection(condition, self.halves[0])
            signal = signal + self.conditioner_projection(condition, self.halves[1])
        h = gate.sigmoid() * signal.tanh()
        residual, skip = (self.output_projection(h, half) for half in self.halves)
        kept = timed if self.residual_includes_time else x
        return (kept + residual) * math.sqrt(0.5), skip


def last(x: Tensor) -> Tensor:
    """x with its channels last in memory."""
    return x.contiguous(memory_format=torch.channels_last)


@final
class DiffWave(nn.Module):
    """Predicts the noise in x (B, 1, N) at steps t (B,), counted from 0 and possibly fractional ->
    (B, 1, N).

    Args:
        channels, layers, cycle: C; the number of residual layers; layer i has dilation 2^(i mod
            cycle).
        mels: bands of the log-mel; makes it a vocoder, which takes `mel` (B, mels, F) with F frames
            for N samples.
        classes: number of classes; makes it class-conditional, which takes `label` (B,) of
            integers.
        embedding: "rising" (the paper, lmnt) or "falling" (philsyn) frequencies of the step's
            sinusoids.
        strides: of the two transposed convolutions that take frames to samples; their product is
            the hop.
        upsampler_per_layer: each layer upsamples the mel with its own weights (philsyn).
        residual_includes_time: the residual path keeps the time term that was added for the
            convolution. It is an accident of philsyn's code that its weights have learned with:
            without it they make static.

    Raises:
        UsageError: arguments that do not go together, or a condition that is missing or uncalled
            for.
    """

    def __init__(
        self,
        *,
        channels: int = 64,
        layers: int = 30,
        cycle: int = 10,
        mels: int | None = None,
        classes: int | None = None,
        embedding: str = "rising",
        strides: Sequence[int] = (16, 16),
        upsampler_per_layer: bool = False,
        residual_includes_time: bool = False,
    ) -> None:
        super().__init__()
        if mels is not None and classes is not None:
            raise UsageError("a DiffWave has mels (a vocoder) or classes, not both")
        if mels is not None and (len(strides) != 2 or any(s % 2 for s in strides)):
            raise UsageError(
                f"strides are two even numbers, such as (16, 16); got {tuple(strides)}"
            )
        self.hop = math.prod(strides)
        self.input_projection = Conv(1, channels)
        self.diffusion_embedding = DiffusionEmbedding(embedding)
        shared = mels is not None and not upsampler_per_layer
        self.spectrogram_upsampler = Upsampler(strides) if shared else None
        self.class_embedding = None if classes is None else nn.Embedding(classes, WIDTH)
        self.residual_layers = nn.ModuleList(
            ResidualLayer(
                channels,
                dilation=2 ** (i % cycle),
                condition=mels if classes is None else WIDTH,
                strides=strides if mels is not None and upsampler_per_layer else None,
                residual_includes_time=residual_includes_time,
            )
            for i in range(layers)
        )
        self.skip_projection = Conv(channels, channels)
        self.output_projection = Conv(channels, 1)
        nn.init.zeros_(self.output_projection.weight)
        self.takes = "mel" if mels is not None else "label" if classes is not None else None

    def condition(self, mel: Tensor | None, label: Tensor | None, samples: int) -> Tensor | None:
        """What the layers get: the mel, upsampled unless each does so itself; the class's vector."""
        given = [name for name, value in (("mel", mel), ("label", label)) if value is not None]
        if given != [self.takes] * (self.takes is not None):
            raise UsageError(
                f"this DiffWave is conditioned on {self.takes or 'nothing'}; "
                f"got {' and '.join(given) or 'nothing'}"
            )
        if mel is not None:
            if mel.shape[-1] * self.hop < samples:
                raise UsageError(
                    f"{mel.shape[-1]} mel frames of {self.hop} do not cover {samples} samples"
                )
            mel = mel.to(self.input_projection.weight.dtype)
            if self.spectrogram_upsampler is None:
                return mel
            return last(self.spectrogram_upsampler(mel)[..., :samples])
        if label is not None and self.class_embedding is not None:
            return self.class_embedding(label)[:, :, None, None]
        return None

    def forward(
        self, x: Tensor, t: Tensor, *, mel: Tensor | None = None, label: Tensor | None = None
    ) -> Tensor:
        condition = self.condition(mel, label, x.shape[-1])
        step = self.diffusion_embedding(t)
        h = last(F.relu(self.input_projection(x[:, :, None])))
        total = torch.zeros_like(h)
        for layer in self.residual_layers:
            h, skip = layer(h, step, condition)
            total = total + skip
        total = total / math.sqrt(len(self.residual_layers))
        return self.output_projection(F.relu(self.skip_projection(total)))[:, :, 0]
