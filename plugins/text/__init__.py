"""The text plugin: `text/mini`, the frozen encoder that brings words to every shipped model."""

from collections.abc import Callable, Mapping

from mdiff.core.hooks import API, PluginInfo, TextEncoder, hookimpl


@hookimpl
def mdiff_info() -> PluginInfo:
    return PluginInfo(name="text", api=API, summary="text/mini, the text encoder of shipped models")


@hookimpl
def mdiff_text_encoders() -> Mapping[str, Callable[[], TextEncoder]]:
    return {"mini": _mini}


def _mini() -> TextEncoder:
    from mdiff.plugins.text.mini import shipped

    return shipped()
