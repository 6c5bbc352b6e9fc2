"""mdiff: multimodal diffusion on one domain-agnostic core.

Importing this package costs nothing: the version is here, everything else is imported when it is asked for.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_LAZY = {"core": "mdiff.core", "plugins": "mdiff.plugins"}


def __getattr__(name: str) -> Any:
    # Absolute import: this file may be loaded under a foreign name by tools that treat the root as a package.
    if name in _LAZY:
        return import_module(_LAZY[name])
    raise AttributeError(f"module 'mdiff' has no attribute {name!r}")
