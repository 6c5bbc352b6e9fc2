"""The command line: stdout is data, stderr is talk, exit codes tell, and no file is ever half
there.
"""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mdiff.cli import main
from mdiff.core import pipeline, record


@pytest.fixture
def mdiff(toy, tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder with the toy plugin: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def fails(outcome: tuple[int, str, str], code: int, *words: str) -> None:
    """The command failed with this code, one line on stderr that has the words, and no data."""
    got, out, err = outcome
    assert got == code and out == "", outcome
    last = err.splitlines()[-1]
    assert last.startswith("mdiff: ") and "Traceback" not in err
    assert all(word in last for word in words), last


def files(folder: Path = Path()) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


RAIN = ("run", "toy", "--text", "rain", "--seed", "3")


def test_run_prints_the_path_and_talks_on_stderr(mdiff):
    code, out, err = mdiff(*RAIN)
    path = Path(out.strip())
    assert (
        code == 0 and path.parent == Path("outputs") and err == "toy/gauss, fp32 on cpu, seed 3\n"
    )
    assert files() == [str(path), f"{path}.json"]
    assert mdiff(*RAIN, "--quiet") == (0, out, "")


def test_json_is_an_object_a_line(mdiff):
    code, out, err = mdiff(*RAIN, "--count", 3, "--json", "--duration", 2)
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [line["seed"] for line in lines] == [3, 4, 5]
    assert all(Path(line["path"]).is_file() and line["model"] == "toy/gauss" for line in lines)
    assert all(
        line["real_time_factor"] == pytest.approx(line["seconds"] / 2, abs=1e-3) for line in lines
    )
    assert "seed 3-5" in err


def test_a_drawn_seed_is_printed_and_makes_the_same_again(mdiff):
    _, out, err = mdiff("run", "toy", "--text", "rain")
    seed = err.split("seed ")[1].split()[0]
    assert "(drawn)" in err and record.read_sidecar(Path(out.strip()))["seed"] == int(seed)
    assert mdiff("run", "toy", "--text", "rain", "--seed", seed)[1] == out


def test_text_from_stdin(mdiff, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"rain\n")))
    assert mdiff("run", "toy", "--text", "-", "--seed", 3)[1] == mdiff(*RAIN)[1]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    fails(mdiff("run", "toy", "--text", "-"), 2, "stdin is not UTF-8")


def test_options_reach_the_request(mdiff):
    given = "--steps 4 --sampler heun --grid karras --guidance 1.5 --precision fp32 --device cpu"
    _, out, _ = mdiff(*RAIN, *given.split(), "-o", "digits=3", "--option", "gain=2", "--dry-run")
    made = json.loads(out)["request"]
    assert (made["steps"], made["sampler"], made["grid"], made["guidance"]) == (
        4,
        "heun",
        "karras",
        1.5,
    )
    assert made["options"] == {"digits": 3, "gain": 2.0} and made["text"] == "rain"


