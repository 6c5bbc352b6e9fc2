"""Averages of weights: they are their closed forms, come back bit for bit, and can be given any width afterwards."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mdiff.core.errors import IntegrityError, MissingError, UsageError
from mdiff.core.training.averages import (
    WIDEST,
    Averages,
    Snapshot,
    coefficients,
    gamma_of,
    power_name,
    profiles,
    read_snapshots,
    sigma_rel_of,
    synthesise,
    write_snapshot,
)

WIDTHS = (0.05, 0.10)


class Walk(nn.Module):
    """Weights that go where they are told, and what a state dict may have besides."""

    def __init__(self, axes: int = 2) -> None:
        super().__init__()
        shape = (2, 3, *(3,) * axes)
        generator = torch.Generator().manual_seed(axes)
        self.generator = generator
        self.kernel = nn.Parameter(0.3 * torch.randn(shape, generator=generator))
        self.bias = nn.Parameter(torch.zeros(2))
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def go(self) -> None:
        for value in self.state_dict().values():
            if value.is_floating_point():
                value += 0.01 * torch.randn(value.shape, generator=self.generator)
            else:
                value += 1


def track(
    averages: Averages, module: Walk, steps: int, at: Callable[[int], None] = lambda step: None
) -> list[NDArray[np.float64]]:
    """The weights before the first step and after each, in float64."""
    seen = [module.kernel.detach().double().numpy().copy()]
    for step in range(1, steps + 1):
        module.go()
        averages.update(step)
        seen.append(module.kernel.detach().double().numpy().copy())
        at(step)
    return seen


# --- profiles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_averages_are_their_closed_forms(axes: int) -> None:
    module = Walk(axes)
    averages = Averages(module, profiles([0.0, 0.9, 0.999], WIDTHS))
    steps = 3000
    seen = track(averages, module, steps)
    i = np.arange(1, steps + 1)
    shares = {}
    for decay in (0.0, 0.9, 0.999):
        keep = np.minimum(decay, i / (9 + i))
        after = np.append(np.cumprod(keep[::-1])[::-1][1:], 1.0)  # what later steps left of each
        shares[f"{decay:g}"] = np.append(keep.prod(), (1 - keep) * after)
    for sigma in WIDTHS:
        g = gamma_of(sigma) + 1
        shares[power_name(sigma)] = np.append(0.0, (i / steps) ** g - ((i - 1) / steps) ** g)
    assert averages.names == list(shares)
    for name, share in shares.items():
        assert share.sum() == pytest.approx(1.0)
        exact = np.tensordot(share, np.stack(seen), 1)
        kernel = averages.state(name)["kernel"].double().numpy()
        np.testing.assert_allclose(kernel, exact, rtol=1e-6, atol=1e-6)


def test_the_power_function_has_the_width_it_is_named_for() -> None:
    """The standard deviation of its weight over time, as a share of the time."""
    steps = 20_000
    i = np.arange(1, steps + 1)
    for sigma in (0.02, 0.05, 0.1, 0.25):
        g = gamma_of(sigma) + 1
        share = (i / steps) ** g - ((i - 1) / steps) ** g
        mean = (share * i).sum()
        std = np.sqrt((share * (i - mean) ** 2).sum())
        assert std / steps == pytest.approx(sigma, rel=1e-3)


def test_width_and_exponent_are_inverse_and_the_papers() -> None:
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)
    for sigma in (0.001, 0.01, 0.05, 0.1, 0.2, 0.28):
        assert sigma_rel_of(gamma_of(sigma)) == pytest.approx(sigma, rel=1e-9)
    assert gamma_of(WIDEST) == pytest.approx(0.0, abs=1e-6)
    for wrong in (0.0, -0.1, 0.3):
        with pytest.raises(UsageError, match="sigma_rel of an average is in"):
            gamma_of(wrong)


def test_names_and_first_steps() -> None:
    found = profiles([0.999, 0.9999], [0.1, 0.075])
    assert list(found) == ["0.999", "0.9999", "power-0.10", "power-0.075"]
    assert found["0.999"].weight(1) == pytest.approx(0.9)  # the score SDE code's ramp: 1 - 1/10
    assert found["0.999"].weight(10**6) == pytest.approx(0.001)
    assert found["power-0.10"].weight(1) == 1.0
    assert found["power-0.10"].weight(2) == pytest.approx(1 - 0.5 ** (gamma_of(0.1) + 1))
    with pytest.raises(UsageError, match="the decay of an average"):
        profiles([1.0], [])


# --- what is held ------------------------------------------------------------------------------------


def test_averages_are_float32_copies_that_share_no_memory() -> None:
    module = Walk().to(torch.bfloat16)
    averages = Averages(module, profiles([0.5], []))
    live = module.state_dict()
    state = averages.state("0.5")
    assert list(state) == list(live)
    assert {k: v.dtype for k, v in state.items()} == {
        "kernel": torch.float32,
        "bias": torch.float32,
        "scale": torch.float32,
        "count": torch.int64,
    }
    before = state["kernel"].clone()
    module.go()
    assert torch.equal(state["kernel"], before)
    averages.update(100)
    expected = before.lerp(module.kernel.detach().float(), 0.5)
    torch.testing.assert_close(state["kernel"], expected)
    assert state["count"] == 1


def test_averages_go_on_bit_for_bit() -> None:
    kinds = profiles([0.9], [0.1])
    module = Walk()
    straight = Averages(module, kinds)
    broken = Averages(module, kinds)
    for step in range(1, 21):
        module.go()
        straight.update(step)
        broken.update(step)
        if step == 10:
            saved = {n: {k: v.clone() for k, v in broken.state(n).items()} for n in broken.names}
            broken = Averages(module, kinds)
            for name, state in saved.items():
                broken.load(name, state)
    for name in straight.names:
        for a, b in zip(straight.state(name).values(), broken.state(name).values(), strict=True):
            assert torch.equal(a, b)


def test_an_average_of_another_module_is_refused() -> None:
    averages = Averages(Walk(2), profiles([0.9], []))
    with pytest.raises(IntegrityError, match="average '0.9' does not fit the module: kernel"):
        averages.load("0.9", Averages(Walk(3), profiles([0.9], [])).state("0.9"))
    with pytest.raises(IntegrityError, match="does not fit the module: bias"):
        averages.load("0.9", {k: v for k, v in averages.state("0.9").items() if k != "bias"})
    with pytest.raises(UsageError, match=r"unknown average '0.99'; did you mean '0.9'\?"):
        averages.state("0.99")


# --- afterwards --------------------------------------------------------------------------------------


def rms(a: Tensor, b: Tensor) -> float:
    return (a - b).square().mean().sqrt().item()


def tracked(folder: Path, at: int) -> tuple[Averages, dict[str, Tensor], list[Snapshot]]:
    """A run of 2000 steps with a snapshot of two widths every 100, and other widths tracked directly up to `at`."""
    module = Walk()
    averages = Averages(module, profiles([], WIDTHS))
    wanted = Averages(module, profiles([], (0.07, 0.15)))
    found: dict[str, Tensor] = {}

    def keep(step: int) -> None:
        if step <= at:
            wanted.update(step)
        if step == at:
            found.update({n: wanted.state(n)["kernel"].clone() for n in wanted.names})
        if step % 100 == 0:
            for name in averages.names:
                write_snapshot(folder, step, name, averages.state(name))

    for name in averages.names:  # before the first step: it says nothing and does no harm
        write_snapshot(folder, 0, name, averages.state(name))
    track(averages, module, 2000, keep)
    return averages, found, read_snapshots(folder)


@pytest.mark.parametrize("at", [2000, 1000])
def test_another_width_is_made_of_two_afterwards(tmp_path: Path, at: int) -> None:
    """Between the tracked widths: a tenth of the distance to the nearest of them at most."""
    _, found, snapshots = tracked(tmp_path, at)
    made = synthesise(snapshots, 0.07, at)
    nearest = min(
        rms(synthesise(snapshots, sigma, at)["kernel"], found["power-0.07"]) for sigma in WIDTHS
    )
    assert rms(made["kernel"], found["power-0.07"]) < 0.1 * nearest
    assert made["kernel"].dtype == torch.float32
    assert made["count"] == at and made["count"].dtype == torch.int64
    wider = synthesise(snapshots, 0.15, at)  # and beyond them
    narrow = synthesise(snapshots, 0.10, at)
    assert rms(wider["kernel"], found["power-0.15"]) < 0.1 * rms(
        narrow["kernel"], found["power-0.15"]
    )


def test_a_tracked_width_is_its_snapshot(tmp_path: Path) -> None:
    averages, _, snapshots = tracked(tmp_path, 2000)
    assert [s.step for s in snapshots] == sorted([*range(0, 2001, 100)] * 2)
    made = synthesise(snapshots, 0.05, 2000)
    half = averages.state("power-0.05")["kernel"].half().float()
    torch.testing.assert_close(made["kernel"], half, rtol=0, atol=1e-6)


def test_coefficients_are_the_least_squares_of_the_profiles_themselves() -> None:
    """Against the normal equations summed over a fine grid of time instead of integrated."""
    known = [(sigma, float(t)) for t in (250, 500, 750, 1000) for sigma in WIDTHS]
    tau = (np.arange(200_000) + 0.5) / 200

    def profile(sigma: float, t: float) -> NDArray[np.float64]:
        g = gamma_of(sigma)
        return np.where(tau < t, (g + 1) / t * (tau / t) ** g, 0.0)

    columns = np.stack([profile(*k) for k in known], 1)
    for sigma, at in ((0.07, 1000.0), (0.12, 600.0), (0.2, 900.0)):
        solved = np.linalg.lstsq(columns, profile(sigma, at), rcond=None)[0]
        ours = coefficients(known, sigma, at)
        assert ours.sum() == pytest.approx(1.0)
        np.testing.assert_allclose(ours, solved / solved.sum(), atol=1e-4)


def test_numbers_too_large_for_half_precision_are_kept_whole(tmp_path: Path) -> None:
    state = {"a": torch.tensor([1e6, 1.0]), "b": torch.tensor([0.1])}
    write_snapshot(tmp_path, 10, "power-0.05", state)
    write_snapshot(tmp_path, 10, "power-0.10", state)
    made = synthesise(read_snapshots(tmp_path), 0.07, 10)
    assert made["a"].tolist() == [1e6, 1.0]
    assert made["b"].item() == pytest.approx(torch.tensor(0.1).half().item(), abs=1e-6)


def test_what_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="has no snapshots: they are kept by a run with --set"):
        read_snapshots(tmp_path)
    write_snapshot(tmp_path, 10, "power-0.05", {"a": torch.zeros(2)})
    write_snapshot(tmp_path, 20, "power-0.05", {"a": torch.zeros(3)})
    snapshots = read_snapshots(tmp_path)
    for at in (0, 21):
        with pytest.raises(UsageError, match="1 to 20 are known"):
            synthesise(snapshots, 0.05, at)
    with pytest.raises(IntegrityError, match="is a snapshot of another module: a"):
        synthesise(snapshots, 0.05, 20)
    (tmp_path / "00000020-power-0.05.safetensors").write_bytes(b"no")
    with pytest.raises(IntegrityError, match="is not a whole safetensors file"):
        synthesise(snapshots, 0.05, 20)
