"""Deterministic samplers, element by element, against diffusers and k-diffusion.

One network, one start, the same times. Where a reference differs from the method that it names, the
difference is an option of ours, given here. In float64 both agree to 1e-10 of the largest number. In
float32 ours is within 1e-5 of that, or at least of twice the error of the reference's own float32.
"""

import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise, repeat
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor

from mdiff.core import Denoiser, noise, sample, samplers, schedules
from mdiff.core.samplers import Sampler

TABLE = schedules.linear()
LOG_SIGMA = schedules.linear(between="log_sigma")
each_steps = pytest.mark.parametrize("steps", [1, 2, 10, 50])


def network(x: Tensor, t: Any) -> Tensor:
    """Smooth, not linear, and no denoiser of anything; t from 0 to 1000."""
    t = torch.as_tensor(t).to(x.dtype)
    return torch.tanh(x) * (0.5 + t.reshape(-1, *[1] * (x.ndim - 1)) / 1000)


def ours(denoise: Denoiser, sampler: Sampler, x: Tensor, times: Sequence[float]) -> Tensor:
    return sample(
        denoise,
        noise.from_seeds([0, 1], x.shape[1:]),
        sampler=sampler,
        grid=lambda schedule: torch.tensor(times, dtype=torch.float64),
        x=x,
    )


def compare(runs: Callable[[Tensor], tuple[Tensor, Tensor]], scale: float = 1.0) -> None:
    """Checks runs(x), which are (ours, the reference's), from one start in both precisions."""
    x = noise.from_seeds([3, 4], (2, 5)).draw() * scale
    (found, expected), single = runs(x.double()), runs(x)
    assert found.dtype == torch.float64 and all(run.dtype == torch.float32 for run in single)
    assert distance(found, expected) < 1e-10
    own, other = (distance(run, expected) for run in single)
    assert own < max(1e-5, 2 * other), (own, other)


def distance(x: Tensor, y: Tensor) -> float:
    return ((x - y).abs().max() / y.abs().max()).item()


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated algorithms, and of log(0)
        yield


# --- diffusers, on tables of betas ----------------------------------------------------------------


def short(steps: int) -> int:
    """lower_order_final of diffusers' DPM-Solvers and DEIS."""
    return steps if steps < 15 else 0


ENDED = {"final_sigmas_type": "sigma_min"}
"""At the first entry of the table, and not at clean data, where some of diffusers divide by 0."""

CASES: dict[str, tuple[str, dict[str, Any], Callable[[int], Sampler]]] = {
    "dpmpp_1": ("DPMSolverMultistep", {"solver_order": 1}, lambda n: samplers.from_name("dpmpp_1")),
    "dpmpp_2m": ("DPMSolverMultistep", {}, lambda n: samplers.dpmpp_2m(lower_order_final=short(n))),
    "dpmpp_2m, heun": (
        "DPMSolverMultistep",
        {"solver_type": "heun", "lower_order_final": False, **ENDED},
        lambda n: samplers.dpmpp_2m(solver_type="heun"),
    ),
    "dpmpp_3m": (
        "DPMSolverMultistep",
        {"solver_order": 3},
        lambda n: samplers.dpmpp_3m(
            solver_type="midpoint", curvature=0.5, lower_order_final=short(n)
        ),
    ),
    "dpmpp_3m, euler at final": (
        "DPMSolverMultistep",
        {
            "solver_order": 3,
            "solver_type": "heun",
            "euler_at_final": True,
            "lower_order_final": False,
            **ENDED,
        },
        lambda n: samplers.dpmpp_3m(curvature=0.5, euler_at_final=n),
    ),
    "dpm_1": (
        "DPMSolverMultistep",
        {"algorithm_type": "dpmsolver", "solver_order": 1, **ENDED},
        lambda n: samplers.from_name("dpm_1"),
    ),
    "dpm_2m": (
        "DPMSolverMultistep",
        {"algorithm_type": "dpmsolver", **ENDED},
        lambda n: samplers.dpm_2m(lower_order_final=short(n)),
    ),
    "dpm_2m, heun": (
        "DPMSolverMultistep",
        {"algorithm_type": "dpmsolver", "solver_type": "heun", **ENDED},
        lambda n: samplers.dpm_2m(solver_type="heun", lower_order_final=short(n)),
    ),
    "dpm_3m": (
        "DPMSolverMultistep",
        {"algorithm_type": "dpmsolver", "solver_order": 3, **ENDED},
        lambda n: samplers.dpm_3m(
            solver_type="midpoint", curvature=0.5, lower_order_final=short(n)
        ),
    ),
    **{
        f"deis, {order}": (
            "DEISMultistep",
            {"solver_order": order},
            lambda n, order=order: samplers.deis(order=order, lower_order_final=short(n)),
        )
        for order in (1, 2, 3)
    },
    **{
        f"unipc, {order}, bh2": (
            "UniPCMultistep",
            {"solver_order": order},
            lambda n, order=order: samplers.UniPC(solver_order=order, lower_order_final=n),
        )
        for order in (1, 2, 3)
    },
    **{
        f"unipc, {order}, {kind}, {form}": (
            "UniPCMultistep",
            {"solver_order": order, "solver_type": kind, "predict_x0": form == "x0", **ENDED},
            lambda n, order=order, kind=kind, form=form: samplers.UniPC(
                solver_order=order, solver_type=kind, form=form, lower_order_final=n
            ),
        )
        for order in (1, 2, 3)
        for kind, form in (("bh1", "x0"), ("bh1", "eps"), ("bh2", "eps"))
    },
    "unipc, without the first corrections": (
        "UniPCMultistep",
        {"solver_order": 3, "disable_corrector": [0, 1], "lower_order_final": False, **ENDED},
        lambda n: samplers.UniPC(solver_order=3, disable_corrector=(0, 1)),
    ),
    "plms": (
        "PNDM",
        {"skip_prk_steps": True, "set_alpha_to_one": True},
        lambda n: samplers.from_name("plms"),
    ),
    "pndm": ("PNDM", {"set_alpha_to_one": True}, lambda n: samplers.from_name("pndm")),
    "ddim": ("DDIM", {"clip_sample": False}, lambda n: samplers.from_name("ddim")),
}


