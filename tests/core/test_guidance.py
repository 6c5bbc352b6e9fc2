"""Guidance: what it costs, what it equals, and what it says of wrong arguments."""

import math
import re
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from diffusers.guiders.adaptive_projected_guidance import normalized_guidance
from guided_diffusion import gaussian_diffusion as gd
from torch import Tensor

from mdiff.core import Denoiser, grids, guidance, noise, operators, sample, samplers, schedules
from mdiff.core.analytic import Gaussian
from mdiff.core.denoiser import Denoise, from_x0, to_x0
from mdiff.core.errors import UsageError
from mdiff.core.schedules import Time, pad

Wrap = Callable[[Denoise], Denoise]
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


def test_guidance_by_name() -> None:
    _, denoise = pair()
    x, denoise = data((3, 4)), denoise.bind(**YES)
    found = guidance.from_name("clamp", denoise, low=0.0)(x, 0.4).x0
    assert torch.equal(found, guidance.clamp(denoise, 0.0)(x, 0.4).x0)
    with pytest.raises(UsageError, match="unknown guidance 'clmp'; did you mean 'clamp'"):
        guidance.from_name("clmp", denoise)
    with pytest.raises(UsageError, match="guidance 'dps': missing"):
        guidance.from_name("dps", denoise)


def test_misuse_is_refused() -> None:
    _, denoise = pair()
    timed = guidance.classifier_free(denoise, cond=YES, uncond=NO, scale=2.0, interval=(0.1, 0.5))
    with pytest.raises(UsageError, match="one time for the whole batch"):
        timed(data((3, 4)), torch.tensor([0.2, 0.3]))
    with pytest.raises(UsageError, match="different shapes"):
        guidance.classifier_free(
            denoise, cond={"c": torch.zeros(1, 2)}, uncond={"c": torch.zeros(1, 3)}, scale=2.0
        )(data((3, 4)), 0.4)
    for scales in ([], [1.0, 2.0]):
        with pytest.raises(UsageError, match="one scale for each"):
            guidance.composed(denoise, conds=[YES], uncond=NO, scales=scales)
    with pytest.raises(UsageError, match="same names"):
        guidance.classifier_free(denoise, cond=YES, uncond={}, scale=2.0)
    guided = guidance.classifier_free(denoise, cond={"c": 1}, uncond={"c": 0}, scale=2.0)
    with pytest.raises(UsageError, match="'c' must be a tensor"):
        guided(data((3, 4)), 0.4)
    three = {"c": torch.zeros(3)}
    with pytest.raises(UsageError, match="'c' has 3 rows"):
        guidance.classifier_free(denoise, cond=three, uncond=three, scale=2.0)(data((3, 4)), 0.4)


# --- several conditions ---------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_split_calls_give_the_same_values(shape: tuple[int, ...]) -> None:
    x = data(shape)
    for rescale in (0.0, 0.7):
        (net, denoise), found = pair("v"), []
        for split in (False, True):
            guided = guidance.classifier_free(
                denoise, cond=YES, uncond=NO, scale=3.0, rescale=rescale, split=split
            )
            found.append(guided(x, 0.4).x0)
        assert net.batches == [4, 2, 2]
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_split_takes_conditions_that_are_no_batch() -> None:
    denoise = Denoiser(lambda x, t, *, c: x * len(c), SCHEDULE, predicts="x0")
    guided = guidance.classifier_free(
        denoise, cond={"c": "long"}, uncond={"c": "s"}, scale=3.0, split=True
    )
    x = data((3, 4))
    torch.testing.assert_close(guided(x, 0.4).x0, x * (1 + 3 * 3))


def test_a_scale_for_each_sample() -> None:
    _, denoise = pair()
    x, scales = data((3, 4)), torch.tensor([1.5, 4.0])
    found = guidance.classifier_free(denoise, cond=YES, uncond=NO, scale=scales)(x, 0.4).x0
    for k in range(2):
        alone = guidance.classifier_free(denoise, cond=YES, uncond=NO, scale=scales[k].item())
        torch.testing.assert_close(found[k], alone(x, 0.4).x0[k])


