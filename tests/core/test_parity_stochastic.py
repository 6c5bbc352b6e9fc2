"""Stochastic and few-step samplers, element by element, against diffusers, k-diffusion and ADM.

One network, one start, the same times, the same noise. Where a reference differs from the method
that it names, the difference is an option of ours, given here. Its float64 runs are held to 1e-10
of the largest number, its float32 runs to 1e-5.
"""

import math
import sys
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import diffusers
import oracles
import pytest
import torch
from guided_diffusion import gaussian_diffusion as adm
from guided_diffusion.respace import SpacedDiffusion
from torch import Tensor

from mdiff.core import Denoiser, grids, guidance, noise, sample, samplers, schedules
from mdiff.core.grids import Grid
from mdiff.core.noise import Noise
from mdiff.core.samplers import Sampler

TABLE = schedules.linear()
LOG_SIGMA = schedules.linear(between="log_sigma")
SIGMAS = schedules.edm(0.002, 100.0)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
each_steps = pytest.mark.parametrize("steps", [1, 2, 10, 50])
several_steps = pytest.mark.parametrize("steps", [2, 10, 50])  # one is too few for the reference
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def streams() -> Noise:
    return noise.from_seeds([5, 6], (2, 5))


def draws(n: int) -> list[Tensor]:
    """What `streams` will draw."""
    drawn = streams()
    return [drawn.draw(dtype=torch.float64) for _ in range(n)]


def network(x: Tensor, t: Any) -> Tensor:
    """Smooth, not linear, and no denoiser of anything; t from 0 to 1000."""
    t = torch.as_tensor(t).to(x.dtype)
    return torch.tanh(x) * (0.5 + t.reshape(-1, *[1] * (x.ndim - 1)) / 1000)


def x0_of_sigma(x: Tensor, sigma: Tensor) -> Tensor:
    """Smooth, not linear; sigma (B,)."""
    scale = (1 + sigma**2).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return torch.tanh(x / scale.sqrt()) * (0.5 + 1 / scale)


def start(dtype: torch.dtype) -> Tensor:
    return noise.from_seeds([3, 4], (2, 5)).draw(dtype=dtype)


def on_table(sampler: Sampler, x: Tensor, times: Sequence[float], **options: Any) -> Tensor:
    options = {"schedule": TABLE, "time": "index", **options}
    denoise = Denoiser(network, **options)
    return sample(denoise, streams(), sampler=sampler, grid=grids.times(times), x=x)


