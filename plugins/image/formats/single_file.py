"""Stable Diffusion's single files: several networks in one state dict, each under a prefix and in its own layout."""

from collections.abc import Mapping

from torch import Tensor

from mdiff.core.errors import IntegrityError
from mdiff.core.nn import layouts
from mdiff.core.nn.autoencoder import AutoencoderKL
from mdiff.core.nn.unet import UNet

PARTS: Mapping[str, tuple[str, str]] = {
    "unet": ("model.diffusion_model.", "openai"),
    "autoencoder": ("first_stage_model.", "ddpm"),
}
"""Module of a model -> the prefix of its keys, and what layout they are in behind it."""

OTHERS = (
    # text encoders; the same averaged over training; ControlNet; unCLIP's noise
    *("cond_stage_model.", "conditioner.", "embedder.", "model_ema.", "control_model."),
    "noise_augmentor.",
    # the schedule, and weights of the loss
    *("betas", "alphas_cumprod", "sqrt_", "log_one_minus_", "posterior_", "lvlb_weights"),
    *("logvar", "scale_factor", "denoiser.sigmas"),
)
"""How keys begin that belong to neither."""


def load(
    modules: Mapping[str, UNet | AutoencoderKL],
    tensors: Mapping[str, Tensor],
    name: str = "state dict",
) -> None:
    """Fills modules, of the names in `PARTS`, from the tensors of a file; `name` says in messages what it is.

    Raises:
        IntegrityError: a network is not in there, or a key is of nothing known, or as `layouts.load`.
    """
    found = parts(tensors, name)
    for module, net in modules.items():
        prefix, layout = PARTS[module]
        if not found[module]:
            first = ", ".join(list(tensors)[:3])
            raise IntegrityError(
                f"{name} has no {module}: no key begins with {prefix} ({first}, ...)"
            )
        layouts.load(net, found[module], layout, f"{module} of {name}")


def parts(tensors: Mapping[str, Tensor], name: str = "state dict") -> dict[str, dict[str, Tensor]]:
    """The tensors of each network in `PARTS`, their prefix taken off; empty for one that is not there.

    Raises:
        IntegrityError: a key begins in a way that no Stable Diffusion's does.
    """
    found = {
        module: {
            key.removeprefix(prefix): tensor
            for key, tensor in tensors.items()
            if key.startswith(prefix)
        }
        for module, (prefix, _) in PARTS.items()
    }
    known = (*(prefix for prefix, _ in PARTS.values()), *OTHERS)
    left = [key for key in tensors if not key.startswith(known)]
    if left:
        raise IntegrityError(
            f"{name} is not a Stable Diffusion file: {len(left)} unexpected "
            f"({', '.join(left[:3])}{', ...' if len(left) > 3 else ''})"
        )
    return found