@pytest.mark.parametrize("shape", SHAPES)
def test_conditions_are_composed(shape: tuple[int, ...]) -> None:
    net, denoise = pair("x0")
    x = data(shape)
    other = {"c": torch.tensor([1.0])}
    each = torch.tensor([0.5, -2.0])
    both = [
        guidance.composed(denoise, conds=[YES, other], uncond=NO, scales=[2.0, each], split=split)
        for split in (False, True)
    ]
    found = [guided(x, 0.4).x0 for guided in both]
    assert net.batches == [6, 2, 2, 2]
    yes, another, no = (net(x, torch.zeros(2), **cond) for cond in (YES, other, NO))
    wanted = no + 2.0 * (yes - no) + pad(each, x) * (another - no)
    for x0 in found:
        torch.testing.assert_close(x0, wanted)


def test_one_composed_condition_is_classifier_free() -> None:
    _, denoise = pair()
    x = data((3, 4))
    composed = guidance.composed(denoise, conds=[YES], uncond=NO, scales=[3.0])
    plain = guidance.classifier_free(denoise, cond=YES, uncond=NO, scale=3.0)
    torch.testing.assert_close(composed(x, 0.4).x0, plain(x, 0.4).x0)


def test_image_and_text_scales_are_a_composition() -> None:
    def net(x: Tensor, t: Tensor, *, image: Tensor, text: Tensor) -> Tensor:
        return torch.tanh(x + image[:, None, None] * 2 + image[:, None, None] * text[:, None, None])

    denoise = Denoiser(net, SCHEDULE)
    one, none = torch.ones(1), torch.zeros(1)
    said = {
        key: denoise.bind(image=image, text=text)(data((3, 4)), 0.4).x0
        for key, image, text in (("", none, none), ("i", one, none), ("it", one, one))
    }
    a, b = 1.5, 7.5
    guided = guidance.composed(
        denoise,
        conds=[{"image": one, "text": none}, {"image": one, "text": one}],
        uncond={"image": none, "text": none},
        scales=[a - b, b],
    )
    wanted = said[""] + a * (said["i"] - said[""]) + b * (said["it"] - said["i"])
    torch.testing.assert_close(guided(data((3, 4)), 0.4).x0, wanted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("parallel", "radius"), [(0.0, 1.0), (1.0, math.inf), (0.3, 2.0)])
def test_projected_is_that_of_diffusers(
    shape: tuple[int, ...], parallel: float, radius: float
) -> None:
    net, denoise = pair("x0")
    x = data(shape)
    yes, no = (net(x, torch.zeros(2), **cond) for cond in (YES, NO))
    wanted = normalized_guidance(
        yes,
        no,
        guidance_scale=4.0,
        eta=parallel,
        norm_threshold=0.0 if radius == math.inf else radius,
        use_original_formulation=True,
    )
    guided = guidance.projected(
        denoise, cond=YES, uncond=NO, scale=5.0, parallel=parallel, radius=radius
    )
    torch.testing.assert_close(guided(x, 0.4).x0, wanted, rtol=1e-10, atol=1e-10)


def test_projected_where_nothing_differs_stays_finite() -> None:
    _, denoise = pair("x0")
    guided = guidance.projected(denoise, cond=NO, uncond=NO, scale=5.0, radius=1.0)
    x = data((3, 4))
    assert torch.equal(guided(x, 0.4).x0, denoise.bind(**NO)(x, 0.4).x0)
    outside = guidance.projected(denoise, cond=YES, uncond=NO, scale=5.0, interval=(0.5, 0.6))
    assert torch.equal(outside(x, 0.4).x0, denoise.bind(**YES)(x, 0.4).x0)


def test_projected_moves_across_the_condition() -> None:
    _, denoise = pair("x0")
    x = data((3, 4))
    change = (
        guidance.projected(denoise, cond=YES, uncond=NO, scale=5.0)(x, 0.4).x0
        - denoise.bind(**YES)(x, 0.4).x0
    )
    along = (change * denoise.bind(**YES)(x, 0.4).x0).sum((1, 2))
    torch.testing.assert_close(along, torch.zeros(2, dtype=torch.float64))


# --- other denoisers ------------------------------------------------------------------------------


def linear_net(weight: float) -> Denoiser:
    def net(x: Tensor, t: Tensor, *, c: Tensor) -> Tensor:
        return x * weight + pad(c, x)

    return Denoiser(net, SCHEDULE, predicts="x0")


