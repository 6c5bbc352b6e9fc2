"""Samplers against exact solutions: the order of each, equalities between them, their moments."""

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mdiff.core import Denoiser, grids, noise, sample, samplers, schedules, steps
from mdiff.core.analytic import Gaussian
from mdiff.core.denoiser import Denoise, Guided, Prediction
from mdiff.core.errors import UsageError
from mdiff.core.grids import Grid
from mdiff.core.samplers import Sampler, interpolation, move
from mdiff.core.schedules import Schedule, Time

SCHEDULES = {
    "vp_linear": schedules.vp_linear(),
    "cosine": schedules.cosine(),
    "ve": schedules.ve(),
}
SHAPES = [(3, 17), (2, 5, 7), (2, 3, 4, 5)]
DETERMINISTIC: dict[str, Sampler] = {
    **{
        name: samplers.from_name(name)
        for name in (
            "ddim",
            "euler",
            "heun",
            "dpm2",
            "lms",
            "ipndm",
            "pndm",
            "plms",
            "gradient_estimation",
            "deis",
            "dpm_2m",
            "dpm_3m",
            "dpm_2s",
            "dpm_3s",
            "dpmpp_2m",
            "dpmpp_3m",
            "dpmpp_2s",
            "dpmpp_3s",
            "res_multistep",
            "unipc",
        )
    },
    "heun, flow": samplers.Heun(frame="flow"),
    "lms, 3": samplers.lms(order=3),
    "ipndm, 1": samplers.ipndm(order=1),
    "deis, 2": samplers.deis(order=2),
    "deis, 4": samplers.deis(order=4),
    "gradient_estimation, 1.5": samplers.gradient_estimation(gamma=1.5),
    "dpmpp_3m, half the curvature": samplers.dpmpp_3m(curvature=0.5),
    "dpm_3m, half the curvature": samplers.dpm_3m(curvature=0.5),
    "dpm_2s, heun": samplers.dpm_2s(solver_type="heun"),
    "dpm_3s, heun": samplers.dpm_3s(solver_type="heun"),
    "dpmpp_3s, heun": samplers.dpmpp_3s(solver_type="heun"),
    "unipc, 1": samplers.UniPC(solver_order=1),
    "unipc, 3": samplers.UniPC(solver_order=3),
    "unipc, bh1": samplers.UniPC(solver_type="bh1"),
    "unipc, eps": samplers.UniPC(form="eps"),
    "unipc, 3, eps, bh1": samplers.UniPC(solver_order=3, form="eps", solver_type="bh1"),
    "unip, 2": samplers.UniPC(corrector=False),
    "unip, 3": samplers.UniPC(solver_order=3, corrector=False),
}


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


def with_history(sampler: Sampler, denoise: Gaussian, x: Tensor, grid: Grid, known: int) -> Tensor:
    """A run whose first `known` steps end on the exact flow: the order of a multistep method is
    that of its steps with a history, and those without one are of lower order.
    """
    times = [denoise.schedule.at(t) for t in grid(denoise.schedule).tolist()]
    streams = noise.from_seeds(range(len(x)), x.shape[1:])
    state: Mapping[str, Any] = {}
    first, exact = x, x
    for k, (t, s) in enumerate(pairwise(times)):
        x, state = sampler.step(denoise, x, t, s, state, streams)
        if k < known:
            # a corrector would go back to the start of the last step, too
            state = {**state, "x": exact} if "x" in state else state
            x = exact = denoise.flow(first, times[0].value, s.value)
    return x


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_observed_order(name: str, schedule: Schedule) -> None:
    sampler = DETERMINISTIC[name]
    denoise = Gaussian(schedule=schedule, mean=0.7, std=0.5)
    x = start(schedule, (3, 4), 0.6)
    exact = denoise.flow(x, 0.6, 0.2)
    errors = [
        (with_history(sampler, denoise, x, even(n, 0.6, 0.2), known=3) - exact).abs().max().item()
        for n in (120, 240)
    ]
    order = math.log2(errors[0] / errors[1])
    # multistep methods have long histories, in which the steps are not all alike
    assert abs(order - sampler.order) < 0.25, (order, errors)


def test_a_run_from_nothing_is_of_second_order() -> None:
    """Whatever the order of its later steps: the first is Euler's."""
    schedule = schedules.cosine()
    denoise = Gaussian(schedule=schedule, mean=0.7, std=0.5)
    x = start(schedule, (3, 4), 0.6)
    exact = denoise.flow(x, 0.6, 0.2)
    streams = noise.from_seeds([0, 1], (3, 4))
    for name in ("lms", "deis", "dpmpp_3m"):
        errors = [
            (sample(denoise, streams, sampler=name, grid=even(n, 0.6, 0.2), x=x) - exact)
            .abs()
            .max()
            .item()
            for n in (200, 400, 800)
        ]
        assert all(1.75 < math.log2(a / b) < 2.4 for a, b in pairwise(errors)), (name, errors)


