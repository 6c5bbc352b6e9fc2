"""The audio plugin: DiffWave, AudioLDM, and sound files."""

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
from mdiff.plugins.audio import io

if TYPE_CHECKING:
    import click
    import torch


@hookimpl
def mdiff_info() -> PluginInfo:
    return PluginInfo(name="audio", api=API, modality="audio", summary="DiffWave and AudioLDM")


@hookimpl
def mdiff_build(card: ModelCard, device: str, dtype: torch.dtype) -> Model:
    from mdiff.plugins.audio import audioldm, diffwave

    systems = {"AudioLDM": audioldm.build, "DiffWave": diffwave.build}
    if card.system not in systems:
        raise UsageError(f"audio has no system {card.system!r}{nearest(card.system, systems)}")
    return systems[card.system](card, device, dtype)


@hookimpl
def mdiff_train(card: ModelCard, model: Model, part: str, settings: Mapping[str, Any]) -> Task:
    from mdiff.plugins.audio import training

    return training.task(card, model, part, settings)


@hookimpl
def mdiff_recipes() -> Mapping[str, Path]:
    return {path.stem: path for path in Path(__file__).parent.glob("recipes/*.toml")}


@hookimpl
def mdiff_datasets() -> Mapping[str, DataSet]:
    from mdiff.plugins.audio.data import recipe

    return {"mini-sounds": recipe.DATA_SET}


@hookimpl
def mdiff_metrics() -> Mapping[str, Callable[[], Metric]]:
    from mdiff.plugins.audio import metrics

    return metrics.METRICS


@hookimpl
def mdiff_commands() -> Sequence[click.Command]:
    from mdiff.plugins.audio import commands

    return [commands.latent_map]


@hookimpl
def mdiff_media() -> Sequence[Media]:
    return io.MEDIA
