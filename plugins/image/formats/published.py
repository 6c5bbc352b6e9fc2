"""What is published of pixel and latent diffusion: each release as a model's `config`, and the layout of its file.

The same networks are found in diffusers folders, in the layout "diffusers" (unCLIP's in "diffusers-unclip"). Sources:
the releases' own scripts and configuration files.
"""

from collections.abc import Mapping
from typing import Any

_PIXELS: dict[str, Any] = {"axes": 2, "in_channels": 3, "out_channels": 3}
_LEARNED_VARIANCE: dict[str, Any] = {**_PIXELS, "out_channels": 6}
_LINEAR: dict[str, Any] = {"name": "linear"}

# --- DDPM (Ho et al., 2020): github.com/hojonathanho/diffusion, as PyTorch in github.com/ermongroup/ddim

_HO: dict[str, Any] = {
    **_PIXELS,
    "channels": 128,
    "heads": 1,
    "padding": "end",
    "eps": 1e-6,
    "sine_first": True,
    "frequency_shift": 1,
}
_HO_256: dict[str, Any] = {**_HO, "multipliers": [1, 1, 2, 2, 4, 4], "attention": [4]}


def _ddpm(size: int, **unet: Any) -> dict[str, Any]:
    return {
        "layout": "ddpm",
        "config": {"size": size, "predicts": "eps", "schedule": _LINEAR, "unet": unet},
    }


# --- Improved DDPM (Nichol and Dhariwal, 2021): github.com/openai/improved-diffusion

_IMPROVED: dict[str, Any] = {
    **_LEARNED_VARIANCE,
    "channels": 128,
    "blocks": 3,
    "heads": 4,
    "scale_shift": True,
}
_IMPROVED_64: dict[str, Any] = {**_IMPROVED, "multipliers": [1, 2, 3, 4], "attention": [2, 3]}


def _improved(size: int, schedule: Mapping[str, Any], **unet: Any) -> dict[str, Any]:
    config = {
        "size": size,
        "predicts": "eps",
        "time": "index_scaled",
        "learned_variance": True,
        "schedule": schedule,
        "unet": unet,
    }
    return {"layout": "openai", "config": config}


# --- ADM (Dhariwal and Nichol, 2021): github.com/openai/guided-diffusion

_ADM: dict[str, Any] = {
    **_LEARNED_VARIANCE,
    "channels": 256,
    "scale_shift": True,
    "resample_residual": True,
}
_ADM_256: dict[str, Any] = {**_ADM, "multipliers": [1, 1, 2, 2, 4, 4], "attention": [3, 4, 5]}
_ADM_UP: dict[str, Any] = {**_ADM_256, "in_channels": 6, "channels": 192, "classes": 1000}


def _adm(
    size: int,
    layout: str = "openai",
    schedule: Mapping[str, Any] = _LINEAR,
    **unet: Any,
) -> dict[str, Any]:
    config = {
        "size": size,
        "predicts": "eps",
        "learned_variance": True,
        "schedule": schedule,
        "unet": unet,
    }
    return {"layout": layout, "config": config}


# --- Stable Diffusion (Rombach et al., 2022; Podell et al., 2023): the files of CompVis and Stability AI

_LATENT: dict[str, Any] = {"axes": 2, "in_channels": 4, "out_channels": 4, "transformer": True}
_SD: dict[str, Any] = {
    **_LATENT,
    "channels": 320,
    "multipliers": [1, 2, 4, 4],
    "attention": [0, 1, 2],
}
_SD_1: dict[str, Any] = {**_SD, "heads": 8, "context": 768}
_SD_2: dict[str, Any] = {**_SD, "head_width": 64, "context": 1024}
_SDXL: dict[str, Any] = {**_LATENT, "attention": [1, 2], "head_width": 64, "vector_added": True}


def _stable(
    size: int, predicts: str = "eps", latent_scale: float = 0.18215, **unet: Any
) -> dict[str, Any]:
    config = {
        "size": size,
        "tokens": 77,
        "predicts": predicts,
        "schedule": {"name": "scaled_linear"},
        "latent_scale": latent_scale,
        "unet": unet,
        "autoencoder": AUTOENCODER,
    }
    return {"layout": "stable-diffusion", "config": config}


