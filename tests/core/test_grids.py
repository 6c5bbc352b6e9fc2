"""The laws of grids, and their times against values worked out by hand, diffusers, k-diffusion and
guided-diffusion.
"""

import math
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from guided_diffusion.respace import space_timesteps

from mdiff.core import grids, schedules
from mdiff.core.errors import UsageError

SCHEDULES = [
    schedules.linear(),
    schedules.betas([0.01] * 7),
    schedules.vp_linear(),
    schedules.cosine(),
    schedules.ve(),
    schedules.edm(),
    schedules.flow(2.0),
    schedules.zero_terminal(),
]


def indices(grid: grids.Grid, steps: int = 1000) -> list[float]:
    """The grid on a table as indices, without the clean end."""
    schedule = schedules.linear(steps=steps)
    times = grid(schedule)
    assert times[-1] == 0
    return schedule.index(times)[:-1].tolist()


COUNTING = {"leading", "trailing", "simple"}
ALIGNED = {name for name in grids.NAMES if name.startswith("ays")}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.name)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("name", grids.NAMES)
def test_laws(name: str, steps: int, schedule: schedules.Schedule) -> None:
    grid = grids.from_name(name, steps)
    counts = name in COUNTING
    if counts and (schedule.steps is None or schedule.steps < steps):
        with pytest.raises(UsageError):
            grid(schedule)
        return
    try:
        times = grid(schedule)
    except UsageError as error:
        # Stable Diffusion's noise levels, on a schedule that does not reach so far
        assert name in ALIGNED and "do not strictly decrease" in str(error)
        return
    assert times.dtype == torch.float64 and times.ndim == 1
    fewer = name == "quadratic" and schedule.steps is not None
    assert len(times) == steps + 1 or fewer and len(times) <= steps + 1
    assert (times.diff() < 0).all() and times[-1] == 0
    if name not in ALIGNED and name != "leading" and not fewer:
        assert times[0] == schedule.high
    if not counts and steps > 1 and name not in {"sgm_uniform", "linear_quadratic", *ALIGNED}:
        assert times[-2] == schedule.low


def test_leading_spacing() -> None:
    assert indices(grids.leading(10)) == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert indices(grids.leading(4, offset=1)) == [751, 501, 251, 1]
    # 1000 // 30 = 33
    assert indices(grids.leading(30))[:2] == [957, 924]


def test_trailing_spacing() -> None:
    assert indices(grids.trailing(10)) == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    # 1000, 666.67, 333.33 rounded, less one
    assert indices(grids.trailing(3)) == [999, 666, 332]
    assert indices(grids.trailing(1000)) == list(range(999, -1, -1))


def test_linear_spacing() -> None:
    assert indices(grids.linear(4)) == pytest.approx([999, 666, 333, 0])
    assert indices(grids.linear(1000)) == pytest.approx(list(range(999, -1, -1)))


def test_karras_spacing() -> None:
    # (80^(1/7) + i/4 (0.002^(1/7) - 80^(1/7)))^7, i = 0 ... 4
    schedule = schedules.ve(0.002, 80.0, low=1e-9)
    _, sigma = schedule(grids.karras(5)(schedule))
    expected = [80.0, 17.52783, 2.51525, 0.17, 0.002]
    ends = 80 ** (1 / 7), 0.002 ** (1 / 7)
    for i in (1, 2, 3):
        expected[i] = (ends[0] + i / 4 * (ends[1] - ends[0])) ** 7
    assert expected[1:4] == pytest.approx([17.5278, 2.5152, 0.1698], rel=1e-3)
    assert sigma[:5].tolist() == pytest.approx(expected, rel=1e-6)
    assert sigma[5] == 0


def test_logsnr_spacing() -> None:
    schedule = schedules.vp_linear()
    log_snr = schedule.log_snr(grids.logsnr(9)(schedule)[:-1])
    torch.testing.assert_close(log_snr.diff(), log_snr.diff().mean().expand(8), rtol=1e-9, atol=0)


def test_truncate_starts_part_of_the_way() -> None:
    schedule = schedules.linear()
    whole = grids.trailing(10)(schedule)
    part = grids.truncate(grids.trailing(10), 0.6)(schedule)
    assert torch.equal(part, whole[4:]) and part[0] == 0.6
    assert torch.equal(grids.truncate(grids.trailing(10), 1.0)(schedule), whole)
    with pytest.raises(UsageError, match=r"start 0.05.*t = 0.1"):
        grids.truncate(grids.trailing(10), 0.05)(schedule)


