"""From a run to a model: the registry.toml of a run, the folder to give away, and the way there on the command line."""

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mdiff import cli
from mdiff.core import registry, request, weights
from mdiff.core.errors import IntegrityError, MissingError, UsageError
from mdiff.core.hooks import File
from mdiff.core.training import checkpoints
from mdiff.core.training import recipe as recipes
from mdiff.core.training.averages import write_snapshot
from mdiff.core.training.export import entry, export, write_entry
from mdiff.core.training.recipe import Average, Batch, Data, Recipe

FACTS = {"seconds": 90.0, "samples": 80, "rows": 7}
RECIPE = Recipe(
    name="mine",
    model="toy/gauss",
    part="net",
    batch=Batch(size=8),
    average=Average(decays=(0.9, 0.99)),
)


def width(value: float) -> dict[str, torch.Tensor]:
    return {"width": torch.tensor([value])}


def read_width(folder: Path, file: File) -> torch.Tensor:
    return weights.read(folder / file.name, file)["width"]


def fabricate(
    run: Path, models: registry.Registry, recipe: Recipe = RECIPE, **files: float
) -> Path:
    """A run as the loop leaves it after 10 steps, of a network with one weight."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "recipe.toml").write_text(recipes.to_toml(recipe))
    (run / "log.jsonl").write_text(
        '{"step": 5, "loss": 0.5}\n{"step": 10, "loss": 0.25}\n{"step": 15, "loss": 0.1}\n'
    )
    own = {"model": 0.1, "average-0.9": 0.2, "average-0.99": 0.3} | files
    tensors = {name: width(value) for name, value in own.items()} | {"optimizer": {}}
    saved = checkpoints.save(run / "checkpoints", 10, tensors, FACTS, 3)
    write_entry(run, recipes.card_of(recipe, models), recipe, saved, {})
    return run


# --- the entry of a run ---------------------------------------------------------------------------


def test_every_card_reads_back_from_its_entry(toy_registry, tmp_path):
    for card in toy_registry.cards.values():
        (tmp_path / "registry.toml").write_text(entry(card))
        back = registry.read_folder(tmp_path, toy_registry.host)
        assert back == replace(card, root=tmp_path)


def test_a_run_is_a_model_of_its_newest_average(toy_registry, tmp_path):
    run = fabricate(tmp_path / "My Run", toy_registry)
    card = toy_registry.resolve(str(run))
    assert card.id == "toy/my-run" and card.source == "`mdiff train`, recipe mine"
    (file,) = card.files
    assert (file.name, file.module) == ("checkpoints/00000010/average-0.9.safetensors", "net")
    assert read_width(run, file) == torch.tensor([0.2])
    assert card.measured == {
        "steps": 10,
        "samples": 80,
        "minutes": 1.5,
        "final_loss": 0.25,
        "data_rows": 7,
    }
    base = toy_registry.cards["toy/gauss"]
    assert (card.options, card.defaults, card.accepts) == (
        base.options,
        base.defaults,
        base.accepts,
    )


def test_other_parts_are_listed_and_a_run_without_averages_runs_on_its_weights(
    toy_registry, tmp_path
):
    recipe = replace(RECIPE, average=Average(decays=()))
    run = fabricate(tmp_path / "run", toy_registry, recipe)
    (saved,) = [checkpoints.newest(run / "checkpoints", print)]
    other = File(name="parts/coder.safetensors", sha256="a" * 64, size=3, module="coder")
    stale = replace(other, module="net")
    write_entry(
        run, recipes.card_of(recipe, toy_registry), recipe, saved, {"coder": other, "net": stale}
    )
    coder, net = toy_registry.resolve(str(run)).files
    assert coder == other and net.name == "checkpoints/00000010/model.safetensors"


# --- a folder to give away ------------------------------------------------------------------------


def test_an_export_is_a_model_by_itself(toy_registry, tmp_path, capsys):
    data = tmp_path / "numbers"
    data.mkdir()
    (data / "LICENSES.md").write_text("ours")
    run = fabricate(tmp_path / "run", toy_registry, replace(RECIPE, data=Data(folder=data)))
    made = export(run, tmp_path / "to", toy_registry.host, licence="CC0-1.0", say=print)
    card = registry.read_folder(tmp_path / "to", toy_registry.host)
    assert made.missing == () and made.card == card
    names = {path.name for path in (tmp_path / "to").iterdir()}
    assert names == {"net.safetensors", "registry.toml", "README.md", "LICENSES.md"}
    assert (card.id, card.licence, card.measured["weights"]) == ("toy/to", "CC0-1.0", "fp16")
    assert card.measured["data"] == "numbers" and card.measured["data_licences"] == "LICENSES.md"
    assert read_width(tmp_path / "to", card.files[0]).dtype == torch.float16
    page = (tmp_path / "to" / "README.md").read_text()
    assert page.startswith(
        "# to\n\nNumbers around a mean. Its architecture is that of toy/gauss.\n"
    )
    assert "trained for 10 steps, 80 samples, 1.5 minutes, to a loss of 0.25." in page
    assert "Data: `numbers`, 7 rows; their licences are in [LICENSES.md](LICENSES.md)." in page
    assert '```sh\nmdiff run ./to --text "..."\n```' in page and "| licence | CC0-1.0 |" in page
    # the recipe in it is the recipe, but for the place of the data
    block = page.split("```toml\n")[1].split("```")[0]
    assert recipes.from_table(tomllib.loads(block)) == RECIPE
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (tmp_path / "to").iterdir())
    assert str(tmp_path) not in page + (tmp_path / "to" / "registry.toml").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["numbers", "run", "to"]


@pytest.mark.parametrize(
    ("average", "value", "said"),
    [
        ("", 0.2, "0.9"),
        ("0.99", 0.3, "0.99"),
        ("none", 0.1, "none"),
        ("power-0.10", 0.5, "power-0.10"),
    ],
)
def test_which_average(toy_registry, tmp_path, average, value, said):
    run = fabricate(tmp_path / "run", toy_registry, **{"average-power-0.10": 0.5})
    made = export(run, tmp_path / "to", toy_registry.host, average=average, precision="fp32")
    assert read_width(tmp_path / "to", made.card.files[0]) == torch.tensor([value])
    assert made.card.measured["average"] == said


def test_an_average_of_another_width_is_made_of_snapshots(toy_registry, tmp_path):
    run = fabricate(tmp_path / "run", toy_registry)
    for step in (5, 10, 15):
        for name in ("power-0.05", "power-0.10"):
            write_snapshot(run / "snapshots", step, name, width(0.75))
    made = export(run, tmp_path / "to", toy_registry.host, average="power-0.07", precision="fp32")
    torch.testing.assert_close(
        read_width(tmp_path / "to", made.card.files[0]), torch.tensor([0.75])
    )
    assert made.card.measured["average"] == "power-0.07"


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_half_weights_load_into_a_network_of_single_precision(toy_registry, tmp_path, precision):
    run = fabricate(tmp_path / "run", toy_registry)
    made = export(run, tmp_path / "to", toy_registry.host, precision=precision)
    model = toy_registry.host.call(
        "toy", "mdiff_build", card=made.card, device="cpu", dtype=torch.float32
    )
    weights.load(model, made.card)
    loaded = model.modules["net"].width
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(loaded.data, torch.tensor([0.2]), rtol=4e-3, atol=0)


def refusals(run: Path, to: Path) -> dict[str, tuple]:
    """What is done before, the choices, and what is said."""
    return {
        "no run": (
            lambda: (run / "recipe.toml").unlink(),
            {},
            MissingError,
            "is no run: it has no recipe.toml",
        ),
        "no checkpoint": (
            lambda: (run / "checkpoints" / "00000010" / "manifest.json").unlink(),
            {},
            MissingError,
            "has no whole checkpoint .*`mdiff train .* --resume` goes on",
        ),
        "no entry": (
            lambda: (run / "registry.toml").unlink(),
            {},
            MissingError,
            "no whole checkpoint",
        ),
        "full folder": (
            lambda: (to.mkdir(), (to / "x").touch()),
            {},
            UsageError,
            "is there and not empty",
        ),
        "a file": (to.touch, {}, UsageError, "is there and not empty"),
        "average": (
            lambda: None,
            {"average": "0.8"},
            UsageError,
            "keeps no average '0.8'; did you mean '0.9'",
        ),
        "power": (lambda: None, {"average": "power-x"}, UsageError, "keeps no average 'power-x'"),
        "snapshots": (lambda: None, {"average": "power-0.07"}, MissingError, "has no snapshots"),
        "name": (
            lambda: None,
            {"name": "My Model"},
            UsageError,
            "should be small letters.*as my-model",
        ),
    }


@pytest.mark.parametrize("case", refusals(Path(), Path()))
def test_what_cannot_be_exported_leaves_nothing(toy_registry, tmp_path, case):
    run, to = fabricate(tmp_path / "run", toy_registry), tmp_path / "to"
    before, choices, error, words = refusals(run, to)[case]
    before()
    there = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=words) as caught:
        export(run, to, toy_registry.host, say=lambda line: None, **choices)
    assert "\n" not in str(caught.value) and sorted(tmp_path.rglob("*")) == there


def test_weights_that_fp16_does_not_hold(toy_registry, tmp_path):
    run = fabricate(tmp_path / "run", toy_registry, **{"average-0.9": 1e6})
    words = r"net: width reaches 1e\+06, which fp16 does not hold: --precision bf16"
    with pytest.raises(UsageError, match=words):
        export(run, tmp_path / "to", toy_registry.host)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    export(run, tmp_path / "to", toy_registry.host, precision="bf16")


def test_a_damaged_part_is_refused(toy_registry, tmp_path):
    run = fabricate(tmp_path / "run", toy_registry)
    (run / "parts").mkdir()
    (run / "parts" / "coder.safetensors").write_bytes(b"abc")
    other = File(name="parts/coder.safetensors", sha256="a" * 64, size=3, module="coder")
    saved = checkpoints.newest(run / "checkpoints", print)
    write_entry(run, recipes.card_of(RECIPE, toy_registry), RECIPE, saved, {"coder": other})
    with pytest.raises(IntegrityError, match="coder.safetensors has sha256"):
        export(run, tmp_path / "to", toy_registry.host)


def test_a_part_without_weights_is_told(toy_site, toy_registry, tmp_path, capsys):
    model = toy_site / "mdiff_toy" / "model.py"
    model.write_text(model.read_text().replace('{"net": net}', '{"net": net, "coder": Net()}'))
    run = fabricate(tmp_path / "run", toy_registry)
    made = export(run, tmp_path / "to", toy_registry.host)
    assert made.missing == ("coder",)
    assert "No weights are here for: coder." in (tmp_path / "to" / "README.md").read_text()
    assert cli.main(["train", "export", str(run), "--to", str(tmp_path / "two")]) == 0
    assert "no weights for coder" in capsys.readouterr().err


def test_what_a_training_began_with_is_told(toy_registry, tmp_path, monkeypatch):
    monkeypatch.setitem(FACTS, "init", "toy/free")
    run = fabricate(tmp_path / "run", toy_registry)
    made = export(run, tmp_path / "to", toy_registry.host)
    assert made.card.measured["began_with"] == "toy/free"
    page = (tmp_path / "to" / "README.md").read_text()
    assert "trained for 10 steps, from the weights of toy/free on, 80 samples" in page


# --- on the command line --------------------------------------------------------------------------


@pytest.fixture
def numbers(tmp_path) -> Path:
    folder = tmp_path / "numbers"
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.txt").write_text(json.dumps([float(i + j % 2) for j in range(16)]) + "\n")
    return folder


def test_from_a_folder_to_a_model_in_four_commands(toy, numbers, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        cli.main(["train", "toy", "--data", "numbers", "--set", "log.steps=5", "--steps", "10"])
        == 0
    )
    said = capsys.readouterr()
    assert said.out == "runs/toy\n" and "step 5/10" in said.err
    run = tmp_path / "runs" / "toy"
    recipe = recipes.read(run / "recipe.toml")
    assert recipe.budget.steps == 10 and recipe.data.folder == numbers
    assert cli.main(["train", "runs/toy", "--resume", "--steps", "20", "--json", "--quiet"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert [json.loads(line)["step"] for line in said.out.splitlines()] == [15, 20]
    steps = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert steps == [5, 10, 15, 20]
    made = [
        "run",
        "runs/toy",
        "--text",
        "a",
        "--seed",
        "1",
        "--steps",
        "2",
        "--out",
        "a.txt",
        "--quiet",
    ]
    assert cli.main(made) == 0
    assert cli.main(["train", "export", "runs/toy", "--to", "model", "--precision", "fp32"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == "model" and "to run it: mdiff run ./model" in said.err
    made = [
        "run",
        "model",
        "--text",
        "a",
        "--seed",
        "1",
        "--steps",
        "2",
        "--out",
        "b.txt",
        "--quiet",
    ]
    assert cli.main(made) == 0
    one, two = ((tmp_path / name).read_text().splitlines()[0] for name in ("a.txt", "b.txt"))
    assert one == two


def test_what_train_refuses(toy, numbers, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = ["train", "toy", "--data", "numbers", "--steps", "5"]
    assert cli.main(train) == 0
    endless = recipes.to_toml(
        replace(recipes.read(tmp_path / "runs/toy/recipe.toml"), budget=recipes.Budget())
    )
    (tmp_path / "endless.toml").write_text(endless)
    capsys.readouterr()
    for arguments, code, words in [
        (
            train,
            2,
            "runs/toy holds a run already: --resume goes on with it, another --out begins anew",
        ),
        ([*train, "--resume", "--set", "seed=3"], 2, "seed was 0 in this run and is 3"),
        ([*train, "--out", "n", "--set", "loss.name=x0", "--set", "loss.reduce=3"], 2, "it is x0("),
        (["train", "toy", "--steps", "5", "--out", "x"], 2, "--data FOLDER"),
        (["train", "endless.toml"], 2, "how long? give --steps or --minutes"),
        (["train", "toy", "--set", "optimizer.rte=1"], 2, "did you mean 'rate'?"),
        (["train", "tiy"], 3, "run); did you mean 'toy'?"),
        (["train", "export", "nothing", "--to", "x"], 3, "nothing is no run"),
        (["train", "toy", "--minutes", "0"], 2, "budget: minutes is 0.0, it has to be above 0"),
    ]:
        assert cli.main(arguments) == code
        said = capsys.readouterr()
        assert words in said.err and said.err.count("\n") == 1 and said.out == "", said.err
    assert not (tmp_path / "x" / "recipe.toml").exists()


@pytest.mark.parametrize(
    ("flags", "first", "then"), [({"amx_bf16"}, "bf16", set()), (set(), "fp32", {"amx_bf16"})]
)
def test_a_run_keeps_the_precision_it_began_with(
    toy, numbers, tmp_path, capsys, monkeypatch, flags, first, then
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(request, "cpu_flags", lambda: frozenset(flags))
    train = ["train", "toy", "--data", "numbers", "--quiet", "--set", "precision=auto"]
    assert cli.main([*train, "--steps", "5"]) == 0
    run = tmp_path / "runs" / "toy"
    assert recipes.read(run / "recipe.toml").precision == first
    monkeypatch.setattr(request, "cpu_flags", lambda: frozenset(then))  # another machine
    assert cli.main([*train, "--steps", "10", "--resume"]) == 0
    assert recipes.read(run / "recipe.toml").precision == first
    other = {"bf16": "fp32", "fp32": "bf16"}[first]
    assert cli.main([*train, "--steps", "15", "--resume", "--set", f"precision={other}"]) == 2
    assert f'precision was "{first}" in this run and is "{other}"' in capsys.readouterr().err


def test_train_lists_recipes_and_prints_one_in_full(toy, tmp_path, capsys):
    assert cli.main(["train"]) == 0
    name, path = capsys.readouterr().out.split()
    assert name == "toy/default" and path.endswith("mdiff_toy/default.toml")
    assert cli.main(["train", "toy", "--dry-run", "--set", "batch.size=3"]) == 0
    (tmp_path / "mine.toml").write_text(capsys.readouterr().out)
    assert recipes.read(tmp_path / "mine.toml").batch.size == 3


def test_ctrl_c_says_how_to_go_on(toy, numbers, tmp_path, capsys, monkeypatch):
    from mdiff.core.training import run

    def stopped(*arguments, out, **named):
        if out.name == "my run":
            out.mkdir()
            (out / "recipe.toml").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "start", stopped)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "toy", "--data", "numbers", "--out", "my run"]) == 130
    said = capsys.readouterr().err.split("\n")
    assert [line for line in said if line] == [
        "to go on: mdiff train './my run' --resume",
        "mdiff: interrupted",
    ]
    # before there is a run, there is nothing to go on with
    assert cli.main(["train", "toy", "--data", "numbers", "--out", "other"]) == 130
    assert "--resume" not in capsys.readouterr().err


def test_training_without_accelerate_says_how_to_get_it(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert cli.main(["train", "toy", "--dry-run"]) == 0
    assert cli.main(["train", "toy", "--data", str(tmp_path)]) == 3
    assert "accelerate: pip install 'mdiffusion[train]'" in capsys.readouterr().err


def test_only_the_first_process_talks(toy, tmp_path, capsys, monkeypatch):
    from mdiff.core.training import run

    seen = []
    monkeypatch.setattr(
        run, "start", lambda recipe, *, log, **named: (seen.append(log), log.say("hello"))
    )
    monkeypatch.setenv("RANK", "1")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "toy", "--data", "."]) == 0
    assert capsys.readouterr() == ("", "") and seen[0].silent
