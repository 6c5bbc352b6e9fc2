"""Stable Diffusion: text -> token states -> latent -> picture (Rombach et al., 2022).

Two stages: the latent UNet, which attends to the token states of a frozen text encoder, and the autoencoder's decoder.
"""

from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from mdiff.core import latent_map, tasks
from mdiff.core.conditions import token_states
from mdiff.core.denoiser import KEYS
from mdiff.core.hooks import Model, ModelCard, Problem, Request, Stage, text_encoder
from mdiff.core.nn.autoencoder import AutoencoderKL
from mdiff.core.nn.unet import UNet
from mdiff.core.registry import check_config
from mdiff.plugins.image import inputs
from mdiff.plugins.image.ddpm import denoiser, size_of, to_picture
from mdiff.plugins.image.io import to_pillow


def build(card: ModelCard, device: str, dtype: torch.dtype) -> Model:
    """The model of a card, with random weights.

    Its config:
        size: pixels of an edge of the pictures it was trained on.
        text_encoder: name of the frozen text encoder.
        tokens: how many of its token states the UNet attends to.
        predicts, time, schedule: as in `ddpm`.
        latent_scale: what latents are multiplied with for the UNet.
        unet, autoencoder: arguments of the networks.
        latent_map: as `mdiff image latent-map` prints it, for previews; none where not said.
    """
    config = card.config
    text, latent = ("text_encoder", "tokens"), ("latent_scale", "latent_map", "autoencoder")
    check_config(card, (*KEYS, *text, *latent, "size", "unet"))
    encoder = text_encoder(config["text_encoder"])
    unet = UNet(**config["unet"]).to(device, dtype)
    autoencoder = AutoencoderKL(**config["autoencoder"]).to(device)
    channels = config["unet"]["in_channels"]

    def read(text: str | None) -> dict[str, Tensor]:
        """The condition of a text; that of the empty text where there is none."""
        return {"context": token_states(encoder, [text or ""], config["tokens"]).to(device, dtype)}

    def prepare(request: Request, carry: dict[str, Any]) -> Problem:
        height, width = size_of(request, config, autoencoder.factor * unet.factor)
        pixels = (config["autoencoder"]["in_channels"], height, width)
        carry["seen"] = inputs.given(request, carry, pixels)
        return Problem(
            shape=(channels, height // autoencoder.factor, width // autoencoder.factor),
            cond=read(request.text),
            uncond=read(request.negative),
            given=tasks.encoded(carry["seen"], encode, decode),
        )

    def encode(x: Tensor) -> Tensor:
        return autoencoder.encode(x.to(device)).mean * config["latent_scale"]

    def decode(latent: Tensor) -> Tensor:
        return autoencoder.decode(latent / config["latent_scale"])

    def keep_latent(
        request: Request, problem: Problem, x: Tensor | None, carry: dict[str, Any]
    ) -> dict[str, Any]:
        assert x is not None  # a stage with a denoiser is given its sample
        return {"latent": x.float() / config["latent_scale"]}

    def draw(x0: Tensor) -> Image:
        colours = latent_map.apply(x0 / config["latent_scale"], config["latent_map"])
        colours = F.interpolate(colours, scale_factor=autoencoder.factor, mode="bilinear")
        return to_pillow(to_picture(colours))

    def no_problem(request: Request, carry: dict[str, Any]) -> Problem:
        return Problem(shape=())

    def to_pixels(
        request: Request, problem: Problem, x: Tensor | None, carry: dict[str, Any]
    ) -> dict[str, Any]:
        pixels = autoencoder.decode(carry["latent"])
        return {"sample": {"image": to_picture(tasks.restored(carry.get("seen"), pixels))}}

    return Model(
        modules={"unet": unet, "autoencoder": autoencoder},
        stages=(
            Stage(
                name="latent",
                prepare=prepare,
                denoiser=denoiser(card, unet),
                finish=keep_latent,
                preview=draw if "latent_map" in config else None,
            ),
            Stage(name="image", prepare=no_problem, denoiser=None, finish=to_pixels),
        ),
    )