def test_misuse_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 1 step"):
        grids.karras(0)
    with pytest.raises(UsageError, match="1001 steps"):
        grids.trailing(1001)(schedules.linear())
    with pytest.raises(UsageError, match="continuous"):
        grids.leading(10)(schedules.cosine())
    with pytest.raises(UsageError, match="'karras'"):
        grids.from_name("karas", 10)
    with pytest.raises(UsageError, match="power"):
        grids.from_name("karras", 10, power=3)


def test_rho_of_karras() -> None:
    schedule = schedules.vp_linear()
    times = grids.from_name("karras", 3, rho=1.0)(schedule)
    ratio = torch.exp(-schedule.log_snr(times[:3]) / 2)
    assert math.isclose(ratio[1], (ratio[0] + ratio[2]) / 2, rel_tol=1e-9)


# --- ends, lists, strings -------------------------------------------------------------------------


def test_ends() -> None:
    assert indices(grids.linear(4, final="discard")) == pytest.approx([999, 749.25, 499.5, 249.75])
    assert indices(grids.linear(4, final="discard", whole=True)) == [999, 749, 500, 250]
    assert indices(grids.sgm_uniform(4)) == indices(grids.linear(4, final="discard"))
    schedule = schedules.linear()
    for final in ("low", "discard_low"):
        times = grids.karras(5, final=final)(schedule)
        assert times.shape == (6,) and times[0] == 1.0 and times[-1] == schedule.low
        assert torch.equal(times, grids.karras(6)(schedule)[:-1])
    # indices that do not end at 0 by themselves
    low = schedule.index(grids.trailing(4, final="low")(schedule))
    assert low.tolist() == [999, 749, 499, 249, 0]
    assert indices(grids.leading(4, 1, final="discard")) == [801, 601, 401, 201]
    assert indices(grids.trailing(4, -1)) == [998, 748, 498, 248]


def test_lists() -> None:
    schedule = schedules.linear()
    assert grids.times([0.9, 0.5, 0.0])(schedule).tolist() == [0.9, 0.5, 0.0]
    assert indices(grids.from_name("indices", [850, 24])) == [850, 24]
    levels = [80.0, 3.0, 0.5, 0.0]
    alpha, sigma = schedule(grids.from_name("sigmas", levels)(schedule))
    assert (sigma / alpha).tolist() == pytest.approx(levels, rel=1e-12)
    with pytest.raises(UsageError, match=r"sigmas are a list of numbers, not 20"):
        grids.from_name("sigmas", 20)
    with pytest.raises(UsageError, match="strictly decrease on linear"):
        grids.sigmas([900.0, 500.0, 1.0])(schedule)
    for wrong in ([24, 850], [1000, 24], [24, 24], [24, -1], []):
        with pytest.raises(UsageError, match="strictly decrease within 0 to 999"):
            grids.indices(wrong)(schedule)


@pytest.mark.parametrize(
    "sections", ["1", "2", "10", "50", "250", "1000", "10,15,20", "10,10,3,2,2", "1,1,333"]
)
@pytest.mark.parametrize("total", [1000, 4000, 1003])
def test_sections_against_guided_diffusion(sections: str, total: int) -> None:
    expected = sorted(space_timesteps(total, sections), reverse=True)
    assert indices(grids.from_name(sections), total) == expected


@pytest.mark.parametrize("count", [1, 2, 10, 25, 50, 250, 1000])
def test_whole_strides_against_guided_diffusion(count: int) -> None:
    if count == 1:  # no stride below T does it
        with pytest.raises(ValueError, match="integer stride"):
            space_timesteps(1000, "ddim1")
        with pytest.raises(UsageError, match="exactly 1 of 1000"):
            indices(grids.from_name("ddim1"))
        return
    expected = sorted(space_timesteps(1000, f"ddim{count}"), reverse=True)
    assert indices(grids.from_name(f"ddim{count}")) == expected


