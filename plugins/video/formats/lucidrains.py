"""Checkpoints of video-diffusion-pytorch: what they call the parts of our `Unet3D`, and how those become ours.

Versions 0.6 and 0.7 differ in the norms of residual blocks. A training checkpoint (`results/model-N.pt`) holds the
network twice, as trained and averaged, among the buffers of its schedule; here both it and a bare state dict of the
network are read. Loaders take tensors: `mdiff.core.pth.tensors` reads them out of a .pt file without executing it.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mdiff.core import weights
from mdiff.core.errors import IntegrityError
from mdiff.plugins.video.nets.unet3d import (
    ROTATED,
    Attend,
    ChannelNorm,
    LinearAttention,
    Residual,
    Unet3D,
)

PLACES: Mapping[str, str] = {
    "time_embed.0": "time_mlp.1",
    "time_embed.2": "time_mlp.3",
    "positions.relative.embedding": "time_rel_pos_bias.relative_attention_bias",
    "stem": "init_conv",
    "stem_attention": "init_temporal_attn",
    "middle.blocks.0": "mid_block1",
    "middle.within": "mid_spatial_attn",
    "middle.along": "mid_temporal_attn",
    "middle.blocks.1": "mid_block2",
    "last": "final_conv.0",
    "out": "final_conv.1",
}
"""A part of our network -> theirs."""

LEVEL: Mapping[str, int] = {"blocks.0": 0, "blocks.1": 1, "within": 2, "along": 3, "sample": 4}
"""A part of a level -> its number."""

RESIDUAL: Mapping[str, str] = {
    "emb": "mlp.1",
    "block1.conv": "block1.proj",
    "block2.conv": "block2.proj",
    "skip": "res_conv",
}
"""What is inside of a residual block; norms have the same names."""

BUFFERS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
"""Of the schedule, beside the network."""

NETWORK = "denoise_fn."
"""The prefix of the network's keys in a checkpoint of its diffusion."""

CONFIG: Mapping[str, Any] = {
    "predicts": "eps",
    "schedule": {"name": "cosine_betas", "steps": 1000, "max_beta": 0.9999},
}
"""What a model's `config` has beside the network, where nothing else was chosen in training."""


def load(net: Unet3D, tensors: Mapping[str, Tensor], name: str = "state dict") -> None:
    """Fills a network from the tensors of a checkpoint; `name` says in messages what they are.

    Raises:
        IntegrityError: keys are missing or left over, or shapes differ; one line names the first few.
    """
    weights.fill(net, convert(net, tensors, name), name)


def convert(
    net: Unet3D, tensors: Mapping[str, Tensor], name: str = "state dict"
) -> dict[str, Tensor]:
    """The tensors of the whole network, under our names and in our order. Raises as `load`."""
    left = network(tensors, name)
    for key in rotations(net):
        _check_frequencies(key, left.pop(key, None), name)
    table = names(net)
    missing = [key for key in table.values() if key not in left]
    extra = [key for key in left if key not in set(table.values())]
    said = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (("missing", missing), ("unexpected", extra))
        if keys
    ]
    if said:
        raise IntegrityError(f"{name} is not this network of lucidrains: {'; '.join(said)}")
    own = net.state_dict()
    return {ours: _squeezed(left[theirs], own[ours]) for ours, theirs in table.items()}


def network(
    tensors: Mapping[str, Tensor], name: str = "state dict", part: str = "ema"
) -> dict[str, Tensor]:
    """The tensors of the network in a checkpoint of any of the three kinds.

    Args:
        part: of a training checkpoint: "ema" is averaged, "model" as it was trained.

    Raises:
        IntegrityError: keys beside the network that no such checkpoint has.
    """
    found = dict(tensors)
    for prefix, beside in ((f"{part}.", ("ema.", "model.", "scaler.")), (NETWORK, BUFFERS)):
        if not any(key.startswith(prefix) for key in found):
            continue
        left = [key for key in found if not key.startswith((prefix, *beside))]
        if left:
            raise IntegrityError(
                f"{name} is no checkpoint of lucidrains: unexpected {', '.join(left[:3])}"
            )
        found = {
            key.removeprefix(prefix): value
            for key, value in found.items()
            if key.startswith(prefix)
        }
    return found


