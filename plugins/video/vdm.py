"""Video Diffusion Models: text -> clip, in pixels (Ho et al., 2022).

One stage: noise -> x0 (C, T, H, W) in [-1, 1] -> a clip. The network is the core's UNet with attention along frames, or
that of video-diffusion-pytorch. A clip of more frames than it was trained on is made a block at a time, each of which
knows the last frames of the one before (section 3.1).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from mdiff.core import blocks
from mdiff.core.conditions import of_length
from mdiff.core.denoiser import KEYS, from_config
from mdiff.core.errors import UsageError
from mdiff.core.guidance import from_clip, reconstruction
from mdiff.core.hooks import Given, Model, ModelCard, Problem, Request, Stage, text_encoder
from mdiff.core.nn.unet import UNet
from mdiff.core.registry import check_config
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
    takes = config[name_of(config)]
    if not takes.get("context") and not takes.get("vector"):
        return lambda texts: {}
    encoder = text_encoder(config["text_encoder"])

    def heard(texts: Sequence[str]) -> dict[str, Tensor]:
        states = encoder.encode(texts)
        found = {}
        if takes.get("context"):
            found["context"] = of_length(states, config["tokens"])
        if takes.get("vector"):
            found["vector"] = config.get("vector_scale", 1.0) * states.pooled.float()
        return found

    return heard


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

    T is that of the duration where there is one, in seconds.

    Raises:
        UsageError: no frame, or a size that is no multiple of what the network divides it by.
    """
    options = {"size": config["size"], "frames": config["frames"], **request.options}
    height, width = (int(options.get(name, options["size"])) for name in ("height", "width"))
    if height % net.factor or width % net.factor:
        raise UsageError(
            f"height and width should be multiples of {net.factor}, they are {height} and {width}"
        )
    frames = int(options["frames"])
    if request.duration is not None:
        frames = round(request.duration * rate(request, config))
    if frames < 1:
        raise UsageError("a clip has at least one frame: ask for more, or for a longer duration")
    channels = config[name_of(config)].get("in_channels", 3)
    return channels, frames, height, width


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
        vector_scale: what pooled vectors are multiplied by, 1 where not said. Entries of a vector of unit norm are so
            small that a network hardly hears them.
        predicts, time, schedule: as `denoiser.from_config` takes them.
        clip: how x0 is cut off at [-1, 1] while sampling, as `guidance.from_clip` takes it; true where not said.

    Two options say what frames that are made do of frames that are known, from an input or an earlier block:
        reconstruction: the scale of reconstruction guidance, w_r in equation 7; 0, and where there is no such option,
            is replacement alone.
        overlap: frames that a block knows of those before; half a block where there is no such option.
    """
    text = ("text_encoder", "tokens", "vector_scale")
    check_config(card, (*KEYS, *NETWORKS, *text, "size", "frames", "fps", "clip"))
    config = card.config
    name = name_of(config)
    net = NETWORKS[name](**config[name]).to(device, dtype)
    listen = listener(config)
    bounds = from_clip(config.get("clip", True))

    def placed(conditions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: value.to(device, dtype) for key, value in conditions.items()}

    def prepare(request: Request, carry: dict[str, Any]) -> Problem:
        whole = carry["whole"] = carry["whole"] if "whole" in carry else begun(request, carry)
        here = blocks.block(whole)
        cond = listen([request.text or ""])
        uncond = nothing(net, listen) if request.negative is None else listen([request.negative])
        return Problem(
            shape=here.shape,
            cond=placed(cond),
            uncond=placed(uncond) if cond else None,
            given=here.given,
            bounds=bounds,
            more=here.more,
        )

    def begun(request: Request, carry: Mapping[str, Any]) -> blocks.Whole:
        """The clip as far as the input says what it is."""
        shape, size = shape_of(request, config, net), config["frames"]
        seen = inputs.given(request, carry, shape, rate(request, config)) or Given()
        scale = float(request.options.get("reconstruction", 0.0))
        if scale:
            seen = replace(seen, guide=partial(reconstruction, scale=scale))
        overlap = int(request.options.get("overlap", size // 2))
        return blocks.Whole(shape=shape, size=size, overlap=overlap, given=seen)

    def finish(
        request: Request, problem: Problem, x: Tensor | None, carry: dict[str, Any]
    ) -> dict[str, Any]:
        assert x is not None  # a stage with a denoiser is given its sample
        whole = blocks.put(carry["whole"], x)
        assert whole.given.start is not None  # what has been put there
        clip = {"video": to_clip(whole.given.start), "fps": rate(request, config)}
        return {"whole": whole, "sample": clip}

    def draw(x0: Tensor) -> Image:
        return io.thumbnail({"video": to_clip(x0)})

    stage = Stage(
        name="video",
        prepare=prepare,
        denoiser=from_config(net, config),
        finish=finish,
        preview=draw,
    )
    return Model(modules={name: net}, stages=(stage,))