@each_steps
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_diffusers(case: tuple[str, dict[str, Any], Callable[[int], Sampler]], steps: int) -> None:
    name, config, sampler = case
    if name == "PNDM" and "skip_prk_steps" not in config and steps < 4:
        return  # diffusers cannot: three of its steps are Runge-Kutta's

    def runs(x: Tensor) -> tuple[Tensor, Tensor]:
        expected, scheduler = oracles.run_diffusers(f"{name}Scheduler", network, x, steps, **config)
        indices = scheduler.timesteps.tolist()
        if name == "PNDM":
            # it visits some twice, and times between
            indices = scheduler._timesteps.tolist()[::-1]
        ended = "final_sigmas_type" in config or name == "DEISMultistep"
        times = [(index + 1) / 1000 for index in indices] + [0.001 if ended else 0.0]
        return ours(Denoiser(network, TABLE, time="index"), sampler(steps), x, times), expected

    compare(runs)


ON_SIGMA = {
    "euler": ("EulerDiscrete", samplers.Euler()),
    "heun": ("HeunDiscrete", samplers.Heun()),
    "lms": ("LMSDiscrete", samplers.lms()),
    "dpm2": ("KDPM2Discrete", samplers.from_name("dpm2")),
}


@each_steps
@pytest.mark.parametrize("name", ON_SIGMA)
def test_diffusers_on_sigma(name: str, steps: int) -> None:
    """Its x is ours over alpha. Between entries of the table it interpolates log sigma."""
    kind, sampler = ON_SIGMA[name]
    config = {"timestep_spacing": "trailing", "beta_start": 1e-4, "beta_end": 0.02}
    times = [1 - i / steps for i in range(steps)] + [0.0]
    denoise = Denoiser(network, LOG_SIGMA, time="index")

    def runs(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x / TABLE.at(1.0).alpha
        expected, _ = oracles.run_diffusers(f"{kind}Scheduler", network, y, steps, **config)
        return ours(denoise, sampler, x, times), expected

    compare(runs)


@pytest.mark.parametrize("form", ["dpmsolver", "dpmsolver++"])
@pytest.mark.parametrize("kind", ["midpoint", "heun"])
@pytest.mark.parametrize(("order", "steps"), [(2, 3), (2, 11), (2, 51), (3, 4), (3, 10), (3, 52)])
def test_diffusers_singlestep(order: int, steps: int, kind: str, form: str) -> None:
    """It asks at times of its grid, which lie where ours do if the grid is even in log sigma."""
    plus = form == "dpmsolver++"
    config: dict[str, Any] = {
        "solver_order": order,
        "solver_type": kind,
        "algorithm_type": form,
        "lower_order_final": True,
        "use_exponential_sigmas": True,
        "final_sigmas_type": "zero" if plus else "sigma_min",
    }
    sampler = samplers.Singlestep(
        order=order, form="x0" if plus else "eps", solver_type=kind, inner_type=kind
    )
    schedule = schedules.cosine()

    def runs(x: Tensor) -> tuple[Tensor, Tensor]:
        expected, scheduler = oracles.run_diffusers(
            "DPMSolverSinglestepScheduler", network, x, steps, by_sigma=True, **config
        )
        # its last step is Euler's: to clean data, or from sigma_min to itself
        log_snr = -2 * scheduler.sigmas[:steps:order].double().log()
        times = schedule.time(log_snr).tolist() + [0.0] * plus
        return ours(Denoiser(network, schedule, time="sigma"), sampler, x, times), expected

    compare(runs)


@each_steps
def test_ipndm(steps: int) -> None:
    """diffusers' has its own schedule, of which the first time, without signal, is left out."""
    denoise = Denoiser(network, schedules.cosine(s=0.0), predicts="v")

    def runs(x: Tensor) -> tuple[Tensor, Tensor]:
        expected, scheduler = oracles.run_diffusers(
            "IPNDMScheduler", network, x, steps + 1, begin=1
        )
        times = [*scheduler.timesteps[1:].tolist(), 0.0]
        return ours(denoise, samplers.ipndm(), x, times), expected

    compare(runs)


@each_steps
@pytest.mark.parametrize(
    ("name", "sampler"), [("Euler", samplers.Euler()), ("Heun", samplers.Heun(frame="flow"))]
)
def test_flow_matching(name: str, sampler: Sampler, steps: int) -> None:
    denoise = Denoiser(
        network, schedules.flow(), predicts="flow", time=lambda t, schedule: t.value * 1000
    )

    def runs(x: Tensor) -> tuple[Tensor, Tensor]:
        expected, scheduler = oracles.run_diffusers(
            f"FlowMatch{name}DiscreteScheduler", network, x, steps, shift=3.0
        )
        # Heun's asks at each time but the first and the last twice
        times = [t / 1000 for t in dict.fromkeys(scheduler.timesteps.tolist())] + [0.0]
        return ours(denoise, sampler, x, times), expected

    compare(runs)


@each_steps
@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc"])
def test_multistep_on_flow(name: str, steps: int) -> None:
    """The same samplers where alpha + sigma = 1."""
    kind, config, sampler = CASES["dpmpp_2m" if name == "dpmpp_2m" else "unipc, 2, bh2"]
    flow = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    denoise = Denoiser(network, schedules.flow(), predicts="flow", time=lambda t, schedule: t.value)

    def runs(x: Tensor) -> tuple[Tensor, Tensor]:
        expected, scheduler = oracles.run_diffusers(
            f"{kind}Scheduler", network, x, steps, by_sigma=True, **config, **flow
        )
        return ours(denoise, sampler(steps), x, scheduler.sigmas.tolist()), expected

    compare(runs)


@each_steps
@pytest.mark.parametrize(
    ("name", "config", "sampler"),
    [
        ("EDMEuler", {}, lambda n: samplers.Euler()),
        *(("EDMDPMSolverMultistep", *CASES[name][1:]) for name in ("dpmpp_2m", "dpmpp_3m")),
    ],
)
def test_diffusers_with_the_network_of_edm(
    name: str, config: dict[str, Any], sampler: Callable[[int], Sampler], steps: int
) -> None:
    schedule = schedules.edm(0.002, 80.0)
    denoise = Denoiser(network, schedule, predicts="edm", scale="edm", time="log_sigma/4")

    def runs(x: Tensor) -> tuple[Tensor, Tensor]:
        expected, scheduler = oracles.run_diffusers(f"{name}Scheduler", network, x, steps, **config)
        times = (scheduler.sigmas.double() / 80).tolist()
        return ours(denoise, sampler(steps), x, times), expected

    compare(runs, scale=80.0)


# --- k-diffusion, at any sigma --------------------------------------------------------------------


def x0_of_sigma(x: Tensor, sigma: Tensor) -> Tensor:
    """Smooth, not linear; sigma (B,)."""
    scale = (1 + sigma**2).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return torch.tanh(x / scale.sqrt()) * (0.5 + 1 / scale)


def spread(steps: int, clean: bool) -> Tensor:
    """steps + 1 sigmas from 50, the last of which is 0.02, or clean data."""
    sigmas = oracles.k_diffusion().get_sigmas_karras(steps + 1 - clean, 0.02, 50.0).double()
    return sigmas if clean else sigmas[:-1]


def along_sigma(sampler: Sampler, x: Tensor, sigmas: Tensor) -> Tensor:
    denoise = Denoiser(x0_of_sigma, schedules.edm(0.01, 100.0), predicts="x0", time="sigma")
    return ours(denoise, sampler, x, (sigmas / 100).tolist())


K_DIFFUSION: dict[str, tuple[str, dict[str, Any], Sampler]] = {
    "euler": ("euler", {}, samplers.Euler()),
    "heun, which is EDM's": ("heun", {}, samplers.Heun()),
    "dpm2": ("dpm_2", {}, samplers.from_name("dpm2")),
    "lms": ("lms", {}, samplers.lms()),
    "lms, 2": ("lms", {"order": 2}, samplers.lms(order=2)),
    "ipndm_v": ("lms", {}, samplers.ipndm_v()),
    "dpmpp_2m": ("dpmpp_2m", {}, samplers.dpmpp_2m()),
    "dpmpp_2m, heun": (
        "dpmpp_2m_sde",
        {"eta": 0.0, "solver_type": "heun", "noise_sampler": ()},
        samplers.dpmpp_2m(solver_type="heun"),
    ),
    "dpmpp_3m": (
        "dpmpp_3m_sde",
        {"eta": 0.0, "noise_sampler": ()},
        samplers.dpmpp_3m(curvature=0.5),
    ),
    "dpmpp_2s": ("dpmpp_2s_ancestral", {"eta": 0.0}, samplers.dpmpp_2s()),
}


@each_steps
@pytest.mark.parametrize("clean", [True, False], ids=["to clean data", "to sigma 0.02"])
@pytest.mark.parametrize("case", K_DIFFUSION.values(), ids=K_DIFFUSION)
def test_k_diffusion(case: tuple[str, dict[str, Any], Sampler], clean: bool, steps: int) -> None:
    name, options, sampler = case
    if name.endswith("m_sde") and clean and steps == 1:
        return  # k-diffusion fails there
    sigmas = spread(steps, clean)

    def runs(x: Tensor) -> tuple[Tensor, Tensor]:
        draws = [torch.zeros_like(x)] * steps
        expected = oracles.run_k_diffusion(name, x0_of_sigma, x, sigmas, draws, **options)
        return along_sigma(sampler, x, sigmas), expected

    compare(runs, scale=50.0)


@each_steps
@pytest.mark.parametrize("order", [2, 3])
def test_dpm_solver_of_k_diffusion(order: int, steps: int) -> None:
    solver = oracles.k_diffusion().DPMSolver(x0_of_sigma)
    step = getattr(solver, f"dpm_solver_{order}_step")
    sigmas = spread(steps, clean=False)

    def runs(x: Tensor) -> tuple[Tensor, Tensor]:
        expected = x
        for t, s in pairwise(-sigmas.to(x.dtype).log()):
            expected, _ = step(expected, t, s)
        return along_sigma(samplers.from_name(f"dpm_{order}s"), x, sigmas), expected

    compare(runs, scale=50.0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"order": 2},
        {"rtol": 1e-3, "atol": 1e-4},
        {"h_init": 2.0, "pcoeff": 0.2, "icoeff": 0.6, "dcoeff": 0.1, "accept_safety": 0.9},
    ],
    ids=str,
)
def test_adaptive(options: dict[str, Any]) -> None:
    """k-diffusion has one step size for a batch, and ours one for each sample: so one by one."""
    sampler, sigmas = (
        samplers.DPMAdaptive(**options),
        torch.tensor([50.0, 0.02], dtype=torch.float64),
    )
    solve = oracles.k_diffusion().sample_dpm_adaptive

    def runs(x: Tensor) -> tuple[Tensor, Tensor]:
        draws = repeat(torch.zeros(()))
        with oracles.prescribed(oracles.k_diffusion(), draws, double=x.dtype == torch.float64):
            rows = [
                solve(x0_of_sigma, row, 0.02, 50.0, disable=True, **options) for row in x.split(1)
            ]
        return along_sigma(sampler, x, sigmas), torch.cat(rows)

    compare(runs, scale=50.0)