def arguments(tensors: Mapping[str, Tensor], name: str = "state dict") -> dict[str, Any]:
    """The arguments of the `Unet3D` that a checkpoint is of, read off its shapes.

    Groups of the older norms cannot be: they are the 8 that nobody has changed.

    Raises:
        IntegrityError: a tensor that every such checkpoint has is missing.
    """
    found = network(tensors, name)
    try:
        heads = found["time_rel_pos_bias.relative_attention_bias.weight"].shape[1]
        stem = found["init_conv.weight"]
        time = found["time_mlp.1.weight"]
        inner = found["init_temporal_attn.fn.fn.fn.to_out.weight"].shape[1]
        levels = len({key.split(".")[1] for key in found if key.startswith("downs.")})
        widths = [found[f"downs.{i}.0.block2.proj.weight"].shape[0] for i in range(levels)]
        out_channels = found["final_conv.1.weight"].shape[0]
    except KeyError as error:
        raise IntegrityError(f"{name} is no checkpoint of lucidrains: it has no {error}") from None
    channels, nothing = time.shape[1], found.get("null_cond_emb")
    return {
        "in_channels": stem.shape[1],
        "out_channels": out_channels,
        "channels": channels,
        "multipliers": [width // channels for width in widths],
        "heads": heads,
        "head_width": inner // heads,
        "vector": None if nothing is None else nothing.shape[1],
        "kernel": stem.shape[-1],
        "linear": any(key.startswith("downs.0.2.") for key in found),
        "groups": 8 if "downs.0.0.block1.norm.weight" in found else None,
    }


def names(net: Unet3D) -> dict[str, str]:
    """Our keys, in our order -> those of a checkpoint."""
    found = {"nothing": "null_cond_emb"}
    for place, module in net.named_modules():
        if isinstance(module, Residual):
            inside = _residual(module)
        elif isinstance(module, Attend):
            inside = _attend(module)
        else:
            continue
        called = _called(place, module)
        found |= {f"{place}.{ours}": f"{called}.{theirs}" for ours, theirs in inside.items()}
    for key in net.state_dict():
        if key not in found:
            place, _, parameter = key.rpartition(".")
            found[key] = f"{_called(place)}.{parameter}"
    return {key: found[key] for key in net.state_dict()}


def rotations(net: Unet3D) -> list[str]:
    """Keys of the frequencies that every attention along frames repeats; they are constants."""
    return [
        f"{_called(place, module)}.{_depth(module)}.rotary_emb.freqs"
        for place, module in net.named_modules()
        if isinstance(module, Attend) and module.along
    ]


def _residual(module: Residual) -> dict[str, str]:
    found = {}
    for key in module.state_dict():
        part, _, parameter = key.rpartition(".")
        newer = isinstance(module.get_submodule(part), ChannelNorm)
        found[key] = f"{RESIDUAL.get(part, part)}.{'gamma' if newer else parameter}"
    return found


def _attend(module: Attend) -> dict[str, str]:
    deep = _depth(module)
    table = {
        "norm.weight": "fn.norm.gamma",
        "attention.qkv.weight": f"{deep}.to_qkv.weight",
        "attention.proj_out.weight": f"{deep}.to_out.weight",
        "attention.proj_out.bias": f"{deep}.to_out.bias",
    }
    return {key: table[key] for key in module.state_dict()}


def _depth(module: Attend) -> str:
    """Where their attention is behind its residual connection and norm: one deeper where axes are moved around it."""
    return "fn.fn" if isinstance(module.attention, LinearAttention) else "fn.fn.fn"


def _called(place: str, module: nn.Module | None = None) -> str:
    """What they call a part of our network."""
    if isinstance(module, Attend):
        place = re.sub(r"attention\.\d$", "along" if module.along else "within", place)
    level = re.fullmatch(r"(down|up)\.(\d+)\.(.*)", place)
    return PLACES[place] if level is None else f"{level[1]}s.{level[2]}.{LEVEL[level[3]]}"


def _check_frequencies(key: str, found: Tensor | None, name: str) -> None:
    """Raises an IntegrityError unless these are the frequencies that the network was written with."""
    count = ROTATED // 2 if found is None else len(found)
    expected = 10_000.0 ** (-torch.arange(count) / count)
    if (
        found is None
        or found.shape != expected.shape
        or not torch.allclose(found.float().cpu(), expected, rtol=1e-3)
    ):
        raise IntegrityError(
            f"{name}: {key} should be the {count} frequencies of rotation, powers of 10000"
        )


def _squeezed(tensor: Tensor, own: Tensor) -> Tensor:
    """A tensor without the axes of length 1 that theirs have more; another shape is left for `fill` to report."""
    plain = [size for size in tensor.shape if size != 1]
    return tensor.reshape(own.shape) if plain == [s for s in own.shape if s != 1] else tensor