def assert_same(found: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < (tolerance or TOLERANCE[found.dtype]), error


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- k-diffusion ----------------------------------------------------------------------------------


def spread(steps: int, clean: bool) -> Tensor:
    """steps + 1 sigmas from 10, the last of which is 0.1, or clean data."""
    sigmas = oracles.k_diffusion().get_sigmas_karras(steps + 1 - clean, 0.1, 10.0).double()
    return sigmas if clean else sigmas[:-1]


def along_sigma(sampler: Sampler, x: Tensor, sigmas: Tensor) -> Tensor:
    denoise = Denoiser(x0_of_sigma, SIGMAS, predicts="x0", time="sigma")
    return sample(denoise, streams(), sampler=sampler, grid=grids.sigmas(sigmas), x=x)


HALF = {"eta": 0.5, "s_noise": 0.9}
OURS_HALF = {"eta": 0.5, "noise_scale": 0.9}
K_DIFFUSION: dict[str, tuple[str, dict[str, Any], Sampler]] = {
    "euler_ancestral": ("euler_ancestral", {}, samplers.from_name("euler_ancestral")),
    "euler_ancestral, half": (
        "euler_ancestral",
        HALF,
        samplers.from_name("euler_ancestral", **OURS_HALF),
    ),
    "the same, as a wrapper of euler": (
        "euler_ancestral",
        HALF,
        samplers.Ancestral(sampler=samplers.Euler(), **OURS_HALF),
    ),
    "dpm2_ancestral": ("dpm_2_ancestral", {}, samplers.from_name("dpm2_ancestral")),
    "dpm2_ancestral, half": (
        "dpm_2_ancestral",
        HALF,
        samplers.from_name("dpm2_ancestral", **OURS_HALF),
    ),
    "dpmpp_2s_ancestral": ("dpmpp_2s_ancestral", {}, samplers.from_name("dpmpp_2s_ancestral")),
    "dpmpp_2s_ancestral, half": (
        "dpmpp_2s_ancestral",
        HALF,
        samplers.from_name("dpmpp_2s_ancestral", **OURS_HALF),
    ),
    "dpmpp_sde": ("dpmpp_sde", {}, samplers.DPMppSDE()),
    "dpmpp_sde, half": ("dpmpp_sde", {**HALF, "r": 0.3}, samplers.DPMppSDE(**OURS_HALF, r=0.3)),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", {}, samplers.from_name("dpmpp_2m_sde")),
    "dpmpp_2m_sde, heun, half": (
        "dpmpp_2m_sde",
        {**HALF, "solver_type": "heun"},
        samplers.from_name("dpmpp_2m_sde", solver_type="heun", **OURS_HALF),
    ),
    "dpmpp_3m_sde": ("dpmpp_3m_sde", {}, samplers.from_name("dpmpp_3m_sde", curvature=0.5)),
    "dpmpp_3m_sde, half": (
        "dpmpp_3m_sde",
        HALF,
        samplers.from_name("dpmpp_3m_sde", curvature=0.5, **OURS_HALF),
    ),
}


@each_dtype
@each_steps
@pytest.mark.parametrize("clean", [True, False], ids=["to clean data", "to sigma 0.1"])
@pytest.mark.parametrize("case", K_DIFFUSION.values(), ids=K_DIFFUSION)
def test_k_diffusion(
    case: tuple[str, dict[str, Any], Sampler], clean: bool, steps: int, dtype: torch.dtype
) -> None:
    name, options, sampler = case
    if name.endswith("m_sde") and clean and steps == 1:
        return  # k-diffusion fails there
    if "2" in name and "ancestral" in name and steps <= 2 and dtype == torch.float32:
        return  # its sigma_down is a difference of almost equal numbers, and loses 3 of 7 digits
    sigmas, x = spread(steps, clean), start(dtype) * 10
    queue = iter(draws(2 * steps))
    expected = oracles.run_k_diffusion(
        name, x0_of_sigma, x, sigmas, noise_sampler=lambda *_: next(queue).to(x), **options
    )
    assert_same(along_sigma(sampler, x, sigmas), expected)


@each_dtype
@each_steps
@pytest.mark.parametrize("limits", [(0.0, math.inf), (0.3, 5.0)], ids=str)
@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2"])
def test_churn(name: str, limits: tuple[float, float], steps: int, dtype: torch.dtype) -> None:
    """k-diffusion's churn, of S_churn 4: EDM's stochastic sampler if around Heun's method."""
    low, high = limits
    sigmas, x = spread(steps, clean=True), start(dtype) * 10
    ours, unused = iter(draws(steps)), torch.zeros(2, 2, 5)
    # it draws in each step, whether it uses it or not
    queue = [next(ours) if low <= s <= high else unused for s in sigmas[:-1].tolist()]
    churned = {"s_churn": 4.0, "s_tmin": low, "s_tmax": high, "s_noise": 1.003}
    expected = oracles.run_k_diffusion(name, x0_of_sigma, x, sigmas, queue, **churned)
    sampler = samplers.Churn(
        sampler=samplers.from_name({"dpm_2": "dpm2"}.get(name, name)),
        gamma=min(4.0 / steps, math.sqrt(2) - 1),
        low=low,
        high=high,
        noise_scale=1.003,
    )
    assert_same(along_sigma(sampler, x, sigmas), expected)


# --- diffusers ------------------------------------------------------------------------------------

CLEAN = {"clip_sample": False}
DIFFUSERS: dict[str, tuple[str, dict[str, Any], dict[str, Any], Callable[[int], Sampler]]] = {
    "ddpm": ("DDPM", CLEAN, {}, lambda n: samplers.DDPM()),
    "ddpm, in logs": (
        "DDPM",
        {**CLEAN, "variance_type": "fixed_small_log"},
        {},
        lambda n: samplers.DDPM(),
    ),
    "ddpm, large": (
        "DDPM",
        {**CLEAN, "variance_type": "fixed_large"},
        {},
        lambda n: samplers.DDPM(variance="large"),
    ),
    "ddim, 0.6": ("DDIM", CLEAN, {"eta": 0.6}, lambda n: samplers.DDIM(eta=0.6)),
    "ddim, 1": ("DDIM", CLEAN, {"eta": 1.0}, lambda n: samplers.DDIM(eta=1.0)),
    "dpmpp_2m_sde": (
        "DPMSolverMultistep",
        {"algorithm_type": "sde-dpmsolver++"},
        {},
        lambda n: samplers.from_name("dpmpp_2m_sde"),
    ),
    "dpmpp_2m_sde, heun": (
        "DPMSolverMultistep",
        {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
        {},
        lambda n: samplers.from_name("dpmpp_2m_sde", solver_type="heun"),
    ),
    "lcm": (
        "LCM",
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, **CLEAN},
        {},
        lambda n: samplers.LCM(),
    ),
    "tcd": (
        "TCD",
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, **CLEAN},
        {"eta": 0.3},
        lambda n: samplers.TCD(gamma=0.3),
    ),
    "tcd, 0.8": (
        "TCD",
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, **CLEAN},
        {"eta": 0.8},
        lambda n: samplers.TCD(gamma=0.8),
    ),
}


