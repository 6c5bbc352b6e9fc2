"""Posterior guidance and RePaint: exact where they say so, biased as they say elsewhere.

The data is a correlated normal, whose posterior given a linear measurement is known. A deterministic
sampler makes of it an affine map of the noise at the start, so that the moments of its samples come
from one run on a basis, without an error of sampling.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import RePaintScheduler
from diffusers.schedulers import scheduling_repaint
from torch import Tensor

from mdiff.core import grids, guidance, noise, operators, sample, schedules, steps
from mdiff.core.analytic import Correlated, Gaussian
from mdiff.core.denoiser import Denoise, Denoiser
from mdiff.core.errors import UsageError
from mdiff.core.noise import Noise
from mdiff.core.operators import Linear
from mdiff.core.samplers import DDIM, DDPM, Heun, Sampler
from mdiff.core.samplers.cfgpp import CFGpp
from mdiff.core.samplers.repaint import RePaint
from mdiff.core.schedules import Schedule, Time

SHAPES = [(1, 12), (2, 2, 3), (1, 2, 2, 3)]
SCHEDULE = schedules.vp_linear()
N = 12


def covariance() -> Tensor:
    place = torch.arange(N, dtype=torch.float64)
    c = 0.95 * torch.exp(-(place[:, None] - place).abs() / 4)
    return c + 0.05 * torch.eye(N, dtype=torch.float64)


DATA = Correlated(
    schedule=SCHEDULE, covariance=covariance(), mean=torch.linspace(-0.5, 0.5, N).double()
)
TRUTH = torch.linspace(1.5, -1.0, N, dtype=torch.float64)
KNOWN = torch.arange(N) < 5


def first_known(shape: tuple[int, ...]) -> Linear:
    return operators.mask(KNOWN.reshape(1, *shape))


OPERATORS: dict[str, Callable[[tuple[int, ...]], Linear]] = {
    "mask": first_known,
    "crop": lambda shape: operators.crop([None] * (len(shape) - 2) + [(0, 2)]),
    "downsample": lambda shape: (
        operators.downsample([1] * (len(shape) - 2) + [shape[-1] // 2 or 1])
        if shape[-1] % 2 == 0
        else operators.downsample([1] * (len(shape) - 2) + [shape[-1]])
    ),
    "blur": lambda shape: operators.blur([0.4] * (len(shape) - 1)),
    "channel_mix": lambda shape: operators.channel_mix([[0.5] + [1.0] * (shape[0] - 1)]),
    "compose": lambda shape: operators.compose(
        operators.blur([0.5] * (len(shape) - 1)),
        operators.crop([None] * (len(shape) - 2) + [(0, 2)]),
    ),
}


METHODS: dict[str, Callable[..., Denoise]] = {
    name: guidance.NAMES[name]
    for name in ("replacement", "pseudo_inverse", "reconstruction", "dps")
}


def dense(operator: Linear, shape: tuple[int, ...]) -> Tensor:
    return operator(torch.eye(N, dtype=torch.float64).reshape(N, *shape)).flatten(1).T


def exact(
    data: Correlated, operator: Linear, y: Tensor, shape: tuple[int, ...], std: float
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of x_0 given y."""
    a, y = dense(operator, shape), y.flatten()
    made = a.abs().sum(1) > 0
    return data.posterior(a[made], y[made], std)


def best_solve(
    data: Correlated, operator: Linear, shape: tuple[int, ...], std: float
) -> Callable[[Tensor, Time[Any]], Tensor]:
    """(A C_t A^T + std^2)^+ with the true covariance of x_0 given x_t."""
    a = dense(operator, shape)
    noises = std**2 * torch.eye(len(a), dtype=torch.float64)

    def solve(residual: Tensor, t: Time[Any]) -> Tensor:
        inverse = torch.linalg.pinv(a @ data.given(t) @ a.T + noises, rtol=1e-11, hermitian=True)
        return (residual.flatten(1) @ inverse).reshape(residual.shape)

    return solve


def along(schedule: Schedule, grid: grids.Grid) -> list[Time[float]]:
    at = schedule.at(grid(schedule))
    return [Time(*row) for row in zip(*(entry.tolist() for entry in at), strict=True)]