def test_a_weaker_network_guides() -> None:
    x = data((3, 4))
    guided = guidance.autoguidance(linear_net(1.0), linear_net(0.8), scale=2.0).bind(**YES)
    wanted = 1.2 * x + pad(YES["c"], x)
    torch.testing.assert_close(guided(x, 0.4).x0, wanted)
    outside = guidance.autoguidance(
        linear_net(1.0), linear_net(0.8), scale=2.0, interval=(0.5, 1.0)
    )
    torch.testing.assert_close(outside.bind(**YES)(x, 0.4).x0, x + pad(YES["c"], x))
    with pytest.raises(UsageError, match="must be the schedule linear"):
        guidance.autoguidance(
            linear_net(1.0), Denoiser(linear_net(1.0).net, schedules.cosine()), scale=2.0
        )


def test_a_perturbed_network_guides_inside_of_conditions() -> None:
    x = data((3, 4))
    guided = guidance.perturbed(linear_net(1.0), linear_net(0.5), scale=2.0)
    torch.testing.assert_close(guided.bind(**YES)(x, 0.4).x0, 2 * x + pad(YES["c"], x))
    # the guidance around it binds conditions, which have to reach the perturbed network as well
    around = guidance.classifier_free(guided, cond=YES, uncond=NO, scale=3.0)
    wanted = 2 * x + pad(NO["c"].double() + 3 * (YES["c"].double() - NO["c"].double()), x)
    torch.testing.assert_close(around(x, 0.4).x0, wanted)


def test_a_mixture_is_guidance_by_text_and_perturbation_at_once() -> None:
    x, a, b = data((3, 4)), 4.0, 1.5
    yes, no, bad = linear_net(1.0).bind(**YES), linear_net(1.0).bind(**NO), linear_net(0.5)
    bad = bad.bind(**YES)
    guided = guidance.mixture([yes, no, bad], [a + b, 1 - a, -b])
    said = [part(x, 0.4).x0 for part in (yes, no, bad)]
    wanted = said[1] + a * (said[0] - said[1]) + b * (said[0] - said[2])
    torch.testing.assert_close(guided(x, 0.4).x0, wanted)
    with pytest.raises(UsageError, match="1 together"):
        guidance.mixture([yes, no], [1.0, 1.0])


# --- bounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("percentile", [0.0, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("high", [1.0, 2.5])
def test_dynamic_threshold_is_that_of_diffusers(
    shape: tuple[int, ...], percentile: float, high: float
) -> None:
    scheduler = DDIMScheduler(
        thresholding=True, dynamic_thresholding_ratio=percentile, sample_max_value=high
    )
    said = 2 * data(shape)
    denoise = Denoiser(lambda x, t: x, SCHEDULE, predicts="x0")
    guided = guidance.dynamic_threshold(denoise, percentile, high=high)
    wanted = scheduler._threshold_sample(said)
    torch.testing.assert_close(guided(said, 0.4).x0, wanted, rtol=1e-12, atol=1e-12)
    if high == 1.0:
        torch.testing.assert_close(wanted, said.clamp(-1, 1))


def test_dynamic_threshold_refuses_nonsense() -> None:
    _, denoise = pair()
    with pytest.raises(UsageError, match="percentile 99.5"):
        guidance.dynamic_threshold(denoise, 99.5)
    with pytest.raises(UsageError, match="range"):
        guidance.dynamic_threshold(denoise, low=2.0, high=1.0)


@pytest.mark.parametrize("bound", [guidance.clamp, guidance.dynamic_threshold])
def test_bounds_keep_the_noise_for_those_who_ask(bound: Wrap) -> None:
    _, denoise = pair("x0")
    x = data((3, 4)) * 10
    said = bound(denoise.bind(**YES))(x, 0.4)
    assert said.x0_noise is not None
    assert torch.equal(said.x0_noise, denoise.bind(**YES)(x, 0.4).x0)
    guided = guidance.classifier_free(denoise, cond=YES, uncond=NO, scale=3.0)
    said = bound(guided)(x, 0.4)
    assert said.x0_noise is not None
    torch.testing.assert_close(said.x0_noise, denoise.bind(**NO)(x, 0.4).x0)


# --- gradients ------------------------------------------------------------------------------------

TABLE = schedules.linear(1e-3, 0.2, 20)


def towards_one(x: Tensor, t: Any) -> Tensor:
    return -0.15 * ((x - 1) ** 2).flatten(1).sum(1)


def index_net(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x) * pad(1 + t.double() / 20, x)


