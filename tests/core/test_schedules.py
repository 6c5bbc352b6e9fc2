"""The laws of schedules, and their tables against products computed by numpy."""

import math

import diffusers
import numpy as np
import pytest
import torch

from mdiff.core import schedules
from mdiff.core.errors import UsageError

ALL = {
    "linear": schedules.linear(),
    "scaled_linear": schedules.scaled_linear(),
    "cosine_betas": schedules.cosine_betas(),
    "betas": schedules.betas([1e-4, 1e-3, 1e-2, 0.05, 0.2, 0.35]),
    "sigmoid_betas": schedules.sigmoid_betas(),
    "laplace_betas": schedules.laplace_betas(),
    "diffwave": schedules.diffwave(),
    "diffwave_fast": schedules.diffwave_fast(),
    "vp_linear": schedules.vp_linear(),
    "subvp": schedules.subvp(),
    "cosine": schedules.cosine(),
    "sigmoid": schedules.sigmoid(),
    "laplace": schedules.laplace(),
    "zero_terminal": schedules.zero_terminal(),
    "shifted": schedules.shifted(),
    "ve": schedules.ve(),
    "edm": schedules.edm(),
    "flow": schedules.flow(),
}
MORE = {
    "one beta": schedules.betas([0.6]),
    "linear in log sigma": schedules.scaled_linear(between="log_sigma"),
    "linear in sigma": schedules.linear(between="sigma"),
    "zero_terminal of vp": schedules.zero_terminal("vp_linear"),
    "zero_terminal of cosine": schedules.zero_terminal("cosine", high=1.0),
    "shifted table": schedules.shifted("cosine_betas", 4.0),
    "shifted back": schedules.shifted("vp_linear", 0.5),
    "shifted flow": schedules.flow(3.0),
    "steep sigmoid": schedules.sigmoid(0.0, 3.0, tau=0.3),
    "diffwave large": schedules.diffwave(0.02, 200),
}
EVERY = {**ALL, **MORE}
PRESERVING = [name for name in EVERY if name not in ("ve", "edm", "subvp", "flow", "shifted flow")]


assert_close = torch.testing.assert_close


def entries(schedule: schedules.Schedule) -> torch.Tensor:
    """The times of a table's entries."""
    return torch.arange(1, schedule.entries + 1, dtype=torch.float64) / schedule.entries


def inside(schedule: schedules.Schedule, n: int = 4001) -> torch.Tensor:
    return torch.linspace(schedule.low, schedule.high, n, dtype=torch.float64)


def test_every_named_schedule_is_tested_here() -> None:
    assert ALL.keys() == schedules.NAMES.keys()


@pytest.mark.parametrize("name", EVERY)
def test_snr_strictly_decreases(name: str) -> None:
    schedule = EVERY[name]
    t = torch.cat([inside(schedule), torch.linspace(0, schedule.low, 9)[1:-1].double()])
    log_snr = schedule.log_snr(t.unique())
    assert torch.isfinite(log_snr[:-1]).all()
    assert (log_snr.diff() < 0).all()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clean_data_at_zero_and_noise_at_one(name: str, dtype: torch.dtype) -> None:
    schedule = EVERY[name]
    alpha, sigma = schedule(torch.tensor([0.0, 1.0], dtype=dtype))
    assert alpha.dtype == sigma.dtype == dtype
    assert (alpha[0], sigma[0]) == (1.0, 0.0)
    assert torch.isfinite(alpha).all() and torch.isfinite(sigma).all()
    assert sigma[1] > 0.7 and schedule.log_snr(torch.zeros((), dtype=dtype)) == math.inf


@pytest.mark.parametrize("name", PRESERVING)
def test_variance_is_preserved(name: str) -> None:
    alpha, sigma = EVERY[name](torch.linspace(0, 1, 3001, dtype=torch.float64))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", EVERY)
def test_time_is_the_inverse_of_log_snr(name: str) -> None:
    schedule = EVERY[name]
    t = torch.cat([inside(schedule), inside(schedule, 9) * 0.3])
    torch.testing.assert_close(schedule.time(schedule.log_snr(t)), t, rtol=0, atol=1e-11)
    infinite = torch.tensor([math.inf, -math.inf], dtype=torch.float64)
    assert schedule.time(infinite).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("name", EVERY)
