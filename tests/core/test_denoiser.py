"""Denoisers: predictions and their inverses, forms of the time, conditions, precision."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mdiff.core import Denoiser, denoiser, schedules
from mdiff.core.denoiser import Guided, from_x0, time_on, to_x0
from mdiff.core.errors import UsageError
from mdiff.core.schedules import Schedule, Time

SHAPES = [(4, 2, 9), (4, 2, 5, 3), (4, 1, 2, 3, 4)]
KINDS = list(denoiser.PREDICTS)


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["linear", "cosine", "ve", "subvp", "flow"])
@given(
    t=st.floats(0.01, 0.95),
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=20)
def test_what_the_data_and_noise_would_say_gives_the_data_back(
    kind: str, name: str, t: float, shape: tuple[int, ...], seed: int
) -> None:
    x0, eps = randn(*shape, seed=seed), randn(*shape, seed=seed + 1)
    time = schedules.from_name(name).at(t)
    x = time.alpha * x0 + time.sigma * eps
    # EDM: c_skip and c_out of x / alpha at the noise level sigma / alpha
    level, data = time.sigma / time.alpha, 0.5
    c_skip = data**2 / (level**2 + data**2)
    c_out = level * data / (level**2 + data**2) ** 0.5
    said = {
        "eps": eps,
        "v": time.alpha * eps - time.sigma * x0,
        "x0": x0,
        "score": -eps / time.sigma,
        "flow": eps - x0,
        "edm": (x0 - c_skip * x / time.alpha) / c_out,
    }[kind]
    near = {"rtol": 1e-9, "atol": 1e-9 * time.sigma / time.alpha}
    torch.testing.assert_close(to_x0(kind, said, x, time), x0, **near)
    torch.testing.assert_close(from_x0(kind, x0, x, time), said, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(from_x0(kind, to_x0(kind, said, x, time), x, time), said)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_time_per_sample_is_each_alone(kind: str, shape: tuple[int, ...]) -> None:
    schedule = schedules.linear()
    denoise = Denoiser(lambda x, t: x * 0.3, schedule, predicts=kind)
    x, t = randn(*shape), torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.float64)
    together = denoise(x, t).x0
    for k in range(4):
        torch.testing.assert_close(denoise(x[k : k + 1], t[k].item()).x0[0], together[k])


def told(time: str, schedule: Schedule, t: float) -> float:
    """What a network is told, of a batch of two in float32."""
    heard: list[Tensor] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        heard.append(t)
        return x

    Denoiser(net, schedule, time=time)(torch.zeros(2, 3), t)
    (row,) = heard
    assert row.shape == (2,) and row.dtype == torch.float32 and row[0] == row[1]
    return row[0].item()


def test_forms_of_the_time() -> None:
    table, exploding = schedules.linear(steps=4000), schedules.ve(0.01, 100.0)
    assert told("t", table, 0.25) == 0.25
    for i in (0, 1, 333, 2999, 3999):
        assert told("index", table, (i + 1) / 4000) == i
        assert told("index_scaled", table, (i + 1) / 4000) == i / 4
    assert told("index", table, 0.5 + 0.5 / 4000) == 1999.5
    assert told("sigma", exploding, 0.75) == pytest.approx(10.0)
    assert told("log_sigma/4", exploding, 0.75) == pytest.approx(math.log(10) / 4)
    assert told("index_rounded", table, 0.5 + 0.9 / 4000) == 2000
    assert told("flow", schedules.flow(3.0), 0.3) == pytest.approx(0.9 / 1.6)
    assert told("flow", exploding, 0.75) == pytest.approx(10 / 11)


def seen(denoise: Denoiser, x: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the network sees and is told, and the x0 that comes of its saying tanh(x)."""
    heard: list[Tensor] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        heard.extend([x, t])
        return torch.tanh(x)

    x0 = replace(denoise, net=net)(x, t).x0
    return heard[0], heard[1], x0


