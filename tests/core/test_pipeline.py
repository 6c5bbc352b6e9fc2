"""The pipeline: one request is one output whatever runs beside it, and an interrupted one goes on
bit for bit.
"""

import errno
import json
import os

import pytest
import torch

from mdiff.core import pipeline, record
from mdiff.core.errors import IntegrityError, MdiffError, PluginError, UsageError
from mdiff.core.hooks import Model, Problem, Stage
from mdiff.core.pipeline import derive, generate, open_model, plan, run, seeds
from mdiff.core.request import expand, resolve


@pytest.fixture
def card(toy_registry):
    return toy_registry.cards["toy/gauss"]


@pytest.fixture
def ask(card, toy):
    """A request of the toy model."""
    return lambda **given: resolve(card, {"text": "rain", **given}, toy)


@pytest.fixture
def make(card, toy):
    """The values that a request gives."""

    def make(request, **how):
        model = open_model(card, request, toy)
        return generate(model, card, request, host=toy, **how)["values"]

    return make


def test_seeds_of_candidates_and_stages():
    assert seeds(7, 3, 0)[0] == 7
    drawn = [seed for stage in range(4) for seed in seeds(7, 5, stage)]
    assert len(set(drawn)) == 20 and all(0 <= seed < 2**32 for seed in drawn)
    assert seeds(7, 5, 2)[:2] == seeds(7, 2, 2), "a candidate does not depend on how many there are"
    assert derive(7, "x", 0) == 7 and derive(7, "x", 1) != derive(8, "x", 1)


def test_the_same_request_is_the_same_sample_and_seeds_differ(ask, make):
    one = make(ask(seed=1))
    assert torch.equal(one, make(ask(seed=1))) and not torch.equal(one, make(ask(seed=2)))


def test_one_sample_does_not_depend_on_its_neighbours(card, toy, toy_registry, tmp_path):
    many = expand(card, [{"text": "rain"}], [1, 2, 3, 4], toy)
    outputs = list(run(plan(many, toy_registry, tmp_path / "many"), toy))
    alone = list(run(plan(many[2:3], toy_registry, tmp_path / "alone"), toy))
    assert outputs[2].path.name == alone[0].path.name
    assert outputs[2].path.read_bytes() == alone[0].path.read_bytes()
    assert len({output.path.read_bytes() for output in outputs}) == 4


def test_the_analytic_model_gives_its_mean(ask, make):
    # guidance 1 leaves the conditional Gaussian: mean -1.75 for this text, then a tenth of a second
    # draw around that mean; the better of two candidates lies above it
    values = torch.cat([make(ask(seed=s, guidance=1.0, duration=4, steps=30)) for s in range(8)])
    assert abs(values.mean() / 1.1 + 1.75) < 0.2


def test_guidance_and_options_reach_the_model(ask, make):
    plain, guided = make(ask(guidance=1.0)), make(ask(guidance=3.0))
    assert guided.mean() < 2 * plain.mean() < 0
    assert torch.equal(make(ask(options={"gain": 2.0})), 2 * make(ask()))
    assert make(ask(duration=2.0)).shape == (16,)


def test_progress_tells_each_step_of_each_stage(ask, make):
    told = []
    make(ask(steps=3), on_step=lambda m: told.append((m.number, m.state.index, m.state.total)))
    assert told == [(stage, index, 3) for stage in (0, 1) for index in (1, 2, 3)]


@pytest.mark.parametrize("place", [(0, 2), (0, 6), (1, 3)])
def test_a_sample_goes_on_from_its_states_bit_for_bit(ask, make, place):
    request, states = ask(seed=5), {}

    def stop(moment):
        states[moment.number] = moment.state
        if (moment.number, moment.state.index) == place:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(request, on_step=stop)
    told = []
    resumed = make(request, resume=states, on_step=lambda m: told.append((m.number, m.state.index)))
    assert torch.equal(resumed, make(request))
    assert (place[0], place[1]) not in told, "what was done is not done again"


