"""DiffWave's public weights: both families load strictly and give what their formulas say."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from mdiff.core.errors import IntegrityError, MissingError, UsageError
from mdiff.plugins.audio.formats.diffwave import PUBLISHED, load, read
from mdiff.plugins.audio.nets.diffwave import DiffWave

LMNT: dict[str, Any] = {"channels": 8, "layers": 4, "cycle": 3, "mels": 80}
VOCODER: dict[str, Any] = {
    "channels": 6,
    "layers": 4,
    "cycle": 3,
    "mels": 5,
    "embedding": "falling",
    "upsampler_per_layer": True,
    "residual_includes_time": True,
}
UNCONDITIONAL: dict[str, Any] = {**VOCODER, "mels": None, "upsampler_per_layer": False}
STEPS = [0.0, 7.0, 49.0, 0.894134, 42.918643]


# --- lmnt: its own package is the reference


@pytest.fixture(scope="module")
def lmnt() -> Any:
    """The reference with random weights, also where it starts at zero."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            from diffwave.model import DiffWave as Reference
            from diffwave.params import AttrDict, params
    except ModuleNotFoundError as error:
        pytest.fail(f"{error}: run `pip install --no-deps diffwave==0.1.7`, the reference")
    size = {"residual_channels": 8, "residual_layers": 4, "dilation_cycle_length": 3}
    torch.manual_seed(0)
    net = Reference(AttrDict({**params, **size}))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net.eval()


@pytest.mark.parametrize("step", STEPS)
def test_lmnt_agrees_with_its_package(lmnt: Any, step: float) -> None:
    net = DiffWave(**LMNT)
    load(net, lmnt.state_dict(), "lmnt")
    generator = torch.Generator().manual_seed(1)
    x, mel = torch.randn(2, 1, 1024, generator=generator), torch.rand(2, 80, 4, generator=generator)
    whole = torch.tensor([int(step)]) if step == int(step) else torch.tensor([step])
    with torch.no_grad():
        expected = lmnt(x[:, 0], mel, whole)
        found = net(x, torch.full((2,), step), mel=mel)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_lmnt_steps_differ_within_a_batch(lmnt: Any) -> None:
    net = DiffWave(**LMNT)
    load(net, lmnt.state_dict(), "lmnt")
    x, mel, t = torch.randn(3, 1, 512), torch.rand(3, 80, 2), torch.tensor([3.0, 3.5, 20.25])
    with torch.no_grad():
        together = net(x, t, mel=mel)
        alone = [lmnt(x[i : i + 1, 0], mel[i : i + 1], t[i : i + 1]) for i in (1, 2)]
    torch.testing.assert_close(together[1:], torch.cat(alone), atol=1e-5, rtol=0)


# --- philsyn: an independent reference, from the formulas


def philsyn_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a philsyn state dict."""
    c, mels = config["channels"], config["mels"]
    shapes: dict[str, tuple[int, ...]] = {}

    def normed(name: str, *shape: int) -> None:
        shapes[f"{name}.bias"] = (shape[0],)
        shapes[f"{name}.weight_g"] = (shape[0], *(1 for _ in shape[1:]))
        shapes[f"{name}.weight_v"] = shape

    def plain(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, (shape[0],)

    normed("init_conv.0.conv", c, 1, 1)
    plain("residual_layer.fc_t1", 512, 128)
    plain("residual_layer.fc_t2", 512, 512)
    for i in range(config["layers"]):
        block = f"residual_layer.residual_blocks.{i}"
        plain(f"{block}.fc_t", c, 512)
        normed(f"{block}.dilated_conv_layer.conv", 2 * c, c, 3)
        if mels:
            normed(f"{block}.upsample_conv2d.0", 1, 1, 3, 32)
            normed(f"{block}.upsample_conv2d.1", 1, 1, 3, 32)
            normed(f"{block}.mel_conv.conv", 2 * c, mels, 1)
        normed(f"{block}.res_conv", c, c, 1)
        normed(f"{block}.skip_conv", c, c, 1)
    normed("final_conv.0.conv", c, c, 1)
    plain("final_conv.2.conv", 1, c, 1)
    return shapes


def philsyn_tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random ones, of sizes at which every part of the network shows in its output."""
    generator = torch.Generator().manual_seed(2)
    gain = {"weight_g": 2.0, "weight_v": 1.0, "weight": 1.0, "bias": 0.3}
    return {
        name: gain[name.rpartition(".")[2]]
        * torch.randn(shape, generator=generator)
        / math.sqrt(math.prod(shape[1:]))
        for name, shape in philsyn_shapes(config).items()
    }


