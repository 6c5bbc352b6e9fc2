"""Fixtures: folders that hold a tiny model of each system of the image plugin, with random weights."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import save_file

from mdiff.core import registry
from mdiff.core.hooks import ModelCard
from mdiff.plugins.image import mdiff_build

DDPM: dict[str, Any] = {
    "system": "DDPM",
    "config": {
        "size": 8,
        "predicts": "eps",
        "schedule": {"name": "linear", "steps": 1000},
        "unet": {
            "axes": 2,
            "in_channels": 3,
            "out_channels": 3,
            "channels": 16,
            "multipliers": [1, 2],
            "blocks": 1,
            "attention": [1],
            "groups": 8,
        },
    },
}
STABLE_DIFFUSION: dict[str, Any] = {
    "system": "Stable Diffusion",
    "accepts": ["text", "negative"],
    "config": {
        "size": 16,
        "text_encoder": "text/mini",
        "tokens": 8,
        "predicts": "v",
        "latent_scale": 2.0,
        "schedule": {"name": "scaled_linear", "steps": 1000},
        "unet": DDPM["config"]["unet"]
        | {"in_channels": 2, "out_channels": 2, "transformer": True, "context": 384},
        "autoencoder": {
            "axes": 2,
            "in_channels": 3,
            "latent": 2,
            "channels": 8,
            "multipliers": [1, 2],
            "blocks": 1,
            "groups": 4,
            "attention": False,
        },
    },
}
SYSTEMS = {"ddpm": DDPM, "stable-diffusion": STABLE_DIFFUSION}

Entry = dict[str, Any]


def entry_of(system: str, config: dict[str, Any], **fields: Any) -> Entry:
    """An entry of a registry.toml, without files; `config` is laid over, with `unet` laid over within."""
    base = SYSTEMS[system]
    unet = base["config"]["unet"] | config.pop("unet", {})
    about = {name: "made up" for name in ("summary", "licence", "source")}
    about |= {"defaults": {"steps": 2, "precision": "fp32", "grid": "trailing"}}
    return about | base | {"config": base["config"] | config | {"unet": unet}} | fields


@pytest.fixture
def card() -> Callable[..., ModelCard]:
    """card("ddpm", size=16, unet={...}) -> a card, without files."""

    def make(system: str, **config: Any) -> ModelCard:
        check = registry.Checker("test")
        entry = entry_of(system, config)
        return registry.card_of(check, f"image/{system}", entry, Path())

    return make


@pytest.fixture
def folder(tmp_path: Path, card: Callable[..., ModelCard]) -> Callable[..., Path]:
    """folder("ddpm", ...) -> a folder with such a model, random weights and a registry.toml."""

    def make(system: str, options: list[dict[str, Any]] | None = None, **fields: Any) -> Path:
        at = tmp_path / system
        at.mkdir()
        config = fields.pop("config", {})
        entry = entry_of(system, dict(config), options=options or [], **fields)
        model = mdiff_build(card(system, **config), "cpu", torch.float32)
        files = []
        torch.manual_seed(0)
        for name, module in model.modules.items():
            for parameter in module.parameters():  # zeros among them would hide what they multiply
                torch.nn.init.normal_(parameter, std=0.1)
            path = at / f"{name}.safetensors"
            save_file(module.state_dict(), path)
            data = path.read_bytes()
            about = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
            files.append({"name": path.name, "module": name, **about})
        models = {f"image/{system}": entry | {"files": files}}
        (at / "registry.toml").write_text(tomli_w.dumps({"models": models}))
        return at

    return make