def test_the_adaptive_solver_meets_its_tolerance() -> None:
    for name, schedule in SCHEDULES.items():
        denoise = Gaussian(schedule=schedule, mean=0.7, std=0.5)
        x = start(schedule, (3, 4), 0.9)
        exact = denoise.flow(x, 0.9, 0.05)
        errors = {}
        for rtol in (1e-2, 1e-4, 1e-6):
            sampler = samplers.DPMAdaptive(rtol=rtol, atol=rtol / 10)
            found = sample(
                denoise, noise.from_seeds([0, 1], (3, 4)), sampler=sampler, grid=even(1), x=x
            )
            errors[rtol] = (found - exact).abs().max().item()
        assert all(error < 10 * rtol for rtol, error in errors.items()), (name, errors)
    for bad in ({"order": 4}, {"rtol": 0.0}, {"h_init": -1.0}):
        with pytest.raises(UsageError, match="adaptive"):
            samplers.DPMAdaptive(**bad)


AT_THE_START = {"plms": 1, "pndm": 9}
"""Evaluations besides those of every step."""

AT_THE_END = {
    "predictor_corrector": 2,
    "ancestral_corrected": 2,
    "annealed_langevin": 6,
    "repaint": 10,
}
"""Evaluations in the step to clean data, where no second slope exists, if not 1."""