@each_dtype
@each_steps
@pytest.mark.parametrize("case", DIFFUSERS.values(), ids=DIFFUSERS)
def test_diffusers(
    case: tuple[str, dict[str, Any], dict[str, Any], Callable[[int], Sampler]],
    steps: int,
    dtype: torch.dtype,
) -> None:
    name, config, options, sampler = case
    x = start(dtype)
    expected, scheduler = oracles.run_diffusers(
        f"{name}Scheduler", network, x, steps, draws(steps), step=options, **config
    )
    times = [(index + 1) / 1000 for index in scheduler.timesteps.tolist()]
    # TCD's end is the first entry of the table, and not clean data
    times += [0.001] if name == "TCD" else [0.0]
    assert_same(on_table(sampler(steps), x, times), expected)


@each_dtype
@each_steps
def test_learned_variance_of_diffusers(steps: int, dtype: torch.dtype) -> None:
    def learned(x: Tensor, t: Any) -> Tensor:
        return torch.cat([network(x, t), torch.sin(3 * x)], dim=1)

    x = start(dtype)
    expected, scheduler = oracles.run_diffusers(
        "DDPMScheduler",
        learned,
        x,
        steps,
        draws(steps),
        clip_sample=False,
        variance_type="learned_range",
    )
    denoise = Denoiser(learned, TABLE, time="index", learned_variance=True)
    found = sample(
        denoise,
        streams(),
        sampler=samplers.DDPM(variance="learned"),
        grid=grids.indices(scheduler.timesteps),
        x=x,
    )
    assert_same(found, expected)


@each_dtype
@each_steps
@pytest.mark.parametrize("again", [True, False])
def test_clipped_ddim_of_diffusers(again: bool, steps: int, dtype: torch.dtype) -> None:
    """`use_clipped_model_output` is how we clip; without it, eps stays that of x0 not clipped."""
    x = start(dtype)
    expected, scheduler = oracles.run_diffusers(
        "DDIMScheduler",
        network,
        x,
        steps,
        draws(steps),
        step={"eta": 0.6, "use_clipped_model_output": again},
        clip_sample=True,
        clip_sample_range=0.4,
    )
    ddim = samplers.DDIM(eta=0.6)
    found = sample(
        guidance.clamp(Denoiser(network, TABLE, time="index"), -0.4, 0.4),
        streams(),
        sampler=ddim if again else samplers.CFGpp(sampler=ddim),
        grid=grids.indices(scheduler.timesteps),
        x=x,
    )
    assert_same(found, expected)