def test_respacings_by_hand() -> None:
    assert indices(grids.respaced("250"))[::-1][:3] == [0, 4, 8]
    assert indices(grids.respaced("250"))[:2] == [999, 995]
    assert indices(grids.respaced("250"), 4000)[:1] == [3999]
    assert indices(grids.respaced("ddim250"))[0] == 996
    assert indices(grids.respaced("ddim25"))[::-1][:3] == [0, 40, 80]
    fast = "0 22 44 66 88 111 133 155 177 199 200 222 244 266 288 311 333 355 377 399 400 500 599 "
    fast += "600 799 800 997"
    assert indices(grids.from_name("fast27"))[::-1] == [int(index) for index in fast.split()]
    # the number of steps of a request does not matter
    assert indices(grids.from_name("ddim50", 20)) == indices(grids.respaced("ddim50"))
    for wrong in ("ddim", "fast", "10,", "ddim10,10", "-5"):
        with pytest.raises(UsageError):
            grids.respaced(wrong)
    with pytest.raises(UsageError, match="600 steps do not fit into a section of 500"):
        indices(grids.respaced("600,10"))
    with pytest.raises(UsageError, match="exactly 7 of 10"):
        indices(grids.respaced("ddim7"), 10)
    with pytest.raises(UsageError, match="continuous"):
        grids.respaced("10")(schedules.cosine())


# --- rules that have no other reference -----------------------------------------------------------


def levels(grid: grids.Grid, schedule: schedules.Schedule) -> list[float]:
    alpha, sigma = schedule(grid(schedule))
    return (sigma / alpha).tolist()


def test_quadratic_spacing() -> None:
    # the squares of an even row up to sqrt(800), cut to whole numbers, as the code of DDIM has it
    for steps in (2, 10, 20, 50, 100):
        squares = np.linspace(0, np.sqrt(1000 * 0.8), steps) ** 2
        expected = sorted({int(square) for square in squares}, reverse=True)
        assert indices(grids.quadratic(steps)) == expected
    schedule = schedules.vp_linear()
    roots = grids.quadratic(5)(schedule)[:-1].sqrt()
    torch.testing.assert_close(roots.diff(), roots.diff().mean().expand(4))


def test_simple_spacing() -> None:
    assert indices(grids.simple(3)) == [999, 666, 333]
    for steps in (7, 30):
        assert indices(grids.simple(steps)) == [999 - int(i * (1000 / steps)) for i in range(steps)]


def test_kl_optimal_spacing() -> None:
    schedule = schedules.edm()
    for steps in (2, 10, 50):
        share = np.arange(steps) / (steps - 1)
        expected = np.tan(share * np.arctan(0.002) + (1 - share) * np.arctan(80.0))
        assert levels(grids.kl_optimal(steps), schedule) == pytest.approx([*expected, 0], rel=1e-9)


def test_linear_quadratic_spacing() -> None:
    # the two halves with their own coefficients, joined with the same slope
    for steps in (2, 10, 50):
        threshold, first = 0.025, steps // 2
        rest, left = steps - first, first - threshold * steps
        a = left / (first * rest**2)
        b = threshold / first - 2 * left / rest**2
        x = [i * threshold / first for i in range(first)]
        x += [a * i**2 + b * i + a * first**2 for i in range(first, steps)]
        expected = [1 - value for value in [*x, 1.0]]
        _, sigma = (flow := schedules.flow())(grids.linear_quadratic(steps)(flow))
        assert sigma.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert grids.linear_quadratic(1)(flow).tolist() == [1.0, 0.0]
    with pytest.raises(UsageError, match="the smaller ones"):
        grids.linear_quadratic(50, first=1)


def test_beta_of_one_is_even_in_sigma() -> None:
    found = levels(grids.beta(5, 1.0, 1.0), schedules.edm(0.002, 80.0))
    assert found == pytest.approx([*np.linspace(80, 0.002, 5), 0], rel=1e-9)


