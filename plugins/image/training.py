"""How the parts of the image systems are trained: a task for each, and its settings, a recipe's table [task]."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdiff.core.conditions import spread, token_states
from mdiff.core.errors import UsageError, nearest
from mdiff.core.hooks import Example, Model, ModelCard, Task, text_encoder
from mdiff.core.nn.autoencoder import AutoencoderKL
from mdiff.core.nn.unet import UNet
from mdiff.core.training import recipe
from mdiff.core.training.draws import Draws
from mdiff.plugins.image import io
from mdiff.plugins.image.ddpm import classes_of, denoiser, label_of, to_signed

Rows = Mapping[str, Tensor]


def pixels(example: Example, size: int, channels: int) -> Tensor:
    """The picture of an example as rows hold it: (channels, size, size), uint8. Raises as `io.read`."""
    image = io.fitted(io.read(example.path, channels)["image"], size)
    return (image * 255).round().byte()


def mirrored(x: Tensor, which: Tensor) -> Tensor:
    """Pictures (B, C, H, W), those of `which` (B,) with left and right exchanged."""
    return torch.where(which.reshape(-1, 1, 1, 1), x.flip(-1), x)


# --- DDPM -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DDPMSettings:
    """Of DDPM's UNet.

    Attributes:
        flip: half of the pictures are mirrored.
        drop: share of pictures whose class the network is not told, where it has a label for that.
    """

    flip: bool = True
    drop: float = 0.1

    def __post_init__(self) -> None:
        recipe.within(self, drop=(0, 1))


def ddpm_task(card: ModelCard, model: Model, settings: DDPMSettings) -> Task:
    """Pixels to the size of the card, and labels where it has classes."""
    config = card.config
    unet = _part(model, "unet", UNet)
    size, channels = config["size"], config["unet"]["in_channels"]
    classes, labels = classes_of(config), config["unet"].get("classes")

    def read(example: Example) -> Iterator[dict[str, Tensor]]:
        row = {"image": pixels(example, size, channels)}
        if labels:
            row["label"] = torch.tensor(label_of(example.label, classes, labels))
        yield row

    def batch(rows: Rows, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        x0 = to_signed(rows["image"])
        flip = draws.chance(0.5)
        if settings.flip:
            x0 = mirrored(x0, flip)
        if not labels:
            return x0, {}
        label, drop = rows["label"], draws.chance(settings.drop)
        if labels > len(classes):
            label = torch.where(drop, len(classes), label)
        return x0, {"label": label}

    return Task(
        module=unet,
        read=read,
        denoiser=denoiser(card, unet),
        batch=batch,
    )


# --- Stable Diffusion -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AutoencoderSettings:
    """Of the autoencoder. The loss is that of the pixels, plus these times theirs.

    Attributes:
        flip: half of the pictures are mirrored.
        edges: that of differences between neighbours, at four scales.
        colours: that of means over 8 x 8 pixels: few numbers, which a latent else leaves to the last.
        kl: the divergence of latents from the standard normal, per number of a latent.
        unit: how far the mean square of a latent is from 1, so that `latent_scale` is 1.
    """

    flip: bool = True
    edges: float = 1.0
    colours: float = 4.0
    kl: float = 1e-4
    unit: float = 0.01

    def __post_init__(self) -> None:
        recipe.within(self, **dict.fromkeys(("edges", "colours", "kl", "unit"), (0, math.inf)))


SCALES = 4
"""Scales at which edges are compared, each half of the one before."""


def edge_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean difference of the two pictures' gradients, summed over scales: (B, C, H, W) twice -> (B,).

    It asks for edges where they belong, as a perceptual loss does, and needs no network.
    """
    difference = found - wanted
    total = difference.new_zeros(len(difference))
    for scale in range(SCALES):
        if scale:
            difference = F.avg_pool2d(difference, 2)
        for axis in (-1, -2):
            total = total + difference.diff(dim=axis).abs().flatten(1).mean(1)
    return total


def colour_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean difference of two pictures' colours, averaged over 8 x 8 pixels: (B, C, H, W) twice -> (B,)."""
    return F.avg_pool2d(found - wanted, 8).abs().flatten(1).mean(1)