class Stream:
    """Normal numbers in float64 from one generator, as a `Noise`."""

    def __init__(self, rows: int, shape: tuple[int, ...]) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.shape = (rows, *shape)

    def draw(self, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.randn(self.shape, generator=self.generator, dtype=torch.float64)

    def between(self, t: Any, s: Any, device: Any = None, dtype: Any = None) -> Tensor:
        return self.draw()


def run(
    denoise: Denoise, x: Tensor, sampler: Sampler, grid: grids.Grid, stream: Any = None
) -> Tensor:
    state: Any = {}
    with torch.no_grad():
        for t, s in pairwise(along(denoise.schedule, grid)):
            x, state = sampler.step(denoise, x, t, s, state, cast(Noise, stream))
    return x


def moments(
    denoise: Denoise, shape: tuple[int, ...], grid: grids.Grid | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of what Heun's method makes, if it is affine in the start."""
    grid = grid or grids.karras(60)
    starts = torch.cat([torch.zeros(1, N), torch.eye(N)]).double().reshape(N + 1, *shape)
    starts = starts * max(1.0, along(denoise.schedule, grid)[0].sigma)
    ends = run(denoise, starts, Heun(), grid).flatten(1)
    map_ = (ends[1:] - ends[0]).T
    return ends[0], map_ @ map_.T


def sampled(
    denoise: Denoise, shape: tuple[int, ...], sampler: Sampler, grid: grids.Grid, rows: int = 2000
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of samples."""
    stream = Stream(rows, shape)
    x = run(denoise, stream.draw(), sampler, grid, stream).flatten(1)
    return x.mean(0), x.T.cov()


# --- exact ----------------------------------------------------------------------------------------

cases = pytest.mark.parametrize(
    ("name", "shape"), [(name, shape) for name in OPERATORS for shape in SHAPES]
)


@cases
@pytest.mark.parametrize("std", [0.0, 0.3])
def test_pseudo_inverse_with_the_true_covariance_is_the_posterior_mean(
    name: str, shape: tuple[int, ...], std: float
) -> None:
    operator = OPERATORS[name](shape)
    y = operator(TRUTH.reshape(1, *shape))
    solve = best_solve(DATA, operator, shape, std)
    guided = guidance.pseudo_inverse(DATA, operator, y, noise=std, solve=solve)
    x = Stream(2, shape).draw()
    a, t = dense(operator, shape), SCHEDULE.at(0.5)
    # given x_t, x_0 is normal around what the denoiser says: a prior to be updated with y
    rest = y.flatten() - DATA(x, t).x0.flatten(1) @ a.T
    gain = DATA.given(t) @ a.T
    wanted = DATA(x, t).x0 + (solve(rest, t) @ gain.T).reshape(x.shape)
    torch.testing.assert_close(guided(x, t).x0, wanted, rtol=1e-8, atol=1e-8)


@cases
def test_exact_guidance_samples_the_posterior(name: str, shape: tuple[int, ...]) -> None:
    std = 0.2
    operator = OPERATORS[name](shape)
    y = operator(TRUTH.reshape(1, *shape))
    mean, cov = exact(DATA, operator, y, shape, std)
    solve = best_solve(DATA, operator, shape, std)
    guided = guidance.pseudo_inverse(DATA, operator, y, noise=std, solve=solve)
    found_mean, found_cov = moments(guided, shape)
    torch.testing.assert_close(found_mean, mean, rtol=0, atol=0.01)
    torch.testing.assert_close(found_cov, cov, rtol=0, atol=0.02)


OTHERS = {
    "linear": schedules.linear(),
    "cosine": schedules.cosine(),
    "subvp": schedules.subvp(),
    "ve": schedules.ve(),
    "edm": schedules.edm(),
    "flow": schedules.flow(),
}


@pytest.mark.parametrize("schedule", OTHERS.values(), ids=OTHERS)
def test_exact_guidance_on_every_kind_of_schedule(schedule: Schedule) -> None:
    shape = (2, 2, 3)
    data = Correlated(schedule=schedule, covariance=DATA.covariance)
    operator = first_known(shape)
    y = operator(TRUTH.reshape(1, *shape))
    mean, cov = exact(data, operator, y, shape, 0.2)
    solve = best_solve(data, operator, shape, 0.2)
    guided = guidance.pseudo_inverse(data, operator, y, noise=0.2, solve=solve)
    # where nothing is left of the signal no gradient says anything
    grid = grids.truncate(grids.logsnr(80), min(schedule.high, 0.9999))
    found_mean, found_cov = moments(guided, shape, grid)
    torch.testing.assert_close(found_mean, mean, rtol=0, atol=0.02)
    torch.testing.assert_close(found_cov, cov, rtol=0, atol=0.03)


@pytest.mark.parametrize("schedule", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("shape", [(3, 8), (3, 4, 6), (3, 4, 2, 6)])
def test_every_method_on_every_kind_of_schedule_stays_finite(
    schedule: Schedule, shape: tuple[int, ...]
) -> None:
    half = operators.downsample([2] * (len(shape) - 1))
    y = half(torch.ones(1, *shape))
    denoise = Gaussian(schedule=schedule, std=0.5)
    grid = grids.truncate(grids.karras(8), min(schedule.high, 0.9999))
    for name, method in METHODS.items():
        guided = method(denoise, half, y, **({"scale": 0.01} if name == "dps" else {}))
        x = sample(guided, noise.from_seeds([0, 1], shape), sampler="dpmpp_2m", grid=grid)
        assert x.dtype == torch.float32 and x.isfinite().all() and x.abs().max() < 10
        near = (half(x) - y).abs().max()
        assert near < {"replacement": 1e-4, "pseudo_inverse": 0.3}.get(name, math.inf)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("std", [0.0, 0.3])
def test_pseudo_inverse_as_it_is_is_exact_for_white_data(
    shape: tuple[int, ...], std: float
) -> None:
    white = Correlated(schedule=SCHEDULE, covariance=0.49 * torch.eye(N, dtype=torch.float64))
    # composed operators solve by iteration, which takes its time
    for name in ("downsample", "blur", *(["compose"] if std > 0 else [])):
        operator = OPERATORS[name](shape)
        y = operator(TRUTH.reshape(1, *shape))
        mean, cov = exact(white, operator, y, shape, max(std, 1e-6))
        plain = Gaussian(schedule=SCHEDULE, std=0.7)
        guided = guidance.pseudo_inverse(plain, operator, y, noise=std, std=0.7)
        found_mean, found_cov = moments(guided, shape, grids.karras(40))
        torch.testing.assert_close(found_mean, mean, rtol=0, atol=0.02)
        torch.testing.assert_close(found_cov, cov, rtol=0, atol=0.02)


def test_samples_have_the_posterior_moments_within_their_error() -> None:
    shape, rows = (1, 12), 3000
    operator = operators.downsample([3])
    y = operator(TRUTH.reshape(1, *shape))
    mean, cov = exact(DATA, operator, y, shape, 0.2)
    solve = best_solve(DATA, operator, shape, 0.2)
    guided = guidance.pseudo_inverse(DATA, operator, y, noise=0.2, solve=solve)
    for sampler, grid in ((Heun(), grids.karras(60)), (DDIM(eta=1.0), grids.logsnr(250))):
        found_mean, found_cov = sampled(guided, shape, sampler, grid, rows)
        variance = cov.diagonal()
        assert ((found_mean - mean).abs() < 5 * (variance / rows).sqrt()).all()
        assert ((found_cov.diagonal() / variance - 1).abs() < 5 * math.sqrt(2 / rows)).all()


# --- biased, as documented ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_replacement_obeys_the_measurement_and_spreads_it_too_little(
    shape: tuple[int, ...],
) -> None:
    operator = first_known(shape)
    y = operator(TRUTH.reshape(1, *shape))
    mean, cov = exact(DATA, operator, y, shape, 0.0)
    found_mean, found_cov = moments(guidance.replacement(DATA, operator, y), shape)
    torch.testing.assert_close(found_mean[KNOWN], TRUTH[KNOWN], rtol=0, atol=1e-9)
    assert found_cov.diagonal()[KNOWN].max() < 1e-9
    # next to the known part: between what is known without y and what should be known with it
    prior = DATA.mean
    assert prior is not None
    learned = ((found_mean - prior) / (mean - prior))[~KNOWN][:3]
    assert (learned > 0.1).all() and (learned < 0.75).all()
    variance, wanted = found_cov.diagonal()[~KNOWN], cov.diagonal()[~KNOWN]
    assert (variance[:3] > 1.1 * wanted[:3]).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_repaint_repairs_the_mean_of_replacement(shape: tuple[int, ...]) -> None:
    operator = first_known(shape)
    y = operator(TRUTH.reshape(1, *shape))
    mean, _ = exact(DATA, operator, y, shape, 0.0)
    off = []
    for repeats in (1, 6):
        sampler = RePaint(operator=operator, measurement=y, repeats=repeats)
        found_mean, _ = sampled(DATA, shape, sampler, grids.linear(60), 1500)
        torch.testing.assert_close(found_mean[KNOWN], TRUTH[KNOWN], rtol=0, atol=1e-9)
        off.append((found_mean - mean)[~KNOWN][:3].abs().mean().item())
    assert off[1] < 0.5 * off[0]
    assert off[0] > 0.07 and off[1] < 0.05


@pytest.mark.parametrize("shape", SHAPES)
def test_pseudo_inverse_takes_correlated_data_for_white(shape: tuple[int, ...]) -> None:
    # the Jacobian spreads what is known, and white weights count agreeing entries twice
    operator = first_known(shape)
    y = operator(TRUTH.reshape(1, *shape))
    mean, cov = exact(DATA, operator, y, shape, 0.0)
    found_mean, found_cov = moments(guidance.pseudo_inverse(DATA, operator, y), shape)
    torch.testing.assert_close(found_mean[KNOWN], TRUTH[KNOWN], rtol=0, atol=0.01)
    unknown = ~KNOWN
    assert (found_mean - mean)[unknown].abs().max() > 0.1
    torch.testing.assert_close(
        found_cov.diagonal()[unknown], cov.diagonal()[unknown], rtol=0.1, atol=0
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_reconstruction_leaves_too_much_variance_and_replacement_around_it_less(
    shape: tuple[int, ...],
) -> None:
    operator = first_known(shape)
    y = operator(TRUTH.reshape(1, *shape))
    mean, cov = exact(DATA, operator, y, shape, 0.0)
    weak = guidance.reconstruction(DATA, operator, y)
    _, found_cov = moments(weak, shape)
    variance, wanted = found_cov.diagonal()[~KNOWN], cov.diagonal()[~KNOWN]
    assert (variance[:2] > 1.1 * wanted[:2]).all()
    # as in the paper: stronger, and the known part replaced
    strong = guidance.replacement(guidance.reconstruction(DATA, operator, y, 3.0), operator, y)
    better_mean, better_cov = moments(strong, shape)
    only_replaced, _ = moments(guidance.replacement(DATA, operator, y), shape)
    off, plain = ((m - mean)[~KNOWN][:3].abs().mean() for m in (better_mean, only_replaced))
    assert off < 0.5 * plain
    assert better_cov.diagonal()[KNOWN].max() < 1e-9


@pytest.mark.parametrize("shape", SHAPES)
def test_dps_moves_the_mean_and_its_variance_is_its_own(shape: tuple[int, ...]) -> None:
    operator = first_known(shape)
    y = operator(TRUTH.reshape(1, *shape))
    _, cov = exact(DATA, operator, y, shape, 0.0)
    grid = grids.linear(150)
    spread = []
    for scale in (0.02, 0.1):
        guided = guidance.dps(DATA, operator, y, scale, grid=grid)
        found_mean, found_cov = sampled(guided, shape, DDPM(), grid, 1500)
        spread.append(found_cov.diagonal()[~KNOWN][:2] / cov.diagonal()[~KNOWN][:2])
    torch.testing.assert_close(found_mean[KNOWN], TRUTH[KNOWN], rtol=0, atol=0.1)
    # too wide where it is weak, too narrow where it is strong: a scale chosen by hand
    assert (spread[0] > 1.1).all() and (spread[1] < 0.95).all()


# --- what the papers' algorithms do ---------------------------------------------------------------


def net(x: Tensor, t: Any) -> Tensor:
    return torch.tanh(x) * 0.7 + 0.1 * x


TABLE = schedules.linear(1e-3, 0.2, 20)


@pytest.mark.parametrize("shape", [(3, 8), (3, 4, 6), (3, 4, 2, 6)])
def test_dps_is_algorithm_1(shape: tuple[int, ...]) -> None:
    """Chung et al., 2023, alg. 1, with the step size of the norm; A need not be linear."""
    denoise = Denoiser(net, TABLE)
    half = operators.downsample([2] * (len(shape) - 1))

    def measure(x: Tensor) -> Tensor:
        return torch.sin(half(x))

    y = measure(torch.ones(1, *shape).double())
    grid = grids.leading(20)
    found = run(
        guidance.dps(denoise, measure, y, 0.4, grid=grid),
        (start := Stream(2, shape).draw()),
        DDPM(),
        grid,
        Stream(2, shape),
    )
    betas = torch.linspace(1e-3, 0.2, 20, dtype=torch.float64)
    bars = torch.cumprod(1 - betas, 0)
    x, stream = start, Stream(2, shape)
    for i in reversed(range(20)):
        bar, before = bars[i], bars[i - 1] if i else torch.tensor(1.0)
        x = x.requires_grad_()
        x0 = (x - (1 - bar).sqrt() * net(x, None)) / bar.sqrt()
        norms = torch.stack([(y[0] - m).square().sum().sqrt() for m in measure(x0)])
        (slope,) = torch.autograd.grad(norms.sum(), x)
        x, x0 = x.detach(), x0.detach()
        mean = ((1 - betas[i]).sqrt() * (1 - before) * x + before.sqrt() * betas[i] * x0) / (
            1 - bar
        )
        std = ((1 - before) / (1 - bar) * betas[i]).sqrt()
        x = mean + (std * stream.draw() if i else 0) - 0.4 * slope
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)


def test_dps_without_a_grid_is_that_of_a_thousand_steps() -> None:
    table = schedules.linear()
    denoise, shape = Denoiser(net, table), (3, 8)
    operator = operators.downsample([2])
    y, x = torch.zeros(1, 3, 4), Stream(2, shape).draw()
    free = guidance.dps(denoise, operator, y)
    bound = guidance.dps(denoise, operator, y, grid=grids.leading(1000))
    for t in (0.001, 0.5, 1.0):
        torch.testing.assert_close(free(x, t).x0, bound(x, t).x0)


@pytest.mark.parametrize("shape", [(3, 8), (3, 4, 6), (3, 4, 2, 6)])
def test_reconstruction_is_equation_7(shape: tuple[int, ...]) -> None:
    denoise, x = Denoiser(net, TABLE), Stream(2, shape).draw()
    operator = operators.downsample([2] * (len(shape) - 1))
    y = operator(torch.ones(2, *shape).double())
    t = TABLE.at(0.5)
    at = x.clone().requires_grad_()
    x0 = denoise(at, t).x0
    (slope,) = torch.autograd.grad((y - operator(x0)).square().sum(), at)
    wanted = x0.detach() - 5.0 * t.alpha / 2 * slope
    found = guidance.reconstruction(denoise, operator, y, 5.0)(x, t).x0
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("shape", [(3, 8), (3, 4, 6), (3, 4, 2, 6)])
def test_pseudo_inverse_is_the_papers(shape: tuple[int, ...]) -> None:
    # without noise the paper's gradient is that of (A^+ y - A^+ A x0)^T x0, over r^2
    denoise, x = Denoiser(net, TABLE), Stream(2, shape).draw()
    operator = operators.downsample([2] * (len(shape) - 1))
    y = operator(torch.ones(2, *shape).double())
    t = TABLE.at(0.5)
    at = x.clone().requires_grad_()
    x0 = denoise(at, t).x0
    vector = operator.pinv(y, x0) - operator.pinv(operator(x0), x0)
    (slope,) = torch.autograd.grad((vector.detach() * x0).sum(), at)
    r2 = t.sigma**2 / (t.alpha**2 + t.sigma**2)
    wanted = x0.detach() + t.sigma**2 / t.alpha / r2 * slope
    torch.testing.assert_close(guidance.pseudo_inverse(denoise, operator, y)(x, t).x0, wanted)


@pytest.mark.parametrize("shape", [(3, 8), (3, 4, 6), (3, 4, 2, 6)])
def test_replacement_pastes_what_is_known(shape: tuple[int, ...]) -> None:
    denoise, x = Denoiser(net, TABLE), Stream(2, shape).draw()
    known = torch.rand(1, *shape, generator=torch.Generator().manual_seed(2)) < 0.5
    y = torch.where(known, 0.3, torch.nan)
    said = denoise(x, 0.5).x0
    found = guidance.replacement(denoise, operators.mask(known), y)(x, 0.5).x0
    torch.testing.assert_close(found, torch.where(known, 0.3, said))
    # of a blurred or smaller picture: consistent with it, and as said in all that it does not show
    operator = operators.downsample([2] * (len(shape) - 1))
    small = operator(torch.ones(1, *shape).double())
    found = guidance.replacement(denoise, operator, small)(x, 0.5).x0
    torch.testing.assert_close(operator(found), small.expand(2, *small.shape[1:]))
    hidden = [v - operator.pinv(operator(v), v) for v in (found, said)]
    torch.testing.assert_close(*hidden)


# --- RePaint --------------------------------------------------------------------------------------


class Told:
    """A stream that draws what it is told."""

    def __init__(self, draws: Iterator[Tensor]) -> None:
        self.draws = draws

    def draw(self, device: Any = None, dtype: Any = None) -> Tensor:
        return next(self.draws).clone()


def diffusers_repaint(
    x: Tensor,
    known: Tensor,
    y: Tensor,
    draws: Iterator[Tensor],
    monkeypatch: pytest.MonkeyPatch,
    *,
    steps: int,
    length: int,
    repeats: int,
    clip: bool,
) -> Tensor:
    """The loop of diffusers' RePaintPipeline, in which one draw serves all of a way back."""
    betas = np.linspace(1e-3, 0.2, 20)
    scheduler = RePaintScheduler(num_train_timesteps=20, trained_betas=betas, clip_sample=clip)
    scheduler.set_timesteps(steps, jump_length=length, jump_n_sample=repeats)
    drawn: list[Tensor] = []
    monkeypatch.setattr(scheduling_repaint, "randn_tensor", lambda *_, **__: drawn.pop())
    last = 20
    for index in scheduler.timesteps.tolist():
        if index < last:
            # what is drawn for clean data counts nothing
            drawn.append(next(draws) if index >= 20 // steps else torch.zeros_like(x))
            x = scheduler.step(net(x, None), index, x, y, known.double(), return_dict=False)[0]
        else:
            # of the steps of a way back only the last adds noise, for all of them
            first, z = last // length * length, torch.zeros_like(x)
            if last == first + length - 1:
                way = torch.tensor(betas[first : first + length])
                z = next(draws) * ((1 - (1 - way).prod()) / way[-1]).sqrt()
            drawn.append(z)
            x = scheduler.undo_step(x, last)
        last = index
    return x


@pytest.mark.parametrize("shape", [(3, 8), (3, 4, 6), (3, 4, 2, 6)])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(
    ("steps", "length", "repeats"), [(20, 1, 1), (20, 1, 4), (20, 5, 3), (5, 1, 1)]
)
def test_repaint_is_that_of_diffusers(
    shape: tuple[int, ...],
    clip: bool,
    steps: int,
    length: int,
    repeats: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = torch.rand(1, *shape, generator=torch.Generator().manual_seed(2)) < 0.5
    y = Stream(1, shape).draw().clamp(-1, 1)
    x = Stream(2, shape).draw()

    def draws() -> Iterator[Tensor]:
        stream = Stream(2, shape)
        while True:
            yield stream.draw()

    denoise: Denoise = Denoiser(net, TABLE)
    inner: Sampler = DDIM()
    if clip:
        # the reference cuts x0 off and leaves the noise as it was
        denoise, inner = guidance.clamp(denoise), CFGpp(sampler=DDIM())
    sampler = RePaint(
        sampler=inner,
        operator=operators.mask(known),
        measurement=y,
        repeats=repeats,
        substeps=length,
        # the reference takes the first jump once
        interval=(0.0, 1.0 - 1e-6),
    )
    ends = torch.arange(steps // length - 1, -1, -1) * 20 // steps * length + length
    places = torch.cat([ends / 20, torch.zeros(1)]).double()
    grid = grids.leading(steps) if length == 1 else lambda schedule: places
    found = run(denoise, x, sampler, grid, Told(draws()))
    wanted = diffusers_repaint(
        x, known, y, draws(), monkeypatch, steps=steps, length=length, repeats=repeats, clip=clip
    )
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_one_pass_without_an_operator_is_the_sampler() -> None:
    denoise, x = Denoiser(net, TABLE), Stream(2, (3, 8)).draw()
    plain = run(denoise, x, DDPM(), grids.linear(6), Stream(2, (3, 8)))
    once = run(denoise, x, RePaint(repeats=1), grids.linear(6), Stream(2, (3, 8)))
    assert torch.equal(plain, once)


def test_repeats_cost_what_they_declare_and_leave_the_moments() -> None:
    calls = []

    def counted(x: Tensor, t: Tensor) -> Tensor:
        calls.append(1)
        return net(x, t)

    sampler = RePaint(sampler=Heun(), repeats=3, substeps=2)
    assert (sampler.order, sampler.evaluations) == (2, 12)
    run(
        Denoiser(counted, SCHEDULE),
        Stream(2, (3, 8)).draw(),
        sampler,
        grids.linear(4),
        Stream(2, (3, 8)),
    )
    # Heun asks once in a step to clean data, of which there are three
    assert len(calls) == 4 * 12 - 3
    data = Gaussian(schedule=SCHEDULE, mean=0.5, std=0.6)
    for again in (
        RePaint(sampler=Heun(), repeats=4),
        RePaint(sampler=DDIM(), repeats=2, substeps=3),
    ):
        mean, cov = sampled(data, (1, 12), again, grids.logsnr(40), 1500)
        assert (mean - 0.5).abs().max() < 5 * 0.6 / 1500**0.5 + 0.01
        assert (cov.diagonal() / 0.36 - 1).abs().max() < 5 * (2 / 1500) ** 0.5 + 0.05


def test_repaint_can_be_resumed() -> None:
    denoise, streams = Denoiser(net, SCHEDULE), noise.from_seeds([3, 4], (3, 8))
    operator = operators.downsample([2])
    sampler = RePaint(operator=operator, measurement=torch.zeros(1, 3, 4), repeats=2)
    states = list(steps(denoise, streams, sampler=sampler, grid=grids.linear(5)))
    saved = type(states[1]).restore(states[1].save())
    again = sample(denoise, streams, sampler=sampler, grid=grids.linear(5), resume=saved)
    assert torch.equal(again, states[-1].x)
    torch.testing.assert_close(operator(again), torch.zeros(2, 3, 4), rtol=0, atol=1e-5)
    # alone as in the batch
    alone = sample(denoise, noise.from_seeds([4], (3, 8)), sampler=sampler, grid=grids.linear(5))
    torch.testing.assert_close(alone[0], again[1])


# --- misuse ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_measurements_that_do_not_fit_are_refused(method: str) -> None:
    denoise, x = Denoiser(net, SCHEDULE), torch.zeros(2, 3, 8)
    half = operators.downsample([2])
    with pytest.raises(UsageError, match=r"measurement is \(2, 3, 8\).* makes \(2, 3, 4\)"):
        METHODS[method](denoise, half, torch.zeros(2, 3, 8))(x, 0.5)
    with pytest.raises(UsageError, match="'measurement' has 3 rows"):
        METHODS[method](denoise, half, torch.zeros(3, 3, 4))(x, 0.5)
    with pytest.raises(UsageError, match="made for 2 axes"):
        METHODS[method](denoise, operators.downsample([2, 2]), torch.zeros(2, 3, 4))(x, 0.5)
    with pytest.raises(UsageError, match=r"mask is \(1, 1, 7\)"):
        METHODS[method](denoise, operators.mask(torch.ones(1, 1, 7)), torch.zeros(2, 3, 8))(x, 0.5)


@pytest.mark.parametrize("method", METHODS)
def test_one_time_and_one_measurement_for_each_sample(method: str) -> None:
    denoise, x = Denoiser(net, SCHEDULE), Stream(2, (3, 8)).draw()
    half, y = operators.downsample([2]), Stream(2, (3, 4)).draw()
    guided, t = METHODS[method](denoise, half, y), torch.tensor([0.3, 0.7], dtype=torch.float64)
    if method == "dps":
        with pytest.raises(UsageError, match="one time for the whole batch"):
            guided(x, t)
        t = torch.tensor([0.3, 0.3], dtype=torch.float64)
    each = [METHODS[method](denoise, half, y[k : k + 1])(x[k : k + 1], t[k].item()) for k in (0, 1)]
    if method == "dps":
        both = guided(x, 0.3).x0
    else:
        both = guided(x, t).x0
    torch.testing.assert_close(both, torch.cat([one.x0 for one in each]))


def test_misuse_is_refused() -> None:
    denoise, x = Denoiser(net, SCHEDULE), torch.zeros(2, 3, 8)
    for method in (guidance.replacement, guidance.pseudo_inverse):
        with pytest.raises(UsageError, match="needs a linear operator"):
            method(denoise, torch.sin, x)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="must be 1 or more"):
        RePaint(repeats=0)
    with pytest.raises(UsageError, match="needs its measurement"):
        RePaint(operator=operators.downsample([2]))
    sampler = RePaint(operator=operators.downsample([2]), measurement=x)
    with pytest.raises(UsageError, match="measurement is"):
        sample(denoise, noise.from_seeds([0, 1], (3, 8)), sampler=sampler, grid=grids.linear(2))