def test_an_interrupted_run_is_resumed_from_the_disk(ask, toy, toy_registry, tmp_path):
    jobs = plan([ask(seed=5)], toy_registry, tmp_path)
    (whole,) = run(plan([ask(seed=5)], toy_registry, tmp_path / "whole"), toy)

    def stop(moment):
        if (moment.number, moment.state.index) == (1, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(run(jobs, toy, keep=True, on_step=stop))
    folder = next(tmp_path.glob("*.state"))
    assert sorted(f.name for f in folder.iterdir()) == ["0.safetensors", "1.safetensors"]
    assert not jobs[0].path.exists()
    state = (folder / "1.safetensors").read_bytes()
    (folder / "1.safetensors").write_bytes(state[:-1])
    with pytest.raises(IntegrityError, match="1.safetensors is not a whole safetensors file"):
        list(run(jobs, toy, resume=True))
    (folder / "1.safetensors").write_bytes(state)
    told = []
    list(run(jobs, toy, resume=True, on_step=lambda m: told.append((m.number, m.state.index))))
    assert told == [(1, index) for index in (3, 4, 5, 6)]
    assert jobs[0].path.read_bytes() == whole.path.read_bytes() and not folder.exists()


def test_resume_leaves_out_what_is_complete(card, toy, toy_registry, tmp_path):
    jobs = plan(expand(card, [{"text": "rain"}], [1, 2, 3], toy), toy_registry, tmp_path)
    first = list(run(jobs, toy))
    jobs[1].path.write_text("damaged")
    again = list(run(jobs, toy, resume=True))
    assert [output.done_before for output in again] == [True, False, True]
    assert [output.path for output in again] == [output.path for output in first]


def test_an_output_has_its_record_inside_and_beside(ask, toy, toy_registry, tmp_path):
    (output,) = run(plan([ask(seed=9)], toy_registry, tmp_path / "a.txt"), toy)
    assert output.path == tmp_path / "a.txt" and output.seconds > 0
    inside = record.parse(output.path.read_text().splitlines()[1])
    beside = json.loads((tmp_path / "a.txt.json").read_text())
    assert inside == output.record and {**inside, "file": beside["file"]} == beside
    assert record.request_of(inside) == ask(seed=9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "a.txt.json"]


def test_where_outputs_go(card, ask, toy, toy_registry, tmp_path):
    two = expand(card, [{"text": "rain"}], [1, 2], toy)
    names = [job.path.name for job in plan(two, toy_registry, tmp_path)]
    assert names == [f"gauss-{r.seed}-{record.key(r)}.txt" for r in two]
    assert plan([ask()], toy_registry, tmp_path, "CSV")[0].path.suffix == ".csv"
    assert plan([ask()], toy_registry, tmp_path / "A.CSV")[0].media.suffix == ".csv"
    for out, suffix, words in [
        (tmp_path / "a.txt", "csv", "--format csv and the file a.txt say different things"),
        (tmp_path / "a.wav", "", "does not write .wav files; it writes: .txt, .csv"),
        (tmp_path, "wav", "does not write .wav files; it writes: .txt, .csv"),
    ]:
        with pytest.raises(UsageError, match=words):
            plan([ask()], toy_registry, out, suffix)
    with pytest.raises(UsageError, match="2 outputs do not fit into the file"):
        plan(two, toy_registry, tmp_path / "a.txt")


def broken(card, **how):
    """A model of one stage with something wrong in it."""
    stage = {"prepare": lambda r, c: Problem(shape=()), "denoiser": None, "finish": lambda *a: {}}
    return Model(modules={}, stages=(Stage(name="only", **{**stage, **how}),))


def test_what_fails_in_a_stage_is_the_plugins(card, ask, toy):
    def fail(*arguments):
        raise ValueError("no idea")

    words = "plugin 'toy' .* failed in stage 'only' of toy/gauss: ValueError: no idea"
    for how in ({"prepare": fail}, {"finish": fail}):
        with pytest.raises(PluginError, match=words):
            generate(broken(card, **how), card, ask(), host=toy)
    with pytest.raises(MdiffError, match="the last stage of toy/gauss left no sample"):
        generate(broken(card), card, ask(), host=toy)


def test_what_is_not_a_model_is_refused(ask, card, toy, monkeypatch):
    import mdiff_toy.model

    monkeypatch.setattr(mdiff_toy.model, "build", lambda *a: "a model")
    with pytest.raises(MdiffError, match="builds 'a model' for toy/gauss instead of a Model"):
        open_model(card, ask(), toy)


def test_a_model_in_bf16_stays_close(ask, make):
    one, other = make(ask(precision="bf16", steps=20)), make(ask(steps=20))
    assert not torch.equal(one, other) and (one - other).abs().max() < 0.2


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), ValueError("x")]
)
def test_a_failed_write_leaves_nothing_and_earlier_outputs_stay(
    card, toy, toy_registry, tmp_path, monkeypatch, error
):
    import mdiff_toy

    jobs = plan(expand(card, [{"text": "rain"}], [1, 2], toy), toy_registry, tmp_path)
    output = next(running := run(jobs, toy))
    monkeypatch.setattr(mdiff_toy.record, "short", lambda made: (_ for _ in ()).throw(error))
    words = (
        "cannot write .*No space left" if isinstance(error, OSError) else "writing .txt: ValueError"
    )
    with pytest.raises(MdiffError, match=words):
        next(running)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [output.path.name, output.path.name + ".json"]
    assert mdiff_toy.EVENTS == ["started", "saved", "started", "failed"]


def test_a_folder_that_cannot_be_written_is_found_out_before_the_work(
    ask, toy, toy_registry, tmp_path
):
    (tmp_path / "file").write_text("")
    steps = []
    with pytest.raises(MdiffError, match="cannot write into"):
        jobs = plan([ask()], toy_registry, tmp_path / "file" / "sub")
        list(run(jobs, toy, on_step=lambda *a: steps.append(a)))
    assert not steps


def test_a_record_of_other_weights_is_not_run_again(card, ask, toy):
    made = pipeline.describe(card, ask(), toy)
    pipeline.as_recorded(made, card)
    made["weights"] = {"weights.safetensors": "0" * 64}
    with pytest.raises(IntegrityError, match="weights of toy/gauss are not those"):
        pipeline.as_recorded(made, card)


def test_the_catalogue_has_the_cores_and_the_plugins(toy):
    found = pipeline.catalogue(toy)
    assert {"ddim", "dpmpp_2m", "heun"} <= set(found["samplers"])
    assert found["grids"]["toy/lazy"].source == "plugin toy"
    assert list(found["text_encoders"]) == ["toy/letters"]
    assert "datasets" not in found
