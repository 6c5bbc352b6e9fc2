"""The log of a run: its lines, what a broken-off run leaves, and who hears what."""

import json
import math
import re
from pathlib import Path

import pytest

from mdiff.core.errors import MdiffError, MissingError
from mdiff.core.training import log as logs
from mdiff.core.training.log import Log


def step(log: Log, number: int, loss: float = 0.5, **more: object) -> None:
    """A line after `number` steps of 4 samples, each of which took 0.1 s, of 100."""
    log.step(
        **{
            "step": number,
            "loss": loss,
            "levels": [0.25, None, 1 / 3],
            "rate": 1e-3,
            "norm": 2.0,
            "samples": 4 * number,
            "seconds": 0.1 * number,
            "progress": number / 100,
            **more,
        }
    )


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_line_has_all_that_is_said_of_a_step(tmp_path):
    with Log(tmp_path) as log:
        step(log, 10)
        step(log, 20, samples=120, seconds=3.0)
    assert lines(tmp_path)[0] == {
        "step": 10,
        "loss": 0.5,
        "loss_by_noise": [0.25, None, 0.333333],
        "rate": 0.001,
        "gradient_norm": 2.0,
        "samples": 40,
        "samples_per_second": 40.0,
        "seconds": 1.0,
    }
    assert (
        lines(tmp_path)[1]["samples_per_second"] == 40.0
    )  # 80 samples in 2 s since the line before


def test_a_run_that_goes_on_drops_the_lines_of_lost_steps(tmp_path):
    with Log(tmp_path) as log:
        for number in (10, 20, 30):
            step(log, number)
    path = tmp_path / "log.jsonl"
    path.write_text(path.read_text() + '{"step": 40, "lo')  # killed in the middle of a line
    with Log(tmp_path) as log:
        step(log, 20, loss=0.7, samples=160, seconds=2.0)
        step(log, 30)
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [
        (10, 0.5),
        (20, 0.7),
        (30, 0.5),
    ]
    assert lines(tmp_path)[1]["samples_per_second"] == 120.0  # 120 samples in 1 s since step 10


def test_nothing_is_written_before_the_first_line(tmp_path):
    with Log(tmp_path / "run") as log:
        log.say("hello")
        log.tick(1, 0.1)
    assert not (tmp_path / "run").exists()


def test_a_log_that_is_damaged_in_the_middle_is_not_thrown_away(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(MdiffError, match=r"line 2 of .*log.jsonl is not JSON"):
        logs.read(tmp_path / "log.jsonl")
    with Log(tmp_path) as log, pytest.raises(MdiffError, match="line 2"):
        step(log, 3)
    assert "rubbish" in (tmp_path / "log.jsonl").read_text()


def test_a_full_disk_is_one_line(tmp_path):
    with (
        pytest.raises(MdiffError, match="cannot write .*log.jsonl: No space left on device"),
        Log(tmp_path) as log,
    ):
        step(log, 1)
        log._file = log._open.enter_context(Path("/dev/full").open("w"))  # noqa: SIM115
        step(log, 2)
    assert [line["step"] for line in lines(tmp_path)] == [1]


def test_talk_goes_to_stderr_and_lines_to_stdout(tmp_path, capsys, monkeypatch):
    clock = iter(range(0, 1000, 60))  # a minute at each look
    monkeypatch.setattr(logs.time, "monotonic", lambda: float(next(clock)))
    with Log(tmp_path, steps=100, as_json=True) as log:
        log.say("hello")
        step(log, 10)
        step(log, 20)
    said = capsys.readouterr()
    assert [json.loads(line) for line in said.out.splitlines()] == lines(tmp_path)
    first, second, third = said.err.splitlines()
    assert first == "hello"
    assert second == "step 10/100  loss 0.5000  40 samples/s  0.0 min"
    assert re.fullmatch(r"step 20/100  loss 0.5000  40 samples/s  0.0 min, \d+.0 min to go", third)


def test_plain_lines_keep_a_distance(tmp_path, capsys):
    with Log(tmp_path) as log:
        for number in range(1, 50):
            step(log, number)
    assert len(capsys.readouterr().err.splitlines()) == 1 and len(lines(tmp_path)) == 49


@pytest.mark.parametrize(
    ("choice", "out", "written"), [("quiet", True, True), ("silent", False, False)]
)
def test_quiet_says_nothing_and_silent_writes_nothing(tmp_path, capsys, choice, out, written):
    with Log(tmp_path, as_json=True, **{choice: True}) as log:
        log.say("hello")
        step(log, 10)
    said = capsys.readouterr()
    assert said.err == "" and bool(said.out) == out and (tmp_path / "log.jsonl").exists() == written


def test_a_terminal_shows_one_live_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logs.sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    with Log(tmp_path, steps=100) as log:
        log.say("[odd] words: " + "w" * 150)
        step(log, 10)
        log.tick(11, 0.11)
        log._bar.refresh()
        shown = capsys.readouterr().err
    assert "[odd] words: " + "w" * 150 in shown.replace("\n", "")
    assert "step 11/100" in shown and "loss 0.5000  40 samples/s" in shown and "min to go" in shown


def test_how_long_it_takes_is_told_from_the_pace_of_this_process(tmp_path, monkeypatch):
    clock = iter([100.0, 160.0])
    monkeypatch.setattr(logs.time, "monotonic", lambda: next(clock))
    log = Log(tmp_path, quiet=True)
    log.tick(500, 0.5)  # a run that goes on at its half
    assert log._left(0.6) == "4.0 min to go"


def test_tensorboard_gets_the_same(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Log(tmp_path, tensorboard=True, quiet=True) as log:
        step(log, 10)
        step(log, 20, loss=0.25)
    seen = EventAccumulator(str(tmp_path / "tensorboard"))
    seen.Reload()
    assert [(e.step, e.value) for e in seen.Scalars("loss")] == [(10, 0.5), (20, 0.25)]
    assert {"rate", "gradient_norm", "loss_by_noise/0", "loss_by_noise/2"} <= set(
        seen.Tags()["scalars"]
    )
    assert "loss_by_noise/1" not in seen.Tags()["scalars"]
    assert math.isclose(seen.Scalars("loss_by_noise/2")[0].value, 1 / 3, rel_tol=1e-5)


def test_tensorboard_that_is_not_there_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match=r"pip install 'mdiffusion\[train\]'"):
        Log(tmp_path, tensorboard=True)
