"""Likelihoods: the probability flow and the variational bound, on data of known density."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mdiff.core import Denoiser, bound, grids, guidance, likelihood, noise, schedules
from mdiff.core.analytic import Gaussian, Mixture
from mdiff.core.denoiser import Guided, Prediction
from mdiff.core.errors import NonFiniteError, UsageError
from mdiff.core.likelihood import Likelihood, dequantise, log_likelihood
from mdiff.core.schedules import Schedule, Time

SHAPES = [(1, 6), (1, 2, 3), (1, 2, 1, 3)]
SCHEDULES = {
    name: schedules.from_name(name)
    for name in ("vp_linear", "subvp", "flow", "cosine", "linear", "cosine_betas")
}
# the density that is found is that of data with sigma_min of noise
SCHEDULES["ve"] = schedules.ve(sigma_min=0.002)
LOW = 1e-5
each_shape = pytest.mark.parametrize("shape", SHAPES)
each_schedule = pytest.mark.parametrize("name", SCHEDULES)


def bits(log_density: Tensor, size: int) -> Tensor:
    return -log_density / (size * math.log(2))


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-3) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def prior_gap(data: Gaussian | Mixture, found: Likelihood) -> Tensor:
    """log prior - log p of x at the last time: what a schedule leaves of the data there."""
    schedule = data.schedule
    std = max(1.0, schedule.at(schedule.high).sigma)
    prior = torch.distributions.Normal(0.0, std).log_prob(found.latent).flatten(1).sum(1)
    if isinstance(data, Mixture):
        return prior - data.log_density(found.latent, schedule.high)
    mean, variance = data.moments(schedule.high)
    end = torch.distributions.Normal(mean, variance**0.5)
    return prior - end.log_prob(found.latent).flatten(1).sum(1)


@each_shape
@each_schedule
def test_a_gaussian_to_a_thousandth_of_a_bit(name: str, shape: tuple[int, ...]) -> None:
    schedule = SCHEDULES[name]
    data = Gaussian(schedule=schedule, mean=0.7, std=0.5)
    x = 0.7 + 0.5 * noise.from_seeds(range(40), shape).draw(dtype=torch.float64)
    found = log_likelihood(data, x, low=LOW)
    exact = torch.distributions.Normal(0.7, 0.5).log_prob(x).flatten(1).sum(1)
    near(found.bits.mean(), bits(exact, 6).mean())
    near(found.bits, bits(exact + prior_gap(data, found), 6), 3e-4)
    torch.testing.assert_close(found.log_density, -found.bits * 6 * math.log(2))
    # the exact flow, in which clean data is x / alpha at the first time
    alpha, _ = schedule(torch.tensor(LOW, dtype=torch.float64))
    end = data.flow(x * alpha, LOW, schedule.high)
    near(found.latent, end, 1e-3 * end.std().item())


@each_shape
@each_schedule
def test_a_mixture_to_a_thousandth_of_a_bit(name: str, shape: tuple[int, ...]) -> None:
    schedule = SCHEDULES[name]
    data = Mixture(schedule=schedule, means=(-1.0, 0.8), weights=(0.3, 0.7), std=0.25)
    streams = noise.from_seeds(range(40), shape)
    which, normal = streams.draw(dtype=torch.float64), streams.draw(dtype=torch.float64)
    x = torch.where(torch.special.ndtr(which) < 0.3, -1.0, 0.8) + 0.25 * normal
    found = log_likelihood(data, x, low=LOW)
    exact = data.log_density(x, 0.0)
    near(found.bits.mean(), bits(exact, 6).mean())
    near(found.bits, bits(exact + prior_gap(data, found), 6))
    assert 20 < found.evaluations < 500


@pytest.mark.parametrize("kind", likelihood.PROBES)
def test_probes_are_exact_on_average(kind: str) -> None:
    schedule = SCHEDULES["vp_linear"]
    data = Mixture(schedule=schedule, means=(-1.0, 0.8), weights=(0.3, 0.7), std=0.25)
    one = noise.from_seeds([3], (8,)).draw(dtype=torch.float64)
    exact = log_likelihood(data, one).bits.item()
    many = one.expand(600, 8)
    found = log_likelihood(data, many, noise.from_seeds(range(600), (8,)), probes=kind).bits
    error = (found.mean().item() - exact) / (found.std().item() / math.sqrt(600) + 1e-9)
    # the flow of independent entries has a diagonal divergence, which signs give exactly
    assert found.std() < 1e-4 if kind == "rademacher" else found.std() > 0.05
    assert abs(error) < 4 or abs(found.mean().item() - exact) < 1e-4


def coupled(schedule: Schedule) -> Denoiser:
    """A network whose entries know of each other, so that the divergence is not diagonal."""
    mix = torch.linspace(-1, 1, 36, dtype=torch.float64).sin().reshape(6, 6)

    def net(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x.flatten(1) @ mix).reshape(x.shape)

    return Denoiser(net, schedule, predicts="v")


@each_shape
def test_the_exact_divergence_and_its_estimates(shape: tuple[int, ...]) -> None:
    denoise = coupled(SCHEDULES["cosine"])
    x = noise.from_seeds([1], shape).draw(dtype=torch.float64)
    exact = log_likelihood(denoise, x).bits.item()
    for kind in likelihood.PROBES:
        probe = noise.from_seeds(range(800), shape)
        found = log_likelihood(denoise, x.expand(800, *shape), probe, probes=kind).bits
        assert found.std() > 1e-3
        assert abs(found.mean().item() - exact) < 4 * found.std().item() / math.sqrt(800)


def test_a_sample_does_not_depend_on_its_batch_beyond_the_tolerance() -> None:
    denoise = coupled(SCHEDULES["flow"])
    x = noise.from_seeds(range(3), (2, 3)).draw(dtype=torch.float64)
    x[2] *= 30
    probe = noise.from_seeds([5, 6, 7], (2, 3))
    before = probe.state()["generators"].clone()
    together = log_likelihood(denoise, x, probe)
    assert torch.equal(before, probe.state()["generators"])
    for k in range(3):
        alone = log_likelihood(denoise, x[k : k + 1], noise.from_seeds([5 + k], (2, 3)))
        near(alone.bits, together.bits[k : k + 1], 1e-4)
    again = log_likelihood(denoise, x, probe)
    assert torch.equal(again.bits, together.bits)


def test_single_precision_and_a_network_that_needs_no_gradient() -> None:
    schedule = SCHEDULES["vp_linear"]
    data = Mixture(schedule=schedule)
    x = noise.from_seeds(range(4), (6,)).draw()
    with torch.no_grad():
        found = log_likelihood(data, x, low=LOW)
    assert found.latent.dtype == torch.float32 and not found.latent.requires_grad
    near(found.bits, bits(data.log_density(x.double(), 0.0), 6), 2e-3)


def test_levels_and_what_a_level_counts() -> None:
    levels = torch.arange(256).reshape(1, 1, 256).expand(2, 3, 256)
    streams = noise.from_seeds([1, 2], (3, 256))
    for low, offset in ((-1.0, 7), (0.0, 8)):
        x, width = dequantise(levels, streams, low=low)
        assert width == 2.0**-offset
        place = (x.double() - low) / width
        assert torch.equal(place.floor().clamp(max=255).long(), levels)
        within = (place - levels).flatten()
        assert abs(within.mean() - 0.5) < 0.02 and abs(within.var() - 1 / 12) < 0.01
        data = Gaussian(schedule=SCHEDULES["vp_linear"], std=0.4)
        plain = log_likelihood(data, x[..., 120:125], low=LOW)
        counted = log_likelihood(data, x[..., 120:125], low=LOW, level_width=width)
        near(counted.bits, plain.bits + offset, 1e-12)


def test_eight_bits_of_a_gaussian_cost_their_entropy() -> None:
    schedule, std = SCHEDULES["vp_linear"], 0.2
    normal = noise.from_seeds(range(2), (4000,)).draw(dtype=torch.float64)
    levels = ((normal * std + 1) * 128).floor().clamp(0, 255).long()
    x, width = dequantise(levels, noise.from_seeds([8, 9], (4000,)))
    probe = noise.from_seeds([3, 4], (4000,))
    found = log_likelihood(Gaussian(schedule=schedule, std=std), x, probe, level_width=width)
    entropy = math.log2(std * math.sqrt(2 * math.pi * math.e)) + 7
    assert (found.bits - entropy).abs().max() < 0.04


def test_misuse_is_refused() -> None:
    data = Gaussian(schedule=SCHEDULES["vp_linear"])
    x = torch.zeros(2, 3)
    with pytest.raises(UsageError, match=r"\(2, 4\), and x0 is \(2, 3\)"):
        log_likelihood(data, x, noise.from_seeds([1, 2], (4,)))
    with pytest.raises(UsageError, match="'rademacher'"):
        log_likelihood(data, x, probes="rademaker")
    broken = Denoiser(lambda x, t: x * math.nan, SCHEDULES["vp_linear"], predicts="v")
    with pytest.raises(NonFiniteError, match="sigma / alpha"):
        log_likelihood(broken, x)


# --- the variational bound ------------------------------------------------------------------------


def guided(betas: np.ndarray, variance: str) -> Any:
    from guided_diffusion import gaussian_diffusion as gd

    return gd.GaussianDiffusion(
        betas=betas,
        model_mean_type=gd.ModelMeanType.EPSILON,
        model_var_type=getattr(gd.ModelVarType, variance),
        loss_type=gd.LossType.MSE,
    )


def eight_bits(batch: int, shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> Tensor:
    x = noise.from_seeds(range(batch), shape).draw(dtype=dtype) * scale
    return (x.clamp(-1, 1) * 127.5).round() / 127.5


VARIANCES = {"FIXED_SMALL": "small", "FIXED_LARGE": "large", "LEARNED_RANGE": "small"}


@each_shape
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clip", [True, False])
def test_the_bound_of_improved_ddpm(
    clip: bool,
    dtype: torch.dtype,
    variance: str,
    shape: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from guided_diffusion import gaussian_diffusion as gd

    def exact(array: np.ndarray, t: Tensor, shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(array)[t].reshape(-1, *[1] * (len(shape) - 1)).expand(shape)

    if dtype == torch.float64:
        # the reference rounds its coefficients to float32
        monkeypatch.setattr(gd, "_extract_into_tensor", exact)
    table = np.array(gd.get_named_beta_schedule("cosine", 60))

    def net(x: Tensor, t: Tensor) -> Tensor:
        said = torch.tanh(x) * (0.5 + t.to(x).reshape(-1, *[1] * (x.ndim - 1)) / 60)
        return torch.cat([said, torch.sin(3 * x)], dim=1) if variance == "LEARNED_RANGE" else said

    x0 = eight_bits(3, shape, dtype, 0.6)
    streams = noise.from_seeds([7, 8, 9], shape)
    copy = noise.Noise.restore(streams.state())
    monkeypatch.setattr(torch, "randn_like", lambda x: copy.draw(dtype=x.dtype))
    expected = guided(table, variance).calc_bpd_loop(net, x0, clip_denoised=clip)
    learned = variance == "LEARNED_RANGE"
    denoise: Any = Denoiser(net, schedules.betas(table), time="index", learned_variance=learned)
    denoise = guidance.clamp(denoise) if clip else denoise
    found = bound.bound(denoise, x0, streams, variance=VARIANCES[variance])
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    if dtype == torch.float32 and not clip:
        # x0 is some 1e4 where there is almost no signal: the reference loses digits in its means
        tolerance = 1e-3
    for ours, theirs in (
        (found.prior, "prior_bpd"),
        (found.terms, "vb"),
        (found.errors, "xstart_mse"),
        (found.total, "total_bpd"),
    ):
        torch.testing.assert_close(ours, expected[theirs], rtol=tolerance, atol=tolerance)


def test_the_prior_term() -> None:
    x0 = eight_bits(2, (1, 8), torch.float64, 0.6)
    assert bound.prior(schedules.from_name("zero_terminal"), x0).abs().max() < 1e-12
    # N(x0, 50^2) from N(0, 50^2)
    expected = (x0**2).flatten(1).mean(1) / (2 * 50**2 * math.log(2))
    torch.testing.assert_close(bound.prior(schedules.ve(), x0), expected)
    # q at an inner time
    q = torch.distributions.Normal(*(torch.tensor(v) for v in (0.0, 1.0)))
    schedule = SCHEDULES["vp_linear"]
    at = schedule.at(0.4)
    each = torch.distributions.kl_divergence(torch.distributions.Normal(at.alpha * x0, at.sigma), q)
    found = bound.prior(schedule, x0, 0.4)
    torch.testing.assert_close(found, each.flatten(1).mean(1) / math.log(2), check_dtype=False)


class Ideal:
    """The exact denoiser of N(0, std^2) and the exact variance of its reverse steps along a grid."""

    def __init__(self, schedule: Schedule, std: float, grid: grids.Grid) -> None:
        self.inner, self.std = Gaussian(schedule=schedule, std=std), std
        self.times = [schedule.at(t) for t in grid(schedule).tolist()]

    def denoiser(self) -> Guided:
        return Guided(inner=self.inner, rule=self.rule)

    def rule(self, inner: Any, x: Tensor, t: Time) -> Prediction:
        place = next(i for i, time in enumerate(self.times) if time.value == t.value)
        s, above = self.times[place + 1], self.times[max(0, place - 1)]

        def fresh(t: Time, s: Time) -> float:
            return 1 - math.exp(t.log_snr - s.log_snr)

        left = t.sigma**2 * self.std**2 / (t.alpha**2 * self.std**2 + t.sigma**2)
        beta = fresh(t, s) * t.sigma**2
        small = fresh(above, t) * t.sigma**2 if s.sigma == 0 else fresh(t, s) * s.sigma**2
        exact = (s.alpha * fresh(t, s)) ** 2 * left + (0 if s.sigma == 0 else small)
        fraction = math.log(exact / small) / math.log(beta / small)
        return Prediction(x0=inner(x, t).x0, variance_fraction=torch.full_like(x, fraction))


@pytest.mark.parametrize("name", ["cosine_betas", "linear", "vp_linear", "ve", "flow"])
@pytest.mark.parametrize("steps", [2, 15])
def test_the_bound_is_the_entropy_where_every_reverse_step_is_exact(name: str, steps: int) -> None:
    schedule, std = schedules.ve() if name == "ve" else SCHEDULES[name], 0.25
    x0 = eight_bits(2, (40_000,), torch.float64, std)
    # to no less noise than a level is wide: data of levels is not normal on that scale
    grid = grids.logsnr(steps)
    if name == "flow":
        grid = lambda _: torch.cat([torch.linspace(0.99, 0.012, steps), torch.zeros(1)]).double()  # noqa: E731
    streams = noise.from_seeds([5, 6], (40_000,))
    found = bound.bound(Ideal(schedule, std, grid).denoiser(), x0, streams, grid=grid)
    # bins are 2 / 255 wide
    density = bits(torch.distributions.Normal(0.0, std).log_prob(x0).sum(1), 40_000)
    near(found.total, density + math.log2(255 / 2), 0.03)
    # a fixed variance is worse
    for variance in ("small", "large"):
        plain = bound.bound(
            Gaussian(schedule=schedule, std=std), x0, streams, grid=grid, variance=variance
        )
        assert (plain.total > found.total).all()


def test_the_decoder_gives_every_level_its_share_and_all_of_them_one() -> None:
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, std in ((0.0, 0.1), (0.97, 0.05), (-1.2, 0.3)):
        log = bound.discretised_gaussian(
            levels, torch.full_like(levels, mean), torch.full_like(levels, math.log(std))
        )
        assert log.exp().sum().item() == pytest.approx(1.0, abs=1e-9)


def test_learned_variance_is_used_and_needed() -> None:
    said = Prediction(x0=torch.zeros(1, 4))
    schedule = schedules.linear(steps=10)
    t, s, above = (schedule.at(torch.tensor(v, dtype=torch.float64)) for v in (0.5, 0.4, 0.6))
    with pytest.raises(UsageError, match="learned one"):
        bound.term(said, torch.zeros(1, 4), t, s, above, "learned")
    data = Gaussian(schedule=schedule)
    rising = lambda schedule: torch.tensor([0.2, 0.5, 0.0])  # noqa: E731
    with pytest.raises(UsageError, match="decreasing"):
        bound.bound(data, torch.zeros(1, 4), noise.from_seeds([1], (4,)), grid=rising)
    with pytest.raises(UsageError, match="unknown variance"):
        bound.term(said, torch.zeros(1, 4), t, s, above, "tiny")
