"""The image plugin: DDPM and Stable Diffusion, and picture files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdiff.core.errors import UsageError, nearest
from mdiff.core.hooks import (
    API,
    DataSet,
    Media,
    Metric,
    Model,
    ModelCard,
    PluginInfo,
    Task,
    hookimpl,
)
from mdiff.plugins.image import io

if TYPE_CHECKING:
    import click
    import torch

RECIPES = Path(__file__).parent / "recipes"


@hookimpl
def mdiff_info() -> PluginInfo:
    return PluginInfo(name="image", api=API, modality="image", summary="DDPM and Stable Diffusion")


@hookimpl
def mdiff_build(card: ModelCard, device: str, dtype: torch.dtype) -> Model:
    from mdiff.plugins.image import ddpm, stable_diffusion

    systems = {"DDPM": ddpm.build, "Stable Diffusion": stable_diffusion.build}
    if card.system not in systems:
        raise UsageError(f"image has no system {card.system!r}{nearest(card.system, systems)}")
    return systems[card.system](card, device, dtype)


@hookimpl
def mdiff_train(card: ModelCard, model: Model, part: str, settings: Mapping[str, Any]) -> Task:
    from mdiff.plugins.image import training

    return training.task(card, model, part, settings)


@hookimpl
def mdiff_recipes() -> Mapping[str, Path]:
    return {path.stem: path for path in sorted(RECIPES.glob("*.toml"))}


@hookimpl
def mdiff_datasets() -> Mapping[str, DataSet]:
    from mdiff.plugins.image import data

    return data.DATASETS


@hookimpl
def mdiff_metrics() -> Mapping[str, Callable[[], Metric]]:
    from mdiff.plugins.image import metrics

    return metrics.METRICS


@hookimpl
def mdiff_commands() -> Sequence[click.Command]:
    from mdiff.plugins.image import commands

    return [commands.latent_map]


@hookimpl
def mdiff_media() -> Sequence[Media]:
    return io.MEDIA