@each_dtype
@each_steps
@pytest.mark.parametrize(
    ("kind", "name"),
    [("EulerAncestralDiscrete", "euler_ancestral"), ("KDPM2AncestralDiscrete", "dpm2_ancestral")],
)
def test_diffusers_on_sigma(kind: str, name: str, steps: int, dtype: torch.dtype) -> None:
    """Its x is ours over alpha. Between entries of the table it interpolates log sigma."""
    if kind.startswith("KDPM2") and steps <= 2 and dtype == torch.float32:
        return  # as above
    x = start(dtype)
    config = {"timestep_spacing": "trailing", "beta_start": 1e-4, "beta_end": 0.02}
    times = [1 - i / steps for i in range(steps)] + [0.0]
    expected, _ = oracles.run_diffusers(
        f"{kind}Scheduler", network, x / TABLE.at(1.0).alpha, steps, draws(steps), **config
    )
    assert_same(on_table(samplers.from_name(name), x, times, schedule=LOG_SIGMA), expected)


@each_dtype
@each_steps
def test_dpmpp_sde_of_diffusers(
    steps: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = iter(draws(2 * steps))
    module = sys.modules[diffusers.DPMSolverSDEScheduler.__module__]
    monkeypatch.setattr(
        module, "BrownianTreeNoiseSampler", lambda *_: lambda *_: next(queue).to(dtype)
    )
    x = start(dtype)
    expected, _ = oracles.run_diffusers(
        "DPMSolverSDEScheduler",
        network,
        x / TABLE.at(1.0).alpha,
        steps,
        timestep_spacing="trailing",
        beta_start=1e-4,
        beta_end=0.02,
    )
    times = [1 - i / steps for i in range(steps)] + [0.0]
    assert_same(on_table(samplers.DPMppSDE(), x, times, schedule=LOG_SIGMA), expected)


@each_dtype
@each_steps
@pytest.mark.parametrize("orders", [(1, 1), (1, 2), (2, 2), (3, 3), (3, 4)], ids=str)
@pytest.mark.parametrize("window", [(200, 800), (0, 1000)], ids=str)
def test_sa_solver(
    orders: tuple[int, int], window: tuple[int, int], steps: int, dtype: torch.dtype
) -> None:
    """It ends at the first entry of the table, and not at clean data."""
    if max(orders) > 2 and dtype == torch.float32 and steps == 50:
        return  # its coefficients are differences of large numbers, and lose 3 of 7 digits
    x = start(dtype)
    indices = torch.linspace(0, 999, steps + 1, dtype=torch.float64).round().flip(0)[:-1].tolist()
    noisy = [window[0] <= index <= window[1] for index in indices]
    ours, unused = iter(draws(steps)), torch.zeros(2, 2, 5)
    expected, scheduler = oracles.run_diffusers(
        "SASolverScheduler",
        network,
        x,
        steps,
        [next(ours) if each else unused for each in noisy],
        predictor_order=orders[0],
        corrector_order=orders[1],
        tau_func=lambda t: torch.tensor(1.0 if window[0] <= t <= window[1] else 0.0),
    )
    assert scheduler.timesteps.tolist() == indices
    sampler = samplers.from_name(
        "sa_solver",
        points=orders[0],
        corrector=orders[1],
        window=((window[0] + 0.5) / 1000, (window[1] + 1.5) / 1000),
        lower_order_final=steps,
    )
    times = [(index + 1) / 1000 for index in indices] + [0.001]
    assert_same(on_table(sampler, x, times), expected)


@each_dtype
@each_steps
def test_consistency(steps: int, dtype: torch.dtype) -> None:
    """Its network says F of c_skip x + c_out F, as of Karras et al. and with a boundary."""
    low, data = 0.002, 0.5

    def scalings(sigma: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        sigma = torch.as_tensor(sigma).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        root = (sigma**2 + data**2).sqrt()
        skip = data**2 / ((sigma - low) ** 2 + data**2)
        return 1 / root, skip, (sigma - low) * data / root

    def function(x: Tensor, sigma: Tensor) -> Tensor:
        inside, skip, out = scalings(sigma, x)
        return skip * x + out * torch.tanh(inside * x)

    x = start(dtype) * 80
    expected, scheduler = oracles.run_diffusers(
        "CMStochasticIterativeScheduler",
        lambda x, sigma: torch.tanh(x),
        x,
        steps,
        draws(steps),
        num_train_timesteps=100,
        clip_denoised=False,
    )
    denoise = Denoiser(function, SIGMAS, predicts="x0", time="sigma")
    sigmas = scheduler.sigmas.double()
    found = sample(
        denoise,
        streams(),
        sampler=samplers.Consistency(floor=low),
        grid=grids.sigmas(sigmas),
        x=x,
    )
    assert_same(found, expected)


@each_dtype
@several_steps
def test_score_sde(steps: int, dtype: torch.dtype) -> None:
    """Norms of diffusers are means over the batch, and ours of each sample: so one by one."""
    module = sys.modules[diffusers.ScoreSdeVeScheduler.__module__]
    x = start(dtype)[:1] * 50
    drawn, given = noise.from_seeds([7], (2, 5)), noise.from_seeds([7], (2, 5))

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        return (x0_of_sigma(x, sigma.expand(len(x))) - x) / sigma**2

    queue = [drawn.draw(dtype=dtype) for _ in range(3 * steps)]
    expected = x
    with oracles.prescribed(module, queue, double=dtype == torch.float64):
        scheduler = diffusers.ScoreSdeVeScheduler(sigma_min=0.02, sigma_max=50.0, snr=0.15)
        scheduler.set_timesteps(steps)
        scheduler.set_sigmas(steps)
        sigmas = scheduler.discrete_sigmas.flip(0)
        for sigma, timestep in zip(sigmas, scheduler.timesteps, strict=True):
            for _ in range(2):
                said = score(expected, sigma)
                expected = scheduler.step_correct(said, expected, return_dict=False)[0]
            said = score(expected, sigma)
            expected, mean = scheduler.step_pred(said, timestep, expected, return_dict=False)
    denoise = Denoiser(x0_of_sigma, SIGMAS, predicts="x0", time="sigma")
    levels = torch.cat([sigmas.double(), torch.zeros(1, dtype=torch.float64)])
    for predictor in (samplers.ReverseDiffusion(), samplers.DDPM(variance="large")):
        found = sample(
            denoise,
            given,
            sampler=samplers.PredictorCorrector(predictor=predictor, corrections=2, snr=0.15),
            grid=grids.sigmas(levels),
            x=x,
        )
        assert_same(found, mean)


@each_steps
@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_ancestral_on_a_rectified_flow(eta: float, steps: int) -> None:
    """diffusers' counts in float32, and guards its divisions with 1e-12."""
    flow = schedules.flow()
    sigmas = torch.linspace(0.99, 0.0, steps + 1, dtype=torch.float64)
    module = sys.modules[diffusers.LTXEulerAncestralRFScheduler.__module__]
    x = expected = start(torch.float32)

    def velocity(x: Tensor, t: Any) -> Tensor:
        return network(x, torch.as_tensor(t) * 1000)

    with oracles.prescribed(module, draws(steps)):
        scheduler = diffusers.LTXEulerAncestralRFScheduler(eta=eta, s_noise=0.9)
        scheduler.set_timesteps(sigmas=sigmas.tolist())
        for sigma, timestep in zip(scheduler.sigmas[:-1], scheduler.timesteps, strict=False):
            said = velocity(expected, sigma)
            expected = scheduler.step(said, timestep, expected, return_dict=False)[0]
    sampler = samplers.from_name("euler_ancestral", rule="flow", eta=eta, noise_scale=0.9)
    denoise = Denoiser(velocity, flow, predicts="flow")
    found = sample(denoise, streams(), sampler=sampler, grid=grids.times(sigmas), x=x)
    assert_same(found, expected)


# --- ADM ------------------------------------------------------------------------------------------


def run_adm(
    kind: str, steps: int, monkeypatch: pytest.MonkeyPatch, x: Tensor, **options: Any
) -> tuple[Tensor, Grid]:
    """A run of guided_diffusion, with its network of 2 C channels where variances are learned."""
    queue = iter(draws(steps))
    fake = oracles._Changed(torch, randn_like=lambda x: next(queue).to(x))
    monkeypatch.setattr(adm, "th", fake)
    section = 1000 // steps
    used = range(section - 1, 1000, section)
    diffusion = SpacedDiffusion(
        used,
        betas=torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).numpy(),
        model_mean_type=adm.ModelMeanType.EPSILON,
        model_var_type=adm.ModelVarType[kind],
        loss_type=adm.LossType.MSE,
    )
    learned = kind.startswith("LEARNED")
    loop = diffusion.ddim_sample_loop if "eta" in options else diffusion.p_sample_loop
    found = loop(
        spoken if learned else network,
        x.shape,
        noise=x,
        clip_denoised=True,
        device="cpu",
        **options,
    )
    return found, grids.indices(list(used)[::-1])


def spoken(x: Tensor, t: Tensor) -> Tensor:
    return torch.cat([network(x, t), torch.sin(3 * x)], dim=1)


@several_steps
@pytest.mark.parametrize(
    ("kind", "variance"),
    [("FIXED_SMALL", "small"), ("FIXED_LARGE", "large"), ("LEARNED_RANGE", "learned")],
)
def test_adm(kind: str, variance: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts in float32. Its first step adds no noise, ours of the last to clean data neither."""
    x = start(torch.float32)
    expected, grid = run_adm(kind, steps, monkeypatch, x)
    learned = variance == "learned"
    denoise = Denoiser(
        spoken if learned else network, TABLE, time="index", learned_variance=learned
    )
    sampler = samplers.DDPM(variance=variance)
    found = sample(guidance.clamp(denoise), streams(), sampler=sampler, grid=grid, x=x)
    assert_same(found, expected)


@several_steps
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_adm_ddim(eta: float, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = start(torch.float32)
    expected, grid = run_adm("FIXED_SMALL", steps, monkeypatch, x, eta=eta)
    denoise = guidance.clamp(Denoiser(network, TABLE, time="index"))
    found = sample(denoise, streams(), sampler=samplers.DDIM(eta=eta), grid=grid, x=x)
    assert_same(found, expected)


def test_the_larger_variance_of_ddim_is_that_of_ddpm() -> None:
    """Song et al., 2021, section 5: the noise has deviation sigma-hat, the mean that of eta 1."""
    x = start(torch.float64)
    denoise = Denoiser(network, TABLE, time="index")
    times = [TABLE.at(t) for t in (1.0, 0.6, 0.2)]
    streams_ = streams()
    expected = x
    for t, s in pairwise(times):
        x0 = denoise(expected, t).x0
        eps = (expected - t.alpha * x0) / t.sigma
        std = s.sigma / t.sigma * (1 - t.alpha**2 / s.alpha**2) ** 0.5
        larger = (1 - t.alpha**2 / s.alpha**2) ** 0.5
        expected = (
            s.alpha * x0
            + (s.sigma**2 - std**2) ** 0.5 * eps
            + larger * streams_.draw(dtype=torch.float64)
        )
    sampler = samplers.DDPM(variance="large")
    assert_same(on_table(sampler, x, [t.value for t in times]), expected)
