"""Recipes: strict reading with its messages, exact round trips, overriding, comparing, finding."""

import json
import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest

from mdiff.core.errors import MissingError, UsageError
from mdiff.core.training import recipe as recipes
from mdiff.core.training.recipe import Average, Batch, Budget, Data, Named, Preview, Recipe

CARD = {
    "plugin": "toy",
    "system": "Gauss",
    "summary": "Numbers",
    "licence": "MIT",
    "source": "made up",
    "accepts": ["text"],
    "config": {"unet": {"channels": 8, "levels": [1, 2]}, "scale": 0.5},
    "options": [{"name": "digits", "type": "int", "default": 7}],
}
FULL = Recipe(
    name="mine",
    card=CARD,
    part="net",
    config={"unet": {"channels": 16}, "odd key": 'a "quoted"\tline\n\x7f é'},
    parts={"autoencoder": "toy/gauss"},
    task={"drop": 0.1, "favour": {"low": 2}, "none": {}, "rows": [{"a": 1}, {"a": [True, 1e-7]}]},
    data=Data(folder=Path("some/where"), split="all"),
    loss=Named(name="min_snr", parameters={"gamma": 5}),
    times=Named(name="uniform"),
    average=Average(decays=(0.99, 0.999), powers=(0.05, 0.1), snapshots=100),
    batch=Batch(size=8, micro=2),
    budget=Budget(steps=100, minutes=0.5),
    preview=Preview(every=5, texts=("a", "b"), request={"guidance": 3.0, "options": {"gain": 2}}),
)
SMALL = {"model": "toy/gauss", "part": "net"}


@pytest.mark.parametrize("recipe", [FULL, Recipe(model="toy/gauss", part="net")])
def test_a_recipe_is_read_back_exactly(recipe, tmp_path):
    path = tmp_path / "a.toml"
    path.write_text(recipes.to_toml(replace(recipe, name="mine")), encoding="utf-8")
    assert recipes.read(path) == replace(recipe, name="mine")


