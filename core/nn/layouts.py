"""Layouts: what public state dicts call the parts of our UNet and autoencoder, and how those become ours.

Seen from afar all these networks are one: a first convolution, residual blocks in levels with attention after some and
a change of resolution between levels, a last norm and convolution. So every block has a place, such as "down.res" of
level 1, block 0, and a layout is a table from places to names, and from the modules inside a block to theirs.

Besides names, layouts differ in how the rows of q, k and v are packed and in whether a convolution over single
positions is kept as a matrix. Loaders take tensors: how a release's file keeps them is its reader's matter.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mdiff.core import weights
from mdiff.core.errors import IntegrityError
from mdiff.core.names import pick
from mdiff.core.nn.autoencoder import AutoencoderKL
from mdiff.core.nn.layers import (
    CONV,
    AttentionBlock,
    Downsample,
    ResBlock,
    SpatialTransformer,
    Upsample,
)
from mdiff.core.nn.unet import UNet

Inside = Mapping[type[nn.Module], Mapping[str, tuple[str, ...]]]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Names of a family of state dicts. What a table does not hold has our own name there too.

    Attributes:
        names: a place, or a module that is outside of blocks -> its name. {level} counts from full resolution,
            {mirror} from the smallest; {block} counts from 0 and {number} from 1.
        inside: kind of block -> end of a module's name -> the modules whose rows it holds, one after the other.
        qkv_first: attention blocks pack rows as [q, k, v][head][channel]; ours are [head][q, k, v][channel].
        older: a part of a key as older files spell it -> as newer ones do.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    inside: Inside = field(default_factory=dict)
    qkv_first: bool = False
    older: Mapping[str, str] = field(default_factory=dict)


_OPENAI = Layout(
    names={"vector_embed.0": "label_emb.0.0", "vector_embed.2": "label_emb.0.2"},
    inside={SpatialTransformer: {"ff.proj": ("ff.net.0.proj",), "ff.out": ("ff.net.2",)}},
)

_DDPM = Layout(
    names={
        "time_embed.0": "temb.dense.0",
        "time_embed.2": "temb.dense.1",
        "first.conv": "conv_in",
        "down.res": "down.{level}.block.{block}",
        "down.attention": "down.{level}.attn.{block}",
        "down.sample": "down.{level}.downsample",
        "middle.res": "mid.block_{number}",
        "middle.attention": "mid.attn_1",
        "up.res": "up.{level}.block.{block}",
        "up.attention": "up.{level}.attn.{block}",
        "up.sample": "up.{level}.upsample",
        "last.norm": "norm_out",
        "last.conv": "conv_out",
    },
    inside={
        ResBlock: {
            "in_layers.0": ("norm1",),
            "in_layers.2": ("conv1",),
            "emb_layers.1": ("temb_proj",),
            "out_layers.0": ("norm2",),
            "out_layers.3": ("conv2",),
            "skip_connection": ("nin_shortcut",),
        },
        AttentionBlock: {"qkv": ("q", "k", "v")},
        Downsample: {"op": ("conv",)},
    },
    qkv_first=True,
)

_DIFFUSERS = Layout(
    names={
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "vector_embed.0": "add_embedding.linear_1",
        "vector_embed.2": "add_embedding.linear_2",
        "label_emb": "class_embedding",
        "first.conv": "conv_in",
        "down.res": "down_blocks.{level}.resnets.{block}",
        "down.attention": "down_blocks.{level}.attentions.{block}",
        "down.sample": "down_blocks.{level}.downsamplers.0",
        "middle.res": "mid_block.resnets.{block}",
        "middle.attention": "mid_block.attentions.0",
        "up.res": "up_blocks.{mirror}.resnets.{block}",
        "up.attention": "up_blocks.{mirror}.attentions.{block}",
        "up.sample": "up_blocks.{mirror}.upsamplers.0",
        "last.norm": "conv_norm_out",
        "last.conv": "conv_out",
    },
    inside={
        ResBlock: {
            "in_layers.0": ("norm1",),
            "in_layers.2": ("conv1",),
            "emb_layers.1": ("time_emb_proj",),
            "out_layers.0": ("norm2",),
            "out_layers.3": ("conv2",),
            "skip_connection": ("conv_shortcut",),
        },
        AttentionBlock: {
            "norm": ("group_norm",),
            "qkv": ("to_q", "to_k", "to_v"),
            "proj_out": ("to_out.0",),
        },
        Downsample: {"op": ("conv",)},
        **_OPENAI.inside,
    },
    qkv_first=True,
    older={"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"},
)

LAYOUTS: Mapping[str, Layout] = {
    # DDPM as PyTorch weights of it circulate, and the autoencoder in files of latent and Stable Diffusion
    "ddpm": _DDPM,
    # Improved DDPM, ADM and GLIDE, and the UNet in files of latent and Stable Diffusion
    "openai": _OPENAI,
    # ADM's model of 64 pixels, alone among those released
    "openai-qkv-first": replace(_OPENAI, qkv_first=True),
    # UNet2DModel, UNet2DConditionModel and AutoencoderKL, before and after the attention of 2023
    "diffusers": _DIFFUSERS,
    # the same where the condition vector is called a class (unCLIP)
    "diffusers-unclip": replace(
        _DIFFUSERS,
        names={
            **_DIFFUSERS.names,
            "vector_embed.0": "class_embedding.linear_1",
            "vector_embed.2": "class_embedding.linear_2",
        },
    ),
}


def load(
    net: UNet | AutoencoderKL,
    tensors: Mapping[str, Tensor],
    layout: str,
    name: str = "state dict",
) -> None:
    """Fills a network from tensors in a layout; `name` says in messages what they are.

    Raises:
        UsageError: no such layout.
        IntegrityError: keys are missing or left over, or shapes differ; one line names the first few.
    """
    weights.fill(net, convert(net, tensors, layout, name), name)


def convert(
    net: UNet | AutoencoderKL,
    tensors: Mapping[str, Tensor],
    layout: str,
    name: str = "state dict",
) -> dict[str, Tensor]:
    """The tensors of the whole network, under our names and in our order. Raises as `load`."""
    table = pick("layout", LAYOUTS, layout)
    theirs = _renewed(tensors, table.older)
    sources = names(net, layout)
    known = [source for group in sources.values() for source in group]
    wrong = {
        "missing": [key for key in known if key not in theirs],
        "unexpected": sorted(set(theirs) - set(known)),
    }
    said = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in wrong.items()
        if keys
    ]
    if said:
        raise IntegrityError(f"{name} does not fit in the layout {layout!r}: {'; '.join(said)}")
    heads = {f"{at}.qkv": m.heads for at, m in net.named_modules() if isinstance(m, AttentionBlock)}
    ours = {}
    for key, own in net.state_dict().items():
        tensor = _reshaped(_joined(key, [theirs[source] for source in sources[key]], name), own)
        count = heads.get(key.rpartition(".")[0], 1)
        if table.qkv_first and count > 1 and tensor.shape == own.shape:
            tensor = tensor.unflatten(0, (3, count, -1)).transpose(0, 1).flatten(0, 2)
        ours[key] = tensor
    return ours


def names(net: UNet | AutoencoderKL, layout: str) -> dict[str, tuple[str, ...]]:
    """Our keys, in our order -> the keys of a layout whose tensors each holds, one after the other."""
    table = pick("layout", LAYOUTS, layout)
    found: dict[str, tuple[str, ...]] = {}
    for place in _places(net):
        called = table.names.get(place.kind)
        theirs = place.ours if called is None else place.side + called.format(**place.numbers)
        inside = table.inside.get(type(place.module), {})
        for key in place.module.state_dict():
            module, _, parameter = key.rpartition(".")
            found[f"{place.ours}.{key}"] = tuple(
                ".".join(filter(None, (theirs, part, parameter)))
                for part in _inside(inside, module)
            )
    for key in net.state_dict():
        module, _, parameter = key.rpartition(".")
        found.setdefault(key, (f"{table.names.get(module, module)}.{parameter}",))
    return {key: found[key] for key in net.state_dict()}


# --- places ---------------------------------------------------------------------------------------

_TRUNKS: Mapping[type[nn.Module], Mapping[str, tuple[str, ...]]] = {
    UNet: {"": ("down", "middle", "up")},
    AutoencoderKL: {"encoder.": ("down", "middle"), "decoder.": ("middle", "up")},
}
"""A network -> where in it blocks follow on each other -> the ways they lead."""

_KINDS: Mapping[type[nn.Module], str] = {
    ResBlock: "res",
    AttentionBlock: "attention",
    SpatialTransformer: "attention",
    Downsample: "sample",
    Upsample: "sample",
    nn.GroupNorm: "norm",
    **dict.fromkeys(CONV.values(), "conv"),
}


class _Place(NamedTuple):
    side: str  # "encoder." or "decoder." in an autoencoder
    ours: str
    kind: str
    numbers: Mapping[str, int]
    module: nn.Module


def _places(net: UNet | AutoencoderKL) -> Iterator[_Place]:
    """Every block with its place: residual blocks are counted, and what follows one is where it is."""
    levels, blocks = range(net.levels), range(net.blocks)
    ways = {
        "down": [("down", level, block) for level in levels for block in blocks],
        "middle": [("middle", 0, 0), ("middle", 0, 1)],
        "up": [("up", level, b) for level in reversed(levels) for b in range(net.blocks + 1)],
    }
    for side, through in _TRUNKS[type(net)].items():
        todo = iter([place for way in through for place in ways[way]])
        way, level, block = "first", 0, 0
        for name, module in _blocks(net.get_submodule(side.removesuffix(".")), side):
            resamples = isinstance(module, ResBlock) and module.resample
            kind = "sample" if resamples else _KINDS.get(type(module), "")
            if kind == "res":
                way, level, block = next(todo)
            if kind == "norm":
                way = "last"
            if kind:
                numbers = {
                    "level": level,
                    "mirror": net.levels - 1 - level,
                    "block": block,
                    "number": block + 1,
                }
                yield _Place(side, name, f"{way}.{kind}", numbers, module)


def _blocks(container: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """What a container holds, also within rows and lists, but not within blocks."""
    for key, child in container.named_children():
        rows = isinstance(child, nn.Sequential | nn.ModuleList)
        yield from _blocks(child, f"{name}{key}.") if rows else [(f"{name}{key}", child)]


# --- tensors --------------------------------------------------------------------------------------


def _inside(table: Mapping[str, tuple[str, ...]], module: str) -> tuple[str, ...]:
    """What a module inside a block is called, by the end of its name."""
    for end, parts in table.items():
        if f".{module}".endswith(f".{end}"):
            return tuple(module.removesuffix(end) + part for part in parts)
    return (module,)


def _renewed(tensors: Mapping[str, Tensor], older: Mapping[str, str]) -> dict[str, Tensor]:
    """Keys as newer files spell them; one that is there in both spellings stays as it is, and is left over."""
    newer = {key: ".".join(older.get(part, part) for part in key.split(".")) for key in tensors}
    return {key if newer[key] in tensors else newer[key]: tensor for key, tensor in tensors.items()}


def _joined(key: str, parts: list[Tensor], name: str) -> Tensor:
    try:
        return torch.cat(parts) if len(parts) > 1 else parts[0]
    except RuntimeError as error:
        shapes = " and ".join(str(tuple(part.shape)) for part in parts)
        raise IntegrityError(f"{name}: {shapes} cannot be joined into {key}") from error


def _reshaped(tensor: Tensor, own: Tensor) -> Tensor:
    """A matrix as the convolution over single positions that does the same, and the other way round."""
    squeezed = [tuple(t.shape[:2]) for t in (tensor, own) if set(t.shape[2:]) <= {1}]
    return (
        tensor.reshape(own.shape) if len(squeezed) == 2 and squeezed[0] == squeezed[1] else tensor
    )