def test_dry_run_needs_no_weights_and_touches_no_disk(mdiff, toy_site):
    (toy_site / "mdiff_toy" / "weights.safetensors").unlink()
    code, out, _ = mdiff(*RAIN, "--count", 2, "--dry-run", "--json")
    assert code == 0 and [json.loads(line)["request"]["seed"] for line in out.splitlines()] == [
        3,
        4,
    ]
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run"], 2, ["name a modality or a model: mdiff run audio"]),
        (["run", "toy"], 2, ["toy/gauss needs a text"]),
        (["run", "tox", "--text", "x"], 3, ["no model 'tox'; did you mean 'toy'?"]),
        (["run", "toy", "--text", " "], 2, ["--text is empty"]),
        (["run", "toy", "--text", "w " * 1001], 2, ["1001 words"]),
        (["run", "toy", "--txt", "x"], 2, ["No such option", "--text"]),
        (["run", "free", "--text", "x"], 2, ["toy/free does not take --text"]),
        ([*RAIN, "--class", "x"], 2, ["does not take --class"]),
        ([*RAIN, "--duration", "9"], 2, ["--duration should be at most 4"]),
        ([*RAIN, "--duration", "x"], 2, ["'x' is not a valid float"]),
        ([*RAIN, "-o", "digit=3"], 2, ["no option 'digit'; did you mean 'digits'?"]),
        ([*RAIN, "-o", "digits"], 2, ["--option 'digits' should be key=value"]),
        ([*RAIN, "--sampler", "heum"], 2, ["did you mean 'heun'?"]),
        ([*RAIN, "--seed", "1-"], 2, ["should be a whole number or a range"]),
        ([*RAIN, "--seed", "1,2", "--count", "2"], 2, ["--count counts from one seed"]),
        ([*RAIN, "--seed", 2**32 - 1, "--count", "2"], 2, ["below 2**32"]),
        (
            [*RAIN, "--count", "2", "--out", "a.txt"],
            2,
            ["2 outputs do not fit into the file a.txt"],
        ),
        ([*RAIN, "--out", "a.wav"], 2, ["does not write .wav files; it writes: .txt, .csv"]),
        ([*RAIN, "--device", "cuda:77"], 3, ["there is no device 'cuda:77' here"]),
        ([*RAIN, "--grid", "leading"], 2, ["is continuous"]),
        (["run", "toy", "--text", "x", "--resume"], 2, ["--resume needs the --seed"]),
        (["run", "toy", "--prompts", "none.txt"], 3, ["cannot read none.txt"]),
        (["run", "toy", "--prompts", "p", "--text", "x"], 2, ["leave --text and --again out"]),
        (["run", "--again", "none.txt"], 3, ["no file 'none.txt'"]),
        (["info", "none.txt"], 3, ["no model 'none.txt'"]),
        (["models", "gaus"], 3, ["did you mean 'gauss'?"]),
        (["rnu"], 2, ["No such command 'rnu'"]),
        (["--no-plugin", "toy", "run", "toy"], 3, ["plugin 'toy'", "is blocked"]),
        (["run", "toy", "--text", "x", "--no-plugin", "toy"], 3, ["is blocked"]),
    ],
)
def test_what_a_person_does_wrong_is_one_line_and_no_file(mdiff, arguments, code, words):
    fails(mdiff(*arguments), code, *words)
    assert files() == []


def test_no_arguments_show_the_help(mdiff):
    code, out, _ = mdiff()
    assert code == 0 and "Usage: mdiff" in out and "doctor" in out
    assert mdiff("run", "--help")[0] == 0
    assert mdiff("--version")[1].startswith("mdiff, version")


def test_broken_weights_are_integrity(mdiff, toy_site):
    weights = toy_site / "mdiff_toy" / "weights.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    fails(mdiff(*RAIN), 4, "has sha256", "install the package")
    weights.unlink()
    fails(mdiff(*RAIN), 3, "cannot be read", "install the package")
    assert files() == []


def test_again_makes_the_same_bytes_and_what_is_said_wins(mdiff):
    out = mdiff(*RAIN, "--count", 2, "-o", "gain=3", "--out", "first")[1].splitlines()[1]
    Path(out).rename("elsewhere.txt")
    code, again, _ = mdiff("run", "--again", "elsewhere.txt", "--out", "second")
    assert code == 0 and Path(again.strip()).name == Path(out).name
    assert Path(again.strip()).read_bytes() == Path("elsewhere.txt").read_bytes()
    dry = mdiff(
        "run", "--again", "elsewhere.txt", "--seed", 9, "--steps", 2, "-o", "digits=2", "--dry-run"
    )
    made = json.loads(dry[1])["request"]
    assert (made["seed"], made["steps"], made["text"]) == (9, 2, "rain")
    assert made["options"] == {"digits": 2, "gain": 3.0}