def test_align_your_steps() -> None:
    known = diffusers.schedulers.AysSchedules
    for name, kind, schedule in (
        ("ays_sd15", "StableDiffusion", schedules.scaled_linear()),
        ("ays_sdxl", "StableDiffusionXL", schedules.scaled_linear()),
        ("ays_svd", "StableDiffusionVideo", schedules.edm(0.002, 700.0)),
    ):
        found = levels(grids.from_name(name, 10), schedule)
        # sigma_max of the table is 14.6146, where the published row says 14.615
        assert found == pytest.approx(known[f"{kind}Sigmas"], rel=3e-5)
        if f"{kind}Timesteps" in known:
            index = schedule.index(grids.from_name(name, 10)(schedule)[:-1]).tolist()
            assert index == pytest.approx(known[f"{kind}Timesteps"], abs=1.1)
        # every second of twenty steps' levels is one of ten's
        finer = levels(grids.from_name(name, 20), schedule)
        assert finer[::2] == pytest.approx(found, rel=1e-9)
        assert finer[1] == pytest.approx(math.sqrt(finer[0] * finer[2]), rel=3e-5)
    ending = levels(grids.ays_sd15(10, final="discard_low"), schedules.scaled_linear())
    assert ending[-1] == pytest.approx(0.02917, rel=1e-3)


def test_ends_of_sigma() -> None:
    schedule = schedules.linear()
    found = levels(grids.karras(6, sigma_min=0.1, sigma_max=20.0), schedule)
    assert found[0] == pytest.approx(20, rel=1e-9) and found[-2] == pytest.approx(0.1, rel=1e-9)
    with pytest.raises(UsageError, match="sigma_max has to be the larger"):
        grids.karras(6, sigma_min=20.0, sigma_max=0.1)(schedule)
    # without signal at the first time the second is where even levels from log-SNR -10.2 put it
    flow = schedules.flow()
    second = flow.log_snr(grids.logsnr(11)(flow)[1]).item()
    last = flow.log_snr(torch.tensor(flow.low, dtype=torch.float64)).item()
    assert second == pytest.approx(schedules.FAINT + (last - schedules.FAINT) / 10, rel=1e-6)


# --- parity ---------------------------------------------------------------------------------------

STEPS = [1, 2, 10, 50]


def peer(name: str, **config: Any) -> Any:
    """A scheduler of Stable Diffusion, whose alphas are those of float64: only they differ."""
    made = getattr(diffusers, name)(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **config
    )
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    made.alphas_cumprod = torch.cumprod(1 - betas, 0)
    return made


DDIM: dict[str, tuple[dict[str, Any], Any]] = {
    "leading": ({"timestep_spacing": "leading"}, grids.leading),
    "leading, offset 1": (
        {"timestep_spacing": "leading", "steps_offset": 1},
        lambda n: grids.leading(n, offset=1),
    ),
    "linspace": ({"timestep_spacing": "linspace"}, lambda n: grids.linear(n, whole=True)),
    "trailing": ({"timestep_spacing": "trailing"}, grids.trailing),
}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", DDIM)
def test_ddim_of_diffusers(name: str, steps: int) -> None:
    config, grid = DDIM[name]
    scheduler = peer("DDIMScheduler", **config)
    scheduler.set_timesteps(steps)
    if name == "linspace" and steps == 1:
        assert scheduler.timesteps.tolist() == [0]  # an even row of one number is its first: clean
        return
    assert indices(grid(steps)) == scheduler.timesteps.tolist()


# what diffusers has linear between entries: sigma where it reads sigmas at given times, and its
# logarithm where it finds the times of given sigmas
SIGMA, LOG = "sigma", "log_sigma"
EULER: dict[str, tuple[dict[str, Any], str, Any]] = {
    "linspace": ({"timestep_spacing": "linspace"}, SIGMA, grids.linear),
    "leading": (
        {"timestep_spacing": "leading", "steps_offset": 1},
        SIGMA,
        lambda n: grids.leading(n, offset=1),
    ),
    "trailing": ({"timestep_spacing": "trailing"}, SIGMA, grids.trailing),
    "karras": ({"use_karras_sigmas": True}, LOG, grids.karras),
    "exponential": ({"use_exponential_sigmas": True}, LOG, grids.logsnr),
    "beta": ({"use_beta_sigmas": True}, LOG, grids.beta),
}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", EULER)
def test_euler_of_diffusers(name: str, steps: int) -> None:
    config, between, grid = EULER[name]
    if steps == 1 and name != "leading":
        # as above: from its even row of one, which is clean, it would have the ends of the others
        config = {**config, "timestep_spacing": "trailing"}
    scheduler = peer("EulerDiscreteScheduler", **config)
    scheduler.set_timesteps(steps)
    schedule = schedules.scaled_linear(between=between)
    assert levels(grid(steps), schedule) == pytest.approx(scheduler.sigmas.tolist(), rel=1e-6)
    index = schedule.index(grid(steps)(schedule)[:-1])
    assert index.tolist() == pytest.approx(scheduler.timesteps.tolist(), rel=1e-6, abs=1e-4)


