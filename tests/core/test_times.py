"""Times: every law by its distribution function, every spread by what it evens out."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from mdiff.core import grids, schedules, times
from mdiff.core.errors import UsageError
from mdiff.core.times import LossHistory

TABLE = schedules.linear()
CONTINUOUS = schedules.vp_linear()
N = 20_000


def draw(law: times.Times, schedule: schedules.Schedule, n: int = N, seed: int = 0) -> Tensor:
    t, weight = law(schedule, n, torch.Generator().manual_seed(seed))
    assert t.shape == weight.shape == (n,) and t.dtype == weight.dtype == torch.float64
    assert (weight == 1).all()
    return t


def ndtr(x: np.ndarray) -> np.ndarray:
    return stats.norm.cdf(x)


def half_log(t: np.ndarray) -> np.ndarray:
    return -CONTINUOUS.log_snr(torch.from_numpy(t)).numpy() / 2


def mode_law(t: np.ndarray) -> np.ndarray:
    """1 - u(t) by bisection: the map falls in u."""
    low, high = np.zeros_like(t), np.ones_like(t)
    for _ in range(60):
        u = (low + high) / 2
        above = 1 - u - 1.29 * (np.cos(np.pi * u / 2) ** 2 - 1 + u) > t
        low, high = np.where(above, u, low), np.where(above, high, u)
    return 1 - low


ENDS = half_log(np.array([CONTINUOUS.low, CONTINUOUS.high]))
LAWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "uniform": lambda t: (t - CONTINUOUS.low) / (CONTINUOUS.high - CONTINUOUS.low),
    "log_normal": lambda t: ndtr((half_log(t) + 1.2) / 1.2),
    "log_uniform": lambda t: (half_log(t) - ENDS[0]) / (ENDS[1] - ENDS[0]),
    "logit_normal": lambda t: ndtr(np.log(t / (1 - t))),
    "mode": mode_law,
}


@pytest.mark.parametrize("spread", times.SPREADS)
@pytest.mark.parametrize("name", LAWS)
def test_a_law_is_its_distribution_function_whatever_the_spread(name: str, spread: str) -> None:
    t = draw(times.from_name(name, spread=spread), CONTINUOUS).numpy()
    inside = t[(t > CONTINUOUS.low) & (t < CONTINUOUS.high)]
    assert len(inside) > 0.99 * N
    u = np.sort(LAWS[name](inside))
    distance = np.abs(u - (np.arange(len(u)) + 0.5) / len(u)).max()
    # independent and antithetic: the 99.9 % point of Kolmogorov; the others fill every cell
    limit = 1.95 / math.sqrt(N / 2) if spread in ("independent", "antithetic") else 0.01
    assert distance < limit
    assert t.min() >= CONTINUOUS.low and t.max() <= CONTINUOUS.high


@pytest.mark.parametrize("spread", times.SPREADS)
def test_entries_are_all_equally_likely(spread: str) -> None:
    table = schedules.linear(steps=50)
    t = draw(times.entries(spread), table)
    index = table.index(t)
    assert torch.equal(index, index.round())
    counts = torch.bincount(index.long(), minlength=50)
    assert len(counts) == 50 and stats.chisquare(counts.numpy()).pvalue > 1e-3
    if spread in ("low_discrepancy", "stratified"):
        assert (counts - N / 50).abs().max() <= 2


def test_antithetic_entries_are_those_of_ddim() -> None:
    for n in (7, 8):
        index = TABLE.index(draw(times.entries("antithetic"), TABLE, n))
        half = n // 2
        assert torch.equal(index[-half:], 999 - index[:half])


def test_low_discrepancy_is_one_comb_and_stratified_one_in_each_cell() -> None:
    generator = torch.Generator().manual_seed(3)
    comb = times.low_discrepancy(64, generator).sort().values
    torch.testing.assert_close(comb.diff(), torch.full((63,), 1 / 64, dtype=torch.float64))
    cells = (times.stratified(64, generator) * 64).long()
    assert cells.tolist() == list(range(64))


@pytest.mark.parametrize("spread", ["low_discrepancy", "stratified", "antithetic"])
def test_an_even_spread_makes_the_mean_less_noisy_and_moves_it_nowhere(spread: str) -> None:
    def means(spread: str) -> np.ndarray:
        law, generator = times.uniform(spread), torch.Generator().manual_seed(1)
        return np.array([law(CONTINUOUS, 16, generator).t.mean().item() for _ in range(400)])

    plain, even = means("independent"), means(spread)
    assert even.std() < 0.5 * plain.std()
    assert abs(even.mean() - 0.5) < 4 * even.std() / 20 + 1e-3


def test_all_randomness_comes_from_the_generator() -> None:
    before = torch.get_rng_state()
    for name in times.NAMES.keys() - {"importance", "visited"}:
        schedule = TABLE if name == "entries" else CONTINUOUS
        first, again, other = (draw(times.from_name(name), schedule, 9, s) for s in (5, 5, 6))
        assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_times_of_a_grid() -> None:
    grid = grids.karras(12)
    t = grid(CONTINUOUS)
    uniform = draw(times.visited(grid), CONTINUOUS)
    counts = (uniform[:, None] == t).sum(0)
    assert counts[-1] == 0 and stats.chisquare(counts[:-1].numpy()).pvalue > 1e-3
    weighted = draw(times.visited(grid, mean=-1.1, std=2.0), CONTINUOUS)
    counts = (weighted[:, None] == t).sum(0).numpy()
    log_sigma = np.append(half_log(t[:-1].numpy()), -np.inf)
    mass = -np.diff(ndtr((log_sigma + 1.1) / 2.0))
    assert stats.chisquare(counts[:-1], N * mass / mass.sum()).pvalue > 1e-3


@pytest.mark.parametrize("spread", times.SPREADS)
def test_importance_draws_by_loss_and_its_weights_undo_it(spread: str) -> None:
    table = schedules.linear(steps=20)
    history = LossHistory.empty(20, length=2)
    entry = torch.arange(1, 21, dtype=torch.float64) / 20
    for size in (3.0, 4.0):
        history = history.add(entry, size * entry)
    p = history.probabilities()
    expected = 0.999 * entry / entry.sum() + 0.001 / 20
    torch.testing.assert_close(p, expected)
    t, weight = times.importance(history, spread=spread)(table, N, torch.Generator().manual_seed(0))
    counts = torch.bincount(table.index(t).long(), minlength=20).numpy()
    assert stats.chisquare(counts, N * p.numpy()).pvalue > 1e-3
    torch.testing.assert_close(weight, 1 / (20 * p[table.index(t).long()]))
    # the mean of t under the uniform law
    assert abs((weight * t).mean() - 0.525) < 0.01


def test_history_is_uniform_until_full_and_forgets_the_oldest() -> None:
    first = LossHistory.empty(3, length=2)
    entry = torch.tensor([1 / 3, 2 / 3, 1.0])
    once = first.add(entry, torch.tensor([1.0, 2.0, 3.0]))
    assert once.probabilities().tolist() == [1 / 3] * 3 and first.counts.sum() == 0
    # two of the same entry in one batch, in order
    full = once.add(entry[[0, 0, 1, 2]], torch.tensor([5.0, 7.0, 2.0, 3.0]))
    roots = torch.tensor([math.sqrt((25 + 49) / 2), 2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(full.probabilities(0.0), roots / roots.sum())


def test_the_resampler_of_improved_ddpm(monkeypatch: pytest.MonkeyPatch) -> None:
    from guided_diffusion.resample import LossSecondMomentResampler

    # the reference asks for a name that NumPy has dropped
    monkeypatch.setattr(np, "int", int, raising=False)

    class Chain:
        num_timesteps = 12

    theirs, ours = LossSecondMomentResampler(Chain()), LossHistory.empty(12)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        index = torch.randint(0, 12, (8,), generator=generator)
        losses = torch.rand(8, generator=generator, dtype=torch.float64)
        theirs.update_with_all_losses(index.tolist(), losses.tolist())
        ours = ours.add((index + 1) / 12, losses)
        weights = theirs.weights()
        np.testing.assert_allclose(
            ours.probabilities().numpy(), weights / weights.sum(), rtol=1e-12
        )
    assert theirs._warmed_up()


@pytest.mark.parametrize("scheme", ["logit_normal", "mode"])
def test_the_densities_of_diffusers(scheme: str) -> None:
    from diffusers.training_utils import compute_density_for_timestep_sampling

    generator = torch.Generator().manual_seed(0)
    theirs = compute_density_for_timestep_sampling(
        scheme, N, logit_mean=0.3, logit_std=0.8, mode_scale=1.1, generator=generator
    )
    params = {"logit_normal": {"mean": 0.3, "std": 0.8}, "mode": {"scale": 1.1}}[scheme]
    ours = draw(times.from_name(scheme, **params), CONTINUOUS)
    assert stats.ks_2samp(ours.numpy(), theirs.numpy()).pvalue > 1e-3


def test_every_law_and_spread_has_a_line_and_a_source() -> None:
    for row in [*times.NAMES.values(), *times.SPREADS.values()]:
        first = (row.__doc__ or "").splitlines()[0]
        assert first.endswith((".", ")")) and any(c.isdigit() for c in row.__doc__ or ""), row


def test_misuse_is_refused() -> None:
    generator = torch.Generator()
    with pytest.raises(UsageError, match="'log_normal'"):
        times.from_name("lognormal")
    with pytest.raises(UsageError, match="spread.*'stratified'"):
        times.uniform("stratify")
    with pytest.raises(UsageError, match="continuous"):
        times.entries()(CONTINUOUS, 2, generator)
    with pytest.raises(UsageError, match="history has 7 entries"):
        times.importance(LossHistory.empty(7))(TABLE, 2, generator)
    with pytest.raises(UsageError, match="scale 3"):
        times.mode(3.0)