def test_shape_dtype_and_argument_are_kept(name: str) -> None:
    t = torch.rand(2, 3, generator=torch.Generator().manual_seed(0))
    before = t.clone()
    alpha, sigma = EVERY[name](t)
    assert alpha.shape == sigma.shape == EVERY[name].log_snr(t).shape == t.shape
    assert alpha.dtype == torch.float32 and torch.equal(t, before)


def cosine_table(steps: int) -> np.ndarray:
    def bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - bar((i + 1) / steps) / bar(i / steps), 0.999) for i in range(steps)])


TABLES = {
    "linear": np.linspace(1e-4, 0.02, 1000),
    "scaled_linear": np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2,
    "cosine_betas": cosine_table(1000),
    "betas": np.array([1e-4, 1e-3, 1e-2, 0.05, 0.2, 0.35]),
    "sigmoid_betas": 1e-4 + 0.0199 / (1 + np.exp(-np.linspace(-6, 6, 1000))),
    "diffwave": np.linspace(1e-4, 0.05, 50),
    "diffwave_fast": np.array([1e-4, 1e-3, 1e-2, 0.05, 0.2, 0.5]),
    "one beta": np.array([0.6]),
    "linear in log sigma": np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2,
    "linear in sigma": np.linspace(1e-4, 0.02, 1000),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tables_are_exact_at_their_entries(name: str, dtype: torch.dtype) -> None:
    bar = np.cumprod(1 - TABLES[name])
    steps = len(bar)
    assert EVERY[name].steps == steps
    t = (torch.arange(1, steps + 1, dtype=torch.float64) / steps).to(dtype)
    alpha, sigma = EVERY[name](t)
    rtol = 1e-7 if dtype == torch.float32 else 1e-11
    np.testing.assert_allclose(alpha.numpy(), np.sqrt(bar), rtol=rtol)
    np.testing.assert_allclose(sigma.numpy(), np.sqrt(1 - bar), rtol=rtol)
    assert EVERY[name].index(t).tolist() == list(range(steps))
    assert [EVERY[name].index((i + 1) / steps) for i in range(steps)] == list(range(steps))


def test_published_ends_of_the_tables() -> None:
    # sigma / alpha at the last entry: 157.4 (DDPM), 20291 (Improved DDPM), 14.61 (latent diffusion)
    ends = {name: EVERY[name].at(1.0) for name in ("linear", "cosine_betas", "scaled_linear")}
    ratio = {name: end.sigma / end.alpha for name, end in ends.items()}
    assert ratio["linear"] == pytest.approx(157.4, abs=0.05)
    assert ratio["cosine_betas"] == pytest.approx(20291, abs=1)
    assert ratio["scaled_linear"] == pytest.approx(14.6146, abs=1e-3)


PEER = {
    "linear": {"beta_schedule": "linear"},
    "scaled_linear": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
    },
    "cosine_betas": {"beta_schedule": "squaredcos_cap_v2"},
    "sigmoid_betas": {"beta_schedule": "sigmoid"},
    "laplace_betas": {"beta_schedule": "laplace"},
}


@pytest.mark.parametrize("name", PEER)
def test_tables_against_diffusers(name: str) -> None:
    peer = diffusers.DDPMScheduler(**PEER[name])
    alpha, _ = EVERY[name](entries(EVERY[name]))
    # diffusers holds its betas, and multiplies them up, in float32
    exact = torch.cumprod(1 - peer.betas.double(), 0)
    assert_close(alpha**2, exact, rtol=2e-4 if "betas" in name else 5e-6, atol=1e-9)
    assert_close(alpha**2, peer.alphas_cumprod.double(), rtol=2e-4, atol=1e-9)