def test_again_from_a_file_that_holds_no_record(mdiff):
    path = Path(mdiff(*RAIN, "--format", "csv")[1].strip())
    assert path.suffix == ".csv"
    again = mdiff("run", "--again", path, "--out", "again.csv")[1].strip()
    assert Path(again).read_bytes() == path.read_bytes()
    record.sidecar(path).unlink()
    fails(mdiff("run", "--again", path), 3, "holds no record")


def test_again_refuses_other_weights(mdiff, toy_site):
    path = mdiff(*RAIN)[1].strip()
    card = toy_site / "mdiff_toy" / "registry.toml"
    text = card.read_text()
    made = json.loads(record.sidecar(Path(path)).read_text())
    sha = made["weights"]["weights.safetensors"]
    card.write_text(text.replace(sha, "f" * 64))
    fails(mdiff("run", "--again", path), 4, "the weights of toy/gauss are not those")


def test_prompts_and_resume_do_what_is_missing(mdiff):
    Path("p.txt").write_text("rain\nwind\nrain\n")
    run = ("run", "toy", "--prompts", "p.txt", "--seed", "1,2")
    code, out, _ = mdiff(*run)
    paths = [Path(line) for line in out.splitlines()]
    assert code == 0 and len(set(paths)) == len(paths) == 4
    whole = paths[2].read_bytes()
    paths[2].write_text("half")
    record.sidecar(paths[0]).unlink()
    code, out, _ = mdiff(*run, "--resume", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line.get("done_before", False) for line in lines] == [False, True, False, True]
    assert paths[2].read_bytes() == whole


def test_prompts_of_json_lines(mdiff):
    lines = [
        '{"text": "rain", "seed": 7, "options": {"digits": 2}}',
        '{"text": "wind", "steps": 3}',
    ]
    Path("p.jsonl").write_text("\n".join(lines))
    _, out, _ = mdiff("run", "toy", "--prompts", "p.jsonl", "--seed", 1, "--dry-run", "--json")
    made = [json.loads(line)["request"] for line in out.splitlines()]
    assert [(r["text"], r["seed"], r["steps"]) for r in made] == [("rain", 7, 6), ("wind", 1, 3)]
    assert made[0]["options"]["digits"] == 2
    Path("p.jsonl").write_text('{"text": "rain"}\n{"txt": "wind"}')
    fails(
        mdiff("run", "toy", "--prompts", "p.jsonl"), 2, "prompt 2", "no 'txt'; did you mean 'text'?"
    )


def interrupt(monkeypatch, at: int):
    """A Ctrl-C in the at-th step of the run."""
    steps, count = pipeline.steps, iter(range(10**6))

    def interrupted(*arguments, **how):
        for state in steps(*arguments, **how):
            if next(count) == at:
                raise KeyboardInterrupt
            yield state

    monkeypatch.setattr(pipeline, "steps", interrupted)


def test_ctrl_c_leaves_whole_outputs_only(mdiff, monkeypatch):
    interrupt(monkeypatch, at=16)
    code, out, err = mdiff(*RAIN, "--count", 3)
    assert code == 130 and err.splitlines()[-1] == "mdiff: interrupted"
    (path,) = out.splitlines()
    assert files() == [path, f"{path}.json"]


def test_ctrl_c_among_prompts_keeps_the_state_and_resume_goes_on(mdiff, monkeypatch):
    Path("p.txt").write_text("rain\nwind\n")
    run = ("run", "toy", "--prompts", "p.txt", "--seed", 1)
    whole = [Path(line).read_bytes() for line in mdiff(*run, "--out", "whole")[1].splitlines()]
    with monkeypatch.context() as patch:
        interrupt(patch, at=16)
        code, out, err = mdiff(*run)
        assert code == 130 and "with --seed 1 --resume" in err and len(out.splitlines()) == 1
    kept = [name for name in files(Path("outputs")) if ".state" in name]
    assert [Path(name).name for name in kept] == ["0.safetensors"]
    code, out, _ = mdiff(*run, "--resume")
    assert code == 0 and [Path(line).read_bytes() for line in out.splitlines()] == whole
    assert len(files(Path("outputs"))) == 4


