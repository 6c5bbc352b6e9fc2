"""The registry: cards are checked strictly, names mean one thing, and listing imports no plugin."""

import sys
from pathlib import Path

import pytest

from mdiff.core import host, registry
from mdiff.core.errors import MdiffError, MissingError, UsageError
from mdiff.core.host import Host, Record
from mdiff.core.weights import verified

MODEL = """
[models."demo/one"]
system = "S"
summary = "s"
licence = "MIT"
source = "here"
"""
FILE = f"""
[[models."demo/one".files]]
name = "w.safetensors"
sha256 = "{"a" * 64}"
size = 10
module = "net"
"""
OPTION = """
[[models."demo/one".options]]
name = "shine"
type = "float"
default = 0.5
"""


def read(tmp_path: Path, text: str) -> registry.ModelCard:
    path = tmp_path / "registry.toml"
    path.write_text(text)
    return registry.read(path, ["demo"])[0]["demo/one"]


def test_a_card_says_what_the_file_says(tmp_path):
    extra = (
        'accepts = ["text"]\nconfig = {width = 3}\ndefaults = {steps = 5}\nmeasured = {fid = 2}\n'
    )
    card = read(tmp_path, MODEL + extra + FILE + OPTION)
    assert (card.id, card.plugin, card.modality, card.system) == ("demo/one", "demo", "demo", "S")
    assert card.config == {"width": 3} and card.defaults == {"steps": 5}
    assert card.accepts == ("text",) and card.measured == {"fid": 2} and card.root == tmp_path
    assert (card.files[0].size, card.files[0].module) == (10, "net")
    assert (card.options[0].name, card.options[0].default) == ("shine", 0.5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = ", "Invalid value"),
        ("[model]", "unknown key 'model'; did you mean 'models'?"),
        (MODEL + "sumary = 1", "model 'demo/one': unknown key 'sumary'; did you mean 'summary'?"),
        (MODEL.replace('licence = "MIT"', ""), "'licence' is missing"),
        (MODEL.replace('"here"', "3"), "'source' should be a text, it is 3"),
        (MODEL.replace("demo/one", "Demo"), "the id should be 'plugin/model'"),
        (MODEL.replace("demo/one", "other/one"), "its plugin should be one of: demo"),
        (MODEL + 'accepts = ["txt"]', "unknown key 'txt'; did you mean 'text'?"),
        (MODEL + "accepts = [1]", "1 should be text"),
        (MODEL + "defaults = {step = 3}", "unknown key 'step'; did you mean 'steps'?"),
        (MODEL + "files = [3]", r"files\[0\]: should be a table"),
        (MODEL + FILE + "hash = 1", r"files\[0\]: unknown key 'hash'"),
        (MODEL + FILE.replace("sha256", "#"), "'sha256' is missing"),
        (MODEL + FILE.replace("size", "#"), "'size' is missing"),
        (MODEL + FILE.replace("10", "true"), "'size' should be a whole number"),
        (MODEL + FILE.replace("10", "0"), "'size' should be positive"),
        (MODEL + FILE.replace("a" * 64, "A" * 64), "64 hexadecimal digits"),
        (MODEL + FILE + FILE, "two files fill the same module"),
        (MODEL + FILE.replace("w.safe", "w.bin.safe").replace("tensors", ""), "safetensors file"),
        (MODEL + FILE.replace("w.safetensors", "../w.safetensors"), "a path inside the folder"),
        (MODEL + FILE.replace("w.safetensors", "a/../../w.safetensors"), "a path inside"),
        (MODEL + FILE.replace("w.safetensors", "/etc/w.safetensors"), "a path inside"),
        (MODEL + FILE.replace("w.safetensors", "C:/w.safetensors"), "a path inside"),
        (MODEL + FILE.replace("w.safetensors", "a\\\\w.safetensors"), "a path inside"),
        (MODEL + OPTION.replace("float", "real"), "unknown key 'real'"),
        (MODEL + OPTION.replace("0.5", '"x"'), "the default should be a number, it is 'x'"),
        (MODEL + OPTION + "maximum = 0.1", "the default should be at most 0.1, it is 0.5"),
        (MODEL + OPTION.replace("default", "#"), "'default' is missing"),
        (MODEL + OPTION.replace("shine", "seed"), "'seed' is a field of every request"),
        (MODEL + OPTION.replace("shine", "very shiny"), "not a plain name"),
        (MODEL + OPTION + OPTION, "an option is there twice"),
        ('[defaults]\ndemo = "demo/two"' + MODEL, "'demo/two' is not a model of this file"),
        ('[defaults]\naudio = "demo/one"' + MODEL, "'audio' is not a plugin of this file"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, words):
    with pytest.raises(UsageError, match=words) as caught:
        read(tmp_path, text)
    assert "registry.toml" in str(caught.value) and "\n" not in str(caught.value)


def test_an_option_named_like_a_field_bounds_it_without_a_default(tmp_path):
    option = OPTION.replace("shine", "duration").replace("default = 0.5", "maximum = 10")
    assert read(tmp_path, MODEL + option).options[0].maximum == 10


def package(folder: Path, name: str, text: str) -> Record:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / name / "registry.toml").write_text(text)
    return Record(name=name, value=name, dist=f"{name}-dist")


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_names_and_their_meaning(site):
    one = package(site, "alpha", '[defaults]\nalpha = "alpha/one"' + MODEL.replace("demo", "alpha"))
    both = MODEL.replace("demo", "beta") + MODEL.replace("demo/one", "beta/two")
    models = registry.load(Host([one, package(site, "beta", both)]))
    assert sorted(models.cards) == ["alpha/one", "beta/one", "beta/two"]
    assert models.resolve("alpha").id == "alpha/one"
    assert models.resolve("beta/one").id == "beta/one"
    assert models.resolve("two").id == "beta/two"
    with pytest.raises(UsageError, match="alpha/one and beta/one: give one of them in full"):
        models.resolve("one")
    with pytest.raises(MissingError, match="no model 'alpa'; did you mean 'alpha'"):
        models.resolve("alpa")
    assert "alpha" not in sys.modules and "beta" not in sys.modules