def autoencoder_task(card: ModelCard, model: Model, settings: AutoencoderSettings) -> Task:
    """Pixels to the size of the card; latents of unit scale come out."""
    net = _part(model, "autoencoder", AutoencoderKL)
    size, channels = card.config["size"], card.config["autoencoder"]["in_channels"]

    def read(example: Example) -> Iterator[dict[str, Tensor]]:
        yield {"image": pixels(example, size, channels)}

    def loss(rows: Rows, draws: Draws) -> Tensor:
        x = to_signed(rows["image"])
        flip = draws.chance(0.5)
        if settings.flip:
            x = mirrored(x, flip)
        posterior = net.encode(x)
        mean, log_variance = posterior.mean.float(), posterior.log_variance.float()
        z = mean + (0.5 * log_variance).exp() * draws.normal(*mean.shape[1:])
        found = net.decode(z).float()
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance)
        square = (mean**2).flatten(1).mean(1)
        return (
            (found - x).abs().flatten(1).mean(1)
            + settings.edges * edge_loss(found, x)
            + settings.colours * colour_loss(found, x)
            + settings.kl * kl.flatten(1).mean(1)
            + settings.unit * (square - 1 - square.clamp(min=1e-6).log())
        )

    return Task(module=net, read=read, loss=loss)


@dataclass(frozen=True, kw_only=True)
class LatentSettings:
    """Of Stable Diffusion's UNet.

    Attributes:
        wordings: texts kept of each picture, of which one is drawn each time; each takes 15 KB on the disk.
        drop: share of pictures that come with the empty text.
        flip: each picture is also there mirrored.
    """

    wordings: int = 4
    drop: float = 0.1
    flip: bool = False

    def __post_init__(self) -> None:
        recipe.within(self, wordings=(1, math.inf), drop=(0, 1))


def latent_task(card: ModelCard, model: Model, settings: LatentSettings) -> Task:
    """Latents of the autoencoder's and token states of the texts, all in half precision."""
    config = card.config
    unet = _part(model, "unet", UNet)
    autoencoder = _part(model, "autoencoder", AutoencoderKL)
    encoder = text_encoder(config["text_encoder"])
    size, length, scale = config["size"], config["tokens"], config["latent_scale"]
    channels = config["autoencoder"]["in_channels"]
    nothing = token_states(encoder, [""], length)

    @torch.no_grad()
    def read(example: Example) -> Iterator[dict[str, Tensor]]:
        image = pixels(example, size, channels)
        tokens = token_states(encoder, spread(example.texts or ("",), settings.wordings), length)
        for picture in (image, image.flip(-1)) if settings.flip else (image,):
            x = to_signed(picture[None]).to(_device(autoencoder))
            posterior = autoencoder.encode(x)
            deviation = (0.5 * posterior.log_variance).exp()
            yield {
                "mean": posterior.mean[0].half().cpu(),
                "deviation": deviation[0].half().cpu(),
                "tokens": tokens.half().cpu(),
            }

    def batch(rows: Rows, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        mean, deviation = rows["mean"].float(), rows["deviation"].float()
        x0 = scale * (mean + deviation * draws.normal(*mean.shape[1:]))
        which = draws.integers(settings.wordings)
        context = rows["tokens"][torch.arange(len(which), device=which.device), which].float()
        drop = draws.chance(settings.drop).reshape(-1, 1, 1)
        return x0, {"context": torch.where(drop, nothing.to(context), context)}

    return Task(
        module=unet,
        read=read,
        made_by={"wordings": settings.wordings, "flip": settings.flip},
        denoiser=denoiser(card, unet),
        batch=batch,
        needs=("autoencoder",),
    )


N = TypeVar("N", bound=nn.Module)


def _part(model: Model, name: str, kind: type[N]) -> N:
    """A module of a model, of the type that `build` gave it."""
    module = model.modules[name]
    assert isinstance(module, kind)
    return module


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


# --- the table ------------------------------------------------------------------------------------

TASKS: Mapping[str, Mapping[str, tuple[type, Callable[[ModelCard, Model, Any], Task]]]] = {
    "DDPM": {"unet": (DDPMSettings, ddpm_task)},
    "Stable Diffusion": {
        "autoencoder": (AutoencoderSettings, autoencoder_task),
        "unet": (LatentSettings, latent_task),
    },
}
"""By system and part: its settings, and what makes the task of them."""


def task(card: ModelCard, model: Model, part: str, settings: Mapping[str, Any]) -> Task:
    """How a part of a model is trained.

    Raises:
        UsageError: the system has no such part to train, or a setting is wrong.
    """
    parts = TASKS[card.system]
    if part not in parts:
        raise UsageError(f"{card.system} trains no part {part!r}{nearest(part, parts)}")
    kind, make = parts[part]
    return make(card, model, recipe.settings(kind, settings))