def test_a_folder_that_cannot_be_written(mdiff):
    Path("file").write_text("")
    fails(mdiff(*RAIN, "--out", "file/sub"), 1, "cannot write into file/sub")
    fails(mdiff(*RAIN, "--out", "/proc/nothing"), 1, "cannot write into /proc/nothing")


def test_a_full_disk(mdiff, monkeypatch):
    def full(self, text):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        fails(mdiff(*RAIN), 1, "cannot write outputs/", "No space left on device")
    assert files() == []


def test_a_bug_is_one_line_and_a_traceback_on_demand(mdiff, monkeypatch):
    def bug(*arguments, **how):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(pipeline, "plan", bug)
    fails(mdiff(*RAIN), 1, "unexpected RuntimeError: two lines", "MDIFF_DEBUG=1")
    monkeypatch.setenv("MDIFF_DEBUG", "1")
    assert "Traceback" in mdiff(*RAIN)[2]


def test_a_model_in_a_folder(mdiff, toy_site):
    package = toy_site / "mdiff_toy"
    Path("mine").mkdir()
    for name in ("registry.toml", "weights.safetensors"):
        (Path("mine") / name).write_bytes((package / name).read_bytes())
    code, out, _ = mdiff("run", "./mine", "--text", "rain", "--seed", 3)
    assert code == 0
    made = record.read_sidecar(Path(out.strip()))
    assert made["model"] == "toy/gauss" and made["request"]["model"] == "./mine"
    again = mdiff("run", "--again", out.strip(), "--out", "again.txt")
    assert Path(again[1].strip()).read_bytes() == Path(out.strip()).read_bytes()


def test_models(mdiff):
    code, out, _ = mdiff("models")
    assert code == 0 and out.splitlines()[0].split() == [
        "toy/gauss",
        "toy",
        "Numbers",
        "around",
        "a",
        "mean",
        "(default)",
    ]
    out = mdiff("models", "gauss")[1]
    for words in (
        "toy/gauss",
        "text, negative, duration",
        "-o digits  int  0..9  [7]  digits that",
        "--duration  float  0.5..4",
        "MIT",
    ):
        assert words in out
    assert mdiff("info", "toy/gauss")[1] == out


def test_plugins_and_their_checks(mdiff, toy_site):
    assert mdiff("plugins")[1].split() == ["toy", "found", "mdiff-toy", "1.0", "mdiff_toy"]
    code, out, _ = mdiff("plugins", "--check", "toy")
    assert code == 0 and out.count("ok  ") == len(out.splitlines()) > 8
    (toy_site / "mdiff_toy" / "registry.toml").write_text("[models]\n[x]")
    code, out, _ = mdiff("plugins", "--check", "toy")
    assert code == 1 and "FAIL  cards" in out and "unknown key 'x'" in out


def test_components(mdiff):
    plain = mdiff("components")[1]
    assert "toy/lazy" in plain and "  Even in sigma^(1 / rho)" in plain
    found = json.loads(mdiff("components", "--json")[1])
    assert "dpmpp_2m" in found["samplers"] and list(found["metrics"]) == ["toy/mean"]
    assert found["grids"]["trailing"] == {
        "line": "Indices T - 1 - i T / steps of a table of T, rounded, plus offset",
        "source": "Lin et al., 2023",
    }


def test_info_prints_the_record(mdiff):
    path = mdiff(*RAIN)[1].strip()
    made = json.loads(mdiff("info", path)[1])
    assert made["request"]["text"] == "rain" and made["seed"] == 3


def test_a_plugins_own_commands(mdiff):
    assert mdiff("toy", "hello") == (0, "hello from toy\n", "")


