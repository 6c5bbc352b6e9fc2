"""DDPM: diffusion on pixels, of any picture or of a class (Ho et al., 2020; Nichol and Dhariwal, 2021).

One stage: noise -> x0 in [-1, 1] -> a picture.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mdiff.core.denoiser import KEYS, Denoiser, from_config
from mdiff.core.errors import UsageError, nearest
from mdiff.core.guidance import from_clip
from mdiff.core.hooks import Model, ModelCard, Problem, Request, Stage
from mdiff.core.nn.unet import UNet
from mdiff.core.registry import check_config
from mdiff.plugins.image import inputs
from mdiff.plugins.image.io import to_pillow


def to_signed(pixels: Tensor) -> Tensor:
    """Pixels 0 to 255 of any type -> what networks see, float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_picture(x: Tensor) -> Tensor:
    """What networks see (1, C, H, W) -> a picture (C, H, W), float32 in [0, 1] on the CPU."""
    return ((x[0].float() + 1) / 2).clamp(0, 1).cpu()


def size_of(request: Request, config: Mapping[str, Any], factor: int) -> tuple[int, int]:
    """Height and width in pixels: options of the model where it has them, else the size it was trained at.

    Raises:
        UsageError: one of them is no multiple of what the model divides it by.
    """
    height, width = (int(request.options.get(name, config["size"])) for name in ("height", "width"))
    if height % factor or width % factor:
        raise UsageError(
            f"height and width should be multiples of {factor}, they are {height} and {width}"
        )
    return height, width


def denoiser(card: ModelCard, unet: UNet) -> Denoiser:
    """The UNet of a card with its schedule and what it predicts: what is trained, and what samples."""
    return from_config(unet, card.config)


def classes_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes in the order of their labels; their numbers where the config names none."""
    return tuple(config.get("classes") or map(str, range(config["unet"].get("classes") or 0)))


def label_of(name: str | None, classes: tuple[str, ...], labels: int) -> int:
    """The label of a class; that of any picture, which comes after the classes, where none is named.

    Args:
        labels: labels that the network knows: one more than classes, where it was also trained without.

    Raises:
        UsageError: no such class, or none named and the network knows nothing but classes.
    """
    if name is None and labels > len(classes):
        return len(classes)
    if name is None:
        raise UsageError(f"this model needs a class: --class NAME{nearest('', classes)}")
    if name not in classes:
        raise UsageError(f"there is no class {name!r}{nearest(name, classes)}")
    return classes.index(name)


def build(card: ModelCard, device: str, dtype: torch.dtype) -> Model:
    """The model of a card, with random weights.

    Its config:
        size: pixels of an edge of the pictures it was trained on.
        predicts, time, learned_variance: of the `Denoiser`; "index" and false where not said.
        schedule: the name of one of the core's, and its parameters.
        clip: how x0 is cut off at [-1, 1] while sampling, as `guidance.from_clip` takes it; true where not said.
        classes: names of classes, in the order of their labels; numbers where not said.
        unet: arguments of the network. With one label more than classes it knows pictures of no class too.
    """
    config = card.config
    check_config(card, (*KEYS, "size", "clip", "classes", "unet"))
    unet = UNet(**config["unet"]).to(device, dtype)
    bounds = from_clip(config.get("clip", True))
    classes, labels = classes_of(config), config["unet"].get("classes")

    def prepare(request: Request, carry: dict[str, Any]) -> Problem:
        shape = (config["unet"]["in_channels"], *size_of(request, config, unet.factor))
        seen = inputs.given(request, carry, shape)
        if not labels:
            return Problem(shape=shape, given=seen, bounds=bounds)

        def condition(name: str | None) -> dict[str, Tensor]:
            return {"label": torch.tensor([label_of(name, classes, labels)], device=device)}

        uncond = condition(None) if labels > len(classes) else None
        cond = condition(request.class_name)
        return Problem(shape=shape, cond=cond, uncond=uncond, given=seen, bounds=bounds)

    def finish(
        request: Request, problem: Problem, x: Tensor | None, carry: dict[str, Any]
    ) -> dict[str, Any]:
        assert x is not None  # a stage with a denoiser is given its sample
        return {"sample": {"image": to_picture(x)}}

    stage = Stage(
        name="image",
        prepare=prepare,
        denoiser=denoiser(card, unet),
        finish=finish,
        preview=lambda x0: to_pillow(to_picture(x0)),
    )
    return Model(modules={"unet": unet}, stages=(stage,))
