"""Samplers against exact solutions: the order of each, equalities between them, their moments."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from mdiff.core import Denoiser, grids, noise, sample, samplers, schedules, steps
from mdiff.core.analytic import Gaussian
from mdiff.core.denoiser import Denoise, Guided, Prediction
from mdiff.core.errors import UsageError
from mdiff.core.grids import Grid
from mdiff.core.schedules import Schedule, Time

SCHEDULES = {
    "vp_linear": schedules.vp_linear(),
    "cosine": schedules.cosine(),
    "ve": schedules.ve(),
}
SHAPES = [(3, 17), (2, 5, 7), (2, 3, 4, 5)]
DETERMINISTIC = {name: samplers.from_name(name) for name in ("ddim", "euler", "heun", "dpmpp_2m")}


def even(n: int, first: float = 0.9, last: float = 0.05) -> Grid:
    return lambda schedule: torch.linspace(first, last, n + 1, dtype=torch.float64)


def start(schedule: Schedule, shape: tuple[int, ...], t: float, batch: int = 2) -> Tensor:
    """x_t of N(0.7, 0.25) data, float64."""
    mean, variance = Gaussian(schedule=schedule, mean=0.7, std=0.5).moments(t)
    return noise.from_seeds(range(batch), shape).draw(dtype=torch.float64) * variance**0.5 + mean


def smooth(schedule: Schedule) -> Denoiser:
    """A network that is no exact denoiser of anything, and not linear."""
    return Denoiser(
        lambda x, t: torch.tanh(x) * (0.5 + t.reshape(-1, *[1] * (x.ndim - 1))), schedule
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_observed_order(name: str, schedule: Schedule, shape: tuple[int, ...]) -> None:
    sampler = DETERMINISTIC[name]
    denoise = Gaussian(schedule=schedule, mean=0.7, std=0.5)
    x = start(schedule, shape, 0.9)
    exact = denoise.flow(x, 0.9, 0.05)
    streams = noise.from_seeds([0, 1], shape)
    counts = [80, 160, 320]
    errors = [
        (sample(denoise, streams, sampler=sampler, grid=even(n), x=x) - exact).abs().max().item()
        for n in counts
    ]
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    slack = 0.25 if name == "dpmpp_2m" else 0.1
    assert all(abs(order - sampler.order) < slack for order in orders), (errors, orders)


@pytest.mark.parametrize("name", samplers.NAMES)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_declared_evaluations(name: str, schedule: Schedule) -> None:
    calls = 0

    def count(inner: Denoise, x: Tensor, t: Time) -> Prediction:
        nonlocal calls
        calls += 1
        return inner(x, t)

    sampler = samplers.from_name(name)
    denoise = Guided(inner=Gaussian(schedule=schedule), rule=count)
    sample(denoise, noise.from_seeds([0], (4,)), sampler=sampler, grid=even(6))
    assert calls == 6 * sampler.evaluations
    calls = 0
    sample(denoise, noise.from_seeds([0], (4,)), sampler=sampler, grid=grids.karras(6))
    # no second slope exists at clean data
    assert calls == 6 * sampler.evaluations - (sampler.evaluations - 1)


def ddim_of_the_paper(x: np.ndarray, x0: np.ndarray, t: Time, s: Time) -> np.ndarray:
    eps = (x - t.alpha * x0) / t.sigma
    return s.alpha * x0 + s.sigma * eps


def euler_of_karras(x: np.ndarray, x0: np.ndarray, t: Time, s: Time) -> np.ndarray:
    sigma, following = t.sigma / t.alpha, s.sigma / s.alpha
    scaled = x / t.alpha
    return (scaled + (following - sigma) * (scaled - x0) / sigma) * s.alpha


def first_order_of_dpm_solver(x: np.ndarray, x0: np.ndarray, t: Time, s: Time) -> np.ndarray:
    h = math.log(s.alpha / s.sigma) - math.log(t.alpha / t.sigma)
    return s.sigma / t.sigma * x - s.alpha * math.expm1(-h) * x0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("formula", [ddim_of_the_paper, euler_of_karras, first_order_of_dpm_solver])
def test_first_order_samplers_are_one(
    formula: Callable[..., np.ndarray], schedule: Schedule, shape: tuple[int, ...]
) -> None:
    denoise, grid = smooth(schedule), even(9)
    x = start(schedule, shape, 0.9)
    times = [schedule.at(t) for t in grid(schedule).tolist()]
    expected = x.numpy().copy()
    for t, s in pairwise(times):
        expected = formula(expected, denoise(torch.from_numpy(expected), t).x0.numpy(), t, s)
    for name in ("ddim", "euler"):
        found = sample(denoise, noise.from_seeds([0, 1], shape), sampler=name, grid=grid, x=x)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_first_step_of_dpmpp_is_euler(schedule: Schedule) -> None:
    denoise, streams = smooth(schedule), noise.from_seeds([0], (3, 8))
    one = [sample(denoise, streams, sampler=name, grid=even(1)) for name in ("dpmpp_2m", "euler")]
    assert torch.equal(*one)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_ddim_with_eta_one_is_ddpm(schedule: Schedule, shape: tuple[int, ...]) -> None:
    denoise, x = smooth(schedule), start(schedule, shape, 0.9)
    found = [
        sample(denoise, noise.from_seeds([8, 9], shape), sampler=sampler, grid=even(12), x=x)
        for sampler in (samplers.DDIM(eta=1.0), samplers.DDPM(variance="small"))
    ]
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.6, 1.0])
def test_ddim_is_that_of_the_paper(eta: float) -> None:
    """Song et al., 2021, eq. 12 and 16, in their alpha, which is alpha^2 here."""
    schedule = schedules.linear()
    denoise, x = smooth(schedule), start(schedule, (3, 9), 0.5)
    for t, s in ((1000, 750), (500, 499), (30, 10)):
        at = schedule.at(t / 1000), schedule.at(s / 1000)
        (bar_t, bar_s), x0 = (time.alpha**2 for time in at), denoise(x, at[0]).x0
        eps = (x - bar_t**0.5 * x0) / (1 - bar_t) ** 0.5
        std = eta * ((1 - bar_s) / (1 - bar_t)) ** 0.5 * (1 - bar_t / bar_s) ** 0.5
        z = noise.from_seeds([4, 5], (3, 9)).draw(dtype=x.dtype)
        expected = bar_s**0.5 * x0 + (1 - bar_s - std**2) ** 0.5 * eps + std * z
        streams = noise.from_seeds([4, 5], (3, 9))
        found, _ = samplers.DDIM(eta=eta).step(denoise, x, *at, {}, streams)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_is_the_posterior_of_the_paper(variance: str) -> None:
    """Ho et al., 2020, eq. 6 and 7, over consecutive entries of the table."""
    beta = np.linspace(1e-4, 0.02, 1000)
    bar = np.cumprod(1 - beta)
    schedule = schedules.linear()
    denoise = smooth(schedule)
    x = start(schedule, (3, 9), 0.5)
    sampler = samplers.DDPM(variance=variance)
    for i in (999, 500, 10, 1):
        t, s = schedule.at((i + 1) / 1000), schedule.at(i / 1000)
        x0 = denoise(x, t).x0
        mean = (bar[i - 1] ** 0.5 * beta[i] * x0 + (1 - beta[i]) ** 0.5 * (1 - bar[i - 1]) * x) / (
            1 - bar[i]
        )
        spread = {"small": beta[i] * (1 - bar[i - 1]) / (1 - bar[i]), "large": beta[i]}[variance]
        z = noise.from_seeds([4, 5], (3, 9)).draw(dtype=x.dtype)
        found, _ = sampler.step(denoise, x, t, s, {}, noise.from_seeds([4, 5], (3, 9)))
        torch.testing.assert_close(found, mean + spread**0.5 * z, rtol=1e-9, atol=1e-10)


def test_learned_variance_lies_between_small_and_large() -> None:
    schedule = schedules.linear()
    x = start(schedule, (2, 6), 0.5)
    t, s = schedule.at(0.5), schedule.at(0.4)

    def after(variance: str, place: float = 0.0) -> Tensor:
        denoise = Denoiser(
            lambda x, t: torch.cat([x, x * 0 + place], dim=1), schedule, learned_variance=True
        )
        sampler = samplers.DDPM(variance=variance)
        return sampler.step(denoise, x, t, s, {}, noise.from_seeds([1, 2], (2, 6)))[0]

    torch.testing.assert_close(after("learned", -1.0), after("small"))
    torch.testing.assert_close(after("learned", 1.0), after("large"))
    mean = samplers.DDPM().step(smooth(schedule), x, t, schedule.at(0.0), {}, noise)[0]
    assert mean.shape == x.shape
    with pytest.raises(UsageError, match="'small' or 'large'"):
        sampler = samplers.DDPM(variance="learned")
        sampler.step(smooth(schedule), x, t, s, {}, noise.from_seeds([1, 2], (2, 6)))


@pytest.mark.parametrize(
    "sampler",
    [
        samplers.DDPM(),
        samplers.DDPM(variance="large"),
        samplers.DDIM(eta=0.5),
        samplers.DDIM(),
        samplers.Heun(),
        samplers.DPMpp2M(),
    ],
    ids=str,
)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_moments(sampler: samplers.Sampler, schedule: Schedule) -> None:
    """20,000 numbers: standard errors 0.0035 of the mean and 0.0025 of the variance."""
    denoise = Gaussian(schedule=schedule, mean=0.7, std=0.5)
    streams = noise.from_seeds([11], (20_000,))
    x = sample(denoise, streams, sampler=sampler, grid=grids.logsnr(300))
    assert x.mean().item() == pytest.approx(0.7, abs=0.012)
    assert x.var().item() == pytest.approx(0.25, abs=0.012)


@pytest.mark.parametrize("name", samplers.NAMES)
def test_no_argument_is_changed(name: str) -> None:
    schedule = schedules.vp_linear()
    streams = noise.from_seeds([0], (3, 8))
    x = start(schedule, (3, 8), 0.9, batch=1)
    state: samplers.Memory = {}
    t, s, r = schedule.at(0.9), schedule.at(0.8), schedule.at(0.7)
    sampler = samplers.from_name(name)
    after, state = sampler.step(smooth(schedule), x, t, s, state, streams)
    kept = {key: value for key, value in state.items()}
    copies = x.clone(), after.clone(), {k: torch.as_tensor(v).clone() for k, v in kept.items()}
    sampler.step(smooth(schedule), after, s, r, state, streams)
    assert torch.equal(x, copies[0]) and torch.equal(after, copies[1])
    assert state.keys() == kept.keys()
    assert all(torch.equal(torch.as_tensor(state[k]), copies[2][k]) for k in kept)


def test_names_and_parameters_are_checked() -> None:
    assert samplers.from_name("ddim", eta=0.5) == samplers.DDIM(eta=0.5)
    with pytest.raises(UsageError, match="'dpmpp_2m'"):
        samplers.from_name("dpmpp2m")
    with pytest.raises(UsageError, match="ddim.*etha"):
        samplers.from_name("ddim", etha=1.0)
    with pytest.raises(UsageError, match="eta 1.5"):
        samplers.DDIM(eta=1.5)
    with pytest.raises(UsageError, match="'small'"):
        samplers.DDPM(variance="smal")


def test_the_exact_flow_composes_and_ends_in_the_data() -> None:
    for schedule in SCHEDULES.values():
        data = Gaussian(schedule=schedule, mean=0.7, std=0.5)
        x = start(schedule, (3, 5), 0.9)
        through = data.flow(data.flow(x, 0.9, 0.4), 0.4, 0.0)
        torch.testing.assert_close(through, data.flow(x, 0.9, 0.0))
        assert data.moments(0.0) == (0.7, 0.25)
        # the flow is what the denoiser says: many small steps of the one lead along the other
        *_, last = steps(data, noise.from_seeds([0, 1], (3, 5)), grid=grids.logsnr(200), x=None)
        assert abs(last.x.std() - 0.5) < 0.2
