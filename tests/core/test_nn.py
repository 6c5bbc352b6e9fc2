"""Networks: published parameter counts, shapes over 1, 2 and 3 axes, dialects, conditions, gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from mdiff.core.errors import UsageError
from mdiff.core.nn.autoencoder import AutoencoderKL, DiagonalGaussian
from mdiff.core.nn.layers import (
    CONV,
    AttentionBlock,
    Downsample,
    ResBlock,
    SpatialTransformer,
    attention,
    patched,
    timestep_embedding,
    unpatched,
)
from mdiff.core.nn.unet import UNet

AUDIOLDM = {
    "axes": 2,
    "in_channels": 8,
    "out_channels": 8,
    "multipliers": [1, 2, 3, 5],
    "blocks": 2,
    "attention": [1, 2, 3],
    "transformer": True,
    "vector": 512,
}


def parameters(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("channels", "head_width", "millions"),
    [(128, 32, 185.04), (192, 32, 415.95), (256, 64, 739.14)],
)
def test_audioldm_published_sizes(channels: int, head_width: int, millions: float) -> None:
    with torch.device("meta"):
        net = UNet(**AUDIOLDM, channels=channels, head_width=head_width)
    assert round(parameters(net) / 1e6, 2) == millions


def test_audioldm_published_autoencoder() -> None:
    with torch.device("meta"):
        net = AutoencoderKL(axes=2, in_channels=1, latent=8, channels=128, multipliers=[1, 2, 4])
    assert round(parameters(net) / 1e6, 2) == 55.38


def test_stable_diffusion_size() -> None:
    with torch.device("meta"):
        net = UNet(
            axes=2,
            in_channels=4,
            out_channels=4,
            channels=320,
            multipliers=[1, 2, 4, 4],
            attention=[0, 1, 2],
            head_width=40,
            transformer=True,
            context=768,
        )
    assert parameters(net) == 859_520_964


def small(axes: int, **options: object) -> UNet:
    torch.manual_seed(0)
    config: dict[str, object] = {"channels": 16, "multipliers": [1, 2], "blocks": 1}
    config |= {"attention": [1], "head_width": 8, "groups": 8}
    net = UNet(axes=axes, in_channels=3, out_channels=2, **config | options)  # type: ignore[arg-type]
    for parameter in net.parameters():  # also the branches that start at zero
        torch.nn.init.normal_(parameter, std=0.1)
    return net.eval()


DDPM = {"heads": 1, "padding": "end", "eps": 1e-6, "sine_first": True, "frequency_shift": 1}
ADM = {"scale_shift": True, "resample_residual": True, "multipliers": [0.5, 1], "classes": 3}
SDXL = {"transformer": True, "context": 5, "depth": [0, 2], "vector": 7, "vector_added": True}


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("dialect", [DDPM, ADM, SDXL], ids=["DDPM", "ADM", "SDXL"])
def test_dialects_over_any_axes(axes: int, dialect: dict[str, object]) -> None:
    net = small(axes, **dialect)
    given = {
        "label": torch.tensor([2, 0]),
        "vector": torch.randn(2, 7),
        "context": torch.randn(2, 4, 5),
    }
    cond = {name: given[name] for name in net.conditions}
    x, t = torch.randn(2, 3, *[4] * axes), torch.tensor([1.0, 999.0])
    out = net(x, t, **cond)
    assert out.shape == (2, 2, *[4] * axes)
    # no axis is another than the rest: kernels and data turned together give the output turned
    turned = small(axes, **dialect)
    for module in turned.modules():
        if isinstance(module, tuple(CONV.values())):
            module.weight.data = module.weight.data.transpose(2, 1 + axes).contiguous()
    again = turned(x.transpose(2, 1 + axes), t, **cond).transpose(2, 1 + axes)
    torch.testing.assert_close(again, out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_patches_become_channels_and_come_back(axes: int) -> None:
    x = torch.randn(2, 3, *(8, 4, 12)[:axes])
    there = patched(x, 4)
    assert there.shape == (2, 3 * 4**axes, *(2, 1, 3)[:axes])
    assert torch.equal(unpatched(there, 4), x)
    if axes == 2:
        assert torch.equal(there, F.pixel_unshuffle(x, 4))


def test_a_network_of_patches_is_that_without_on_what_patches_are() -> None:
    net, inner = small(2, patch=2), small(2)
    inner.input_blocks[0][0], inner.out[-1] = net.input_blocks[0][0], net.out[-1]
    inner.load_state_dict(net.state_dict())
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 999.0])
    assert net.factor == 2 * inner.factor and net(x, t).shape == (2, 2, 8, 8)
    torch.testing.assert_close(patched(net(x, t), 2), inner(patched(x, 2), t))
    with pytest.raises(UsageError, match="multiple of 4"):
        net(x[..., :6], t)


def test_where_attention_is() -> None:
    def count(**options: object) -> int:
        net = small(2, blocks=2, multipliers=[1, 1, 1], attention=[1], **options)
        return sum(isinstance(m, AttentionBlock) for m in net.modules())

    assert count() == 2 + 1 + 3  # down, middle, up
    assert count(attention_up_last=True) == 2 + 1 + 1
    assert count(attention_middle=False) == 2 + 3


def test_transformers_are_as_deep_as_their_level() -> None:
    net = small(
        1, transformer=True, context=5, multipliers=[1, 1, 1], attention=[0, 1], depth=[1, 3, 2]
    )
    depths = [len(m.transformer_blocks) for m in net.modules() if isinstance(m, SpatialTransformer)]
    assert depths == [1, 3, 2, 3, 3, 1, 1]


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("transformer", [False, True])
def test_shapes_and_batch(axes: int, transformer: bool) -> None:
    net = small(axes, transformer=transformer, context=5 if transformer else None, scale_shift=True)
    x, t = torch.randn(3, 3, *[4] * axes), torch.tensor([1.0, 500.0, 999.0])
    context = torch.randn(3, 7, 5) if transformer else None
    out = net(x, t, context=context)
    assert out.shape == (3, 2, *[4] * axes)
    for k in range(3):
        alone = net(
            x[k : k + 1], t[k : k + 1], context=context if context is None else context[k : k + 1]
        )
        torch.testing.assert_close(alone, out[k : k + 1], rtol=1e-4, atol=1e-4)


def test_conditions_matter_and_missing_ones_are_named() -> None:
    net = small(1, vector=6, classes=4)
    x, t = torch.randn(1, 3, 8), torch.tensor([3.0])
    given = {"vector": torch.zeros(1, 6), "label": torch.tensor([1])}
    base = net(x, t, **given)
    for name, value in (("vector", torch.ones(1, 6)), ("label", torch.tensor([2]))):
        assert (net(x, t, **given | {name: value}) - base).abs().max() > 1e-4
        with pytest.raises(UsageError, match=f"needs the condition '{name}'"):
            net(x, t, **{k: v for k, v in given.items() if k != name})
    with pytest.raises(UsageError, match="multiple of 2"):
        net(torch.randn(1, 3, 7), t, **given)
    with pytest.raises(UsageError, match="does not take the condition 'context'"):
        net(x, t, **given, context=torch.zeros(1, 2, 3))
    with pytest.raises(UsageError, match="needs the condition 'context'"):
        small(1, transformer=True, context=5)(x, t)
    with pytest.raises(UsageError, match="unknown padding 'ends'; did you mean 'end'"):
        small(1, padding="ends")


def test_untrained_output_is_zero() -> None:
    net = UNet(axes=2, in_channels=1, out_channels=1, channels=32, multipliers=[1])
    assert net(torch.randn(2, 1, 4, 4), torch.tensor([0.0, 9.0])).abs().max() == 0


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_autoencoder_shapes_and_gradients(axes: int) -> None:
    net = AutoencoderKL(
        axes=axes, in_channels=1, latent=2, channels=8, multipliers=[1, 2], blocks=1, groups=4
    )
    x = torch.randn(2, 1, *[8] * axes)
    posterior = net.encode(x)
    assert posterior.mean.shape == (2, 2, *[4] * axes)
    z = posterior.sample(torch.randn(posterior.mean.shape))
    (net.decode(z).square().mean() + posterior.kl()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_kl_is_zero_only_at_the_standard_normal() -> None:
    zero = torch.zeros(2, 3, 4)
    assert DiagonalGaussian(mean=zero, log_variance=zero).kl() == 0
    # KL of N(1, e) per element: (1 + e - 1 - 1) / 2
    found = DiagonalGaussian(mean=zero + 1, log_variance=zero + 1).kl()
    torch.testing.assert_close(found, torch.tensor(12 * (torch.e - 1) / 2))


# --- blocks: laws that references only show indirectly


@pytest.mark.parametrize("sine_first", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
def test_sinusoids(sine_first: bool, shift: int) -> None:
    t, half = torch.tensor([0.0, 3.5, 999.0]), 4
    found = timestep_embedding(t, 2 * half, sine_first=sine_first, frequency_shift=shift)
    angles = [[v * 10_000 ** (-i / (half - shift)) for i in range(half)] for v in t.tolist()]
    cosines, sines = (
        torch.tensor([[f(a) for a in row] for row in angles]) for f in (math.cos, math.sin)
    )
    expected = torch.cat([sines, cosines] if sine_first else [cosines, sines], dim=1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_halving_looks_beyond_the_end_only_or_beyond_both(axes: int) -> None:
    x = torch.zeros(1, 1, *[4] * axes)
    x[(..., *[0] * axes)] = 1.0  # the first position of every axis
    for padding, tap in (("end", 0), ("symmetric", 1)):
        down = Downsample(axes, 1, padding=padding)
        out = down(x) - down(torch.zeros_like(x))
        assert out.shape == (1, 1, *[2] * axes)
        # the first window begins there, or one before it
        torch.testing.assert_close(out.flatten()[0], down.op.weight[(0, 0, *[tap] * axes)])
        assert out.flatten()[1:].abs().max() == 0


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_residual_blocks_resample_both_ways_through_them(axes: int) -> None:
    x = torch.randn(1, 8, *[4] * axes)
    halve, double = (
        ResBlock(axes, 8, 8, embedding=None, groups=4, resample=how) for how in ("halve", "double")
    )
    # the branch starts at zero: what is left is each position twice, and the mean of pairs
    twice = double(x)
    for dim in range(2, 2 + axes):
        assert torch.equal(*twice.unflatten(dim, (4, 2)).unbind(dim + 1))
    torch.testing.assert_close(halve(twice), x)
    torch.testing.assert_close(halve(x).mean(), x.mean())
    for block, size in ((halve, 2), (double, 8)):
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter)
        assert block(x).shape == (1, 8, *[size] * axes)


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_is_its_formula(heads: int) -> None:
    block, x = AttentionBlock(8, heads=heads, groups=4), torch.randn(2, 8, 3, 5)
    torch.nn.init.normal_(block.proj_out.weight)
    flat = block.norm(x).flatten(2)
    qkv = torch.einsum("oc,bcl->bol", block.qkv.weight, flat) + block.qkv.bias[:, None]
    out = []
    for head in qkv.reshape(2, heads, 3, 8 // heads, 15).unbind(1):
        q, k, v = head.unbind(1)
        share = (torch.einsum("bci,bcj->bij", q, k) / (8 // heads) ** 0.5).softmax(-1)
        out.append(torch.einsum("bij,bcj->bci", share, v))
    h = torch.einsum("oc,bcl->bol", block.proj_out.weight, torch.cat(out, 1))
    torch.testing.assert_close(block(x), x + h.reshape(x.shape), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("heads", "queries", "keys"), [(3, 5, 7), (3, 600, 600), (2, 1100, 1000), (1, 1, 1)]
)
def test_attention_in_bfloat16(heads: int, queries: int, keys: int) -> None:
    """In inference on a CPU it is made block by block: right, and of a sample alone what it is in a batch."""
    g = torch.Generator().manual_seed(3)
    exact = [
        torch.randn(3, n, heads, 8, generator=g).transpose(1, 2) for n in (queries, keys, keys)
    ]
    half = [x.bfloat16() for x in exact]
    found = attention(*half)
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.float(), attention(*exact), rtol=0.02, atol=0.03)
    for sample in range(3):
        alone = attention(*(x[sample : sample + 1] for x in half))
        assert torch.equal(alone[0], found[sample])


@pytest.mark.parametrize("mask", ["none", "bool", "bias"])
def test_attention_in_training_is_that_of_inference(mask: str) -> None:
    """In bfloat16 on a CPU it is made of other products then, with the same result and the same gradients."""
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 3, n, 16, generator=g) for n in (12, 7, 7))
    masks = {
        "none": None,
        "bool": torch.rand(2, 1, 1, 7, generator=g) < 0.7,
        "bias": torch.randn(1, 3, 12, 7, generator=g),
    }
    out = torch.randn(2, 3, 12, 16, generator=g)
    exact, half = (
        [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        for dtype in (torch.float32, torch.bfloat16)
    )
    expected, found = attention(*exact, masks[mask]), attention(*half, masks[mask])
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.03)
    expected.backward(out)
    found.backward(out.bfloat16())
    for a, b in zip(half, exact, strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad.float(), b.grad, rtol=0.02, atol=0.06)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_norms_are_taken_in_float32(memory_format: torch.memory_format) -> None:
    """In bfloat16 they are the float32 ones, rounded once: references cast around them for nothing."""
    torch.manual_seed(0)
    x = (100 + torch.randn(2, 64, 16, 16)).bfloat16().contiguous(memory_format=memory_format)
    weight, bias = torch.randn(64).bfloat16(), torch.randn(64).bfloat16()
    found = F.group_norm(x, 32, weight, bias)
    expected = F.group_norm(x.float(), 32, weight.float(), bias.float()).bfloat16()
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-3)
    assert (found != expected).float().mean() < 0.01
