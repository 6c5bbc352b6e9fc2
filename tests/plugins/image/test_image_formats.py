"""Public files of image models: every published size, and what is said of a file that is something else."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mdiff.core.errors import IntegrityError, UsageError
from mdiff.core.nn import layouts
from mdiff.core.nn.autoencoder import AutoencoderKL
from mdiff.core.nn.unet import UNet
from mdiff.plugins.image.formats import single_file
from mdiff.plugins.image.formats.published import AUTOENCODER, PUBLISHED

SIZES = {
    "ddpm-cifar10": (35_746_307, 328),
    "ddpm-celeba-64": (78_700_803, None),
    "ddpm-256": (113_673_219, None),
    "improved-cifar10": (52_546_438, 446),
    "improved-imagenet-64": (121_063_942, 450),
    "improved-imagenet-64-class": (273_049_350, None),
    "improved-lsun-256": (113_676_678, None),
    "adm-64": (295_904_454, 541),
    "adm-128": (421_529_606, None),
    "adm-256": (553_838_086, 567),
    "adm-256-unconditional": (552_814_086, None),
    "adm-lsun-256": (552_814_086, None),
    "adm-512": (558_997_638, None),
    "adm-upsampler-64-256": (311_795_910, None),
    "adm-upsampler-128-512": (308_835_270, None),
    "sd-1": (859_520_964, 686),
    "sd-2-base": (865_910_724, 686),
    "sd-2": (865_910_724, 686),
    "sdxl": (2_567_463_684, 1680),
}
"""Parameters and tensors of the references' own networks; None where only the former were counted."""
VARIANTS = {
    # more input channels of the first convolution, 3 x 3 to 320
    "sd-1-inpainting": ("sd-1", 5 * 320 * 9),
    "sd-2-inpainting": ("sd-2", 5 * 320 * 9),
    "instruct-pix2pix": ("sd-1", 4 * 320 * 9),
    # two layers from the vector to 1280
    "sd-2-unclip-l": ("sd-2", 1280 * (1536 + 1) + 1280 * 1281),
    "sd-2-unclip-h": ("sd-2", 1280 * (2048 + 1) + 1280 * 1281),
}


def unet(name: str) -> UNet:
    with torch.device("meta"):
        return UNet(**PUBLISHED[name]["config"]["unet"])


def size(net: UNet | AutoencoderKL, layout: str) -> tuple[int, int]:
    """Parameters, and tensors of a file in a layout."""
    tensors = layouts.names(net, layout).values()
    assert len({key for keys in tensors for key in keys}) == sum(map(len, tensors))
    return sum(p.numel() for p in net.parameters()), sum(map(len, tensors))


def layout_of(name: str) -> str:
    layout = PUBLISHED[name]["layout"]
    return single_file.PARTS["unet"][1] if layout == "stable-diffusion" else layout


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name: str) -> None:
    parameters, tensors = size(unet(name), layout_of(name))
    assert (parameters, tensors if SIZES[name][1] else None) == SIZES[name]


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_differ_by_what_they_add(name: str) -> None:
    base, more = VARIANTS[name]
    assert size(unet(name), "openai")[0] == SIZES[base][0] + more


def test_sdxl_refiner_is_as_large_as_that_of_diffusers() -> None:
    import diffusers

    with torch.device("meta"):
        reference = diffusers.UNet2DConditionModel(
            block_out_channels=(384, 768, 1536, 1536),
            down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"),
            up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
            transformer_layers_per_block=4,
            attention_head_dim=(6, 12, 24, 24),
            cross_attention_dim=1280,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2560,
        )
    expected = sum(p.numel() for p in reference.parameters()), len(reference.state_dict())
    assert size(unet("sdxl-refiner"), "diffusers") == expected


@pytest.mark.parametrize("layout", ["ddpm", "diffusers"])
def test_published_autoencoder(layout: str) -> None:
    with torch.device("meta"):
        net = AutoencoderKL(**AUTOENCODER)
    assert size(net, layout) == (83_653_863, 248)


def test_every_published_model_is_counted() -> None:
    assert PUBLISHED.keys() == SIZES.keys() | VARIANTS.keys() | {"sdxl-refiner"}


# --- strictness -----------------------------------------------------------------------------------

TINY: dict[str, Any] = {"axes": 2, "in_channels": 3, "out_channels": 3, "channels": 8, "heads": 1}
TINY |= {"multipliers": [1, 2], "attention": [1], "blocks": 1, "groups": 4}
LATENT: dict[str, Any] = {"axes": 2, "in_channels": 3, "latent": 2, "channels": 8}
LATENT |= {"multipliers": [1, 2], "blocks": 1, "groups": 4}


def file_of(net: UNet | AutoencoderKL, layout: str) -> dict[str, Tensor]:
    """Tensors of a network as a file in a layout has them, q, k and v of one head."""
    own = net.state_dict()
    return {
        source: tensor
        for key, sources in layouts.names(net, layout).items()
        for source, tensor in zip(sources, own[key].chunk(len(sources)), strict=True)
    }