AUTOENCODER: Mapping[str, Any] = {
    "axes": 2,
    "in_channels": 3,
    "latent": 4,
    "channels": 128,
    "multipliers": [1, 2, 4, 4],
    "padding": "end",
}
"""Of all Stable Diffusion up to SDXL; in layout "ddpm" in its files."""

PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "ddpm-cifar10": _ddpm(32, **_HO, multipliers=[1, 2, 2, 2], attention=[1], dropout=0.1),
    "ddpm-celeba-64": _ddpm(64, **_HO, multipliers=[1, 2, 2, 2, 4], attention=[2], dropout=0.1),
    "ddpm-256": _ddpm(256, **_HO_256),  # CelebA-HQ, LSUN bedroom, cat, church
    "improved-cifar10": _improved(
        32,
        {"name": "cosine_betas", "steps": 4000},
        **_IMPROVED,
        multipliers=[1, 2, 2, 2],
        attention=[1, 2],
        dropout=0.3,
    ),
    "improved-imagenet-64": _improved(64, {"name": "cosine_betas", "steps": 4000}, **_IMPROVED_64),
    "improved-imagenet-64-class": _improved(
        64,
        {"name": "cosine_betas", "steps": 4000},
        **{**_IMPROVED_64, "channels": 192, "classes": 1000},
    ),
    "improved-lsun-256": _improved(
        256,
        _LINEAR,
        **_LEARNED_VARIANCE,
        channels=128,
        multipliers=[1, 1, 2, 2, 4, 4],
        attention=[4],
        heads=1,
    ),
    "adm-64": _adm(
        64,
        "openai-qkv-first",
        {"name": "cosine_betas"},
        **{**_ADM, "channels": 192, "blocks": 3, "classes": 1000, "dropout": 0.1},
        multipliers=[1, 2, 3, 4],
        attention=[1, 2, 3],
    ),
    "adm-128": _adm(
        128, **_ADM, multipliers=[1, 1, 2, 3, 4], attention=[2, 3, 4], heads=4, classes=1000
    ),
    "adm-256": _adm(256, **_ADM_256, classes=1000),
    "adm-256-unconditional": _adm(256, **_ADM_256),
    "adm-lsun-256": _adm(256, **_ADM_256, dropout=0.1),
    "adm-512": _adm(
        512, **_ADM, multipliers=[0.5, 1, 1, 2, 2, 4, 4], attention=[4, 5, 6], classes=1000
    ),
    "adm-upsampler-64-256": _adm(256, **_ADM_UP, heads=4),
    "adm-upsampler-128-512": _adm(512, **{**_ADM_UP, "attention": [4, 5]}),
    "sd-1": _stable(512, **_SD_1),
    "sd-1-inpainting": _stable(512, **{**_SD_1, "in_channels": 9}),
    "instruct-pix2pix": _stable(512, **{**_SD_1, "in_channels": 8}),
    "sd-2-base": _stable(512, **_SD_2),
    "sd-2": _stable(768, "v", **_SD_2),
    "sd-2-inpainting": _stable(512, **{**_SD_2, "in_channels": 9}),
    "sd-2-unclip-l": _stable(768, "v", **_SD_2, vector=1536, vector_added=True),
    "sd-2-unclip-h": _stable(768, "v", **_SD_2, vector=2048, vector_added=True),
    "sdxl": _stable(
        1024,
        latent_scale=0.13025,
        **_SDXL,
        channels=320,
        multipliers=[1, 2, 4],
        depth=[0, 2, 10],
        context=2048,
        vector=2816,
    ),
    "sdxl-refiner": _stable(
        1024,
        latent_scale=0.13025,
        **_SDXL,
        channels=384,
        multipliers=[1, 2, 4, 4],
        depth=4,
        context=1280,
        vector=2560,
    ),
}
"""Name -> layout of the original file, and `config` as `ddpm.build` or `stable_diffusion.build` takes it. The latter
has to be told of a text encoder; networks with a vector, or with more input channels than latents, want those as well.

The layout "stable-diffusion" is that of a file with several networks, which `single_file` takes apart.
"""
