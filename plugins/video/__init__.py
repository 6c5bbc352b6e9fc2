"""The video plugin: Video Diffusion Models, and files of moving pictures."""

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
from mdiff.plugins.video import io

if TYPE_CHECKING:
    import torch

RECIPES = Path(__file__).parent / "recipes"


@hookimpl
def mdiff_info() -> PluginInfo:
    return PluginInfo(name="video", api=API, modality="video", summary="Video Diffusion Models")


@hookimpl
def mdiff_build(card: ModelCard, device: str, dtype: torch.dtype) -> Model:
    from mdiff.plugins.video import vdm

    systems = {"Video Diffusion Models": vdm.build}
    if card.system not in systems:
        raise UsageError(f"video has no system {card.system!r}{nearest(card.system, systems)}")
    return systems[card.system](card, device, dtype)


@hookimpl
def mdiff_train(card: ModelCard, model: Model, part: str, settings: Mapping[str, Any]) -> Task:
    from mdiff.plugins.video import training

    return training.task(card, model, part, settings)


@hookimpl
def mdiff_recipes() -> Mapping[str, Path]:
    return {path.stem: path for path in sorted(RECIPES.glob("*.toml"))}


@hookimpl
def mdiff_datasets() -> Mapping[str, DataSet]:
    from mdiff.plugins.video import data

    return data.DATASETS


@hookimpl
def mdiff_metrics() -> Mapping[str, Callable[[], Metric]]:
    from mdiff.plugins.video import metrics

    return metrics.METRICS


@hookimpl
def mdiff_media() -> Sequence[Media]:
    return io.MEDIA
