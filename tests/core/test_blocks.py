"""Long samples by blocks: the law of a Gaussian process in time is kept, on one, two and three axes; a run of blocks is
resumed, watched and repeated like any other.
"""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from mdiff.core import blocks, guidance, looking, operators, pipeline, schedules, tasks
from mdiff.core.analytic import Correlated
from mdiff.core.denoiser import Denoise, Denoiser
from mdiff.core.errors import MdiffError, UsageError
from mdiff.core.hooks import Given, Model, Problem, Request, Stage
from mdiff.core.host import Host
from mdiff.core.operators import Linear
from mdiff.core.registry import Registry
from mdiff.core.schedules import Time

SHAPES = [(2, 8), (1, 8, 2), (1, 8, 2, 2)]
"""Of whole samples: the first axis is time, in blocks of 4."""
SIZE, OVERLAP, RHO, COPIES = 4, 2, 0.8, 3000
SCHEDULE = schedules.cosine()

Guide = Callable[[Denoise, Any, Tensor], Denoise]
Make = Callable[..., Tensor]


def covariance(shape: tuple[int, ...]) -> Tensor:
    """Of an autoregressive process of order 1 in time, whose entries at one time go together as well.

    Given the last entries before it, its future does not depend on any earlier ones: blocks that know exactly what
    follows an end make the whole process exactly.
    """
    rest = torch.Size((shape[0], *shape[2:]))
    time = torch.arange(shape[1]).reshape(1, -1, *(1 for _ in shape[2:])).expand(shape).flatten()
    place = torch.arange(rest.numel()).reshape(rest).unsqueeze(1).expand(shape).flatten()
    apart = (time[:, None] - time).abs().double()
    return RHO**apart * torch.exp(-(place[:, None] - place).abs().double() / 2)


def data(shape: tuple[int, ...]) -> Correlated:
    return Correlated(schedule=SCHEDULE, covariance=covariance(shape))


def exact(process: Correlated, shape: tuple[int, ...]) -> Guide:
    """Guidance by the true covariance of x_0 given x_t, with which samples obey Bayes' rule."""
    eye = torch.eye(len(process.covariance), dtype=torch.float64).reshape(-1, *shape)

    def guide(denoise: Denoise, operator: Linear, measurement: Tensor) -> Denoise:
        a = operator(eye).flatten(1)

        def solve(residual: Tensor, t: Time[Any]) -> Tensor:
            inverse = torch.linalg.pinv(a @ process.given(t) @ a, rtol=1e-9, hermitian=True)
            return (residual.flatten(1).double() @ inverse).to(residual).reshape(residual.shape)

        return guidance.pseudo_inverse(denoise, operator, measurement, solve=solve)

    return guide


def fit(sample: Mapping[str, Any], shape: tuple[int, ...]) -> Tensor:
    return sample["values"].reshape(1, *shape)


def stage_of(
    denoise: Denoise,
    shape: tuple[int, ...],
    guide: Guide | None = None,
    copies: int = 1,
    size: int = SIZE,
    overlap: int = OVERLAP,
    forms: Mapping[str, tasks.Form] | None = None,
    bounds: Any = None,
) -> Stage:
    def prepare(request: Request, carry: dict[str, Any]) -> Problem:
        if "whole" not in carry:
            given = tasks.given(request, carry, shape, fit, forms=forms) or Given()
            given = Given(**{**vars(given), "guide": guide})
            carry["whole"] = blocks.Whole(shape=shape, size=size, overlap=overlap, given=given)
        here = blocks.block(carry["whole"])
        return Problem(
            shape=here.shape, given=here.given, more=here.more, copies=copies, bounds=bounds
        )

    def finish(
        request: Request, problem: Problem, x: Tensor | None, carry: dict[str, Any]
    ) -> Mapping[str, Any]:
        assert x is not None
        whole = blocks.put(carry["whole"], x)
        return {"whole": whole, "sample": {"values": whole.given.start}}

    return Stage(name="long", prepare=prepare, denoiser=denoise, finish=finish)


@pytest.fixture
def run(toy: Host, toy_registry: Registry) -> Make:
    """run(stage, files, **fields) -> the values that a request gives of a model of that stage."""

    def run(stage: Stage, values: Tensor | None = None, **fields: Any) -> Tensor:
        how = {name: fields.pop(name) for name in ("on_step", "resume") if name in fields}
        files = {} if values is None else {"input": {"values": values}}
        named = {} if values is None else {"input": "file"}
        card = toy_registry.cards["toy/gauss"]
        request = Request(model=card.id, **{"sampler": "dpmpp_2m", "steps": 30, **named, **fields})
        model = Model(modules={}, stages=(stage,))
        made = pipeline.generate(model, card, request, host=toy, files=files, **how)
        return cast(Tensor, made["values"])

    return run


