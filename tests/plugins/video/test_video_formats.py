"""Checkpoints of video-diffusion-pytorch: the same output as the package's on random weights, and strictness."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import video_diffusion_pytorch as reference
from torch import Tensor, nn

from mdiff.core import pth, schedules
from mdiff.core.errors import IntegrityError
from mdiff.plugins.video.formats import lucidrains
from mdiff.plugins.video.nets.unet3d import Unet3D

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "text": {"cond_dim": 5},
    "one level": {"dim_mults": (2,)},
    "three levels": {"dim_mults": (1, 2, 3), "attn_heads": 4},
    "wide heads": {"attn_heads": 2, "attn_dim_head": 40},
    "narrow heads": {"attn_heads": 2, "attn_dim_head": 16},
    "no linear attention": {"use_sparse_linear_attn": False},
    "grey, small stem, other output": {"channels": 1, "init_kernel_size": 3, "out_dim": 2},
}
VERSIONS = [(case, False) for case in CASES] + [("plain", True), ("text", True)]
"""Those of 0.7, and of 0.6, in which the norms alone differ."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def theirs(older: bool = False, **arguments: Any) -> nn.Module:
    """The package's network with random weights; `older` with the norms of version 0.6."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = reference.Unet3D(**({"dim": 16, "dim_mults": (1, 2)} | arguments))
        if older:
            for module in list(net.modules()):
                if type(module).__name__ == "Block":
                    module.norm = nn.GroupNorm(8, module.proj.out_channels)
        for name, parameter in net.named_parameters():
            if name.endswith(("gamma", "norm.weight", "norm.bias", "bias")):
                nn.init.normal_(parameter, 0.5 if "bias" in name else 1.0, 0.3)
    return net.eval()


def ours(tensors: dict[str, Tensor]) -> Unet3D:
    net = Unet3D(**lucidrains.arguments(tensors))
    lucidrains.load(net, tensors)
    return net.eval()


@pytest.mark.parametrize(("case", "older"), VERSIONS)
@torch.no_grad()
def test_output_is_that_of_the_package(case: str, older: bool) -> None:
    net = theirs(older, **CASES[case])
    own = ours(net.state_dict())
    draw = torch.Generator().manual_seed(1)
    for frames, height, width in ((5, 8, 12), (1, 4, 4), (40, 4, 4)):
        x = torch.randn(2, CASES[case].get("channels", 3), frames, height, width, generator=draw)
        t = torch.tensor([7, 900])
        cond = torch.randn(2, 5, generator=draw) if "cond_dim" in CASES[case] else None
        expected = net(x, t, cond=cond)
        found = own(x, t.float(), **({} if cond is None else {"vector": cond}))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        if cond is not None:
            without = net(x, t, cond=cond, null_cond_prob=1.0)
            assert own.nothing is not None
            found = own(x, t.float(), vector=own.nothing.expand(2, -1))
            torch.testing.assert_close(found, without, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_frames_apart_are_the_package_s_focus_on_the_present() -> None:
    net = theirs()
    # the package lets the attention after the stem look at other frames even then
    nn.init.zeros_(net.init_temporal_attn.fn.fn.fn.to_out.weight)
    own = ours(net.state_dict())
    x, t = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.ones(2)
    clips = torch.tensor([[0, 1, 2, 3], [0, 0, 0, 0]])
    expected = net(x, t, focus_present_mask=torch.tensor([True, False]))
    torch.testing.assert_close(own(x, t, clips=clips), expected, atol=1e-5, rtol=1e-5)


def diffusion(**arguments: Any) -> nn.Module:
    return reference.GaussianDiffusion(
        theirs(**arguments), image_size=8, num_frames=4, timesteps=1000
    )


def test_training_checkpoints(tmp_path: Path) -> None:
    trained, averaged = diffusion(), diffusion()
    nn.init.ones_(averaged.denoise_fn.init_conv.bias)
    path = tmp_path / "model-1.pt"
    parts = {"step": 3, "model": trained.state_dict(), "ema": averaged.state_dict(), "scaler": {}}
    torch.save(parts, path)
    tensors = pth.tensors(path)
    assert (ours(tensors).stem.bias == 1).all()
    trained_only = lucidrains.network(tensors, part="model")
    torch.testing.assert_close(trained_only["init_conv.bias"], trained.denoise_fn.init_conv.bias)
    # and the schedule is the one that its model's config names
    params = dict(lucidrains.CONFIG["schedule"])
    schedule = schedules.from_name(params.pop("name"), **params)
    alpha, _ = schedule(torch.arange(1, 1001, dtype=torch.float64) / 1000)
    torch.testing.assert_close(
        alpha.float() ** 2, tensors["ema.alphas_cumprod"], atol=1e-6, rtol=1e-4
    )


SPOILT: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop("mid_block1.block1.proj.bias"), "1 missing .mid_block1.block1"),
    "unexpected": (lambda t: t.update(extra=torch.ones(1)), "1 unexpected .extra"),
    "shape": (
        lambda t: t.update({"final_conv.1.bias": torch.ones(4)}),
        "of another shape .out.bias",
    ),
    "rotation": (
        lambda t: t["downs.1.3.fn.fn.fn.rotary_emb.freqs"].mul_(2),
        "downs.1.3.*frequencies of rotation",
    ),
    "no rotation": (
        lambda t: t.pop("mid_temporal_attn.fn.fn.fn.rotary_emb.freqs"),
        "mid_temporal_attn.*frequencies of rotation",
    ),
    "older norms": (
        lambda t: t.update({"downs.0.0.block1.norm.weight": t["downs.0.0.block1.norm.gamma"]}),
        "missing|unexpected",
    ),
}


@pytest.mark.parametrize("how", SPOILT)
def test_other_files_are_refused(how: str) -> None:
    tensors = {key: value.detach().clone() for key, value in theirs().state_dict().items()}
    net = Unet3D(**lucidrains.arguments(tensors))
    spoil, message = SPOILT[how]
    spoil(tensors)
    with pytest.raises(IntegrityError, match=message):
        lucidrains.load(net, tensors, "file.pt")


def test_files_of_something_else_are_refused() -> None:
    with pytest.raises(IntegrityError, match="no checkpoint of lucidrains"):
        lucidrains.arguments({"conv.weight": torch.ones(1)})
    whole = dict(diffusion().state_dict()) | {"vae.weight": torch.ones(1)}
    with pytest.raises(IntegrityError, match="unexpected vae.weight"):
        lucidrains.network(whole)


def test_the_default_network_has_the_size_of_the_package_s() -> None:
    with torch.device("meta"):
        own, net = Unet3D(), reference.Unet3D(64)
    # the frequencies of rotation, which all its attention shares
    rotation = 16
    assert parameters(own) + rotation == parameters(net)


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())