DPM: dict[str, tuple[dict[str, Any], str, Any]] = {
    "linspace": (
        {"timestep_spacing": "linspace"},
        SIGMA,
        lambda n: grids.sgm_uniform(n, whole=True),
    ),
    "linspace to sigma_min": (
        {"timestep_spacing": "linspace", "final_sigmas_type": "sigma_min"},
        SIGMA,
        lambda n: grids.linear(n, final="low", whole=True),
    ),
    "leading": (
        {"timestep_spacing": "leading", "steps_offset": 1},
        SIGMA,
        lambda n: grids.leading(n, offset=1, final="discard"),
    ),
    "leading to sigma_min": (
        {"timestep_spacing": "leading", "steps_offset": 1, "final_sigmas_type": "sigma_min"},
        SIGMA,
        lambda n: grids.leading(n, offset=1, final="discard_low"),
    ),
    "trailing": ({"timestep_spacing": "trailing"}, SIGMA, grids.trailing),
    "trailing to sigma_min": (
        {"timestep_spacing": "trailing", "final_sigmas_type": "sigma_min"},
        SIGMA,
        lambda n: grids.trailing(n, final="low"),
    ),
    "karras": ({"use_karras_sigmas": True}, LOG, grids.karras),
    "lu": ({"use_lu_lambdas": True}, LOG, grids.logsnr),
    "exponential": ({"use_exponential_sigmas": True}, LOG, grids.logsnr),
    "beta": ({"use_beta_sigmas": True}, LOG, grids.beta),
}
# how the times of these are made whole: the network is told them so, and sigma stays
WHOLE = {"karras": np.round, "lu": np.round, "exponential": np.trunc, "beta": np.trunc}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", DPM)
def test_dpm_solver_of_diffusers(name: str, steps: int) -> None:
    config, between, grid = DPM[name]
    scheduler = peer("DPMSolverMultistepScheduler", **config)
    scheduler.set_timesteps(steps)
    schedule = schedules.scaled_linear(between=between)
    assert levels(grid(steps), schedule) == pytest.approx(scheduler.sigmas.tolist(), rel=1e-6)
    index = schedule.index(grid(steps)(schedule)[:-1]).numpy()
    whole = WHOLE.get(name, lambda index: index)(index)
    assert whole.tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_of_diffusers(shift: float, steps: int) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    # its last time is shifted twice
    schedule = schedules.flow(shift, low=shift * 0.001 / (1 + (shift - 1) * 0.001))
    _, sigma = schedule(grids.linear(steps)(schedule))
    assert sigma.tolist() == pytest.approx(scheduler.sigmas.tolist(), rel=1e-6)


@pytest.fixture(scope="module")
def k_diffusion() -> Iterator[ModuleType]:
    """`k_diffusion.sampling` in float64, without what the package imports besides."""
    spec = find_spec("k_diffusion")
    assert spec is not None and spec.submodule_search_locations
    if "k_diffusion" not in sys.modules:
        package = ModuleType("k_diffusion")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["k_diffusion"] = package
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield import_module("k_diffusion.sampling")
    torch.set_default_dtype(before)


@pytest.mark.parametrize("steps", STEPS)
def test_k_diffusion(k_diffusion: ModuleType, steps: int) -> None:
    ends = {"sigma_min": 0.03, "sigma_max": 14.6}
    for schedule in (schedules.edm(), schedules.linear(), schedules.vp_linear()):
        for name, params in (
            ("karras", {"rho": 7.0}),
            ("karras", {"rho": 3.0}),
            ("exponential", {}),
            ("polyexponential", {"rho": 1.0}),
            ("polyexponential", {"rho": 2.0}),
        ):
            expected = getattr(k_diffusion, f"get_sigmas_{name}")(steps, **ends, **params).tolist()
            grid = grids.from_name(name, steps, **ends, **params)
            assert levels(grid, schedule) == pytest.approx(expected, rel=1e-10)
    expected = k_diffusion.get_sigmas_vp(steps).tolist()
    assert levels(grids.linear(steps), schedules.vp_linear()) == pytest.approx(expected, rel=1e-10)
