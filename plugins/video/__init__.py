"""The video plugin: Video Diffusion Models, and files of moving pictures."""

from __future__ import annotations

from collections.abc import Sequence

from mdiff.core.hooks import API, Media, PluginInfo, hookimpl
from mdiff.plugins.video import io


@hookimpl
def mdiff_info() -> PluginInfo:
    return PluginInfo(name="video", api=API, modality="video", summary="Video Diffusion Models")


@hookimpl
def mdiff_media() -> Sequence[Media]:
    return io.MEDIA
