"""The audio plugin: DiffWave, AudioLDM, and sound files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mdiff.core.errors import UsageError, nearest
from mdiff.core.hooks import API, Media, Model, ModelCard, PluginInfo, hookimpl
from mdiff.plugins.audio import io

if TYPE_CHECKING:
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
def mdiff_media() -> Sequence[Media]:
    return io.MEDIA