def test_the_name_is_that_of_the_file_where_it_says_none(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text('model = "toy/gauss"\npart = "net"\n')
    assert recipes.read(path) == Recipe(name="small", model="toy/gauss", part="net")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (
            {"optimizer": {"rte": 1}},
            r"f.toml: \[optimizer\]: unknown key 'rte'; did you mean 'rate'\?",
        ),
        ({"optimiser": {}}, r"f.toml: unknown key 'optimiser'; did you mean 'optimizer'\?"),
        (
            {"optimizer": {"rate": "fast"}},
            r"\[optimizer\]: 'rate' should be a number, it is 'fast'",
        ),
        ({"optimizer": {"rate": float("inf")}}, "'rate' should be a number, it is inf"),
        ({"optimizer": {"rate": 0}}, "f.toml: optimizer: rate is 0.0, it has to be above 0"),
        ({"optimizer": {"name": "adm"}}, "unknown optimizer 'adm'; did you mean 'adam'"),
        ({"optimizer": {"freeze": "all"}}, "'freeze' should be a list, it is 'all'"),
        ({"optimizer": {"freeze": [1]}}, "'freeze' should be text, it is 1"),
        ({"optimizer": 3}, r"\[optimizer\]: should be a table, it is 3"),
        ({"batch": {"size": 0}}, "batch: size is 0, it has to be 1 or more"),
        ({"batch": {"size": 1.5}}, "'size' should be a whole number, it is 1.5"),
        ({"batch": {"size": True}}, "'size' should be a whole number, it is True"),
        ({"batch": {"micro": -1}}, "batch: micro is -1, it has to be 0 or more"),
        ({"budget": {"steps": 0}}, "budget: steps is 0, it has to be 1 or more"),
        ({"budget": {"minutes": 0}}, "budget: minutes is 0.0, it has to be above 0"),
        ({"save": {"keep": 0}}, "save: keep is 0, it has to be 1 or more"),
        ({"save": {"minutes": -1}}, "save: minutes is -1.0, it has to be 0 or more"),
        ({"log": {"steps": 0}}, "log: steps is 0, it has to be 1 or more"),
        ({"log": {"tensorboard": 1}}, "'tensorboard' should be true or false, it is 1"),
        ({"preview": {"count": 0}}, "preview: count is 0, it has to be 1 or more"),
        (
            {"preview": {"guidence": 2}},
            r"\[preview\]: unknown key 'guidence'; did you mean 'guidance'",
        ),
        ({"preview": {"seed": 2}}, r"\[preview\]: unknown key 'seed'"),
        ({"average": {"decays": [1]}}, r"the decay of an average is in \[0, 1\)"),
        ({"average": {"powers": [0.4]}}, "sigma_rel of an average is in"),
        ({"average": {"snapshots": -1}}, "average: snapshots is -1, it has to be 0 or more"),
        ({"precision": "fp8"}, "'precision' should be 'auto' or 'bf16' or 'fp32', it is 'fp8'"),
        ({"seed": -1}, "recipe: seed is -1, it has to be 0 or more"),
        ({"threads": -1}, "recipe: threads is -1, it has to be 0 or more"),
        ({"data": {"folder": 3}}, "'folder' should be a path, it is 3"),
        ({"parts": {"net": 3}}, r"\[parts\]: 'net' should be text, it is 3"),
        ({"config": 3}, "'config' should be a table, it is 3"),
        ({"loss": {"gamma": 5}}, r"\[loss\]: 'name' is missing"),
        ({"loss": "min_sn"}, "f.toml: unknown loss 'min_sn'; did you mean 'min_snr'"),
        ({"loss": {"name": "min_snr", "gama": 5}}, r"'gama'; it is min_snr\(gamma=5.0\)$"),
        ({"loss": {"name": "min_snr", "gamma": "x"}}, "gamma should be a number, it is 'x'"),
        ({"times": "importance"}, r"missing a required argument: 'history'; it is importance\(his"),
        ({"times": {"name": "uniform", "spread": 3}}, "spread should be text, it is 3"),
        ({"preview": {"sha256": {}}}, r"\[preview\]: unknown key 'sha256'"),
        ({"card": CARD}, "has either `model`.* or a table .card.*; this one has both"),
        ({"model": None}, "this one has none"),
        ({"part": None}, "f.toml: 'part' is missing"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(table, words):
    table = {name: value for name, value in (SMALL | table).items() if value is not None}
    with pytest.raises(UsageError, match=words) as caught:
        recipes.from_table(table, "f.toml")
    assert str(caught.value).startswith("f.toml: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"plugin": None}, "'plugin' is missing"),
        ({"sumary": "x"}, "unknown key 'sumary'; did you mean 'summary'"),
        ({"licence": None}, "'licence' is missing"),
        ({"accepts": ["txt"]}, "unknown key 'txt'; did you mean 'text'"),
        ({"options": [{"name": "digits", "type": "int"}]}, "'default' is missing"),
        ({"files": []}, "'files' is for models that are trained"),
    ],
)
def test_a_card_of_its_own_is_as_strict_as_an_entry_of_the_registry(change, words):
    card = {name: value for name, value in (CARD | change).items() if value is not None}
    with pytest.raises(UsageError, match=r"f.toml: \[card\].*" + words):
        recipes.from_table({"name": "mine", "part": "net", "card": card}, "f.toml")


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(MissingError, match="no recipe .*No such file"):
        recipes.read(tmp_path / "a.toml")
    (tmp_path / "a.toml").write_text("model = ")
    with pytest.raises(UsageError, match="a.toml: Invalid value"):
        recipes.read(tmp_path / "a.toml")
    (tmp_path / "a.toml").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="a.toml: .*can't decode"):
        recipes.read(tmp_path / "a.toml")


