"""The networks say what their references say: random small weights, loaded strictly through a layout."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from torch import Tensor, nn

from mdiff.core.nn import layouts
from mdiff.core.nn.autoencoder import AutoencoderKL
from mdiff.core.nn.layers import timestep_embedding
from mdiff.core.nn.unet import UNet
from mdiff.plugins.image.formats import single_file

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its helpers for MPI
    from guided_diffusion.unet import UNetModel

SMALL: dict[str, Any] = {"axes": 2, "in_channels": 3, "out_channels": 3, "channels": 16}
SMALL |= {"multipliers": [1, 2, 2], "groups": 8}
TIMES = torch.tensor([3, 999])


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def shaken(net: nn.Module) -> Any:
    """The network with every parameter moved off its start, also in branches that begin at zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return net.eval()


def agree(found: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def compare(
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    layout: str,
    reference: Callable[[Tensor, Tensor], Tensor],
    **cond: Tensor,
) -> None:
    net = UNet(**config).eval()
    layouts.load(net, tensors, layout)
    x = noise(2, config["in_channels"], 16, 16)
    agree(net(x, TIMES, **cond), reference(x, TIMES))


# --- DDPM -----------------------------------------------------------------------------------------

DDPM = SMALL | {"attention": [1], "heads": 1, "padding": "end", "eps": 1e-6}
DDPM |= {"sine_first": True, "frequency_shift": 1}


def unet_2d(**changes: Any) -> Any:
    """The UNet2DModel of DDPM's folders, small."""
    torch.manual_seed(0)
    config = {
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": None,
        "norm_num_groups": 8,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
        "norm_eps": 1e-6,
    }
    return shaken(diffusers.UNet2DModel(**config | changes))


def told(net: Any, **cond: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, t: net(x, t, **cond).sample


def test_ddpm() -> None:
    reference = unet_2d()
    compare(DDPM, reference.state_dict(), "diffusers", told(reference))


def test_ddpm_before_2023() -> None:
    reference = unet_2d()
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {
        re.sub("|".join(older), lambda found: older[found[0]], key): tensor
        for key, tensor in reference.state_dict().items()
    }
    assert "mid_block.attentions.0.query.weight" in tensors
    compare(DDPM, tensors, "diffusers", told(reference))


def test_ddpm_in_its_plain_spelling() -> None:
    """The rules by which the plain spelling becomes the diffusers one, the other way round."""
    rules = [
        (r"^time_embedding\.linear_(\d)", lambda m: f"temb.dense.{int(m[1]) - 1}"),
        (r"^up_blocks\.(\d)", lambda m: f"up.{2 - int(m[1])}"),
        (r"^down_blocks", "down"),
        (r"^mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"^mid_block\.attentions\.0", "mid.attn_1"),
        (r"\.resnets\.", ".block."),
        (r"\.attentions\.", ".attn."),
        (r"\.(down|up)samplers\.0\.", r".\1sample."),
        (r"time_emb_proj", "temb_proj"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"group_norm|conv_norm_out", lambda m: {"g": "norm", "c": "norm_out"}[m[0][0]]),
        (r"to_([qkv])\.", r"\1."),
        (r"to_out\.0", "proj_out"),
    ]
    reference = unet_2d()
    tensors = {}
    for key, tensor in reference.state_dict().items():
        for pattern, name in rules:
            key = re.sub(pattern, name, key)
        attention = re.search(r"attn\S*\.(q|k|v|proj_out)\.weight", key)
        tensors[key] = tensor[:, :, None, None] if attention else tensor
    assert tensors["up.1.attn.2.proj_out.weight"].shape == (32, 32, 1, 1)
    compare(DDPM, tensors, "ddpm", told(reference))


def test_heads_classes_scale_and_shift_and_residual_resampling() -> None:
    """What folders of UNet2DModel may have beyond DDPM; with several heads the packing of q, k and v matters."""
    reference = unet_2d(
        attention_head_dim=8,
        num_class_embeds=5,
        resnet_time_scale_shift="scale_shift",
        attn_norm_num_groups=8,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
    )
    config = {"heads": None, "head_width": 8, "classes": 5, "scale_shift": True}
    config |= {"resample_residual": True}
    label = torch.tensor([4, 0])
    said = told(reference, class_labels=label)
    compare(DDPM | config, reference.state_dict(), "diffusers", said, label=label)


# --- Improved DDPM and ADM ------------------------------------------------------------------------

GUIDED = {
    "improved": {"heads": 4},
    "one head and no scale": {"heads": 1, "scale_shift": False},
    "adm": {"head_width": 16, "resample_residual": True},
    "adm 64": {"head_width": 16, "resample_residual": True, "classes": 7},
    "adm 512": {"heads": 2, "resample_residual": True, "multipliers": [0.5, 1, 1]},
}


@pytest.mark.parametrize("name", GUIDED)
def test_guided_diffusion(name: str) -> None:
    layout = "openai-qkv-first" if name == "adm 64" else "openai"
    config = SMALL | {"out_channels": 6, "channels": 64, "multipliers": [0.5, 1], "blocks": 1}
    config |= {"attention": [1], "scale_shift": True, "groups": 32} | GUIDED[name]
    torch.manual_seed(0)
    reference = shaken(
        UNetModel(
            image_size=16,
            in_channels=3,
            model_channels=64,
            out_channels=6,
            num_res_blocks=1,
            attention_resolutions=(2,),
            channel_mult=config["multipliers"],
            num_classes=config.get("classes"),
            num_heads=config.get("heads", 1),
            num_head_channels=config.get("head_width", -1),
            use_scale_shift_norm=config["scale_shift"],
            resblock_updown=config.get("resample_residual", False),
            use_new_attention_order=name == "adm 64",
        )
    )
    cond = {"label": torch.tensor([6, 2])} if "classes" in config else {}
    compare(
        config,
        reference.state_dict(),
        layout,
        lambda x, t: reference(x, t, cond.get("label")),
        **cond,
    )


# --- Stable Diffusion -----------------------------------------------------------------------------

STABLE = SMALL | {"in_channels": 4, "out_channels": 4, "transformer": True, "context": 12}
SD_1 = STABLE | {"attention": [0, 1], "heads": 2}
SD_2 = STABLE | {"attention": [0, 1], "head_width": 8}
SDXL = STABLE | {"attention": [1, 2], "depth": [0, 1, 2], "head_width": 8}
SDXL |= {"vector": 10 + 6 * 8, "vector_added": True}


def unet_condition(attention: list[int], **changes: Any) -> Any:
    torch.manual_seed(0)
    kinds = [f"{'CrossAttn' if level in attention else ''}{{}}Block2D" for level in range(3)]
    config = {
        "block_out_channels": (16, 32, 32),
        "down_block_types": tuple(kind.format("Down") for kind in kinds),
        "up_block_types": tuple(kind.format("Up") for kind in reversed(kinds)),
        "norm_num_groups": 8,
        "cross_attention_dim": 12,
    }
    return shaken(diffusers.UNet2DConditionModel(**config | changes))


def test_stable_diffusion_1() -> None:
    reference, context = unet_condition([0, 1], attention_head_dim=2), noise(2, 5, 12)
    said = told(reference, encoder_hidden_states=context)
    compare(SD_1, reference.state_dict(), "diffusers", said, context=context)


def test_stable_diffusion_2() -> None:
    """Heads of one width, projections as matrices; nine input channels, as inpainting has."""
    reference = unet_condition(
        [0, 1], attention_head_dim=(2, 4, 4), use_linear_projection=True, in_channels=9
    )
    context = noise(2, 5, 12)
    said = told(reference, encoder_hidden_states=context)
    compare(SD_2 | {"in_channels": 9}, reference.state_dict(), "diffusers", said, context=context)


def test_stable_diffusion_2_unclip() -> None:
    reference = unet_condition(
        [0, 1],
        attention_head_dim=(2, 4, 4),
        use_linear_projection=True,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=6,
    )
    cond = {"context": noise(2, 5, 12), "vector": noise(2, 6)}
    said = told(reference, encoder_hidden_states=cond["context"], class_labels=cond["vector"])
    config = SD_2 | {"vector": 6, "vector_added": True}
    compare(config, reference.state_dict(), "diffusers-unclip", said, **cond)


def test_sdxl() -> None:
    """The vector is the pooled text and six sinusoids of sizes in pixels."""
    reference = unet_condition(
        [1, 2],
        attention_head_dim=(2, 4, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=10 + 6 * 8,
    )
    pooled, context = noise(2, 10), noise(2, 5, 12)
    sizes = torch.tensor([[1024.0, 768, 0, 12, 1024, 768], [512, 512, 0, 0, 1024, 1024]])
    waves = timestep_embedding(sizes.flatten(), 8).reshape(2, -1)
    said = told(
        reference,
        encoder_hidden_states=context,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes},
    )
    cond = {"context": context, "vector": torch.cat([pooled, waves], dim=1)}
    compare(SDXL, reference.state_dict(), "diffusers", said, **cond)


AUTOENCODER: dict[str, Any] = {"axes": 2, "in_channels": 3, "latent": 4, "channels": 16}
AUTOENCODER |= {"multipliers": [1, 2, 2], "groups": 8, "padding": "end"}


@pytest.fixture(scope="module")
def autoencoder() -> Any:
    torch.manual_seed(0)
    reference = diffusers.AutoencoderKL(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        norm_num_groups=8,
    )
    return shaken(reference)


@torch.no_grad()
def test_autoencoder(autoencoder: Any) -> None:
    net = AutoencoderKL(**AUTOENCODER).eval()
    layouts.load(net, autoencoder.state_dict(), "diffusers")
    x = noise(2, 3, 16, 24)
    found, expected = net.encode(x), autoencoder.encode(x).latent_dist
    agree(found.mean, expected.mean)
    agree(found.log_variance, expected.logvar)
    agree(net.decode(found.mean), autoencoder.decode(expected.mean).sample)


@torch.no_grad()
@pytest.mark.parametrize("config", [SD_1, SD_2, SDXL], ids=["SD 1", "SD 2", "SDXL"])
def test_single_file(config: dict[str, Any], autoencoder: Any) -> None:
    """A file in the original spelling means to us what it means to diffusers' converter.

    Its tensors are ours under the names of the layout, those of attention in the autoencoder as
    convolutions; SD 2's and SDXL's projections are matrices.
    """
    unet, net = shaken(UNet(**config)), shaken(AutoencoderKL(**AUTOENCODER))
    tensors: dict[str, Tensor] = {}
    for (prefix, layout), part in zip(single_file.PARTS.values(), (unet, net), strict=True):
        for key, sources in layouts.names(part, layout).items():
            pieces = part.state_dict()[key].chunk(len(sources))
            tensors |= {prefix + s: piece for s, piece in zip(sources, pieces, strict=True)}
    for key, tensor in tensors.items():
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", key):
            tensors[key] = tensor[:, :, None, None]
        if config is not SD_1 and re.search(r"proj_(in|out)\.weight", key) and tensor.ndim == 4:
            tensors[key] = tensor[:, :, 0, 0]
    loaded = {"unet": UNet(**config).eval(), "autoencoder": AutoencoderKL(**AUTOENCODER).eval()}
    single_file.load(loaded, tensors | {"betas": torch.zeros(3)})
    for found, expected in zip(loaded.values(), (unet, net), strict=True):
        for a, b in zip(found.parameters(), expected.parameters(), strict=True):
            assert torch.equal(a, b)
    added = "text_time" if "vector" in config else None
    folder = {"layers_per_block": 2, "addition_embed_type": added}
    theirs = single_file_utils.convert_ldm_unet_checkpoint(dict(tensors), folder)
    again = UNet(**config)
    layouts.load(again, theirs, "diffusers")
    assert all(map(torch.equal, again.state_dict().values(), unet.state_dict().values()))
    config_vae = {"down_block_types": [""] * 3, "up_block_types": [""] * 3}
    theirs = single_file_utils.convert_ldm_vae_checkpoint(dict(tensors), config_vae)
    assert theirs.keys() == autoencoder.state_dict().keys()
    layouts.load(loaded["autoencoder"], theirs, "diffusers")
    assert all(
        map(torch.equal, loaded["autoencoder"].state_dict().values(), net.state_dict().values())
    )