# --- the law --------------------------------------------------------------------------------------


def moments(made: Tensor) -> tuple[Tensor, Tensor]:
    rows = made.flatten(1).double()
    return rows.mean(0), rows.T.cov()


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize("shape", SHAPES, ids=["1 axis", "2 axes", "3 axes"])
@pytest.mark.parametrize("operator", [None, "extend 0:6", "extend 6:0"])
def test_exactly_guided_blocks_have_the_law_of_the_whole(
    run: Make, shape: tuple[int, ...], operator: str | None
) -> None:
    here = (shape[0], SIZE, *shape[2:])
    short, long = data(here), data(shape)
    stage = stage_of(short, shape, exact(short, here), COPIES)
    mean, cov = torch.zeros(len(long.covariance), dtype=torch.float64), long.covariance
    if operator is None:
        made = run(stage)
    else:
        seen = torch.linspace(-1.5, 1.0, torch.Size(shape).numel() // 4)
        made = run(stage, seen.reshape(1, shape[0], 2, *shape[2:]), operator=operator)
        ends = (0, 2) if operator == "extend 0:6" else (6, 8)
        window = operators.crop([ends] + [None] * (len(shape) - 2))
        eye = torch.eye(len(cov), dtype=torch.float64).reshape(-1, *shape)
        mean, cov = long.posterior(window(eye).flatten(1).T, seen.double())
    found_mean, found = moments(made)
    # entries go together, and so do their errors: of a mean up to 3 times 0.018, of a covariance less
    assert rms(found_mean - mean) < 0.06 and rms(found - cov) < 0.04


@pytest.mark.parametrize("shape", SHAPES, ids=["1 axis", "2 axes", "3 axes"])
def test_reconstruction_guidance_sees_more_of_an_earlier_block_than_replacement(
    run: Make, shape: tuple[int, ...]
) -> None:
    short = data((shape[0], SIZE, *shape[2:]))
    lost = []
    for scale in (0.0, 2.0, 4.0):
        guide = partial(guidance.reconstruction, scale=scale) if scale else None
        made = run(stage_of(short, shape, guide, 1000))
        last, first = made[:, :, 3].flatten(1), made[:, :, 4].flatten(1)
        kept = (last * first).mean() / (last.square().mean() * first.square().mean()).sqrt()
        lost.append(RHO - float(kept))
    # of what goes together over the border replacement loses a third
    assert lost[0] > 0.25 and lost[0] > lost[1] + 0.1 > lost[2] + 0.15 and abs(lost[2]) < 0.12


# --- where blocks lie -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("known", "starts"),
    [
        ("............", [0, 2, 4, 6, 8]),
        ("...........", [0, 2, 4, 6, 7]),
        ("####........", [2, 4, 6, 8]),
        ("........####", [6, 4, 2, 0]),
        ("....####....", [6, 8, 2, 0]),
        ("####....####", [2, 4]),
        ("#...#...#...", [0, 3, 5, 7, 8]),
        ("#.........##", [0, 2, 4, 6]),
        ("############", [0]),
    ],
)
def test_blocks_go_on_from_what_is_known(known: str, starts: list[int]) -> None:
    assert blocks.plan([entry == "#" for entry in known], 4, 2) == starts


@pytest.mark.parametrize("size", range(2, 7))
def test_every_plan_covers_all(size: int) -> None:
    draws = torch.Generator().manual_seed(size)
    for overlap in range(1, size):
        for share in (0.0, 0.1, 0.5, 0.9):
            known = (torch.rand(17, generator=draws) < share).tolist()
            starts = blocks.plan(known, size, overlap)
            made = {place for low in starts for place in range(low, low + size)}
            assert {place for place, there in enumerate(known) if not there} <= made
            assert 0 <= min(starts) and max(starts) + size <= 17


def test_what_is_known_of_a_block_is_its_part_of_the_whole() -> None:
    start, keep = torch.arange(9.0).reshape(1, 1, 9), torch.arange(9).reshape(1, 1, 9) < 3
    measured = torch.arange(9.0).reshape(1, 1, 9) * 10
    given = Given(start=start, keep=keep, operator=operators.blur([0.0]), measurement=measured)
    whole = blocks.Whole(shape=(1, 9), size=4, overlap=1, given=given)
    here = blocks.block(whole)
    assert here.shape == (1, 4) and here.more == 1 and here.given is not None
    assert here.given.start is not None and here.given.start.flatten().tolist() == [2, 3, 4, 5]
    assert here.given.keep is not None and here.given.keep.flatten().tolist() == [1, 0, 0, 0]
    assert here.given.measurement is not None
    assert here.given.measurement.flatten().tolist() == [20, 30, 40, 50]
    # what was known stays whatever a sampler says of it, and what was not made is not known
    whole = blocks.put(whole, torch.full((2, 1, 4), -1.0))
    assert whole.given.start is not None and whole.given.keep is not None
    assert whole.given.start.tolist() == [[[0, 1, 2, -1, -1, -1, 6, 7, 8]]] * 2
    assert whole.given.keep.flatten().tolist() == [1] * 6 + [0] * 3
    assert start.flatten().tolist() == list(range(9)), "what was given is not changed"


