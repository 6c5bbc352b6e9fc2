"""Stochastic samplers against exact distributions and against each other."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mdiff.core import Denoiser, State, grids, guidance, noise, sample, samplers, schedules, steps
from mdiff.core.analytic import Gaussian, Mixture
from mdiff.core.denoiser import Denoise, Guided, Prediction
from mdiff.core.errors import UsageError
from mdiff.core.grids import Grid
from mdiff.core.noise import Noise
from mdiff.core.samplers import Sampler, from_name
from mdiff.core.schedules import Schedule, Time

SCHEDULES = {
    "linear": schedules.linear(),
    "ve": schedules.ve(),
    "flow": schedules.flow(),
}
SHAPES = [(3, 17), (2, 5, 7), (2, 3, 4, 5)]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)

SDE: dict[str, Sampler] = {
    "ddpm": samplers.DDPM(),
    "ddim, 1": samplers.DDIM(eta=1.0),
    "ddim, half": samplers.DDIM(eta=0.5),
    "ddim, a flow's": samplers.DDIM(eta=0.5, rule="flow"),
    "ddim, an SDE's": samplers.DDIM(eta=0.5, rule="sde"),
    "euler_ancestral": from_name("euler_ancestral"),
    "dpm2_ancestral": from_name("dpm2_ancestral"),
    "dpmpp_2s_ancestral": from_name("dpmpp_2s_ancestral"),
    "dpmpp_sde": samplers.DPMppSDE(),
    "dpmpp_2m_sde": from_name("dpmpp_2m_sde"),
    "dpmpp_2m_sde, half": from_name("dpmpp_2m_sde", eta=0.5, solver_type="heun"),
    "dpmpp_3m_sde": from_name("dpmpp_3m_sde"),
    "sa_solver": from_name("sa_solver"),
    "sa_solver, 3": from_name("sa_solver", points=3, corrector=4, window=(0.0, 1.0)),
    "reverse_diffusion": samplers.ReverseDiffusion(),
    "euler_maruyama": samplers.EulerMaruyama(),
    "euler_maruyama, half": samplers.EulerMaruyama(eta=0.5),
}
"""Samplers whose noise is that of an SDE."""
STOCHASTIC: dict[str, Sampler] = {
    **SDE,
    "ddpm, large": samplers.DDPM(variance="large"),
    "edm": samplers.Churn(gamma=0.1),
    "edm with dpmpp_2m": samplers.Churn(gamma=0.02, sampler=from_name("dpmpp_2m")),
    "restart": samplers.Restart(),
    "predictor_corrector": samplers.PredictorCorrector(snr=0.05),
    "ancestral_corrected": from_name("ancestral_corrected", snr=0.05),
}
EVERY: dict[str, Sampler] = {
    **STOCHASTIC,
    "annealed_langevin": samplers.AnnealedLangevin(),
    "consistency": samplers.Consistency(floor=0.002),
    "lcm": samplers.LCM(),
    "tcd": samplers.TCD(),
}


def later(steps: int) -> Grid:
    """Even in log-SNR; on a flow, a little after the time without any signal."""
    return grids.truncate(grids.logsnr(steps + 1), 0.9999)


# --- distributions --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize("schedule", ["linear", "ve"])
def test_moments_of_a_normal(name: str, schedule: str) -> None:
    """10,000 numbers: standard errors 0.005 and 0.0035; first order leaves up to 0.014."""
    denoise = Gaussian(schedule=SCHEDULES[schedule], mean=0.7, std=0.5)
    streams = noise.from_seeds([11], (10_000,))
    x = sample(denoise, streams, sampler=STOCHASTIC[name], grid=later(250))
    assert x.mean().item() == pytest.approx(0.7, abs=0.02)
    assert x.var().item() == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize(
    "name", ["ddpm", "euler_ancestral", "predictor_corrector", "ancestral_corrected"]
)
def test_moments_under_guidance_on_three_axes(name: str) -> None:
    """Of a normal around a mean that is the condition, guidance makes the normal around `scale` times that mean."""
    schedule, shape = schedules.cosine(), (2, 16, 18, 18)

    def net(x: Tensor, t: Tensor, mean: Tensor) -> Tensor:
        alpha, sigma = (c.reshape(-1, 1, 1, 1, 1).to(x) for c in schedule(t))
        gain = alpha * 0.25 / (alpha**2 * 0.25 + sigma**2)
        return mean + gain * (x - alpha * mean)

    denoise = guidance.classifier_free(
        Denoiser(net, schedule, predicts="x0"),
        cond={"mean": torch.full((1, 1, 1, 1, 1), 0.3)},
        uncond={"mean": torch.zeros(1, 1, 1, 1, 1)},
        scale=2.5,
    )
    streams = noise.from_seeds([13], shape)
    x = sample(denoise, streams, sampler=STOCHASTIC[name], grid=later(250))
    assert x.mean().item() == pytest.approx(0.75, abs=0.02)
    assert x.var().item() == pytest.approx(0.25, abs=0.02)


def assert_two_modes(schedule: Schedule, sampler: Sampler, grid: Grid) -> None:
    """8,000 numbers: standard errors 0.0085 of the mean and 0.005 of the weight."""
    denoise = Mixture(schedule=schedule, means=(-1.0, 0.6), weights=(0.3, 0.7), std=0.2)
    x = sample(denoise, noise.from_seeds([12], (8_000,)), sampler=sampler, grid=grid)
    mean, variance = denoise.moments(0.0)
    assert x.mean().item() == pytest.approx(mean, abs=0.035)
    assert x.var().item() == pytest.approx(variance, abs=0.03)
    low = x < -0.2
    assert low.double().mean().item() == pytest.approx(0.3, abs=0.02)
    assert x[low].mean().item() == pytest.approx(-1.0, abs=0.02)
    assert x[low].std().item() == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize("schedule", ["linear", "flow"])
def test_moments_of_two_modes(name: str, schedule: str) -> None:
    assert_two_modes(SCHEDULES[schedule], STOCHASTIC[name], later(150))


def test_moments_of_annealed_langevin() -> None:
    """As NCSN: 100 steps a level, of size 0.2; what x lags behind is the ratio of levels over 20."""
    langevin = samplers.AnnealedLangevin(steps=100, size=0.2)
    assert_two_modes(SCHEDULES["ve"], langevin, grids.logsnr(40))


@pytest.mark.parametrize(
    "sampler", [samplers.Consistency(), samplers.LCM(), samplers.TCD(gamma=1.0)], ids=str
)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_moments_of_few_steps_of_an_exact_consistency_function(
    sampler: Sampler, count: int
) -> None:
    schedule = schedules.linear()
    data = Gaussian(schedule=schedule, mean=0.7, std=0.5)

    def rule(inner: Denoise, x: Tensor, t: Time[float]) -> Prediction:
        return Prediction(x0=data.flow(x, t.value, 0.0))

    streams = noise.from_seeds([11], (20_000,))
    grid = grids.trailing(count)
    x = sample(Guided(inner=data, rule=rule), streams, sampler=sampler, grid=grid)
    assert x.mean().item() == pytest.approx(0.7, abs=0.015)
    assert x.var().item() == pytest.approx(0.25, abs=0.01)


# --- limits ---------------------------------------------------------------------------------------


def smooth(schedule: Schedule) -> Denoiser:
    """A network that is no exact denoiser of anything, and not linear."""
    return Denoiser(
        lambda x, t: torch.tanh(x) * (0.5 + t.reshape(-1, *[1] * (x.ndim - 1))),
        schedule,
        predicts="x0",
    )


LIMITS: dict[str, tuple[Sampler, Sampler]] = {
    "ddim": (samplers.DDIM(eta=0.0), samplers.Euler()),
    "ddim, a flow's": (samplers.DDIM(eta=0.0, rule="flow"), samplers.Euler()),
    "ddim, an SDE's": (samplers.DDIM(eta=0.0, rule="sde"), samplers.Euler()),
    "ddpm": (samplers.DDPM(), samplers.DDIM(eta=1.0)),
    "the wrapper": (samplers.Ancestral(sampler=samplers.Euler()), samplers.DDIM(eta=1.0)),
    "an SDE's rule": (samplers.DDIM(eta=1.0, rule="sde"), samplers.DDIM(eta=1.0)),
    "dpm2_ancestral": (from_name("dpm2_ancestral", eta=0.0), from_name("dpm2")),
    "dpmpp_2s_ancestral": (from_name("dpmpp_2s_ancestral", eta=0.0), from_name("dpmpp_2s")),
    "dpmpp_sde": (samplers.DPMppSDE(eta=0.0), from_name("dpmpp_2s")),
    "dpmpp_2m_sde": (from_name("dpmpp_2m_sde", eta=0.0), from_name("dpmpp_2m")),
    "dpmpp_3m_sde": (from_name("dpmpp_3m_sde", eta=0.0), from_name("dpmpp_3m")),
    "sa_solver": (
        from_name("sa_solver", corrector=3, eta=0.0),
        samplers.UniPC(solver_order=2, solver_type="bh1"),
    ),
    "edm": (samplers.Churn(gamma=0.0), samplers.Heun()),
    "restart": (samplers.Restart(times=0), samplers.Heun()),
    "predictor_corrector": (
        samplers.PredictorCorrector(corrections=0),
        samplers.ReverseDiffusion(),
    ),
    "tcd": (samplers.TCD(gamma=0.0), samplers.DDIM()),
    "cfg++ without guidance": (samplers.CFGpp(), samplers.DDIM()),
}


@pytest.mark.parametrize("name", LIMITS)
@each_schedule
def test_limits_are_the_simpler_sampler(name: str, schedule: Schedule) -> None:
    denoise = smooth(schedule)
    x = noise.from_seeds([1, 2], (3, 8)).draw(dtype=torch.float64)
    found = [
        sample(denoise, noise.from_seeds([3, 4], (3, 8)), sampler=each, grid=later(12), x=x)
        for each in LIMITS[name]
    ]
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-8)


def test_under_ve_reverse_diffusion_is_ddpm() -> None:
    denoise, streams = smooth(SCHEDULES["ve"]), noise.from_seeds([3, 4], (3, 8))
    found = [
        sample(denoise, streams, sampler=each, grid=later(12)).double()
        for each in (samplers.ReverseDiffusion(), samplers.DDPM(variance="large"))
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_on_a_flow_euler_maruyama_without_noise_is_euler() -> None:
    denoise, streams = smooth(schedules.flow()), noise.from_seeds([3, 4], (3, 8))
    x = noise.from_seeds([1, 2], (3, 8)).draw(dtype=torch.float64)
    found = [
        sample(denoise, streams, sampler=each, grid=later(12), x=x)
        for each in (samplers.EulerMaruyama(eta=0.0), samplers.Euler())
    ]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@each_schedule
def test_cfgpp_is_that_of_the_paper(schedule: Schedule) -> None:
    """Chung et al., 2024, alg. 2: the guided x0 and the unconditional eps."""
    denoise = Denoiser(lambda x, t, c: torch.tanh(x + c), schedule, predicts="x0")
    cond, uncond = {"c": torch.ones(1, 1, 1)}, {"c": torch.zeros(1, 1, 1)}
    guided = guidance.classifier_free(denoise, cond=cond, uncond=uncond, scale=0.6)
    x = expected = noise.from_seeds([1, 2], (3, 8)).draw(dtype=torch.float64)
    times = [schedule.at(t) for t in later(6)(schedule).tolist()]
    for t, s in pairwise(times):
        free, bound = (denoise.bind(**each)(expected, t).x0 for each in (uncond, cond))
        eps = (expected - t.alpha * free) / t.sigma
        expected = s.alpha * (free + 0.6 * (bound - free)) + s.sigma * eps
    found = sample(
        guided, noise.from_seeds([0, 0], (3, 8)), sampler=from_name("cfgpp"), grid=later(6), x=x
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    # at 1, which asks for the condition alone, and where nothing guides, it is the plain sampler
    at_one = guidance.classifier_free(denoise, cond=cond, uncond=uncond, scale=1.0)
    for name in ("cfgpp", "dpmpp_2m_cfgpp"):
        plain = {"cfgpp": "ddim", "dpmpp_2m_cfgpp": "dpmpp_2m"}[name]
        found, expected = (
            sample(at_one, noise.from_seeds([0], (3, 8)), sampler=each, grid=later(6))
            for each in (name, plain)
        )
        assert torch.equal(found, expected)


# --- Brownian paths -------------------------------------------------------------------------------


def after(denoise: Denoise, sampler: Sampler, count: int, streams: Noise) -> Tensor:
    return sample(denoise, streams, sampler=sampler, grid=later(count)).double()


@pytest.mark.parametrize(
    "name",
    [
        "ddpm",
        "ddim, half",
        "euler_ancestral",
        "dpm2_ancestral",
        "dpmpp_2s_ancestral",
        "dpmpp_sde",
        "dpmpp_2m_sde",
        "dpmpp_3m_sde",
        "sa_solver",
        "euler_maruyama",
    ],
)
def test_on_one_path_samplers_agree_across_step_counts(name: str) -> None:
    """Strong convergence: twice the steps end closer on one path than on fresh noise."""
    denoise = Mixture(schedule=schedules.vp_linear(), std=0.3)
    shape = (400,)
    coarse, fine = (after(denoise, SDE[name], n, noise.brownian([7], shape)) for n in (40, 80))
    fresh = [after(denoise, SDE[name], n, noise.from_seeds([7], shape)) for n in (40, 80)]
    near, far = ((a - b).square().mean().sqrt() for a, b in ((coarse, fine), fresh))
    assert near < 0.5 * far, (near, far)


@pytest.mark.parametrize("name", ["ddpm", "ddim, 1", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"])
@each_schedule
def test_if_the_network_says_the_same_on_one_path_the_steps_do_not_matter(
    name: str, schedule: Schedule
) -> None:
    """Up to the resolution of the path, 1e-4 of its octave."""
    denoise = Denoiser(lambda x, t: x * 0 + 0.3, schedule, predicts="x0")
    ends = torch.tensor([0.9, 0.2], dtype=torch.float64)
    found = [
        sample(
            denoise,
            noise.brownian([1, 2], (3, 8)),
            sampler=SDE[name],
            grid=lambda schedule, n=n: torch.lerp(
                ends[0], ends[1], torch.linspace(0, 1, n + 1, dtype=torch.float64)
            ),
        )
        for n in (1, 3, 16)
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[0], found[2], rtol=1e-3, atol=1e-3)


# --- as every sampler -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", EVERY)
def test_a_sample_is_bit_equal_alone_in_a_batch_and_after_a_pause(
    name: str, shape: tuple[int, ...]
) -> None:
    """On paths; `test_sampling` does the same on fresh noise."""
    denoise, grid, sampler = smooth(schedules.linear()), grids.trailing(6), EVERY[name]
    together = sample(denoise, noise.brownian([3, 1], shape), sampler=sampler, grid=grid)
    alone = sample(denoise, noise.brownian([1], shape), sampler=sampler, grid=grid)
    assert torch.equal(alone[0], together[1])
    run = steps(denoise, noise.brownian([3, 1], shape), sampler=sampler, grid=grid)
    saved = next(state for state in run if state.index == 3).save()
    fresh = noise.from_seeds([8, 9], shape)
    found = sample(denoise, fresh, sampler=sampler, grid=grid, resume=State.restore(saved))
    assert torch.equal(found, together)


@pytest.mark.parametrize("name", EVERY)
def test_no_argument_is_changed(name: str) -> None:
    schedule, sampler = schedules.linear(), EVERY[name]
    streams = noise.from_seeds([0], (3, 8))
    x = noise.from_seeds([1], (3, 8)).draw()
    state: samplers.Memory = {}
    for t, s in pairwise(schedule.at(t) for t in (0.9, 0.8, 0.7, 0.6)):
        kept = {key: torch.as_tensor(value).clone() for key, value in state.items()}
        copy = x.clone()
        following, new = sampler.step(smooth(schedule), x, t, s, state, streams)
        assert torch.equal(x, copy) and state.keys() == kept.keys()
        assert all(torch.equal(torch.as_tensor(state[k]), kept[k]) for k in kept)
        x, state = following, new


def calls(sampler: Sampler, grid: Grid) -> int:
    count = 0

    def rule(inner: Denoise, x: Tensor, t: Time[float]) -> Prediction:
        nonlocal count
        count += 1
        return inner(x, t)

    denoise = Guided(inner=Gaussian(schedule=schedules.ve()), rule=rule)
    sample(denoise, noise.from_seeds([0], (4,)), sampler=sampler, grid=grid)
    return count


def test_evaluations() -> None:
    grid = grids.sigmas([20.0, 5.0, 1.0, 0.3, 0.05])
    for name, sampler in STOCHASTIC.items():
        extra = {"restart": 2 * 9 * 2}.get(name, 0)
        assert calls(sampler, grid) == 4 * sampler.evaluations + extra, name
    assert calls(samplers.AnnealedLangevin(steps=3), later(5)) == 5 * 3 + 1
    assert calls(samplers.AnnealedLangevin(steps=3, final=False), later(5)) == 5 * 3


def test_churn_stops_where_the_schedule_does() -> None:
    schedule = schedules.ve()
    seen: list[float] = []

    def rule(inner: Denoise, x: Tensor, t: Time[float]) -> Prediction:
        seen.append(t.sigma)
        return inner(x, t)

    denoise = Guided(inner=Gaussian(schedule=schedule), rule=rule)
    sampler = samplers.Churn(sampler=samplers.Euler(), gamma=0.4, low=1.0, high=60.0)
    sample(
        denoise,
        noise.from_seeds([0], (4,)),
        sampler=sampler,
        grid=grids.sigmas([50.0, 40.0, 2.0, 0.5, 0.1]),
    )
    assert seen == pytest.approx([50.0, 50.0, 2.8, 0.5])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: samplers.DDIM(rule="flows"), "'flow'"),
        (lambda: samplers.Ancestral(eta=2.0), "eta 2.0"),
        (lambda: from_name("dpmpp_2m_sde", eta=-1.0), "eta -1.0"),
        (lambda: from_name("dpmpp_2m_sde", solver_type="hein"), "'heun'"),
        (lambda: samplers.SDEMultistep(points=0), "not 0 and 0"),
        (lambda: samplers.Churn(gamma=0.5), "S_churn over the number of steps"),
        (lambda: samplers.Restart(low=2.0, high=1.0), "low 2.0, high 1.0"),
        (lambda: samplers.AnnealedLangevin(size=1.5), "of 1.5"),
        (lambda: samplers.TCD(gamma=1.5), "gamma 1.5"),
        (lambda: samplers.EulerMaruyama(eta=1.5), "eta 1.5"),
    ],
)
def test_impossible_samplers_are_refused(make: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("name", ["euler_maruyama", "annealed_langevin"])
def test_what_needs_signal_says_so(name: str) -> None:
    denoise = Gaussian(schedule=schedules.flow())
    with pytest.raises(UsageError, match="no signal"):
        sample(denoise, noise.from_seeds([0], (4,)), sampler=name, grid=grids.linear(5))


@pytest.mark.parametrize("name", STOCHASTIC)
def test_from_where_no_signal_is(name: str) -> None:
    denoise = smooth(schedules.flow())
    if "maruyama" in name:
        return
    x = sample(denoise, noise.from_seeds([0], (4,)), sampler=STOCHASTIC[name], grid=grids.linear(5))
    assert math.isfinite(x.sum())