def test_what_all_processes_find_alike_is_said_by_the_first(mdiff, monkeypatch):
    fails(mdiff("models", "nope"), 3, "no model 'nope'")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert mdiff("models", "nope") == (3, "", "")


def test_an_unexpected_error_is_one_short_line(mdiff, monkeypatch):
    def pages(*_):
        raise RuntimeError("no compiler\n" + "and so on\n" * 1000)

    monkeypatch.setattr("mdiff.core.registry.load", pages)
    code, out, err = mdiff("models")
    assert code == 1 and not out and err.startswith("mdiff: unexpected RuntimeError: no compiler")
    assert err.count("\n") == 1 and len(err) < 600 and "MDIFF_DEBUG=1" in err


def test_doctor(mdiff, toy_site):
    code, out, _ = mdiff("doctor")
    assert code == 0 and list(Path().iterdir()) == []
    for words in (
        "versions: mdiff",
        "precision: ",
        "plugin toy: mdiff-toy 1.0",
        "sha256 right",
        "output folder",
    ):
        assert words in out
    (toy_site / "mdiff_toy" / "weights.safetensors").write_bytes(b"x")
    Path("file").write_text("")
    code, out, _ = mdiff("doctor", "--out", "file/sub")
    assert (
        code == 1 and out.count("FAIL") == 3 and "has 1 bytes" in out and "cannot write into" in out
    )


# --- in a process of its own -----------------------------------------------------------------------


def python(*arguments: str, path: str = "", **how) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": path, "MDIFF_PLUGINS": "toy,audio,text"}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        **how,
    )


def test_a_strangers_package_runs_and_again_makes_the_same_bytes(toy_files, tmp_path):
    one = python("-m", "mdiff", *RAIN, "--out", "one.txt", path=str(toy_files), cwd=tmp_path)
    assert one.returncode == 0 and one.stdout == "one.txt\n", one.stderr
    two = python(
        "-m",
        "mdiff",
        "run",
        "--again",
        "one.txt",
        "--out",
        "two.txt",
        path=str(toy_files),
        cwd=tmp_path,
    )
    assert two.returncode == 0, two.stderr
    assert (tmp_path / "one.txt").read_bytes() == (tmp_path / "two.txt").read_bytes()


LIGHT = """
import sys
from mdiff.cli import main
helps = (["--help"], ["run", "--help"], ["train", "--help"], ["train", "export", "--help"])
for command in (*helps, ["models"], ["plugins"]):
    assert main(command) == 0
heavy = [m for m in sys.modules if m == "torch" or m.startswith(("mdiff.plugins.", "mdiff_toy"))]
print("heavy:", heavy)
"""


def test_help_and_lists_import_neither_torch_nor_a_plugin(toy_files):
    done = python("-c", LIGHT, path=str(toy_files))
    assert done.stdout.splitlines()[-1] == "heavy: []", done.stdout + done.stderr
    assert "toy/gauss" in done.stdout and "mdiff-toy 1.0" in done.stdout


def test_ctrl_c_while_the_command_line_is_imported(tmp_path):
    (tmp_path / "click.py").write_text("raise KeyboardInterrupt")
    call = [sys.executable, "-m", "mdiff", "--help"]
    there = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(call, env=there, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "mdiff: interrupted\n")


def test_a_real_ctrl_c_ends_with_130_and_no_temporary_files(toy_files, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(toy_files)}
    command = [sys.executable, "-m", "mdiff", *RAIN, "--steps", "9999", "--count", "999"]
    with subprocess.Popen(
        command,
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background jobs ignore it, and so would the child
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    ) as child:
        assert child.stderr.readline().startswith("toy/gauss")
        time.sleep(1)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=30)
    assert child.returncode == 130 and err.splitlines()[-1] == "mdiff: interrupted"
    assert not [name for name in files(tmp_path) if Path(name).name.startswith(".")]


def test_a_closed_pipe_is_no_error(toy_files):
    command = f"{sys.executable} -m mdiff models | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stderr == ""