def philsyn_forward(
    tensors: dict[str, Tensor], config: dict[str, Any], x: Tensor, t: float, mel: Tensor | None
) -> Tensor:
    def weight(name: str) -> Tensor:
        if f"{name}.weight" in tensors:
            return tensors[f"{name}.weight"]
        g, v = tensors[f"{name}.weight_g"], tensors[f"{name}.weight_v"]
        return torch.stack([g[k] * v[k] / v[k].square().sum().sqrt() for k in range(len(v))])

    def conv(name: str, h: Tensor, dilation: int = 1) -> Tensor:
        w = weight(name)
        padding = dilation * (w.shape[2] // 2)
        return F.conv1d(h, w, tensors[f"{name}.bias"], padding=padding, dilation=dilation)

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    angles = [t * 10 ** (-4 * i / 63) for i in range(64)]
    e = torch.tensor([[math.sin(a) for a in angles] + [math.cos(a) for a in angles]])
    for name in ("fc_t1", "fc_t2"):
        e = linear(f"residual_layer.{name}", e)
        e = e / (1 + torch.exp(-e))
    h = conv("init_conv.0.conv", x).relu()
    skips = []
    for i in range(config["layers"]):
        block = f"residual_layer.residual_blocks.{i}"
        h = h + linear(f"{block}.fc_t", e)[:, :, None]
        y = conv(f"{block}.dilated_conv_layer.conv", h, 2 ** (i % config["cycle"]))
        if mel is not None:
            up = mel[:, None]
            for k in range(2):
                name = f"{block}.upsample_conv2d.{k}"
                up = F.conv_transpose2d(
                    up, weight(name), tensors[f"{name}.bias"], stride=(1, 16), padding=(1, 8)
                )
                up = torch.where(up > 0, up, 0.4 * up)
            y = y + conv(f"{block}.mel_conv.conv", up[:, 0])
        tanh, gate = y.chunk(2, dim=1)
        y = tanh.tanh() * gate.sigmoid()
        skips.append(conv(f"{block}.skip_conv", y))
        # h has the time term in it: that is how these weights were trained
        h = (h + conv(f"{block}.res_conv", y)) / 2**0.5
    y = torch.stack(skips).sum(0) / config["layers"] ** 0.5
    return conv("final_conv.2.conv", conv("final_conv.0.conv", y).relu())


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("config", [VOCODER, UNCONDITIONAL], ids=["vocoder", "unconditional"])
def test_philsyn_agrees_with_its_formulas(config: dict[str, Any], step: float) -> None:
    net = DiffWave(**config)
    tensors = philsyn_tensors(config)
    load(net, tensors, "philsyn")
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 1, 768, generator=generator)
    mel = torch.randn(2, 5, 3, generator=generator) if config["mels"] else None
    with torch.no_grad():
        expected = philsyn_forward(tensors, config, x, step, mel)
        found = net(x, torch.full((2,), step), **({} if mel is None else {"mel": mel}))
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_philsyn_without_weight_norm_is_the_same() -> None:
    tensors = philsyn_tensors(UNCONDITIONAL)
    plain = {k: v for k, v in tensors.items() if not k.endswith(("_g", "_v"))}
    for key in tensors:
        if key.endswith("_v"):
            v = tensors[key]
            norm = v.flatten(1).norm(dim=1).reshape(-1, *(1 for _ in v.shape[1:]))
            plain[key.removesuffix("_v")] = v * tensors[f"{key[:-2]}_g"] / norm
    normed, folded = DiffWave(**UNCONDITIONAL), DiffWave(**UNCONDITIONAL)
    load(normed, tensors, "philsyn")
    load(folded, plain, "philsyn")
    for a, b in zip(normed.parameters(), folded.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_time_term_in_the_residual_is_not_a_detail() -> None:
    tensors = philsyn_tensors(UNCONDITIONAL)
    with_it, without = (
        DiffWave(**{**UNCONDITIONAL, "residual_includes_time": on}) for on in (True, False)
    )
    load(with_it, tensors, "philsyn")
    load(without, tensors, "philsyn")
    x, t = torch.randn(1, 1, 256), torch.tensor([30.0])
    with torch.no_grad():
        a, b = with_it(x, t), without(x, t)
    assert (a - b).norm() > 0.1 * a.norm()


# --- what is published


@pytest.mark.parametrize(
    ("name", "millions", "count"),
    [
        ("lmnt", 2.620, 254),
        ("philsyn-base", 2.637, 612),
        ("philsyn-large", 6.914, 612),
        ("philsyn-sc09", 24.07, 408),
    ],
)
def test_published_sizes(name: str, millions: float, count: int) -> None:
    published = PUBLISHED[name]
    with torch.device("meta"):
        net = DiffWave(**published["network"])
    parameters, tensors = sum(p.numel() for p in net.parameters()), len(net.state_dict())
    if published["layout"] == "philsyn":
        # theirs has a g per row of each convolution but the last, and two output convolutions in
        # a layer, of three tensors each, where ours has one of two
        rows = [len(p) for k, p in net.named_parameters() if p.ndim > 2 and k[:6] != "output"]
        layers = len(net.residual_layers)
        parameters, tensors = parameters + sum(rows), tensors + len(rows) + 3 * layers
        shapes = philsyn_shapes({"mels": None, **published["network"]})
        assert parameters == sum(math.prod(shape) for shape in shapes.values())
        assert tensors == len(shapes)
    digits = 2 if name == "philsyn-sc09" else 3
    assert (round(parameters / 1e6, digits), tensors) == (millions, count)


# --- strictness


def test_what_is_missing_and_what_is_too_much_is_named() -> None:
    tensors = philsyn_tensors(VOCODER)
    del tensors["residual_layer.residual_blocks.2.skip_conv.weight_g"]
    del tensors["final_conv.2.conv.bias"]
    tensors["optimizer.step"] = torch.zeros(1)
    with pytest.raises(IntegrityError) as caught:
        load(DiffWave(**VOCODER), tensors, "philsyn", "ckpt")
    assert str(caught.value) == (
        "ckpt is not this DiffWave in the layout 'philsyn': 2 missing "
        "(residual_layer.residual_blocks.2.skip_conv.weight_g, final_conv.2.conv.bias); "
        "1 unexpected (optimizer.step)"
    )


def test_other_sizes_are_refused() -> None:
    tensors = philsyn_tensors(VOCODER)
    with pytest.raises(IntegrityError, match="unexpected"):
        load(DiffWave(**{**VOCODER, "layers": 3}), tensors, "philsyn")
    with pytest.raises(IntegrityError, match="missing"):
        load(DiffWave(**{**VOCODER, "layers": 5}), tensors, "philsyn")
    with pytest.raises(IntegrityError, match="another shape"):
        load(DiffWave(**{**VOCODER, "channels": 7}), tensors, "philsyn")
    tensors["residual_layer.residual_blocks.0.res_conv.weight_v"] = torch.ones(6, 4, 1)
    with pytest.raises(IntegrityError, match=r"\(6, 4, 1\) and \(6, 6, 1\) cannot be joined"):
        load(DiffWave(**VOCODER), tensors, "philsyn")
    with pytest.raises(UsageError, match="unknown layout 'phylsin'; did you mean 'philsyn'"):
        load(DiffWave(**VOCODER), tensors, "phylsin")


def test_files(tmp_path: Path) -> None:
    tensors = philsyn_tensors(VOCODER)
    path = tmp_path / "diffwave.safetensors"
    save_file(tensors, path)
    from_file, from_memory = DiffWave(**VOCODER), DiffWave(**VOCODER)
    read(from_file, path, "philsyn")
    load(from_memory, tensors, "philsyn")
    for a, b in zip(from_file.parameters(), from_memory.parameters(), strict=True):
        assert torch.equal(a, b)
    path.write_bytes(b"PK\x03\x04 a pickle in a zip")
    with pytest.raises(IntegrityError, match="diffwave.safetensors is not"):
        read(from_file, path, "philsyn")
    with pytest.raises(MissingError, match="cannot be read"):
        read(from_file, tmp_path / "none.safetensors", "philsyn")
