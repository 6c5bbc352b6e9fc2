"""Guidance: what it costs, what it equals, and what it says of wrong arguments."""

import pytest
import torch
from torch import Tensor

from mdiff.core import Denoiser, grids, guidance, noise, sample, schedules
from mdiff.core.denoiser import from_x0, to_x0
from mdiff.core.errors import UsageError

SHAPES = [(3, 17), (2, 5, 7), (2, 3, 4, 5)]
SCHEDULE = schedules.linear()


class Net:
    """tanh(x + c), which keeps the sizes of the batches and the conditions it was called with."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.seen: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor, *, c: Tensor, shift: Tensor | None = None) -> Tensor:
        self.batches.append(len(x))
        self.seen.append(c)
        axes = (-1, *[1] * (x.ndim - 1))
        y = torch.tanh(x + c.reshape(axes))
        return y if shift is None else y + shift.reshape(axes)


YES, NO = {"c": torch.tensor([0.5, 0.6])}, {"c": torch.tensor([-0.3])}


def pair(kind: str = "eps") -> tuple[Net, Denoiser]:
    net = Net()
    return net, Denoiser(net, SCHEDULE, predicts=kind)


def data(shape: tuple[int, ...]) -> Tensor:
    return noise.from_seeds([0, 1], shape).draw(dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_it_extrapolates_whatever_the_network_says(kind: str, shape: tuple[int, ...]) -> None:
    net, denoise = pair(kind)
    x, t = data(shape), SCHEDULE.at(0.4)
    found = guidance.classifier_free(denoise, cond=YES, uncond=NO, scale=3.0)(x, t).x0
    assert net.batches == [4]
    positive, negative = (net(x, torch.zeros(2), **cond) for cond in (YES, NO))
    said = negative + 3.0 * (positive - negative)
    torch.testing.assert_close(found, to_x0(kind, said, x, t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("scale", "cond"), [(1.0, YES), (0.0, NO)])
def test_scales_one_and_zero_cost_one_plain_call(scale: float, cond: dict[str, Tensor]) -> None:
    net, denoise = pair()
    x = data((3, 4))
    found = guidance.classifier_free(denoise, cond=YES, uncond=NO, scale=scale)(x, 0.4).x0
    assert net.batches == [2]
    assert torch.equal(found, denoise.bind(**cond)(x, 0.4).x0)


def test_outside_the_interval_the_condition_alone_is_asked() -> None:
    net, denoise = pair()
    guided = guidance.classifier_free(denoise, cond=YES, uncond=NO, scale=3.0, interval=(0.2, 0.6))
    x = data((3, 4))
    for t, batch in ((0.1, 2), (0.2, 4), (0.6, 4), (0.61, 2)):
        net.batches.clear()
        found = guided(x, t).x0
        assert net.batches == [batch]
        assert torch.equal(found, denoise.bind(**YES)(x, t).x0) == (batch == 2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_rescale_brings_back_the_deviation(kind: str, shape: tuple[int, ...]) -> None:
    _, denoise = pair(kind)
    x, t = data(shape), SCHEDULE.at(0.4)

    def said(amount: float, scale: float = 4.0) -> Tensor:
        guided = guidance.classifier_free(denoise, cond=YES, uncond=NO, scale=scale, rescale=amount)
        return from_x0(kind, guided(x, t).x0, x, t)

    axes = tuple(range(1, x.ndim))
    torch.testing.assert_close(said(1.0).std(axes), said(0.0, scale=1.0).std(axes))
    torch.testing.assert_close(said(0.3), 0.3 * said(1.0) + 0.7 * said(0.0))


def test_learned_variance_is_that_under_the_condition() -> None:
    def net(x: Tensor, t: Tensor, *, c: Tensor) -> Tensor:
        return torch.cat([x, x * 0 + c[:, None]], dim=1)

    denoise = Denoiser(net, SCHEDULE, learned_variance=True)
    guided = guidance.classifier_free(denoise, cond=YES, uncond=NO, scale=3.0)
    fraction = guided(torch.zeros(2, 3), 0.4).variance_fraction
    assert fraction is not None
    torch.testing.assert_close(fraction[:, 0], (YES["c"] + 1) / 2)


def test_the_network_sees_the_same_conditions_in_every_step() -> None:
    net, denoise = pair("v")
    guided = guidance.classifier_free(denoise, cond=YES, uncond=NO, scale=3.0)
    sample(guided, noise.from_seeds([0, 1], (3, 4)), grid=grids.karras(5))
    assert net.batches == [4] * 5
    assert all(seen is net.seen[0] for seen in net.seen)


def test_conditions_that_both_share_are_bound_on_either_side() -> None:
    x, shift = data((3, 4)), torch.tensor([[1.0], [2.0]])
    _, denoise = pair("x0")
    inside = guidance.classifier_free(denoise.bind(shift=shift), cond=YES, uncond=NO, scale=3.0)
    outside = guidance.classifier_free(denoise, cond=YES, uncond=NO, scale=3.0).bind(shift=shift)
    plain = guidance.classifier_free(denoise, cond=YES, uncond=NO, scale=3.0)
    torch.testing.assert_close(inside(x, 0.4).x0, plain(x, 0.4).x0 + shift[:, :, None].double())
    assert torch.equal(inside(x, 0.4).x0, outside(x, 0.4).x0)


def test_one_time_per_sample() -> None:
    _, denoise = pair("v")
    guided = guidance.classifier_free(denoise, cond=YES, uncond=NO, scale=3.0)
    x, t = data((3, 4)), torch.tensor([0.2, 0.8], dtype=torch.float64)
    found = guided(x, t).x0
    for k in range(2):
        one = {"c": YES["c"][k : k + 1]}
        alone = guidance.classifier_free(denoise, cond=one, uncond=NO, scale=3.0)
        torch.testing.assert_close(alone(x[k : k + 1], t[k].item()).x0[0], found[k])


def test_wrappers_nest() -> None:
    x = data((2, 5, 7)) * 10
    _, denoise = pair("x0")
    clamped = guidance.clamp(denoise.bind(**YES), -0.5, 0.25)(x, 0.4).x0
    assert clamped.min() == -0.5 and clamped.max() == 0.25
    guided = guidance.classifier_free(guidance.clamp(denoise), cond=YES, uncond=NO, scale=3.0)
    bounded = guidance.clamp(guided)
    torch.testing.assert_close(bounded(x, 0.4).x0, guided(x, 0.4).x0.clamp(-1, 1))


def test_nothing_is_changed() -> None:
    x = data((3, 4))
    copies = x.clone(), YES["c"].clone(), NO["c"].clone()
    _, denoise = pair()
    guided = guidance.classifier_free(denoise, cond=YES, uncond=NO, scale=3.0, rescale=0.7)
    guidance.clamp(guided)(x, 0.4)
    assert all(torch.equal(*both) for both in zip((x, YES["c"], NO["c"]), copies, strict=True))


def test_misuse_is_refused() -> None:
    _, denoise = pair()
    with pytest.raises(UsageError, match="same names"):
        guidance.classifier_free(denoise, cond=YES, uncond={}, scale=2.0)
    guided = guidance.classifier_free(denoise, cond={"c": 1}, uncond={"c": 0}, scale=2.0)
    with pytest.raises(UsageError, match="'c' must be a tensor"):
        guided(data((3, 4)), 0.4)
    three = {"c": torch.zeros(3)}
    with pytest.raises(UsageError, match="'c' has 3 rows"):
        guidance.classifier_free(denoise, cond=three, uncond=three, scale=2.0)(data((3, 4)), 0.4)