def test_values_are_laid_over():
    pairs = [
        "optimizer.rate=1e-4",
        "task.drop=0.2",
        "config.unet.channels=64",
        "card.config.scale=2",
        "preview.texts=['x', 'y']",
        "preview.guidance=1.5",
        "preview.options.gain=3",
        "data.folder=other place",
        "data.split=2024-01-01",
        "compile=true",
        "average.powers=[]",
    ]
    new = recipes.overridden(FULL, pairs)
    assert new.optimizer == replace(FULL.optimizer, rate=1e-4)
    assert new.task == {**FULL.task, "drop": 0.2}
    assert new.config["unet"] == {"channels": 64} and new.card["config"]["scale"] == 2
    assert new.preview.texts == ("x", "y") and new.average.powers == ()
    assert new.preview.request == {"guidance": 1.5, "options": {"gain": 3}}
    assert new.data == Data(folder=Path("other place"), split="2024-01-01") and new.compile is True
    assert FULL.task["drop"] == 0.1 and FULL.config["unet"] == {"channels": 16}


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("optimizer.rte=1", r"--set: \[optimizer\]: unknown key 'rte'; did you mean 'rate'"),
        ("optimizer.rate", "--set 'optimizer.rate' should be key=value, as in optimizer.rate=1e-4"),
        ("=3", "should be key=value"),
        ("a..b=3", "should be key=value"),
        ("part.name=x", "'part' is no table, it is 'net'"),
        ("optimizer.rate=", r"'rate' should be a number, it is ''"),
        ("batch.size=0", "--set: batch: size is 0, it has to be 1 or more"),
    ],
)
def test_a_value_that_cannot_be_laid_over_is_named(pair, words):
    with pytest.raises(UsageError, match=words):
        recipes.overridden(FULL, [pair])


def test_what_binds_a_run_and_what_may_change():
    free = {
        "name": "x",
        "budget.steps": "9",
        "budget.minutes": "9",
        "save.keep": "9",
        "preview.every": "9",
        "preview.guidance": "2",
        "log.steps": "9",
        "threads": "3",
        "compile": "true",
        "checkpointing": "true",
        "batch.micro": "4",
        "data.folder": "x",
        "card.licence": "x",
    }
    changed = recipes.overridden(FULL, [f"{key}={value}" for key, value in free.items()])
    assert changed != FULL and recipes.changed(FULL, changed) == []
    assert recipes.digest(changed) == recipes.digest(FULL)
    bound = {
        "optimizer.rate": "1e-3",
        "batch.size": "16",
        "seed": "1",
        "precision": "fp32",
        "part": "x",
        "config.unet.channels": "3",
        "task.favour.low": "3",
        "loss.gamma": "4",
        "times.spread": "stratified",
        "average.decays": "[0.5]",
        "data.split": "train",
        "card.system": "x",
        "task.none": "1",
        "task.more": "{}",
    }
    for key, value in bound.items():
        changed = recipes.overridden(FULL, [f"{key}={value}"])
        assert recipes.changed(FULL, changed) == [key]
        assert recipes.digest(changed) != recipes.digest(FULL)
        with pytest.raises(UsageError, match=f"^{key} was .* in this run and is "):
            recipes.check_same(FULL, changed)
    recipes.check_same(FULL, FULL)


def test_the_line_about_a_changed_recipe():
    new = recipes.overridden(FULL, ["optimizer.rate=0.001"])
    with pytest.raises(UsageError) as caught:
        recipes.check_same(FULL, new)
    assert str(caught.value) == (
        "optimizer.rate was 0.0003 in this run and is 0.001: give another --out, or --init RUN to "
        "start from its weights"
    )
    new = recipes.overridden(FULL, ["batch.size=16", "seed=3", "times.spread=stratified"])
    with pytest.raises(UsageError, match=r"is 3 \(and 2 more: batch.size, times.spread\): give"):
        recipes.check_same(FULL, new)


# --- what a name means ----------------------------------------------------------------------------


def test_a_recipe_is_found_by_each_of_its_names(toy_registry, tmp_path):
    found = recipes.find("toy", toy_registry)
    assert (found.name, found.model, found.part, found.task) == (
        "toy",
        "toy/gauss",
        "net",
        {"drop": 0.1},
    )
    assert recipes.find("toy/default", toy_registry) == found
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.toml").write_text(recipes.to_toml(found))
    assert recipes.find(str(run), toy_registry) == found
    assert recipes.find(str(run / "recipe.toml"), toy_registry) == found
    assert [name for name, _ in recipes.listed(toy_registry)] == ["toy/default"]