def test_zero_terminal_against_diffusers() -> None:
    schedule = schedules.zero_terminal("scaled_linear")
    alpha, sigma = schedule(entries(schedule))
    config = {**PEER["scaled_linear"], "rescale_betas_zero_snr": True}
    peer = diffusers.DDIMScheduler(**config).alphas_cumprod.double()
    assert_close(alpha, peer.sqrt(), rtol=0, atol=2e-6)
    plain = EVERY["scaled_linear"](entries(schedule))[0]
    # algorithm 1 of Lin et al., in float64
    expected = (plain - plain[-1]) * plain[0] / (plain[0] - plain[-1])
    assert_close(alpha, expected, rtol=1e-12, atol=1e-15)
    assert alpha[-1] == 0 and sigma[-1] == 1 and alpha[0] == plain[0]
    assert schedule.log_snr(torch.ones(())) == -math.inf
    with pytest.raises(UsageError, match="preserves variance, not ve"):
        schedules.zero_terminal(schedules.ve())


@pytest.mark.parametrize("factor", [0.25, 1.0, 4.0])
def test_a_shift_takes_as_much_off_log_snr_everywhere(factor: float) -> None:
    base = schedules.cosine()
    schedule = schedules.shifted(base, factor)
    t = inside(schedule)
    assert_close(schedule.log_snr(t), base.log_snr(t) - 2 * math.log(factor), rtol=0, atol=1e-9)
    assert schedule(torch.zeros(())) == (1, 0)
    # averaging factor^2 numbers that say the same undoes it
    alpha, sigma = schedule(t)
    assert_close(alpha / (sigma / factor), base(t)[0] / base(t)[1], rtol=1e-9, atol=0)
    for wrong in (0.0, -1.0, math.inf):
        with pytest.raises(UsageError, match="a factor above 0"):
            schedules.shifted(base, wrong)
    with pytest.raises(
        UsageError, match="shifted takes a schedule that preserves variance, not ve"
    ):
        schedules.shifted(schedules.ve())


@pytest.mark.parametrize("between", ["sigma", "log_sigma"])
def test_between_entries_as_diffusers_and_k_diffusion_have_it(between: str) -> None:
    schedule = schedules.scaled_linear(between=between)
    bar = np.cumprod(1 - TABLES["scaled_linear"])
    heights = np.sqrt((1 - bar) / bar)
    index = np.linspace(0, 999, 713)
    alpha, sigma = schedule(torch.from_numpy((index + 1) / 1000))
    if between == "sigma":
        expected = np.interp(index, np.arange(1000), heights)
    else:
        expected = np.exp(np.interp(index, np.arange(1000), np.log(heights)))
    np.testing.assert_allclose(sigma / alpha, expected, rtol=1e-11)


def test_a_table_is_linear_in_log_alpha_between_entries() -> None:
    schedule = ALL["betas"]
    ends = [schedule.at(2 / 6).alpha, schedule.at(3 / 6).alpha]
    assert schedule.at(2.25 / 6).alpha == pytest.approx(
        ends[0] ** 0.75 * ends[1] ** 0.25, rel=1e-12
    )


def test_continuous_forms_at_hand_checked_points() -> None:
    # integral of 0.1 + 19.9 t over [0, 1/2] is 2.5375
    assert schedules.vp_linear().at(0.5).alpha == pytest.approx(math.exp(-2.5375 / 2), rel=1e-13)
    expected = math.cos(0.508 / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)
    assert schedules.cosine().at(0.5).alpha == pytest.approx(expected, rel=1e-13)
    assert schedules.ve(0.01, 100).at(0.5).sigma == pytest.approx(1.0, rel=1e-13)
    assert schedules.ve(0.01, 100).at(0.5).alpha == 1.0
    vp, subvp = schedules.vp_linear().at(0.5), schedules.subvp().at(0.5)
    assert subvp.alpha == vp.alpha and subvp.sigma == pytest.approx(vp.sigma**2, rel=1e-14)
    # by symmetry half of the variance is signal in the middle
    assert schedules.sigmoid().at(0.5).alpha == pytest.approx(0.5**0.5, rel=1e-13)
    lower, upper = (1 / (1 + math.exp(-u)) for u in (-3.0, 3.0))
    quarter = (upper - 1 / (1 + math.exp(1.5))) / (upper - lower)
    assert schedules.sigmoid().at(0.25).alpha == pytest.approx(quarter**0.5, rel=1e-13)
    # a quarter of Laplace(0, 1/2) lies above ln(2) / 2
    assert schedules.laplace().at(0.25).log_snr == pytest.approx(math.log(2) / 2, rel=1e-13)
    assert schedules.laplace(1.0).at(0.75).log_snr == pytest.approx(1 - math.log(2) / 2, rel=1e-12)
    assert schedules.edm().at(0.25).sigma == 20.0
    assert schedules.edm().at(schedules.edm().low).sigma == pytest.approx(0.002, rel=1e-14)
    flow, shifted = schedules.flow().at(0.3), schedules.flow(3.0).at(0.3)
    assert (flow.alpha, flow.sigma) == (0.7, 0.3)
    assert shifted.sigma == pytest.approx(0.9 / 1.6, rel=1e-14)
    assert shifted.alpha == pytest.approx(0.7 / 1.6, rel=1e-14)


