"""Inversion: against diffusers and guided-diffusion, and there and back again; the way between two."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mdiff.core import Denoiser, grids, inversion, noise, sample, schedules
from mdiff.core.analytic import Gaussian
from mdiff.core.errors import UsageError
from mdiff.core.grids import Grid

SHAPES = [(2, 9), (2, 5, 3), (1, 2, 3, 4)]
SCHEDULES = {
    "linear": schedules.linear(),
    "vp_linear": schedules.vp_linear(),
    "subvp": schedules.subvp(),
    "ve": schedules.ve(),
    "flow": schedules.from_name("flow"),
}
each_shape = pytest.mark.parametrize("shape", SHAPES)


def data(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return noise.from_seeds([1, 2], shape).draw(dtype=dtype) * 0.5 + 0.2


def net(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x) * (0.5 + t.to(x).reshape(-1, *[1] * (x.ndim - 1)) / 1000)


def cut(grid: Grid, first: float = 0.9) -> Grid:
    """The part of a grid where there is signal."""
    return grids.truncate(grid, first)


def back(denoise: Any, x: Tensor, grid: Grid) -> Tensor:
    """DDIM from x at the first time of the grid."""
    streams = noise.from_seeds([0] * len(x), x.shape[1:])
    return sample(denoise, streams, sampler="ddim", grid=grid, x=x)


# --- references -----------------------------------------------------------------------------------


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def precision(request: Any) -> tuple[torch.dtype, float]:
    return request.param, 1e-10 if request.param == torch.float64 else 1e-5


CASES = {
    # what the network predicts, the reference's options, ours
    "eps": ("epsilon", {}, {}),
    "eps, from an entry": ("epsilon", {"set_alpha_to_one": False}, {"start": 0.001}),
    "v": ("v_prediction", {"set_alpha_to_one": False}, {"start": 0.001, "read": "level"}),
    "x0": ("sample", {"set_alpha_to_one": False}, {"start": 0.001, "read": "level"}),
}


@each_shape
@pytest.mark.parametrize("steps", [1, 2, 10, 50])
@pytest.mark.parametrize("name", CASES)
def test_the_inverse_scheduler_of_diffusers(
    name: str, steps: int, shape: tuple[int, ...], precision: tuple[torch.dtype, float]
) -> None:
    from diffusers import DDIMInverseScheduler

    dtype, tolerance = precision
    kind, theirs, ours = CASES[name]
    reference = DDIMInverseScheduler(clip_sample=False, prediction_type=kind, **theirs)
    # its table is kept in float32
    table = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    reference.alphas_cumprod = torch.cumprod(1 - table, 0).to(dtype)
    reference.initial_alpha_cumprod = (
        torch.tensor(1.0, dtype=dtype) if not theirs else reference.alphas_cumprod[0]
    )
    reference.set_timesteps(steps)
    expected = data(shape, dtype)
    for t in reference.timesteps:
        said = net(expected, t.expand(2))
        expected = reference.step(said, t, expected).prev_sample
    predicts = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}[kind]
    denoise = Denoiser(net, schedules.linear(), predicts=predicts, time="index")
    found = inversion.ddim(denoise, data(shape, dtype), grids.leading(steps), **ours)
    if predicts == "x0" and dtype == torch.float32:
        # the reference takes sigma of the first entry, 0.01, from a rounded 1 - sigma^2
        tolerance = 3e-4
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@each_shape
def test_the_reverse_steps_of_guided_diffusion(
    shape: tuple[int, ...],
    precision: tuple[torch.dtype, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from guided_diffusion import gaussian_diffusion as gd

    def exact(array: np.ndarray, t: Tensor, shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(array)[t].reshape(-1, *[1] * (len(shape) - 1)).expand(shape)

    dtype, tolerance = precision
    if dtype == torch.float64:
        # the reference rounds its coefficients to float32
        monkeypatch.setattr(gd, "_extract_into_tensor", exact)
    table = np.array(gd.get_named_beta_schedule("cosine", 40))[:39]
    reference = gd.GaussianDiffusion(
        betas=table,
        model_mean_type=gd.ModelMeanType.EPSILON,
        model_var_type=gd.ModelVarType.FIXED_SMALL,
        loss_type=gd.LossType.MSE,
    )
    expected = data(shape, dtype)
    # its last step goes to pure noise, from which nothing comes back
    for i in range(38):
        t = torch.full((2,), i)
        expected = reference.ddim_reverse_sample(net, expected, t, clip_denoised=False)["sample"]
    denoise = Denoiser(net, schedules.betas(table), time="index")
    found = inversion.ddim(denoise, data(shape, dtype), grids.leading(39), told="own")
    torch.testing.assert_close(found, expected, rtol=10 * tolerance, atol=10 * tolerance)


# --- laws -----------------------------------------------------------------------------------------


@each_shape
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("told", inversion.TOLD)
def test_what_comes_back_is_nearer_with_more_steps(
    told: str, name: str, shape: tuple[int, ...]
) -> None:
    schedule = SCHEDULES[name]
    denoise = Gaussian(schedule=schedule, mean=0.2, std=0.5)
    x0 = data(shape)

    def errors(steps: int) -> list[float]:
        grid = cut(grids.karras(steps), 0.97 if schedule.high == 1 else schedule.high)
        x = inversion.ddim(denoise, x0, grid, told=told)
        first, last = (time.item() for time in grid(schedule)[[0, -2]])
        ends = denoise.flow(x0, last, first), x0
        found = x, back(denoise, x, grid)
        return [(a - b).std().item() for a, b in zip(found, ends, strict=True)]

    # of the noise that is found, and of the data that comes back
    for found in zip(*(errors(steps) for steps in (20, 40, 80, 160)), strict=True):
        assert list(found) == sorted(found, reverse=True) and found[-1] < found[0] / 4, found


@each_shape
@pytest.mark.parametrize("predicts", ["eps", "v", "x0", "flow"])
def test_iterations_find_the_exact_inverse_of_ddim(predicts: str, shape: tuple[int, ...]) -> None:
    def mild(x: Tensor, t: Tensor) -> Tensor:
        return 0.3 * torch.tanh(x)

    denoise = Denoiser(mild, schedules.vp_linear(), predicts=predicts)
    # the step to clean data forgets x where x0 is predicted outright
    grid = cut(grids.linear(30), 0.6)
    if predicts == "x0":
        grid = lambda schedule: torch.linspace(0.6, 0.3, 20, dtype=torch.float64)  # noqa: E731
    x0 = data(shape)
    first = grid(denoise.schedule)[-1].item()
    errors = []
    for iterations in (1, 4, 60):
        x = inversion.ddim(denoise, x0, grid, iterations=iterations, start=first)
        errors.append((back(denoise, x, grid) - x0).abs().max().item())
    assert errors[0] > 100 * errors[1] / 10 and errors[2] < 1e-12


@each_shape
@pytest.mark.parametrize("name", SCHEDULES)
def test_edict_comes_back_to_rounding_for_any_network(name: str, shape: tuple[int, ...]) -> None:
    def rough(x: Tensor, t: Tensor) -> Tensor:
        x = x / (1 + t**2).sqrt().reshape(-1, *[1] * (x.ndim - 1))
        return torch.sin(3 * x) + 0.5 * torch.roll(torch.cos(x), 1, dims=-1)

    denoise = Denoiser(rough, SCHEDULES[name], time="sigma")
    x0, grid = data(shape), cut(grids.karras(50))
    pair = inversion.edict(denoise, x0, grid)
    x, y = inversion.edict_decode(denoise, pair, grid)
    for part in (x, y):
        assert (part - x0).abs().max() < 1e-10
    # DDIM inversion does not
    there = inversion.ddim(denoise, x0, grid)
    assert (back(denoise, there, grid) - x0).abs().max() > 1e-3


@pytest.mark.parametrize(("steps", "mixing"), [(50, 0.93), (100, 0.97)])
def test_edict_is_near_the_flow(steps: int, mixing: float) -> None:
    schedule = schedules.vp_linear()
    denoise = Gaussian(schedule=schedule, mean=0.2, std=0.5)
    x0, grid = data((2, 9)), cut(grids.karras(steps))
    exact = denoise.flow(x0, schedule.low, grid(schedule)[0].item())
    x, y = inversion.edict(denoise, x0, grid, mixing=mixing)
    assert (x - exact).std() < 0.02 * exact.std() and (x - y).std() < 0.002 * exact.std()


def test_a_sample_is_alone_in_its_batch_and_nothing_given_is_changed() -> None:
    denoise = Denoiser(net, schedules.vp_linear(), predicts="v")
    x0, grid = data((2, 5)), cut(grids.karras(8))
    before = x0.clone()
    together = [inversion.ddim(denoise, x0, grid), *inversion.edict(denoise, x0, grid)]
    for k in range(2):
        one = x0[k : k + 1]
        alone = [inversion.ddim(denoise, one, grid), *inversion.edict(denoise, one, grid)]
        assert all(torch.equal(a[0], b[k]) for a, b in zip(alone, together, strict=True))
    assert torch.equal(x0, before)


# --- between --------------------------------------------------------------------------------------


@each_shape
def test_slerp_keeps_the_norm_and_ends_at_its_ends(shape: tuple[int, ...]) -> None:
    a, b = (noise.from_seeds(seeds, shape).draw(dtype=torch.float64) for seeds in ([1, 2], [3, 4]))
    norm = a.flatten(1).norm(dim=1)
    b = b * (norm / b.flatten(1).norm(dim=1)).reshape(-1, *[1] * len(shape))
    for weight in (0.0, 0.3, 0.5, 1.0):
        found = inversion.slerp(a, b, weight)
        torch.testing.assert_close(found.flatten(1).norm(dim=1), norm)
        u, v = a[0].flatten() / norm[0], b[0].flatten() / norm[0]
        angle = math.acos(float(u @ v))
        expected = math.sin((1 - weight) * angle) * a[0] + math.sin(weight * angle) * b[0]
        torch.testing.assert_close(found[0], expected / math.sin(angle))
    torch.testing.assert_close(inversion.slerp(a, b, 0.0), a)
    torch.testing.assert_close(inversion.slerp(a, b, 1.0), b)
    each = inversion.slerp(a, b, torch.tensor([0.2, 0.8]))
    torch.testing.assert_close(each[1:], inversion.slerp(a, b, 0.8)[1:], rtol=1e-6, atol=1e-6)


def test_slerp_of_one_noise_with_itself_and_with_its_opposite() -> None:
    a = noise.from_seeds([1], (7,)).draw()
    near = a * (1 + 1e-7)
    torch.testing.assert_close(inversion.slerp(a, near, 0.5), a)
    assert inversion.slerp(a, a, 0.5).dtype == torch.float32
    with pytest.raises(UsageError, match="opposite"):
        inversion.slerp(a, -a, 0.5)


def test_conditions_between() -> None:
    a = {"text": torch.zeros(2, 3, 4), "style": torch.zeros(2, 5)}
    b = {"text": torch.ones(2, 3, 4), "style": torch.full((2, 5), 2.0)}
    found = inversion.lerp(a, b, 0.25)
    assert (found["text"] == 0.25).all() and (found["style"] == 0.5).all()
    each = inversion.lerp(a, b, torch.tensor([0.0, 1.0]))
    assert each["text"][0].sum() == 0 and (each["text"][1] == 1).all()
    with pytest.raises(UsageError, match="same names"):
        inversion.lerp(a, {"text": b["text"]}, 0.5)
    with pytest.raises(UsageError, match="'k' is no tensor"):
        inversion.lerp({"k": torch.tensor([1])}, {"k": torch.tensor([2])}, 0.5)
    with pytest.raises(UsageError, match="shapes"):
        inversion.lerp({"k": torch.zeros(1, 2)}, {"k": torch.zeros(1, 3)}, 0.5)


def test_misuse_is_refused() -> None:
    denoise = Denoiser(net, schedules.linear())
    x0, grid = data((2, 5)), grids.leading(5)
    for options, message in (
        ({"told": "last"}, "'next'|own"),
        ({"read": "levels"}, "'level'"),
        ({"read": "level"}, "start="),
        ({"told": "own", "iterations": 2}, "told='next'"),
        ({"iterations": 0}, "at least 1"),
        ({"start": 0.5}, "above 0.001"),
    ):
        with pytest.raises(UsageError, match=message):
            inversion.ddim(denoise, x0, grid, **options)  # type: ignore[arg-type]
    for mixing in (0.0, 1.1):
        with pytest.raises(UsageError, match="mixing"):
            inversion.edict(denoise, x0, grid, mixing=mixing)
    with pytest.raises(UsageError, match="decreasing"):
        inversion.ddim(denoise, x0, lambda schedule: torch.tensor([0.2, 0.5, 0.0]))
    silent = Denoiser(net, schedules.from_name("zero_terminal"), predicts="v")
    with pytest.raises(UsageError, match="no signal"):
        inversion.ddim(silent, x0, grids.trailing(5))