def test_preconditioning_of_edm() -> None:
    # the four columns of table 1 of Karras et al., 2022, where sigma is 3
    edm, sigma, x = schedules.edm(), 3.0, randn(2, 3, 4)
    t = edm.time(torch.tensor(-2 * math.log(sigma), dtype=torch.float64)).item()
    vp, table = schedules.vp_linear(), schedules.cosine_betas()

    def vp_time(sigma: float) -> float:
        # the inverse of sigma(t) = sqrt(exp(19.9 t^2 / 2 + 0.1 t) - 1)
        return (math.sqrt(0.1**2 + 2 * 19.9 * math.log(1 + sigma**2)) - 0.1) / 19.9

    in_vp, spread = 1 / math.sqrt(sigma**2 + 1), math.sqrt(sigma**2 + 0.5**2)
    columns = {
        "EDM": (
            Denoiser(torch.tanh, edm, predicts="edm", scale="edm", time="log_sigma/4"),
            (0.5**2 / spread**2, sigma * 0.5 / spread, 1 / spread, math.log(sigma) / 4),
        ),
        "VP": (
            Denoiser(torch.tanh, edm, scale="unit", time=time_on(vp)),
            (1.0, -sigma, in_vp, vp_time(sigma)),
        ),
        "iDDPM": (
            Denoiser(torch.tanh, edm, scale="unit", time=time_on(table, "index_rounded")),
            (
                1.0,
                -sigma,
                in_vp,
                round(table.index(table.time(torch.tensor(-2 * math.log(3))).item())),
            ),
        ),
        # with its output divided by sigma it is a score
        "VE": (
            Denoiser(torch.tanh, edm, predicts="score", time=lambda t, _: t.log_snr * 0),
            (1.0, sigma**2, 1.0, 0.0),
        ),
    }
    for denoise, (c_skip, c_out, c_in, c_noise) in columns.values():
        for at in (t, torch.tensor([t, t], dtype=torch.float64)):
            network, noise, x0 = seen(denoise, x, at)
            torch.testing.assert_close(network, c_in * x)
            assert noise.tolist() == pytest.approx([c_noise] * 2, rel=1e-6)
            torch.testing.assert_close(x0, c_skip * x + c_out * torch.tanh(c_in * x))


def test_a_network_runs_on_another_schedule_with_the_same_ratio() -> None:
    vp, x = schedules.vp_linear(), randn(2, 3, 4)
    home = Denoiser(torch.tanh, vp)
    away = replace(home, schedule=schedules.ve(), scale="unit", time=time_on(vp))
    level = vp.at(0.4)
    t = schedules.ve().time(torch.tensor(level.log_snr, dtype=torch.float64)).item()
    first, second = seen(home, level.alpha * x, 0.4), seen(away, x, t)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["zero_terminal", "flow", "cosine"])
def test_without_signal_eps_and_score_are_refused_and_the_others_work(kind: str, name: str) -> None:
    schedule, x = schedules.from_name(name), randn(2, 3, 4)
    denoise = Denoiser(lambda x, t: torch.tanh(x), schedule, predicts=kind)
    assert schedule.at(1.0).alpha < 1e-15
    for t in (1.0, torch.tensor([0.5, 1.0], dtype=torch.float64)):
        if name == "cosine":
            assert denoise(x, t).x0.shape == x.shape
        elif kind in ("eps", "score"):
            with pytest.raises(
                UsageError, match=rf"{kind} says nothing.*predicts v, x0 or the flow"
            ):
                denoise(x, t)
        else:
            assert torch.isfinite(denoise(x, t).x0).all()
    # clean data stays what it is
    assert kind == "x0" or torch.equal(denoise(x, 0.0).x0, x)
    if kind != "x0":
        with pytest.raises(UsageError, match="cannot be told from x0: alpha 1, sigma 0"):
            from_x0(kind, x, x, schedule.at(0.0))