def test_a_name_means_what_is_installed_before_it_means_a_folder(
    toy_registry, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for folder in ("toy", "mine"):
        Path(folder).mkdir()
        Path(folder, "recipe.toml").write_text(recipes.to_toml(FULL))
    assert recipes.find("toy", toy_registry).model == "toy/gauss"
    assert not recipes.is_run("toy", toy_registry) and recipes.is_run("./toy", toy_registry)
    assert recipes.find("./toy", toy_registry) == recipes.find("mine", toy_registry) == FULL


def test_a_folder_that_is_no_run_is_said_to_be_none(toy_registry, tmp_path):
    with pytest.raises(MissingError, match=r"the folder .* is no run: .* --out "):
        recipes.find(str(tmp_path), toy_registry)


def test_a_loss_or_a_law_of_times_can_be_a_name_alone():
    made = recipes.from_table(
        {"model": "a/b", "part": "p", "loss": "min_snr", "times": "log_normal"}
    )
    assert made.loss == Named(name="min_snr") and made.times == Named(name="log_normal")


def test_a_model_means_the_recipe_of_its_name(toy_site, toy_registry):
    package = toy_site / "mdiff_toy"
    text = (package / "__init__.py").read_text()
    text = text.replace('"default": Path(__file__)', '"gauss": Path(__file__)')
    (package / "__init__.py").write_text(text)
    by_id = recipes.find("toy/gauss", toy_registry)
    assert by_id == recipes.find("gauss", toy_registry) and by_id.part == "net"


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (
            "toi",
            r"no recipe 'toi' \(a .toml file, .* or the folder of a run\); did you mean 'toy'\?",
        ),
        ("toy/defualt", "plugin 'toy' has no recipe 'defualt'; did you mean 'default'"),
        ("tory/default", r"no recipe 'tory/default' .*; did you mean 'toy"),
        ("free", "plugin 'toy' has no recipe 'free'; known: default"),
        ("a/b.toml", "no recipe 'a/b.toml': No such file"),
    ],
)
def test_a_name_that_means_nothing(toy_registry, target, words):
    with pytest.raises(MissingError, match=words):
        recipes.find(target, toy_registry)


def test_the_card_has_the_config_laid_over(toy_registry):
    recipe = replace(FULL, config={"unet": {"channels": 16}, "new": 1})
    card = recipes.card_of(recipe, toy_registry)
    assert card.config == {"unet": {"channels": 16, "levels": [1, 2]}, "scale": 0.5, "new": 1}
    assert (card.id, card.system, card.accepts, card.files) == ("toy/mine", "Gauss", ("text",), ())
    assert CARD["config"]["unet"]["channels"] == 8
    model = recipes.card_of(Recipe(model="toy", part="net", config={"a": 1}), toy_registry)
    assert model.id == "toy/gauss" and model.config == {"a": 1} and len(model.files) == 1
    stranger = replace(FULL, card={**CARD, "plugin": "far"})
    with pytest.raises(MissingError, match="no plugin 'far'"):
        recipes.card_of(stranger, toy_registry)


def test_a_slug_is_a_name_that_a_model_may_have():
    assert recipes.slug("My Run (2)!") == "my-run--2" and recipes.slug("né") == "n"
    assert recipes.slug("...") == "model"


# --- docs/training.md -----------------------------------------------------------------------------


def documented() -> dict[str, str]:
    """Key -> what holds by default, from the table of docs/training.md."""
    page = Path(__file__).parents[3] / "docs" / "training.md"
    _, _, table = page.read_text(encoding="utf-8").partition("## A recipe, key by key")
    return dict(re.findall(r"^\| `([\w.]+)` \| (?:`(.*?)` )?\| ", table, re.MULTILINE))


def keys(kind: type, path: str = "") -> dict[str, str]:
    """Key -> what holds by default, from the dataclasses."""
    found = {}
    default = kind(model="a/b", part="x") if kind is Recipe else kind()
    for f in fields(kind):
        value = getattr(default, f.name)
        if is_dataclass(value):
            found |= keys(type(value), f"{f.name}.")
        elif f.metadata:  # keys that follow, as text in the page
            continue
        else:
            plain = str(value) if isinstance(value, Path) else value
            plain = list(plain) if isinstance(plain, tuple) else plain
            empty = plain is None or plain in ({}, "")
            found[f"{path}{f.name}"] = "" if empty else json.dumps(plain)
    return found


def test_the_page_explains_every_key_and_says_what_holds_by_default():
    wanted = keys(Recipe) | {"model": "", "part": ""}
    assert documented() == wanted