def test_one_block_is_the_problem_it_would_be_without() -> None:
    given = Given(start=torch.zeros(1, 1, 3), keep=torch.ones(1, 1, 3, dtype=torch.bool))
    for length in (1, 3):
        whole = blocks.Whole(shape=(1, length), size=3, overlap=3, given=given)
        assert blocks.block(whole) == ((1, length), given, 0)
    assert blocks.block(blocks.Whole(shape=(1, 3), size=3, overlap=1)) == ((1, 3), None, 0)


# --- runs of blocks -------------------------------------------------------------------------------


class Smooth(nn.Module):
    """A random network that mixes neighbours in time."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x + 0.7 * x.roll(1, 2) - 0.4 * x.roll(2, 2))


def network(predicts: str = "v") -> Denoiser:
    return Denoiser(Smooth(), SCHEDULE, predicts=predicts)


FIELDS: dict[str, Any] = {"steps": 3, "sampler": "ddpm", "seed": 5}


@pytest.mark.parametrize("place", [(0, 2), (2, 1), (2, 3)])
def test_blocks_go_on_from_their_states_bit_for_bit(run: Make, place: tuple[int, int]) -> None:
    stage, states = stage_of(network(), (2, 9), partial(guidance.reconstruction, scale=2.0)), {}

    def stop(moment: pipeline.Moment) -> None:
        states[moment.turn] = moment.state
        if (moment.part, moment.state.index) == place:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(stage, on_step=stop, **FIELDS)
    told: list[int] = []
    resumed = run(stage, resume=states, on_step=lambda m: told.append(m.index), **FIELDS)
    assert torch.equal(resumed, run(stage, **FIELDS))
    assert told == list(range(3 * place[0] + place[1] + 1, 13))


def test_a_run_of_blocks_is_resumed_from_the_disk(
    toy: Host, toy_registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = toy_registry.cards["toy/gauss"]
    stage = stage_of(network(), (1, 9))

    def finish(*said: Any) -> Mapping[str, Any]:
        made = stage.finish(*said)
        return {**made, "sample": {"values": made["sample"]["values"].flatten()}}

    model = Model(modules={}, stages=(Stage(**{**vars(stage), "finish": finish, "preview": None}),))
    monkeypatch.setattr(pipeline, "open_model", lambda *said: model)
    monkeypatch.setattr(pipeline, "SAVE_EVERY", -1)
    options = {"options": {"gain": 1.0, "digits": 7}}
    request = Request(model=card.id, text="rain", **FIELDS, **options)
    jobs = pipeline.plan([request], toy_registry, tmp_path / "a")
    (whole,) = pipeline.run(pipeline.plan([request], toy_registry, tmp_path / "b"), toy)

    def stop(moment: pipeline.Moment) -> None:
        if moment.index == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(pipeline.run(jobs, toy, keep=True, on_step=stop))
    (folder,) = (tmp_path / "a").glob("*.state")
    assert sorted(f.name for f in folder.iterdir()) == [f"{k}.safetensors" for k in range(3)]
    told: list[int] = []
    list(pipeline.run(jobs, toy, resume=True, on_step=lambda m: told.append(m.index)))
    assert told == [9, 10, 11, 12] and not folder.exists()
    assert jobs[0].path.read_bytes() == whole.path.read_bytes()


def test_each_block_has_noise_of_its_own_and_each_candidate_its_own_past(run: Make) -> None:
    seeds = [pipeline.seeds(5, 2, stage, part) for stage in range(3) for part in range(3)]
    assert len({seed for pair in seeds for seed in pair}) == 18 and seeds[0][0] == 5
    alone = run(stage_of(network(), (2, 9)), **FIELDS)
    both = run(stage_of(network(), (2, 9), copies=2), **FIELDS)
    torch.testing.assert_close(both[:1], alone)
    assert (both[0] - both[1]).abs().amin(0).min() > 1e-4


def test_progress_is_over_all_blocks(run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pace, seen, told = None, [], []

    def look(moment: pipeline.Moment) -> None:
        nonlocal pace
        pace = pace or looking.Pace([moment.request])
        pace.step(moment)
        seen.append(pace.done)
        told.append((moment.part, moment.index, moment.total))
        sample = moment.sample()
        assert sample is not None and sample["values"].shape == (1, 2, 9)

    run(stage_of(network(), (2, 9)), on_step=look, **FIELDS)
    assert seen == pytest.approx([step / 12 for step in range(1, 13)])
    assert told == [(step // 3, step + 1, 12) for step in range(12)]


def test_a_trajectory_is_spread_over_all_blocks(run: Make) -> None:
    shown: list[int] = []

    def look(moment: pipeline.Moment) -> None:
        if moment.index in looking.spread(moment.total, 4):
            shown.append(moment.index)

    run(stage_of(network(), (2, 9)), on_step=look, **FIELDS)
    assert shown == [1, 5, 8, 12]


def test_an_input_is_changed_block_by_block(run: Make) -> None:
    x0 = torch.linspace(-1, 1, 18).reshape(1, 2, 9)
    stage, asked = stage_of(network(), (2, 9)), {**FIELDS, "sampler": "ddim", "steps": 20}
    near, far = (run(stage, x0, strength=strength, **asked) for strength in (0.05, 0.9))
    assert 2 * rms(near - x0) < rms(far - x0)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_blocks_of_something_measured_join(run: Make, scale: float) -> None:
    """What is measured of each entry holds in every block, and so does what earlier blocks made."""
    mix = operators.channel_mix([[0.5, 0.5]])

    def mono(words: Any, shape: tuple[int, ...], units: Any, read: tasks.Read) -> Given:
        return tasks.measured(mix, shape, read)

    guide = partial(guidance.reconstruction, scale=scale) if scale else None
    stage = stage_of(network(), (2, 9), guide, copies=2, forms={"mono": mono})
    y, ends = torch.linspace(-1, 1, 9).reshape(1, 1, 9), []

    def look(moment: pipeline.Moment) -> None:
        if moment.state.index == moment.state.total:
            ends.append((moment.problem, moment.state.x))

    made = run(stage, y, operator="mono", on_step=look, **FIELDS)
    torch.testing.assert_close(mix(made), y.expand(2, -1, -1), atol=1e-5, rtol=1e-5)
    assert [problem.more for problem, _ in ends] == [3, 2, 1, 0]
    for (_, before), (_, after) in pairwise(ends[:3]):
        torch.testing.assert_close(after[:, :, :OVERLAP], before[:, :, OVERLAP:])


# --- bounds ---------------------------------------------------------------------------------------


def test_bounds_come_after_all_guidance_and_before_what_is_known(run: Make) -> None:
    asked = {**FIELDS, "sampler": "ddim", "operator": "extend 0:7"}
    y = torch.tensor([[[3.0, 3.0], [0.5, -3.0]]])
    for scale in (0.0, 50.0):
        guide = partial(guidance.reconstruction, scale=scale) if scale else None
        made = run(stage_of(network(), (2, 9), guide, bounds=guidance.clamp), y, **asked)
        # a strong pull goes far beyond the bounds, and what is known stays beyond them
        assert made[:, :, 2:].abs().max() <= 1 and torch.equal(made[:, :, :2], y)
        if scale:
            assert run(stage_of(network(), (2, 9), guide), y, **asked)[:, :, 2:].abs().max() > 1
    bounds = guidance.from_clip(0.9)
    assert bounds is not None and guidance.from_clip(False) is None
    made = run(stage_of(network(), (2, 4), bounds=bounds), **FIELDS)
    assert made.abs().max() <= 1


# --- what cannot be -------------------------------------------------------------------------------


def test_what_cannot_be_made_in_blocks_is_said() -> None:
    for overlap in (0, 4, 9):
        with pytest.raises(UsageError, match=f"9 are made in blocks of 4, .* and not by {overlap}"):
            blocks.Whole(shape=(1, 9), size=4, overlap=overlap)
    small = Given(operator=operators.downsample([3]), measurement=torch.zeros(1, 1, 3))
    with pytest.raises(UsageError, match="makes 3 of 9, which is more than the 4 .*: ask for less"):
        blocks.Whole(shape=(1, 9), size=4, overlap=2, given=small)


def test_a_stage_that_comes_to_no_end_is_the_plugins_fault(run: Make) -> None:
    def prepare(request: Request, carry: dict[str, Any]) -> Problem:
        return Problem(shape=(1, 4), more=1)

    stage = stage_of(network(), (1, 4))
    endless = Stage(**{**vars(stage), "prepare": prepare, "finish": lambda *said: {}})
    with pytest.raises(MdiffError, match="plugin 'toy': stage 'long' of toy/gauss comes to no end"):
        run(endless, **FIELDS)