def test_a_form_of_ones_own() -> None:
    def noise_level(time: Time, schedule: Schedule) -> float:
        return time.alpha

    denoise = Denoiser(lambda x, t: x * 0 + t[:, None], schedules.linear(), predicts="x0")
    own = Denoiser(denoise.net, denoise.schedule, predicts="x0", time=noise_level)
    assert own(torch.zeros(1, 2), 0.3).x0[0, 0] == pytest.approx(denoise.schedule.at(0.3).alpha)


class Shift(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(1, dtype=dtype))
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen += [x.dtype, t.dtype]
        return x + self.shift


def test_the_network_computes_in_its_own_type_and_x0_in_that_of_x() -> None:
    net = Shift(torch.bfloat16)
    denoise = Denoiser(net, schedules.linear(), predicts="v", time="index")
    assert denoise(torch.zeros(1, 3), 1.0).x0.dtype == torch.float32
    assert denoise(torch.zeros(1, 3, dtype=torch.float64), 1.0).x0.dtype == torch.float64
    # bfloat16 cannot count to a thousand: the time keeps its own type
    denoise(torch.zeros(1, 3, dtype=torch.bfloat16), 1.0)
    assert net.seen[::2] == [torch.bfloat16] * 3
    assert net.seen[1::2] == [torch.float32, torch.float64, torch.float32]
    assert denoise.device.type == "cpu"


def test_conditions_are_bound_by_keyword_and_spread_over_the_batch() -> None:
    def net(x: Tensor, t: Tensor, *, a: Tensor, b: float) -> Tensor:
        return x * 0 + a * b

    bare = Denoiser(net, schedules.linear(), predicts="x0")
    denoise = bare.bind(a=torch.tensor([[1.0], [2.0]])).bind(b=3.0)
    assert dict(bare.cond) == {}
    assert denoise(torch.zeros(2, 1), 0.5).x0.flatten().tolist() == [3, 6]
    assert denoise(torch.zeros(4, 1), 0.5).x0.flatten().tolist() == [3, 6, 3, 6]
    one = denoise.bind(a=torch.tensor([[5.0]]))
    assert one(torch.zeros(3, 1), 0.5).x0.flatten().tolist() == [15, 15, 15]
    with pytest.raises(UsageError, match="'a' has 2 rows.*batch of 3"):
        denoise(torch.zeros(3, 1), 0.5)


def test_learned_variance_is_split_off() -> None:
    def net(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([x, torch.full_like(x, -0.5)], dim=1)

    denoise = Denoiser(net, schedules.linear(), predicts="x0", learned_variance=True)
    said = denoise(torch.ones(2, 3, 4), 0.5)
    assert torch.equal(said.x0, torch.ones(2, 3, 4))
    assert said.variance_fraction is not None and (said.variance_fraction == 0.25).all()


def test_misuse_is_refused() -> None:
    table = schedules.linear()
    with pytest.raises(UsageError, match="'eps'"):
        Denoiser(Shift(torch.float32), table, predicts="epsilon")
    with pytest.raises(UsageError, match="'index'"):
        Denoiser(Shift(torch.float32), table, time="indexx")
    with pytest.raises(UsageError, match="'unit'"):
        Denoiser(Shift(torch.float32), table, scale="units")
    for time in ("index", "index_scaled"):
        with pytest.raises(UsageError, match="continuous"):
            Denoiser(Shift(torch.float32), schedules.cosine(), time=time)
    wide = Denoiser(lambda x, t: torch.cat([x, x], dim=1), table)
    with pytest.raises(UsageError, match="learned_variance"):
        wide(torch.zeros(1, 2, 3), 0.5)


def test_a_rule_over_a_denoiser_looks_like_a_denoiser() -> None:
    inner = Denoiser(lambda x, t, c: x * c, schedules.linear(), predicts="x0")

    def rule(inside: denoiser.Denoise, x: Tensor, t: Time) -> denoiser.Prediction:
        assert isinstance(t, Time)
        return inside(x + 1, t)

    guided = Guided(inner=inner, rule=rule).bind(c=torch.tensor([2.0]))
    assert guided.schedule is inner.schedule and guided.predicts == "x0"
    assert guided(torch.zeros(1, 1), 0.5).x0.item() == 2.0
