"""Video Diffusion Models: text -> clip, in pixels (Ho et al., 2022).

One stage: noise -> x0 (C, T, H, W) in [-1, 1] -> a clip. The network is the core's UNet with attention along frames, or
that of video-diffusion-pytorch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from mdiff.core.conditions import token_states
from mdiff.core.denoiser import Denoise, from_config
from mdiff.core.errors import UsageError
from mdiff.core.guidance import clamp
from mdiff.core.hooks import Model, ModelCard, Problem, Request, Stage, text_encoder
from mdiff.core.nn.unet import UNet
from mdiff.plugins.video import inputs, io
from mdiff.plugins.video.ffmpeg import rate_of
from mdiff.plugins.video.nets.unet3d import Unet3D

Network = UNet | Unet3D
NETWORKS: Mapping[str, type[UNet] | type[Unet3D]] = {"unet": UNet, "unet3d": Unet3D}
"""A name in a card's config, of its arguments, and in the model -> the network."""


def name_of(config: Mapping[str, Any]) -> str:
    """The name of the network of a card. Raises a UsageError unless it has one."""
    found = [name for name in NETWORKS if name in config]
    if len(found) != 1:
        raise UsageError(f"the config of a card should have one of {', '.join(NETWORKS)}")
    return found[0]


def listener(config: Mapping[str, Any]) -> Callable[[Sequence[str]], dict[str, Tensor]]:
    """What makes the conditions of texts that the network of a card takes: token states, a pooled vector, or none."""
    makers: dict[str, Callable[[Sequence[str]], Tensor]] = {}
    takes = config[name_of(config)]
    if takes.get("context") or takes.get("vector"):
        encoder = text_encoder(config["text_encoder"])
    if takes.get("context"):
        makers["context"] = lambda texts: token_states(encoder, texts, config["tokens"])
    if takes.get("vector"):
        makers["vector"] = lambda texts: encoder.encode(texts).pooled.float()
    return lambda texts: {name: make(texts) for name, make in makers.items()}


def nothing(
    net: Network, listen: Callable[[Sequence[str]], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The conditions of no text, (1, ...): those of the empty one, where the network has not learnt its own."""
    if isinstance(net, Unet3D):
        return {} if net.nothing is None else {"vector": net.nothing}
    return listen([""])


def to_signed(pixels: Tensor) -> Tensor:
    """Pixels 0 to 255 of any type -> what networks see, float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_clip(x: Tensor) -> Tensor:
    """What networks see (1, 1 or 3, T, H, W) -> a clip (3, T, H, W), float32 in [0, 1] on the CPU."""
    return ((x[0].float() + 1) / 2).clamp(0, 1).expand(3, -1, -1, -1).cpu()


def shape_of(request: Request, config: Mapping[str, Any], net: Network) -> tuple[int, ...]:
    """(C, T, H, W) of a request: options of the model where it has them, else what it was trained on.

    Raises:
        UsageError: a size is no multiple of what the network divides it by.
    """
    options = {"size": config["size"], "frames": config["frames"], **request.options}
    height, width = (int(options.get(name, options["size"])) for name in ("height", "width"))
    if height % net.factor or width % net.factor:
        raise UsageError(
            f"height and width should be multiples of {net.factor}, they are {height} and {width}"
        )
    channels = config[name_of(config)].get("in_channels", 3)
    return channels, int(options["frames"]), height, width


def rate(request: Request, config: Mapping[str, Any]) -> Fraction:
    """Frames a second of a request."""
    return rate_of(request.options.get("fps", config["fps"]))


def build(card: ModelCard, device: str, dtype: torch.dtype) -> Model:
    """The model of a card, with random weights.

    Its config:
        size, frames, fps: pixels of an edge, frames, and frames a second of the clips it was trained on. Options of
            the same names, and height and width, let one choose.
        unet or unet3d: arguments of the network.
        text_encoder: name of the frozen text encoder, where the network takes a context or a vector.
        tokens: how many token states make a context.
        predicts, time, schedule: as `denoiser.from_config` takes them.
        clip: x0 is cut off at [-1, 1] while sampling, true where not said.

    An option `reconstruction` is the scale of the guidance of that name where the request has an input (section 3.1).
    """
    config = card.config
    name = name_of(config)
    net = NETWORKS[name](**config[name]).to(device, dtype)
    listen = listener(config)
    denoise: Denoise = from_config(net, config)
    if config.get("clip", True):
        denoise = clamp(denoise)

    def placed(conditions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: value.to(device, dtype) for key, value in conditions.items()}

    def prepare(request: Request, carry: dict[str, Any]) -> Problem:
        shape = shape_of(request, config, net)
        seen = inputs.given(request, carry, shape, rate(request, config))
        if seen is not None:
            seen = replace(seen, pull=float(request.options.get("reconstruction", 0.0)))
        cond = listen([request.text or ""])
        uncond = nothing(net, listen) if request.negative is None else listen([request.negative])
        return Problem(
            shape=shape, cond=placed(cond), uncond=placed(uncond) if cond else None, given=seen
        )

    def finish(
        request: Request, problem: Problem, x: Tensor | None, carry: dict[str, Any]
    ) -> dict[str, Any]:
        assert x is not None  # a stage with a denoiser is given its sample
        return {"sample": {"video": to_clip(x), "fps": rate(request, config)}}

    def draw(x0: Tensor) -> Image:
        return io.thumbnail({"video": to_clip(x0)})

    stage = Stage(name="video", prepare=prepare, denoiser=denoise, finish=finish, preview=draw)
    return Model(modules={name: net}, stages=(stage,))
