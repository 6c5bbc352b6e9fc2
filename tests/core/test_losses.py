"""Losses against their formulas, guided-diffusion and k-diffusion; the laws of consistency."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor, nn

from mdiff.core import Denoiser, consistency, denoiser, grids, losses, schedules, times
from mdiff.core.analytic import Gaussian
from mdiff.core.denoiser import Guided, Prediction
from mdiff.core.errors import UsageError
from mdiff.core.schedules import Schedule, Time

SHAPES = [(4, 2, 9), (4, 2, 5, 3), (4, 1, 2, 3, 4)]
SCHEDULES = {
    "linear": schedules.linear(),
    "vp_linear": schedules.vp_linear(),
    "subvp": schedules.subvp(),
    "cosine": schedules.cosine(),
    "ve": schedules.ve(),
    "flow": schedules.from_name("flow"),
}
each_shape = pytest.mark.parametrize("shape", SHAPES)
each_schedule = pytest.mark.parametrize("name", SCHEDULES)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=dtype, generator=generator)


def net(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x) * (0.5 + t.reshape(-1, *[1] * (x.ndim - 1)))


def wide(x: Tensor, t: Tensor) -> Tensor:
    """Twice the channels; the last place a variance, also outside [-1, 1]."""
    return torch.cat([net(x, t), 1.2 * torch.sin(3 * x)], dim=1)


class Case:
    """Data, noise, times, and what a denoiser says of them, by explicit formulas."""

    def __init__(self, schedule: Schedule, shape: tuple[int, ...], predicts: str = "v") -> None:
        self.schedule = schedule
        self.x0, self.z = randn(*shape), randn(*shape, seed=1)
        self.t = torch.tensor([0.011, 0.3, 0.62, 0.9], dtype=torch.float64)
        self.alpha, self.sigma = (c.reshape(-1, *[1] * (len(shape) - 1)) for c in schedule(self.t))
        self.x = self.alpha * self.x0 + self.sigma * self.z
        self.denoise = Denoiser(net, schedule, predicts=predicts)
        self.x0hat = self.denoise(self.x, self.t).x0
        self.zhat = (self.x - self.alpha * self.x0hat) / self.sigma

    def loss(self, name: str, **params: Any) -> Tensor:
        each = losses.from_name(name, **params)(self.denoise, self.x0, self.t, self.z)
        assert each.shape == (4,) and each.dtype == torch.float64
        return each


def mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=0)


def test_every_loss_has_a_line_and_a_source() -> None:
    for row in losses.NAMES.values():
        doc = row.__doc__ or ""
        assert doc.splitlines()[0].rstrip(".").strip() and any(c.isdigit() for c in doc), row


# --- regressions ----------------------------------------------------------------------------------


@each_shape
@each_schedule
@pytest.mark.parametrize("predicts", denoiser.PREDICTS)
def test_a_regression_is_of_what_its_name_says_whatever_the_network_says(
    predicts: str, name: str, shape: tuple[int, ...]
) -> None:
    case = Case(SCHEDULES[name], shape, predicts)

    def v(x0: Tensor, z: Tensor) -> Tensor:
        return case.alpha * z - case.sigma * x0

    # v as the network means it: a sub-VP or VE schedule has norm alpha^2 + sigma^2 not 1
    targets = {
        "eps": (case.z, case.zhat),
        "x0": (case.x0, case.x0hat),
        "v": (v(case.x0, case.z), v(case.x0hat, case.zhat)),
        "score": (-case.z / case.sigma, -case.zhat / case.sigma),
        "flow": (case.z - case.x0, case.zhat - case.x0hat),
    }
    for kind, (target, said) in targets.items():
        close(case.loss(kind), mean((target - said) ** 2), 1e-8)
    close(case.loss("eps", reduce="sum"), case.loss("eps") * math.prod(shape[1:]))


@each_shape
def test_denoising_score_matching_of_ncsn(shape: tuple[int, ...]) -> None:
    case = Case(SCHEDULES["ve"], shape)
    score = (case.x0hat - case.x) / case.sigma**2
    error = score + case.sigma * case.z / case.sigma**2
    expected = (case.sigma**2 * error**2).flatten(1).sum(1) / 2
    close(case.loss("ncsn"), expected)
    close(case.loss("score_sde", reduce="sum"), expected)


def diffusion(name: str, t: Tensor) -> Tensor:
    """g^2 as the paper of the SDEs writes it."""
    beta, integral = 0.1 + 19.9 * t, 0.1 * t + 19.9 * t**2 / 2
    return {
        "vp_linear": beta,
        "subvp": beta * (1 - torch.exp(-2 * integral)),
        "ve": (0.01 * 5000**t) ** 2 * 2 * math.log(5000),
    }[name]


@pytest.mark.parametrize("name", ["vp_linear", "subvp", "ve"])
def test_score_matching_of_the_sdes(name: str) -> None:
    case = Case(SCHEDULES[name], SHAPES[1])
    score = (case.alpha * case.x0hat - case.x) / case.sigma**2
    plain = mean((score * case.sigma + case.z) ** 2)
    close(case.loss("score_sde"), plain, 1e-9)
    weighted = diffusion(name, case.t) * mean((score + case.z / case.sigma) ** 2)
    close(case.loss("score_sde", likelihood=True), weighted, 1e-7)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_weights_by_snr_in_every_form_of_the_papers(name: str) -> None:
    case = Case(SCHEDULES[name], SHAPES[0])
    snr = (case.alpha / case.sigma).flatten() ** 2
    eps, v, x0 = (case.loss(kind) for kind in ("eps", "v", "x0"))
    for gamma in (1.0, 5.0):
        expected = case.loss("min_snr", gamma=gamma)
        smaller = snr.clamp(max=gamma)
        for form in (smaller / snr * eps, smaller / (snr + 1) * v, smaller * x0):
            close(expected, form, 1e-9)
    for gamma, k in ((0.5, 1.0), (1.0, 2.0)):
        expected, weight = case.loss("p2", gamma=gamma, k=k), (k + snr) ** -gamma
        for form in (weight * eps, weight * snr / (snr + 1) * v, weight * snr * x0):
            close(expected, form, 1e-9)
    close(case.loss("truncated_snr"), torch.maximum(x0, eps), 1e-9)


@each_shape
@pytest.mark.parametrize("weighting", ["karras", "soft-min-snr"])
def test_losses_of_k_diffusion(weighting: str, shape: tuple[int, ...]) -> None:
    karras = oracles.k_diffusion("layers")
    case = Case(schedules.ve(0.002, 80.0), shape)
    sigma = case.sigma.flatten()
    reference = karras.Denoiser(net, sigma_data=0.5, weighting=weighting)
    expected = reference.loss(case.x0, case.z, sigma)

    def rule(inner: Any, x: Tensor, t: Time) -> Prediction:
        return Prediction(x0=reference(x, (t.sigma / t.alpha).to(x)))

    case.denoise = Guided(inner=case.denoise, rule=rule)  # type: ignore[assignment]
    found = case.loss("edm") if weighting == "karras" else case.loss("soft_min_snr")
    close(found, expected, 1e-9)


@pytest.mark.parametrize("name", ["vp_linear", "subvp", "ve", "cosine"])
def test_the_likelihood_weight_integrates_to_mutual_information(name: str) -> None:
    schedule, std = SCHEDULES[name], 0.5
    denoise = Gaussian(schedule=schedule, mean=0.3, std=std)
    x0, z = 0.3 + std * randn(4000, 200), randn(4000, 200, seed=1)
    t, _ = times.uniform("stratified")(schedule, 4000, torch.Generator().manual_seed(0))
    each = losses.score_sde(likelihood=True, reduce="sum")(denoise, x0, t, z)
    found = each.mean().item() * (schedule.high - schedule.low)
    ends = torch.tensor([schedule.low, schedule.high], dtype=torch.float64)
    snr = schedule.log_snr(ends).exp()
    # Guo et al., 2005: d I / d SNR is half the least squared error
    first, last = torch.log1p(std**2 * snr) / 2
    assert found == pytest.approx(200 * (first - last).item(), rel=0.02)


# --- guided-diffusion -----------------------------------------------------------------------------


def guided(steps: int, mean: str, variance: str, loss: str) -> Any:
    from guided_diffusion import gaussian_diffusion as gd

    return gd.GaussianDiffusion(
        betas=cosine(steps),
        model_mean_type=getattr(gd.ModelMeanType, mean),
        model_var_type=getattr(gd.ModelVarType, variance),
        loss_type=getattr(gd.LossType, loss),
    )


def cosine(steps: int) -> np.ndarray:
    from guided_diffusion import gaussian_diffusion as gd

    return np.array(gd.get_named_beta_schedule("cosine", steps))


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def precision(request: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.dtype, float]:
    """The type to compute in, and how well it has to agree."""
    from guided_diffusion import gaussian_diffusion as gd

    def exact(array: np.ndarray, t: Tensor, shape: tuple[int, ...]) -> Tensor:
        # the reference rounds its coefficients to float32
        return torch.from_numpy(array)[t].reshape(-1, *[1] * (len(shape) - 1)).expand(shape)

    if request.param == torch.float64:
        monkeypatch.setattr(gd, "_extract_into_tensor", exact)
        return torch.float64, 1e-10
    return torch.float32, 1e-5


LIKE = {
    # the reference's mean, variance and loss; ours
    "simple": ("EPSILON", "FIXED_SMALL", "MSE", lambda steps: losses.eps()),
    "x0": ("START_X", "FIXED_LARGE", "MSE", lambda steps: losses.x0()),
    "hybrid": ("EPSILON", "LEARNED_RANGE", "RESCALED_MSE", lambda steps: losses.hybrid()),
    "hybrid, x0": ("START_X", "LEARNED_RANGE", "RESCALED_MSE", lambda steps: losses.hybrid("x0")),
    "hybrid, weight 1": (
        "EPSILON",
        "LEARNED_RANGE",
        "MSE",
        lambda steps: losses.hybrid(scale=1 / steps),
    ),
    "bound": ("EPSILON", "LEARNED_RANGE", "RESCALED_KL", lambda steps: losses.vlb()),
    "term": ("EPSILON", "LEARNED_RANGE", "KL", lambda steps: losses.vlb(rescale=False)),
    "term, small": ("EPSILON", "FIXED_SMALL", "KL", lambda steps: losses.vlb(rescale=False)),
    "term, large": (
        "EPSILON",
        "FIXED_LARGE",
        "KL",
        lambda steps: losses.vlb(rescale=False, variance="large"),
    ),
}


@each_shape
@pytest.mark.parametrize("name", LIKE)
def test_losses_of_improved_ddpm(
    name: str, shape: tuple[int, ...], precision: tuple[torch.dtype, float]
) -> None:
    dtype, tolerance = precision
    steps = 400
    kind, variance, loss, make = LIKE[name]
    scale = nn.Parameter(torch.tensor([1.0, 1.0], dtype=dtype))

    def model(x: Tensor, t: Tensor) -> Tensor:
        first, second = wide(x, t.to(x) / steps).chunk(2, dim=1)
        both = [first * scale[0], second * scale[1]]
        return torch.cat(both, dim=1) if variance == "LEARNED_RANGE" else both[0]

    index = torch.tensor([0, 1, 157, 399])
    # eight bits, the ends of the range among them
    x0 = ((randn(*shape, dtype=dtype) * 0.6).clamp(-1, 1) * 127.5).round() / 127.5
    z = randn(*shape, seed=1, dtype=dtype)
    reference = guided(steps, kind, variance, loss)
    expected = reference.training_losses(model, x0, index, noise=z)["loss"]
    denoise = Denoiser(
        model,
        schedules.betas(cosine(steps)),
        predicts={"EPSILON": "eps", "START_X": "x0"}[kind],
        time="index",
        learned_variance=variance == "LEARNED_RANGE",
    )
    found = make(steps)(denoise, x0, (index + 1).double() / steps, z)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    (there,) = torch.autograd.grad(expected.mean(), scale)
    (here,) = torch.autograd.grad(found.mean(), scale)
    torch.testing.assert_close(here, there, rtol=10 * tolerance, atol=10 * tolerance)


def test_only_the_variance_learns_from_the_bound_of_the_hybrid() -> None:
    schedule = schedules.linear(steps=100)
    denoise = Denoiser(wide, schedule, learned_variance=True)
    x0, z = randn(3, 2, 8).requires_grad_(), randn(3, 2, 8, seed=1)
    t = torch.tensor([0.01, 0.5, 1.0], dtype=torch.float64)
    parts = []
    for loss in (losses.eps(), losses.hybrid(scale=0.0), losses.hybrid(scale=1.0)):
        weight = torch.ones(2, dtype=torch.float64, requires_grad=True)

        def rule(inner: Any, x: Tensor, t: Time, weight: Tensor = weight) -> Prediction:
            said = inner(x, t)
            assert said.variance_fraction is not None
            return Prediction(
                x0=said.x0 * weight[0], variance_fraction=said.variance_fraction * weight[1]
            )

        each = loss(Guided(inner=denoise, rule=rule), x0.detach(), t, z)
        parts.append(torch.autograd.grad(each.sum(), weight, allow_unused=True)[0])
    simple, none, whole = parts
    assert simple[1] == none[1] == 0 and whole[1] != 0 and torch.isfinite(whole).all()
    assert simple[0] == none[0] == whole[0]


# --- consistency ----------------------------------------------------------------------------------


def exact_flow(schedule: Schedule, first: float = 1.0) -> Guided:
    """The consistency function of N(0.3, 0.25): where the flow ends."""
    teacher = Gaussian(schedule=schedule, mean=0.3, std=0.5)

    def rule(inner: Any, x: Tensor, t: Time) -> Prediction:
        mean, variance = t.alpha * 0.3, t.alpha**2 * 0.25 + t.sigma**2
        a, b = (
            c.reshape(-1, *[1] * (x.ndim - 1)) for c in (0.5 / variance**0.5, torch.as_tensor(mean))
        )
        return Prediction(x0=0.3 + a * (x - b) * first)

    return Guided(inner=teacher, rule=rule)


@each_shape
@pytest.mark.parametrize("name", ["vp_linear", "ve", "flow"])
def test_distillation_vanishes_on_the_true_flow_as_its_steps_do(
    name: str, shape: tuple[int, ...]
) -> None:
    schedule = SCHEDULES[name]
    teacher = Gaussian(schedule=schedule, mean=0.3, std=0.5)
    x0, z = 0.3 + 0.5 * randn(*shape), randn(*shape, seed=1)

    def error(solver: str, steps: int) -> float:
        grid = lambda schedule: torch.linspace(0.8, 0, steps + 1, dtype=torch.float64)  # noqa: E731
        t = grid(schedule)[[0, steps // 4, steps // 2, steps - steps // 4]]
        loss = losses.consistency_distillation(teacher, grid, solver=solver)
        return loss(exact_flow(schedule), x0, t, z).mean().sqrt().item()

    # one step's error is of the order of the method plus one
    for solver, order in (("euler", 2), ("heun", 3)):
        coarse, fine = error(solver, 64), error(solver, 128)
        assert abs(math.log2(coarse / fine) - order) < 0.3, (solver, coarse, fine)
    # any multiple of the flow agrees along its paths: only the end tells that it is wrong
    loss, last = losses.consistency_distillation(teacher, grids.linear(64)), schedule.low
    for factor, wrong in ((1.0, False), (1.3, True)):
        each = loss(exact_flow(schedule, factor), x0, torch.full((4,), last).double(), z)
        assert ((each > 1e-3) == wrong).all()


@each_shape
def test_training_pairs_share_data_and_noise_and_end_at_the_data(shape: tuple[int, ...]) -> None:
    schedule, grid = SCHEDULES["vp_linear"], grids.karras(10)
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, t))
        return net(x, t)

    denoise = Denoiser(spy, schedule, predicts="x0")
    x0, z, visited = randn(*shape), randn(*shape, seed=1), grid(schedule)
    t = visited[[0, 4, 8, 9]]
    # a time that float32 has rounded is still the same
    for given in (t, t.float()):
        seen.clear()
        each = losses.consistency_training(grid)(denoise, x0, given, z)
        (low, low_t), (high, high_t) = seen
        torch.testing.assert_close(high_t, t, rtol=1e-6, atol=0)
        torch.testing.assert_close(low_t[:3], visited[[1, 5, 9]], rtol=0, atol=0)
        torch.testing.assert_close(low[:3], schedule.diffuse(x0, low_t, z)[:3])
        torch.testing.assert_close(high, schedule.diffuse(x0, t, z), rtol=1e-5, atol=1e-5)
        goal = net(low, low_t)
        goal[3] = x0[3]
        close(each, mean((net(high, high_t) - goal) ** 2))


def test_the_target_gets_no_gradient_and_distances_and_weights_are_those_of_the_papers() -> None:
    schedule, grid = schedules.ve(0.002, 80.0), grids.karras(18)
    t = grid(schedule)[[0, 5, 10, 16]]
    x0, z = randn(4, 2, 9), randn(4, 2, 9, seed=1)
    gain = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    student = Denoiser(lambda x, t: net(x, t) * gain, schedule, predicts="x0")
    target = Denoiser(lambda x, t: net(x, t) * 0.5, schedule, predicts="x0")
    grads = [
        torch.autograd.grad(loss(student, x0, t, z).sum(), gain)[0]
        for loss in (
            losses.consistency_training(grid),
            losses.consistency_training(grid, target=target),
        )
    ]
    assert grads[0] == grads[1] != 0
    s = consistency.following(grid, schedule, t)
    sigma, smaller = schedule(t)[1], schedule(s)[1]
    a, b = (student(schedule.diffuse(x0, u, z), u).x0.detach() for u in (t, s))
    c = 0.00054 * math.sqrt(18)
    for name, expected in {
        "absolute": mean((a - b).abs()),
        "pseudo_huber": ((a - b).flatten(1).norm(dim=1) ** 2 + c**2).sqrt() - c,
    }.items():
        plain = losses.consistency_training(grid, distance=name)
        close(plain(student, x0, t, z).detach(), expected, 1e-9)
        gap = losses.consistency_training(grid, distance=name, weight="gap")
        close(gap(student, x0, t, z).detach(), expected / (sigma - smaller), 1e-9)


def test_curricula_of_consistency_training() -> None:
    assert [consistency.growing(k, 800_000) for k in (0, 800_000)] == [2, 151]
    assert consistency.growing(400_000, 800_000) == 107
    assert [consistency.doubling(k, 400_000) for k in (0, 49_999, 50_000, 350_000, 400_000)] == [
        11,
        11,
        21,
        1281,
        1281,
    ]
    assert consistency.target_decay(2, decay=0.9) == pytest.approx(0.9)
    with pytest.raises(UsageError, match="step 3"):
        consistency.growing(3, 2)


# --- a batch --------------------------------------------------------------------------------------


def test_a_batch_is_drawn_from_its_generator_alone() -> None:
    denoise = Denoiser(net, schedules.linear(), predicts="v")
    x0, before = randn(6, 2, 5, dtype=torch.float32), torch.get_rng_state()

    def run(seed: int) -> losses.Outcome:
        generator = torch.Generator().manual_seed(seed)
        return losses.evaluate(losses.v(), times.entries(), denoise, x0, generator)

    first, again, other = run(1), run(1), run(2)
    assert torch.equal(first.mean, again.mean) and first.mean != other.mean
    assert first.mean.dtype == torch.float32 and first.mean == first.each.mean()
    assert torch.equal(before, torch.get_rng_state())
    history = times.LossHistory.empty(1000).add(first.t, first.each)
    assert history.counts.sum() == 6


def test_importance_leaves_the_mean_where_it_was() -> None:
    schedule = schedules.linear(steps=10)
    denoise, entry = Denoiser(net, schedule), torch.arange(1, 11, dtype=torch.float64) / 10
    history = times.LossHistory.empty(10, length=1).add(entry, 1 / entry)
    x0 = randn(20_000, 1, 2)
    means = [
        losses.evaluate(losses.eps(), law, denoise, x0, torch.Generator().manual_seed(0)).mean
        for law in (times.entries(), times.importance(history))
    ]
    assert abs(means[0] / means[1] - 1) < 0.03


def test_by_level() -> None:
    schedule = schedules.vp_linear()
    t = schedule.time(torch.tensor([-30.0, -9.0, 0.1, 0.2, 9.9, 30.0], dtype=torch.float64))
    each = torch.tensor([1.0, 3.0, 5.0, 6.0, 7.0, 9.0])
    found = losses.by_level(schedule, t, each, bins=4)
    assert found[[0, 2, 3]].tolist() == [2.0, 5.5, 8.0] and found[1].isnan()


def test_a_batch_of_one_and_an_outlier_next_door() -> None:
    for loss in (losses.flow(), losses.min_snr(), losses.hybrid()):
        denoise = Denoiser(wide, schedules.linear(), learned_variance=True)
        x0, z = randn(3, 2, 4), randn(3, 2, 4, seed=1)
        t = torch.tensor([0.001, 0.5, 1.0], dtype=torch.float64)
        together = loss(denoise, x0, t, z)
        for k in range(3):
            one = slice(k, k + 1)
            close(loss(denoise, x0[one], t[one], z[one]), together[one], 1e-12)


def test_no_signal_at_the_end_is_no_trouble_for_v() -> None:
    schedule = schedules.from_name("zero_terminal")
    denoise = Denoiser(net, schedule, predicts="v")
    x0, z, t = randn(2, 1, 4), randn(2, 1, 4, seed=1), torch.ones(2, dtype=torch.float64)
    for name in ("v", "x0", "min_snr", "p2", "edm", "flow", "truncated_snr"):
        assert torch.isfinite(losses.from_name(name)(denoise, x0, t, z)).all(), name
    assert torch.isfinite(losses.score_sde(likelihood=True)(denoise, x0, t, z)).all()


def test_misuse_is_refused() -> None:
    table = Denoiser(net, schedules.linear())
    x0, t = randn(1, 2, 4), torch.tensor([0.5])
    with pytest.raises(UsageError, match="'min_snr'"):
        losses.from_name("minsnr")
    with pytest.raises(UsageError, match="gama"):
        losses.from_name("min_snr", gama=3)
    with pytest.raises(UsageError, match="learns a variance"):
        losses.hybrid()(table, x0, t, x0)
    with pytest.raises(UsageError, match="'small' or 'large'"):
        losses.vlb(variance="learned")(table, x0, t, x0)
    with pytest.raises(UsageError, match="continuous"):
        losses.vlb()(Denoiser(net, schedules.cosine()), x0, t, x0)
    wrong: list[Callable[[], object]] = [
        lambda: losses.eps(reduce="max"),
        lambda: losses.consistency_training(grids.karras(3), distance="lpips"),
        lambda: losses.consistency_distillation(table, grids.karras(3), solver="rk4"),
    ]
    for make in wrong:
        with pytest.raises(UsageError, match="unknown"):
            make()