def adm(kind: gd.ModelVarType, monkeypatch: pytest.MonkeyPatch) -> gd.GaussianDiffusion:
    # the reference casts to float32 wherever it says .float(): the same in float64
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    return gd.GaussianDiffusion(
        betas=np.linspace(1e-3, 0.2, 20),
        model_mean_type=gd.ModelMeanType.EPSILON,
        model_var_type=kind,
        loss_type=gd.LossType.MSE,
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_the_classifier_shifts_the_score_as_adm(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = adm(gd.ModelVarType.FIXED_SMALL, monkeypatch)
    denoise = Denoiser(index_net, TABLE, time="index")
    guided = guidance.classifier(denoise, towards_one, 1.7)
    x = data(shape)
    for index in (0, 7, 19):
        t = torch.full((2,), index)
        said = reference.p_mean_variance(index_net, x, t, clip_denoised=False)
        wanted = reference.condition_score(
            lambda x, t: -0.3 * 1.7 * (x - 1), said, x, t, model_kwargs={}
        )
        found = guided(x, (index + 1) / 20).x0
        torch.testing.assert_close(found, wanted["pred_xstart"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_the_classifier_shifts_the_mean_as_adm(
    shape: tuple[int, ...], variance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {
        "small": gd.ModelVarType.FIXED_SMALL,
        "large": gd.ModelVarType.FIXED_LARGE,
        "learned": gd.ModelVarType.LEARNED_RANGE,
    }
    reference = adm(kinds[variance], monkeypatch)
    learned = variance == "learned"

    def net(x: Tensor, t: Tensor) -> Tensor:
        y = index_net(x, t)
        return torch.cat([y, torch.cos(x)], 1) if learned else y

    denoise = Denoiser(net, TABLE, time="index", learned_variance=learned)
    guided = guidance.classifier(
        denoise, towards_one, 1.7, ancestral=grids.leading(20), variance=variance
    )
    x = data(shape)

    class Silent:
        def between(self, t: Any, s: Any, device: Any = None, dtype: Any = None) -> Tensor:
            return torch.zeros_like(x)

    sampler = samplers.from_name("ddpm", variance=variance)
    # in the last step, to clean data, the reference moves the mean by the variance of the step
    # before it (or by none, "small"), and here it is not moved
    for index in (1, 7, 19):
        t = torch.full((2,), index)
        said = reference.p_mean_variance(net, x, t, clip_denoised=False)
        wanted = reference.condition_mean(
            lambda x, t: -0.3 * 1.7 * (x - 1), said, x, t, model_kwargs={}
        )
        here, there = (TABLE.at(i / 20) for i in (index + 1, index))
        found, _ = sampler.step(guided, x, here, there, {}, cast(noise.Noise, Silent()))
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_both_forms_of_the_classifier_agree_as_steps_become_small() -> None:
    schedule, x = schedules.vp_linear(), data((3, 4))
    denoise = Gaussian(schedule=schedule)
    score = guidance.classifier(denoise, towards_one)(x, 0.5).x0 - denoise(x, 0.5).x0
    far = []
    for steps in (10, 100, 1000):

        def grid(_: Any, steps: int = steps) -> Tensor:
            return torch.linspace(1, 0, steps + 1, dtype=torch.float64)

        mean = guidance.classifier(denoise, towards_one, ancestral=grid)(x, 0.5).x0
        far.append(((mean - denoise(x, 0.5).x0) / score - 1).abs().max().item())
    assert far[1] < far[0] / 5 and far[2] < far[1] / 5 and far[2] < 0.02


@pytest.mark.parametrize("shape", SHAPES)
def test_the_exact_classifier_of_a_normal_gives_its_exact_posterior(
    shape: tuple[int, ...],
) -> None:
    # x_0 ~ N(0, 1), y ~ N(x_0, 0.5^2): then y given x_t is normal as well
    schedule, y, x = schedules.cosine(), 0.8, data(shape)
    denoise, t = Gaussian(schedule=schedule), schedule.at(0.6)

    def log_p(x: Tensor, t: Any) -> Tensor:
        variance = t.sigma**2 + 0.25
        return -((y - t.alpha * x) ** 2).flatten(1).sum(1) / (2 * variance)

    found = guidance.classifier(denoise, log_p)(x, 0.6).x0
    precision = 1 + 1 / 0.25 + t.alpha**2 / t.sigma**2
    wanted = (y / 0.25 + t.alpha / t.sigma**2 * x) / precision
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_a_gradient_through_the_network() -> None:
    net, denoise = pair("x0")
    x, t = data((3, 4)), SCHEDULE.at(0.4)
    found = guidance.universal(denoise.bind(**YES), towards_one, 2.0)(x, t).x0
    at = x.clone().requires_grad_()
    said = net(at, torch.zeros(2), **YES)
    (slope,) = torch.autograd.grad(2.0 * towards_one(said, t).sum(), at)
    torch.testing.assert_close(found, said.detach() + t.sigma**2 / t.alpha * slope)
    assert not found.requires_grad


@pytest.mark.parametrize("noised", [True, False])
def test_towards_an_embedding(noised: bool) -> None:
    _, denoise = pair("x0")
    x, t = data((3, 4)), SCHEDULE.at(0.4)
    target = torch.tensor([[1.0, -2.0, 0.5]])

    def embed(x: Tensor, t: Any) -> Tensor:
        return torch.sin(x).sum(-1)

    guided = guidance.similarity(denoise.bind(**YES), embed, target, 30.0, noised=noised)

    def near(x: Tensor, t: Any) -> Tensor:
        return F.cosine_similarity(embed(x, t), target.double(), dim=1)

    around = guidance.classifier if noised else guidance.universal
    wanted = around(denoise.bind(**YES), near, 30.0)(x, t).x0
    torch.testing.assert_close(guided(x, t).x0, wanted)
    # a small step brings it nearer
    small = guidance.similarity(denoise.bind(**YES), embed, target, 0.01, noised=noised)
    change = small(x, t).x0 - denoise.bind(**YES)(x, t).x0
    assert (near(x + change, t) > near(x, t)).all() or not noised
    with pytest.raises(UsageError, match=r"embedding of x is \(2, 3\)"):
        guidance.similarity(denoise.bind(**YES), embed, target[:, :2], 1.0)(x, t)


def test_gradients_go_through_each_other() -> None:
    def net(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x)

    denoise = Denoiser(net, SCHEDULE, predicts="x0")
    x, t = data((3, 4)), SCHEDULE.at(0.4)
    level = t.sigma**2 / t.alpha
    found = guidance.universal(guidance.universal(denoise, towards_one), towards_one)(x, t).x0

    def inner(x: Tensor) -> Tensor:
        slope = torch.func.grad(lambda x: towards_one(torch.tanh(x), t).sum())(x)
        return torch.tanh(x) + level * slope

    slope = torch.func.grad(lambda x: towards_one(inner(x), t).sum())(x)
    torch.testing.assert_close(found, inner(x) + level * slope)


def test_gradients_in_inference_mode() -> None:
    _, denoise = pair("x0")
    x = data((3, 4))
    guided = guidance.universal(denoise.bind(**YES), towards_one)
    wanted = guided(x, 0.4).x0
    with torch.inference_mode():
        assert torch.equal(guided(x.clone(), 0.4).x0, wanted)
        made_here = {"c": torch.eye(3, dtype=torch.float64)[None]}
    # what the network keeps for the backward pass must not come from inference mode
    scaled = Denoiser(lambda x, t, *, c: torch.tanh(x.mT @ c[0]).mT, SCHEDULE, predicts="x0")
    with pytest.raises(UsageError, match="made in inference mode"):
        guidance.universal(scaled.bind(**made_here), towards_one)(x, 0.4)


def test_gradient_misuse_is_refused() -> None:
    _, denoise = pair("x0")
    denoise = denoise.bind(**YES)
    x = data((3, 4))
    with pytest.raises(UsageError, match="one number per sample"):
        guidance.classifier(denoise, lambda x, t: x.sum())(x, 0.4)
    with pytest.raises(UsageError, match="not differentiable"):
        guidance.universal(denoise, lambda x, t: x.detach().sum((1, 2)))(x, 0.4)
    with pytest.raises(UsageError, match="unknown variance 'smal'; did you mean 'small'"):
        guidance.classifier(denoise, towards_one, variance="smal")
    with pytest.raises(UsageError, match="learned one"):
        guidance.classifier(denoise, towards_one, ancestral=grids.linear(3), variance="learned")(
            x, 0.4
        )
    with pytest.raises(UsageError, match="one time for the whole batch"):
        guidance.classifier(denoise, towards_one, ancestral=grids.linear(3))(
            x, torch.tensor([0.2, 0.3])
        )
    no_signal = Time(1.0, 0.0, 1.0, -math.inf)
    with pytest.raises(UsageError, match="no signal is left"):
        guidance.classifier(denoise, towards_one)(x, no_signal)


# --- all of them ----------------------------------------------------------------------------------

HALF = operators.downsample([2])
EVERY: dict[str, Wrap] = {
    "classifier_free": lambda d: guidance.classifier_free(d, cond=YES, uncond=NO, scale=1.5),
    "composed": lambda d: guidance.composed(d, conds=[YES, NO], uncond=NO, scales=[1.0, 0.2]),
    "projected": lambda d: guidance.projected(d, cond=YES, uncond=NO, scale=1.5, radius=3.0),
    "autoguidance": lambda d: guidance.autoguidance(d, d, scale=1.5),
    "perturbed": lambda d: guidance.perturbed(d, d, scale=0.5),
    "mixture": lambda d: guidance.mixture([d, d], [1.5, -0.5]),
    "classifier": lambda d: guidance.classifier(d, towards_one, 0.1),
    "similarity": lambda d: guidance.similarity(
        d, lambda x, t: x.sum(-1), torch.tensor([[1.0, 2.0, 3.0]]), 0.1, noised=False
    ),
    "universal": lambda d: guidance.universal(d, towards_one, 0.1),
    "clamp": guidance.clamp,
    "dynamic_threshold": guidance.dynamic_threshold,
    "replacement": lambda d: guidance.replacement(d, HALF, torch.ones(1, 3, 2)),
    "pseudo_inverse": lambda d: guidance.pseudo_inverse(d, HALF, torch.ones(1, 3, 2), noise=0.5),
    "reconstruction": lambda d: guidance.reconstruction(d, HALF, torch.ones(1, 3, 2)),
    "dps": lambda d: guidance.dps(d, HALF, torch.ones(1, 3, 2), 0.01),
}


def test_every_guidance_is_listed_with_a_line_and_a_source() -> None:
    assert (
        EVERY.keys()
        == guidance.NAMES.keys()
        == set(guidance.__all__) - {"NAMES", "from_clip", "from_name"}
    )
    for row in guidance.NAMES.values():
        first = (row.__doc__ or "").splitlines()[0]
        assert 10 < len(first) < 110 and first.endswith(".")
        assert re.search(r"\(.*\d{4}.*\)", " ".join((row.__doc__ or "").split()))


def say_all(x: Tensor, t: Tensor, *, c: Tensor) -> Tensor:
    return torch.cat([torch.tanh(x + pad(c, x)), torch.cos(x)], 1)


@pytest.mark.parametrize("name", EVERY)
def test_every_guidance_keeps_what_denoisers_have(name: str) -> None:
    inner = Denoiser(say_all, SCHEDULE, predicts="v", learned_variance=True).bind(**YES)
    guided = EVERY[name](inner)
    assert guided.schedule is SCHEDULE
    assert guided.predicts == "v"
    assert guided.device == torch.device("cpu")
    x = data((3, 4))
    copy = x.clone()
    said = guided(x, 0.4)
    assert said.variance_fraction is not None
    torch.testing.assert_close(said.variance_fraction, (torch.cos(x) + 1) / 2)
    assert said.x0.shape == x.shape and said.x0.dtype == x.dtype
    assert not said.x0.requires_grad and not said.variance_fraction.requires_grad
    assert torch.equal(x, copy)
    # a row sees nothing of the others
    one = EVERY[name](inner.bind(c=YES["c"][:1]))
    if name not in ("classifier_free", "composed", "projected"):
        torch.testing.assert_close(one(x[:1], 0.4).x0, said.x0[:1])


@pytest.mark.parametrize("outer", EVERY)
def test_every_guidance_nests_in_every_other(outer: str) -> None:
    x = data((3, 4))
    for inner in EVERY.values():
        guided = EVERY[outer](inner(Denoiser(say_all, SCHEDULE, learned_variance=True).bind(**YES)))
        with torch.no_grad():
            said = guided(x, 0.4)
        assert said.x0.isfinite().all() and said.variance_fraction is not None
        with torch.inference_mode():
            torch.testing.assert_close(guided(x, 0.4).x0, said.x0)