IN_STEPS_WITHIN = ("dpm_adaptive", "restart", "repaint")
"""They take steps inside a step, so many of which depends on the schedule."""


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
    if name in IN_STEPS_WITHIN:
        assert calls >= 6 * sampler.evaluations and calls % sampler.evaluations == 0
        return
    more = AT_THE_START.get(name, 0)
    assert calls == 6 * sampler.evaluations + more
    calls = 0
    sample(denoise, noise.from_seeds([0], (4,)), sampler=sampler, grid=grids.karras(6))
    assert calls == 5 * sampler.evaluations + AT_THE_END.get(name, 1) + more


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
@pytest.mark.parametrize("name", [n for n, s in DETERMINISTIC.items() if s.evaluations == 1])
def test_without_a_history_every_multistep_method_is_euler(name: str, schedule: Schedule) -> None:
    sampler = DETERMINISTIC[name]
    denoise, x = smooth(schedule), start(schedule, (3, 8), 0.9)
    t, s = schedule.at(0.9), schedule.at(0.0 if name in AT_THE_START else 0.05)
    found, _ = sampler.step(denoise, x, t, s, {}, noise.from_seeds([0, 1], (3, 8)))
    torch.testing.assert_close(found, move(x, denoise(x, t).x0, t, s), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_names_for_one_method(schedule: Schedule) -> None:
    denoise, x = smooth(schedule), start(schedule, (3, 8), 0.9)
    streams = noise.from_seeds([0, 1], (3, 8))

    def run(sampler: Sampler, grid: Grid) -> Tensor:
        return sample(denoise, streams, sampler=sampler, grid=grid, x=x)

    def midpoint(x: Tensor, t: Time, s: Time) -> Tensor:
        """In log sigma, as k-diffusion writes it: the slope half of the way, all of the way."""
        rho, rho_s = t.sigma / t.alpha, s.sigma / s.alpha
        half = schedule.at(
            schedule.time(torch.tensor((t.log_snr + s.log_snr) / 2, dtype=torch.float64)).item()
        )
        rho_half = half.sigma / half.alpha
        slope = (x - t.alpha * denoise(x, t).x0) / t.sigma
        there = half.alpha * (x / t.alpha + (rho_half - rho) * slope)
        slope = (there - half.alpha * denoise(there, half).x0) / half.sigma
        return s.alpha * (x / t.alpha + (rho_s - rho) * slope)

    for grid in (even(5), grids.karras(5)):
        for one, other in [
            (samplers.deis(order=2), samplers.dpm_2m(solver_type="heun")),
            (samplers.deis(order=3), samplers.dpm_3m()),
            (samplers.res_multistep(), samplers.dpmpp_2m(solver_type="heun")),
            (samplers.ipndm_v(), samplers.lms()),
            (samplers.UniPC(corrector=False), samplers.dpmpp_2m()),
            (
                samplers.UniPC(corrector=False, solver_order=3),
                samplers.dpmpp_3m(solver_type="midpoint"),
            ),
            (samplers.ipndm(order=2), samplers.gradient_estimation(gamma=1.5)),
        ]:
            torch.testing.assert_close(run(one, grid), run(other, grid), rtol=1e-9, atol=1e-9)
    expected = x
    for t, s in pairwise(schedule.at(t) for t in even(5)(schedule).tolist()):
        expected = midpoint(expected, t, s)
    found = run(samplers.from_name("dpm2"), even(5))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_end_of_a_run_of_known_length() -> None:
    """Each step goes through at most as many points as steps are left, itself included."""
    schedule = schedules.vp_linear()
    denoise, x = smooth(schedule), start(schedule, (3, 8), 0.9)

    def run(sampler: Sampler, first: int, last: int, memory: Any) -> tuple[Tensor, Any]:
        y = x
        for k in range(first, last):
            t, s = (schedule.at(0.9 - 0.1 * i) for i in (k, k + 1))
            y, memory = sampler.step(denoise, y, t, s, memory, noise.from_seeds([0, 1], (3, 8)))
        return y, memory

    whole = {"points": 3, "order": 3, "form": "x0", "variable": "lambda"}
    _, memory = run(samplers.Multistep(**whole), 0, 3, {})
    for index, (plain, lowered, euler) in enumerate([(3, 3, 3), (3, 2, 3), (3, 1, 1)], 3):
        at = {**memory, "index": float(index)}
        for points, ending in (
            (plain, {}),
            (lowered, {"lower_order_final": 6}),
            (euler, {"euler_at_final": 6}),
        ):
            found, _ = run(samplers.Multistep(**whole, **ending), 3, 4, at)
            kept = {k: v for k, v in at.items() if not k[-1].isdigit() or int(k[-1]) < points - 1}
            expected, _ = run(samplers.Multistep(**{**whole, "points": points}), 3, 4, kept)
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", [n for n in samplers.NAMES if n in DETERMINISTIC])
def test_a_start_without_signal(name: str) -> None:
    """At alpha 0 lambda and sigma / alpha are infinite: the step there is Euler's, and forgotten."""
    schedule = schedules.flow()
    denoise = Denoiser(
        lambda x, t: torch.tanh(x) * (0.5 + t.reshape(-1, 1, 1)), schedule, predicts="flow"
    )
    x = start(schedule, (3, 8), 1.0)
    streams = noise.from_seeds([0, 1], (3, 8))
    sampler = samplers.from_name(name)
    if name in AT_THE_START:
        with pytest.raises(UsageError, match="no signal"):
            sample(denoise, streams, sampler=sampler, grid=grids.linear(6), x=x)
        return
    states = list(steps(denoise, streams, sampler=sampler, grid=grids.linear(6), x=x))
    t, s = schedule.at(1.0), schedule.at(states[0].t)
    torch.testing.assert_close(states[0].x, move(x, denoise(x, t).x0, t, s))
    assert states[-1].x.isfinite().all()


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
        samplers.dpmpp_2m(),
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
    for name, params, message in [
        ("heun", {"frame": "sigmas"}, "'sigma'"),
        ("dpmpp_2m", {"solver_type": "mid"}, "midpoint"),
        ("dpm_3s", {"solver_type": "bh2"}, "heun, midpoint"),
        ("dpm_3s", {"inner_type": "huen"}, "'heun'"),
        ("unipc", {"solver_type": "bh3"}, "'bh[12]'"),
        ("unipc", {"form": "x1"}, "'x0'"),
        ("unipc", {"solver_order": 4}, "solver_order 1, 2 or 3"),
        ("lms", {"order": 5}, "lms has order 1, 2, 3 or 4"),
        ("deis", {"order": 0}, "deis has order 1, 2, 3 or 4"),
    ]:
        with pytest.raises(UsageError, match=message):
            samplers.from_name(name, **params)


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


@pytest.mark.parametrize("z", [-40.0, -3.0, -1.0, -1e-3, -1e-9, 0.0, 1e-6, 0.4, 1.0, 2.0, 30.0])
def test_moments_of_the_weight_of_a_step(z: float) -> None:
    # 400 points of Gauss and Legendre's rule
    places, mass = np.polynomial.legendre.leggauss(400)
    tau, weight = (places + 1) / 2, mass * np.exp(-z * (places + 1) / 2 + min(z, 0.0))
    expected = [(weight * tau**i).sum() / weight.sum() for i in range(4)]
    np.testing.assert_allclose(interpolation.moments(z, 4), expected, rtol=1e-11)


def test_the_mean_of_a_polynomial_is_that_of_its_interpolation() -> None:
    nodes, means = [0.0, -0.7, 1.0, -2.5], [1.0, 0.4, 0.3, 0.2]
    for n in range(1, 5):
        c = interpolation.weights(nodes[:n], means[:n])
        for i in range(n):
            assert sum(c[j] * nodes[j] ** i for j in range(n)) == pytest.approx(means[i])


@pytest.mark.parametrize("name", [n for n in samplers.NAMES if n in DETERMINISTIC])
def test_a_tensor_is_kept_for_each_point_of_the_past(name: str) -> None:
    """And by UniPC those of the present and x, for its corrector."""
    schedule, sampler = schedules.vp_linear(), samplers.from_name(name)
    streams = noise.from_seeds([0, 1], (3, 8))
    *_, last = steps(smooth(schedule), streams, sampler=sampler, grid=even(8))
    kept = sum(isinstance(value, Tensor) for value in last.sampler_state.values())
    points = getattr(sampler, "points", {"unipc": 4, "pndm": 4, "plms": 4}.get(name, 1))
    assert kept == points - 1
