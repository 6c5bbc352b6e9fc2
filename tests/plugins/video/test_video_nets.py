"""Networks of clips: attention along frames as its formula, clips that do not see each other, positions of frames."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mdiff.core.errors import UsageError
from mdiff.core.nn.layers import (
    FrameAttention,
    FramePositions,
    RelativePositions,
    folded,
    frame_places,
    rotated,
    unfolded,
)
from mdiff.core.nn.unet import UNet
from mdiff.plugins.video.nets.unet3d import Unet3D

SMALL: dict[str, Any] = {"in_channels": 3, "out_channels": 2, "channels": 8, "groups": 4}
SMALL |= {"multipliers": [1, 2], "blocks": 1, "attention": [1], "heads": 2}
SMALL |= {"frame_heads": 2, "frame_levels": [0, 1]}
CONDITIONS: dict[str, tuple[int, ...]] = {"vector": (6,), "context": (3, 5)}
"""Shapes of the conditions of a clip."""


def unet(**arguments: Any) -> UNet:
    return UNet(**({"axes": 2, "vector": 6, "transformer": True, "context": 5} | SMALL | arguments))


def unet3d(**arguments: Any) -> Unet3D:
    return Unet3D(channels=8, multipliers=[1, 2], heads=2, vector=6, **arguments)


NETS: dict[str, Callable[[], nn.Module]] = {
    "relative": unet,
    "rotary": lambda: unet(frame_rotary=True),
    "index": lambda: unet(frame_index=True),
    "unet3d": unet3d,
}


def random(net: nn.Module, std: float = 0.2) -> nn.Module:
    draw = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=std, generator=draw)
    return net.eval().requires_grad_(False)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def conditions(net: nn.Module, *rows: int) -> dict[str, Tensor]:
    names = ["vector"] if isinstance(net, Unet3D) else list(CONDITIONS)
    return {name: normal(*rows, *CONDITIONS[name], seed=2) for name in names}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_folding_and_back() -> None:
    x = normal(2, 3, 4, 5)
    assert folded(x).shape == (8, 3, 5) and torch.equal(folded(x)[5], x[1, :, 1])
    assert torch.equal(unfolded(folded(x), 4), x)


@pytest.mark.parametrize("rotary", [False, True])
def test_attention_along_frames_is_its_formula(rotary: bool) -> None:
    block = FrameAttention(8, heads=2, rotary=rotary, groups=4)
    random(block, 0.5)
    x, bias = normal(3, 8, 5, 2, 3), normal(1, 2, 5, 5, seed=3)
    found = unfolded(block(folded(x), bias), 5)
    normed = unfolded(block.norm(folded(x)), 5)
    expected = x.clone()
    for b in range(3):
        for i in range(2):
            for j in range(3):
                qkv = block.attention.qkv(normed[b, :, :, i, j].T).unflatten(-1, (3, 2, 4))
                q, k, v = qkv.permute(1, 2, 0, 3)
                if rotary:
                    q, k = rotated(q, 4), rotated(k, 4)
                weights = (q @ k.transpose(-1, -2) / 2 + bias[0]).softmax(-1)
                mixed = (weights @ v).transpose(0, 1).flatten(1)
                expected[b, :, :, i, j] += block.attention.proj_out(mixed).T
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_it_begins_as_the_identity() -> None:
    x = normal(4, 8, 3, 3)
    block = FrameAttention(8, heads=2, groups=4)
    assert torch.equal(block(x, torch.zeros(1, 2, 4, 4)), x)


def test_rotated_products_depend_on_distance_alone() -> None:
    token = normal(1, 16).expand(9, 16)
    turned = rotated(token, 8)
    products = turned @ turned.T
    for distance in range(9):
        along = products.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along))
    assert torch.equal(turned[:, 8:], token[:, 8:])
    torch.testing.assert_close(turned.norm(dim=-1), token.norm(dim=-1))
    # the first pair turns by one radian a position
    angle = torch.atan2(turned[1, 1], turned[1, 0]) - torch.atan2(token[0, 1], token[0, 0])
    assert math.isclose(float(angle) % (2 * math.pi), 1.0, abs_tol=1e-5)


def test_relative_positions_are_of_distances() -> None:
    positions = RelativePositions(3, buckets=32, farthest=32)
    bias = positions(40)[0]
    for distance in range(-39, 40):
        along = bias.diagonal(distance, dim1=1, dim2=2)
        assert torch.equal(along, along[:, :1].expand_as(along))
    here = bias[:, 39 // 2]
    centre = 39 // 2
    near = here[:, centre - 7 : centre + 8]
    assert len(near.unique(dim=1)[0]) == 15  # each of its own, before and after
    # beyond the farthest all are alike, and growing distances go through the buckets in order
    assert torch.equal(bias[:, 0, 32:], bias[:, 0, 31:32].expand(-1, 8))
    assert len(bias[0, 0].unique()) == 16


def test_positions_of_clips() -> None:
    positions = FramePositions(2)
    x, clips = normal(1), torch.tensor([[0, 0, 1], [0, 1, 2]])
    whole, apart = positions(3, None, x), positions(3, clips, x)
    assert whole.shape == (1, 2, 3, 3) and apart.shape == (2, 2, 3, 3)
    seen = apart.isfinite()
    assert seen[0, 0].tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    assert torch.equal(seen[1, 1], torch.eye(3).bool())
    assert torch.equal(apart[0, :, :2, :2], whole[0, :, :2, :2])
    assert FramePositions(2, relative=False)(3, None, x.bfloat16()).dtype == torch.bfloat16


def test_places_of_frames() -> None:
    clips = torch.tensor([[0, 0, 1, 1], [0, 1, 2, 0]])
    assert frame_places(4, clips, normal(2)).tolist() == [[0, 1, 0, 1], [0, 0, 0, 1]]
    assert frame_places(3, None, normal(2)).tolist() == [[0, 1, 2]] * 2


def test_places_are_told() -> None:
    """What frames that are all alike differ by; those that see none of the others are all first ones."""
    frame, t = normal(1, 3, 1, 4, 4), torch.ones(1)
    x, cond = frame.expand(-1, -1, 4, -1, -1), conditions(unet(), 1)
    net = unet(frame_index=True)
    nn.init.normal_(net.out[-1].weight)
    for untold in (net, random(unet())):
        out = untold(x, t, **cond)
        torch.testing.assert_close(out, out[:, :, :1].expand_as(out))
    told = random(net)(x, t, **cond)
    assert (told[:, :, 1:] - told[:, :, :-1]).abs().amax((0, 1, 3, 4)).min() > 1e-3
    each = {name: torch.stack([value] * 4, dim=1) for name, value in cond.items()}
    stills = net(x, t, **each, clips=torch.arange(4).unsqueeze(0))
    torch.testing.assert_close(stills, net(frame, t, **cond).expand_as(stills))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("frames", [1, 3, 6])
def test_any_number_of_frames(name: str, frames: int) -> None:
    net = random(NETS[name]())
    out = net(normal(2, 3, frames, 4, 6), torch.tensor([3.0, 800.0]), **conditions(net, 2))
    assert out.shape == (2, 3 if name == "unet3d" else 2, frames, 4, 6) and out.isfinite().all()


@pytest.mark.parametrize("name", NETS)
def test_frames_see_each_other_and_their_order(name: str) -> None:
    net = random(NETS[name]())
    x, t, cond = normal(1, 3, 4, 4, 4), torch.ones(1), conditions(net, 1)
    plain = net(x, t, **cond)
    moved = net(torch.cat([x[:, :, :3], x[:, :, 3:] + 1], dim=2), t, **cond)
    assert (moved - plain)[:, :, 0].abs().max() > 1e-4
    order = [2, 0, 3, 1]
    assert (net(x[:, :, order], t, **cond) - plain[:, :, order]).abs().max() > 1e-4


@pytest.mark.parametrize("name", NETS)
def test_clips_of_a_row_are_as_each_alone(name: str) -> None:
    """A clip of three frames and two stills in a row: what each is told and what comes of it is its own."""
    net = random(NETS[name]())
    x, t = normal(2, 3, 5, 4, 4), torch.tensor([5.0, 700.0])
    cond = conditions(net, 2, 3)
    clips = torch.tensor([0, 0, 0, 1, 2]).expand(2, -1)
    together = net(x, t, clips=clips, **cond)
    for g, part in enumerate((slice(0, 3), slice(3, 4), slice(4, 5))):
        alone = net(x[:, :, part], t, **{key: value[:, g] for key, value in cond.items()})
        torch.testing.assert_close(together[:, :, part], alone, atol=1e-5, rtol=1e-5)


def test_rows_may_differ_in_their_clips() -> None:
    net = random(unet())
    x, t, cond = normal(2, 3, 3, 4, 4), torch.ones(2), conditions(unet(), 2, 3)
    clips = torch.tensor([[0, 0, 0], [2, 1, 0]])
    together = net(x, t, clips=clips, **cond)
    first = net(x[:1], t[:1], **{key: value[:1, 0] for key, value in cond.items()})
    torch.testing.assert_close(together[:1], first, atol=1e-5, rtol=1e-5)
    last = net(x[1:, :, 2:], t[:1], **{key: value[1:, 0] for key, value in cond.items()})
    torch.testing.assert_close(together[1:, :, 2:], last, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_frames_of_any_axes(axes: int) -> None:
    net = random(UNet(axes=axes, **SMALL))
    assert net(normal(2, 3, 3, *[4] * axes), torch.ones(2)).shape == (2, 2, 3, *[4] * axes)


def test_without_what_goes_along_frames_it_is_the_network_of_pictures() -> None:
    clips, pictures = random(unet()), unet(frame_heads=None, frame_levels=[]).eval()
    assert isinstance(clips, UNet)
    for name in ("time_embed", "film_emb", "out"):
        pictures.get_submodule(name).load_state_dict(clips.get_submodule(name).state_dict())
    ours, theirs = (
        [*net.input_blocks, net.middle_block, *net.output_blocks] for net in (clips, pictures)
    )
    for row, same in zip(ours, theirs, strict=True):
        within = [block for block in row if not isinstance(block, FrameAttention)]
        for block in set(row) - set(within):
            nn.init.zeros_(block.attention.proj_out.weight)
            nn.init.zeros_(block.attention.proj_out.bias)
        for one, other in zip(within, same, strict=True):
            other.load_state_dict(one.state_dict())
    x, t, cond = normal(2, 3, 4, 4, 4), torch.ones(2), conditions(clips, 2)
    found = clips(x, t, **cond)
    for k in range(4):
        torch.testing.assert_close(found[:, :, k], pictures(x[:, :, k], t, **cond))


@pytest.mark.parametrize("name", NETS)
def test_gradients_reach_all_parameters(name: str) -> None:
    net = random(NETS[name]()).requires_grad_(True)
    clips = torch.tensor([[0, 0, 1]])
    net(normal(1, 3, 3, 4, 4), torch.ones(1), clips=clips, **conditions(net, 1, 2)).sum().backward()
    unseen = {key for key, p in net.named_parameters() if p.grad is None}
    assert unseen <= {"nothing"}  # which is given as a condition


@pytest.mark.parametrize("name", NETS)
def test_bf16_is_near(name: str) -> None:
    net = random(NETS[name](), 0.1)
    x, t, cond = normal(1, 3, 4, 4, 4), torch.ones(1), conditions(net, 1)
    expected = net(x, t, **cond)
    half = {key: value.bfloat16() for key, value in cond.items()}
    found = net.bfloat16()(x.bfloat16(), t, **half)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_what_does_not_fit_is_said() -> None:
    x, t = normal(1, 3, 2, 4, 4), torch.ones(1)
    for net in (unet(), unet3d()):
        with pytest.raises(UsageError, match="multiple"):
            net(normal(1, 3, 2, 4, 5), t, **conditions(net, 1))
        with pytest.raises(UsageError, match="needs the condition 'vector'"):
            net(x, t)
        with pytest.raises(UsageError, match="one for each clip of a row"):
            net(x, t, clips=torch.zeros(2, 2).long(), **conditions(net, 1))
    with pytest.raises(UsageError, match="does not take the condition 'clips'"):
        UNet(axes=3, **(SMALL | {"frame_heads": None}))(x, t, clips=torch.zeros(1, 2).long())