def test_what_is_missing_and_what_is_too_much_is_named_as_the_file_names_it() -> None:
    tensors = file_of(UNet(**TINY), "ddpm")
    for key in (
        "conv_in.weight",
        "mid.attn_1.q.bias",
        "up.0.block.0.norm1.weight",
        "conv_out.bias",
    ):
        del tensors[key]
    tensors["step"] = torch.zeros(())
    with pytest.raises(IntegrityError) as caught:
        layouts.load(UNet(**TINY), tensors, "ddpm", "model.ckpt")
    assert str(caught.value) == (
        "model.ckpt does not fit in the layout 'ddpm': 4 missing (conv_in.weight, "
        "mid.attn_1.q.bias, up.0.block.0.norm1.weight, ...); 1 unexpected (step)"
    )


def test_a_tensor_in_both_spellings_is_one_too_many() -> None:
    tensors = file_of(UNet(**TINY), "diffusers")
    extra = "mid_block.attentions.0.query.weight"
    for twice in (tensors | {extra: torch.zeros(16, 16)}, {extra: torch.zeros(16, 16)} | tensors):
        with pytest.raises(IntegrityError, match=f"1 unexpected \\({extra}\\)"):
            layouts.load(UNet(**TINY), twice, "diffusers")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"channels": 16, "groups": 8}, "of another shape"),
        ({"multipliers": [1, 2, 2]}, "missing"),
        ({"multipliers": [1]}, "unexpected"),
        ({"attention": []}, "unexpected"),
        ({"classes": 3}, r"1 missing \(class_embedding.weight\)"),
    ],
)
def test_other_networks_are_refused(change: dict[str, Any], said: str) -> None:
    tensors = file_of(UNet(**TINY), "diffusers")
    net = UNet(**TINY | change)
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(IntegrityError, match=said):
        layouts.load(net, tensors, "diffusers")
    assert all(map(torch.equal, net.parameters(), before))


def test_only_kernels_of_one_position_are_taken_as_matrices() -> None:
    tensors = file_of(UNet(**TINY), "ddpm")
    whole = tensors["mid.attn_1.proj_out.weight"]
    for shape in ((16, 16), (16, 16, 1), (16, 16, 1, 1)):
        layouts.load(
            UNet(**TINY), tensors | {"mid.attn_1.proj_out.weight": whole.reshape(shape)}, "ddpm"
        )
    for shape in ((1, 16, 16), (256,), (8, 32), (16, 4, 4)):
        wrong = tensors | {"mid.attn_1.proj_out.weight": whole.reshape(shape)}
        with pytest.raises(IntegrityError, match="1 of another shape"):
            layouts.load(UNet(**TINY), wrong, "ddpm")
    wrong = tensors | {"mid.attn_1.q.weight": torch.zeros(16, 8)}
    with pytest.raises(IntegrityError, match=r"\(16, 8\) and \(16, 16\) .*cannot be joined"):
        layouts.load(UNet(**TINY), wrong, "ddpm")


def test_unknown_layouts_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown layout 'difusers'; did you mean 'diffusers'"):
        layouts.load(UNet(**TINY), {}, "difusers")


def test_single_files_are_taken_apart() -> None:
    net, first_stage = UNet(**TINY), AutoencoderKL(**LATENT)
    tensors = {
        **{f"model.diffusion_model.{k}": v for k, v in file_of(net, "openai").items()},
        **{f"first_stage_model.{k}": v for k, v in file_of(first_stage, "ddpm").items()},
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.zeros(1, 77),
        "model_ema.diffusion_modelout0weight": torch.zeros(8),
        "alphas_cumprod": torch.zeros(1000),
    }
    loaded = {"unet": UNet(**TINY), "autoencoder": AutoencoderKL(**LATENT)}
    single_file.load(loaded, tensors)
    for found, expected in zip(loaded.values(), (net, first_stage), strict=True):
        assert all(map(torch.equal, found.state_dict().values(), expected.state_dict().values()))
    del tensors["first_stage_model.quant_conv.bias"]
    with pytest.raises(
        IntegrityError, match=r"autoencoder of a\.ckpt .*1 missing \(quant_conv.bias\)"
    ):
        single_file.load(loaded, tensors, "a.ckpt")
    no_unet = {k: v for k, v in tensors.items() if "diffusion_model." not in k}
    with pytest.raises(
        IntegrityError, match="has no unet: no key begins with model.diffusion_model"
    ):
        single_file.load(loaded, no_unet)
    with pytest.raises(IntegrityError, match=r"not a Stable Diffusion file: 1 unexpected \(lora"):
        single_file.load(loaded, tensors | {"lora_unet_mid.alpha": torch.zeros(())})