@pytest.mark.parametrize("name", ["sigmoid", "laplace"])
def test_networks_stop_where_the_signal_is_faint(name: str) -> None:
    schedule = EVERY[name]
    assert schedule.at(schedule.high).log_snr == pytest.approx(schedules.FAINT, rel=1e-6)
    assert schedules.from_name(name, high=1.0).high == 1.0
    assert schedule.at(1.0).alpha == 0.0


def test_the_shift_of_a_flow_against_diffusers() -> None:
    peer = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    t = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    assert_close(schedules.flow(3.0)(t)[1], peer.sigmas.double(), rtol=1e-6, atol=0)


def test_at_gives_floats_or_tensors() -> None:
    schedule = ALL["linear"]
    time = schedule.at(0.25)
    assert all(type(entry) is float for entry in time) and schedule.at(time) is time
    many = schedule.at(torch.tensor([0.25, 0.5]))
    for entry, one in zip(many, time, strict=True):
        assert entry.dtype == torch.float64 and entry[0].item() == pytest.approx(one, rel=1e-12)


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4), (2, 2, 3, 4)])
def test_diffuse_takes_one_time_per_sample_on_any_axes(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, z = (torch.randn(3, *shape, generator=generator) for _ in range(2))
    t = torch.tensor([0.1, 0.5, 0.9])
    x = ALL["cosine"].diffuse(x0, t, z)
    for k in range(3):
        at = ALL["cosine"].at(t[k].item())
        torch.testing.assert_close(x[k], at.alpha * x0[k] + at.sigma * z[k])


def test_pad_keeps_dtype_and_adds_axes() -> None:
    x = torch.zeros(2, 3, 4, 5)
    padded = schedules.pad(torch.tensor([1.0, 2.0], dtype=torch.float64), x)
    assert padded.shape == (2, 1, 1, 1) and padded.dtype == x.dtype


def test_names_and_parameters_are_checked() -> None:
    assert schedules.from_name("linear", steps=50).steps == 50
    with pytest.raises(UsageError, match="'cosine'"):
        schedules.from_name("cosin")
    with pytest.raises(UsageError, match="beta_first.*linear"):
        schedules.from_name("linear", beta_first=1e-4)


@pytest.mark.parametrize("table", [[], [0.1, 0.0], [0.1, 1.0], [float("nan")], [[0.1]]])
def test_impossible_betas_are_refused(table: list) -> None:
    with pytest.raises(UsageError, match="above 0 and below 1"):
        schedules.betas(table)


def test_an_unknown_interpolation_is_refused() -> None:
    with pytest.raises(UsageError, match="'log_sigma'"):
        schedules.linear(between="logsigma")


def test_a_continuous_schedule_has_no_index() -> None:
    with pytest.raises(UsageError, match="continuous"):
        schedules.cosine().index(0.5)


def test_the_slope_at_an_entry_of_a_table_is_that_of_its_beta() -> None:
    schedule = schedules.linear()
    t = torch.tensor([0.001, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    alpha, _ = schedule.kernel(t)
    (slope,) = torch.autograd.grad(alpha.log().sum(), t)
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)[[0, 499, 999]]
    torch.testing.assert_close(slope, torch.log1p(-beta) * 1000 / 2)