def test_a_wrong_file_is_a_problem_of_its_plugin_alone(site):
    good = package(site, "alpha", MODEL.replace("demo", "alpha"))
    models = registry.load(Host([good, package(site, "beta", "[modles]")]))
    assert list(models.cards) == ["alpha/one"]
    assert len(models.problems) == 1 and "beta" in models.problems[0]


def test_a_blocked_plugin_has_no_models_and_says_why(site):
    record = package(site, "alpha", MODEL.replace("demo", "alpha"))
    models = registry.load(Host([record], block=["alpha"]))
    assert not models.cards
    for name in ("alpha", "alpha/one"):
        with pytest.raises(MissingError, match="plugin 'alpha' .* is blocked"):
            models.resolve(name)


def test_plugins_of_one_distribution_share_the_file_above_them(site):
    text = MODEL.replace("demo", "left") + MODEL.replace("demo", "right")
    package(site, "house", text)
    records = [Record(name=n, value=f"house.rooms.{n}", dist="house") for n in ("left", "right")]
    assert sorted(registry.load(Host(records)).cards) == ["left/one", "right/one"]
    # Blocking one does not make the other's file wrong.
    assert sorted(registry.load(Host(records, block=["left"])).cards) == ["right/one"]


def test_a_plugin_without_a_file_has_no_cards(site):
    (site / "bare.py").write_text("")
    (site / "registry.toml").write_text("[[[")
    models = registry.load(Host([Record(name="bare", value="bare", dist="bare")]))
    assert not models.cards and not models.problems


def test_cards_of_a_plugin_that_are_not_in_its_file(toy, toy_registry, monkeypatch):
    from dataclasses import replace

    import mdiff_toy

    card = replace(toy_registry.cards["toy/gauss"], id="toy/late")
    monkeypatch.setattr(mdiff_toy, "mdiff_models", host_hook(lambda: [card]), raising=False)
    assert toy_registry.resolve("toy/late") is card
    with pytest.raises(MissingError, match="no model 'toy/lat'"):
        toy_registry.resolve("toy/lat")


def host_hook(function):
    from mdiff.core.hooks import hookimpl

    return hookimpl(function)


def test_a_folder_is_a_model(tmp_path, toy):
    text = MODEL.replace("demo", "toy") + MODEL.replace("demo/one", "toy/two")
    (tmp_path / "registry.toml").write_text(MODEL.replace("demo", "toy"))
    models = registry.load(toy)
    card = models.resolve(str(tmp_path))
    assert card.id == "toy/one" and card.root == tmp_path
    (tmp_path / "registry.toml").write_text(text)
    with pytest.raises(UsageError, match="holds toy/one, toy/two: name one under"):
        models.resolve(str(tmp_path))
    (tmp_path / "registry.toml").write_text('[defaults]\ntoy = "toy/two"' + text)
    assert models.resolve(str(tmp_path)).id == "toy/two"
    (tmp_path / "registry.toml").write_text(MODEL)
    with pytest.raises(MissingError, match="no plugin 'demo' is installed"):
        models.resolve(str(tmp_path))
    (tmp_path / "registry.toml").write_text("")
    with pytest.raises(UsageError, match="has no model"):
        models.resolve(str(tmp_path))


def test_networks_that_are_no_models_have_cards_too():
    models = registry.load(host.discover())
    judges = models.apart["evaluators"]
    assert set(judges) >= {"audio/instrument-classifier", "image/emoji-scorer"}
    assert not judges.keys() & models.cards.keys() and "text/mini" in models.apart["encoders"]
    for id, card in judges.items():
        assert registry.network(f"mdiff.plugins.{card.plugin}", "evaluators", id) == card
        assert all(verified(card.root / file.name, file) for file in card.files)
        assert card.licence and card.source and card.measured["command"]
    with pytest.raises(MissingError, match=r"no 'image/emoji-score' under \[evaluators\]; did you"):
        registry.network("mdiff.plugins.image", "evaluators", "image/emoji-score")


def test_a_folder_without_a_model_is_said_to_have_none(tmp_path, toy_registry):
    with pytest.raises(MissingError, match=r"the folder .* is no model: .* first checkpoint on$"):
        toy_registry.resolve(str(tmp_path))


def test_the_built_in_models_can_be_used():
    models = registry.load(host.discover())
    assert models.problems == ()
    for name, id in models.defaults.items():
        assert models.resolve(name).id == id
    for card in models.cards.values():
        assert all((card.root / file.name).is_file() for file in card.files), card.id
        assert models.resolve(card.id) is card


def test_errors_carry_the_exit_codes():
    codes = {kind.__name__: kind.exit_code for kind in MdiffError.__subclasses__()}
    assert codes["UsageError"] == 2 and codes["MissingError"] == 3 and codes["IntegrityError"] == 4
    assert codes["PluginError"] == codes["NonFiniteError"] == MdiffError.exit_code == 1
