"""Public DiffWave weights: what each release is called inside, and how it becomes our network's.

A layout is a table from our modules to the modules of a release. Weight norm is folded, two
convolutions that we keep as one are joined, and where the halves of a gate stand the other way
round they change places; whatever else differs between the families is an option of the network.
Loaders take tensors: a release's own file is a pickle, which is never opened here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdiff.core import weights
from mdiff.core.errors import IntegrityError, MissingError
from mdiff.core.names import pick
from mdiff.plugins.audio.nets.diffwave import DiffWave


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Names of a release.

    Attributes:
        modules: our module -> the modules whose rows it holds, one after the other; {} is the
            number of the layer. A module that is not there has the same name.
        swapped: ours among them whose two halves of rows stand the other way round: tanh first,
            then sigmoid.
    """

    modules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    swapped: tuple[str, ...] = ()


_OURS = "residual_layers.{}"
_THEIRS = "residual_layer.residual_blocks.{}"

LAYOUTS: Mapping[str, Layout] = {
    # github.com/lmnt-com/diffwave, "model" of its checkpoint
    "lmnt": Layout(),
    # github.com/philsyn/DiffWave-Vocoder and DiffWave-unconditional, "model_state_dict"
    "philsyn": Layout(
        modules={
            "input_projection": ("init_conv.0.conv",),
            "diffusion_embedding.projection1": ("residual_layer.fc_t1",),
            "diffusion_embedding.projection2": ("residual_layer.fc_t2",),
            f"{_OURS}.diffusion_projection": (f"{_THEIRS}.fc_t",),
            f"{_OURS}.dilated_conv": (f"{_THEIRS}.dilated_conv_layer.conv",),
            f"{_OURS}.spectrogram_upsampler.conv1": (f"{_THEIRS}.upsample_conv2d.0",),
            f"{_OURS}.spectrogram_upsampler.conv2": (f"{_THEIRS}.upsample_conv2d.1",),
            f"{_OURS}.conditioner_projection": (f"{_THEIRS}.mel_conv.conv",),
            f"{_OURS}.output_projection": (f"{_THEIRS}.res_conv", f"{_THEIRS}.skip_conv"),
            "skip_projection": ("final_conv.0.conv",),
            "output_projection": ("final_conv.2.conv",),
        },
        swapped=(f"{_OURS}.dilated_conv", f"{_OURS}.conditioner_projection"),
    ),
}

_PHILSYN = {"embedding": "falling", "residual_includes_time": True}
_PHILSYN_VOCODER = {**_PHILSYN, "layers": 30, "mels": 80, "upsampler_per_layer": True}
_FAST_BASE = (1e-4, 1e-3, 1e-2, 0.05, 0.2, 0.5)
_FAST_LARGE = (1e-4, 1e-3, 1e-2, 0.05, 0.2, 0.7)

PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "lmnt": {
        "layout": "lmnt",
        "network": {"channels": 64, "layers": 30, "mels": 80},
        "betas": {"start": 1e-4, "end": 0.05, "steps": 50},
        "fast": _FAST_BASE,
        "clamp": True,
        "rate": 22_050,
    },
    "philsyn-base": {
        "layout": "philsyn",
        "network": {"channels": 64, **_PHILSYN_VOCODER},
        "betas": {"start": 1e-4, "end": 0.05, "steps": 50},
        "fast": _FAST_BASE,
        "rate": 22_050,
    },
    "philsyn-large": {
        "layout": "philsyn",
        "network": {"channels": 128, **_PHILSYN_VOCODER},
        "betas": {"start": 1e-4, "end": 0.02, "steps": 200},
        "fast": _FAST_LARGE,
        "rate": 22_050,
    },
    "philsyn-sc09": {
        "layout": "philsyn",
        "network": {"channels": 256, "layers": 36, "cycle": 12, **_PHILSYN},
        "betas": {"start": 1e-4, "end": 0.02, "steps": 200},
        "rate": 16_000,
    },
}
"""The releases: each is the layout of its file and a model's `config` (see `diffwave.build`)."""


def read(net: DiffWave, path: Path, layout: str) -> None:
    """Fills a network from a safetensors file in a layout.

    Raises:
        MissingError: no such file.
        IntegrityError: not a safetensors file, or as `load`.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MissingError(
            f"{path} cannot be read ({error.strerror}): give a safetensors file"
        ) from error
    load(net, weights.parse(data, path.name), layout, path.name)


def load(
    net: DiffWave, tensors: Mapping[str, Tensor], layout: str, name: str = "state dict"
) -> None:
    """Fills a network from tensors in a layout; `name` says in messages what they are.

    Raises:
        UsageError: no such layout.
        IntegrityError: keys are missing or left over, or shapes differ; one line names the first
            few.
    """
    weights.fill(net, convert(net, tensors, layout, name), name)


def convert(
    net: DiffWave, tensors: Mapping[str, Tensor], layout: str, name: str = "state dict"
) -> dict[str, Tensor]:
    """The tensors of the whole network, under our names and in our order. Raises as `load`."""
    table = pick("layout", LAYOUTS, layout)
    left = dict(tensors)
    missing: list[str] = []
    parts: dict[str, list[Tensor]] = {}
    for key in net.state_dict():
        module, _, parameter = key.rpartition(".")
        pattern, number = _numbered(module)
        sources = [s.format(number) for s in table.modules.get(pattern, (pattern,))]
        parts[key] = [_take(left, f"{source}.{parameter}", missing) for source in sources]
    if missing or left:
        said = [
            f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
            for what, keys in (("missing", missing), ("unexpected", list(left)))
            if keys
        ]
        raise IntegrityError(
            f"{name} is not this DiffWave in the layout {layout!r}: {'; '.join(said)}"
        )
    ours = {key: _joined(key, tensors, name) for key, tensors in parts.items()}
    for key, tensor in ours.items():
        if _numbered(key.rpartition(".")[0])[0] in table.swapped:
            ours[key] = tensor.roll(len(tensor) // 2, dims=0)
    return ours


def _numbered(module: str) -> tuple[str, str]:
    """A module's name with {} for the number of its layer, and that number."""
    number = re.search(r"(?<=\.)\d+(?=\.)", module)
    return (module.replace(f".{number[0]}.", ".{}.", 1), number[0]) if number else (module, "")


def _take(left: dict[str, Tensor], key: str, missing: list[str]) -> Tensor:
    """A tensor taken out of `left`, its weight norm folded; what is not there goes to `missing`."""
    if f"{key}_v" not in left and f"{key}_g" not in left:
        if key not in left:
            missing.append(key)
        return left.pop(key, torch.empty(0))
    halves = [f"{key}_{half}" for half in "gv"]
    missing += [half for half in halves if half not in left]
    g, v = (left.pop(half, torch.ones(1, 1)) for half in halves)
    # w = g v / |v|, the norm over all axes but the first
    return g * v / torch.linalg.vector_norm(v, dim=tuple(range(1, v.ndim)), keepdim=True)


def _joined(key: str, parts: list[Tensor], name: str) -> Tensor:
    try:
        return torch.cat(parts) if len(parts) > 1 else parts[0]
    except RuntimeError as error:
        shapes = " and ".join(str(tuple(part.shape)) for part in parts)
        raise IntegrityError(f"{name}: {shapes} cannot be joined into {key}") from error
