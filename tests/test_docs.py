"""The pages about hooks: one for each, with its exact arguments, and examples that work in a
plugin.
"""

import inspect
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from mdiff.core import registry
from mdiff.core.hooks import Components, Event, Media, Model, PluginInfo, Specs, hookimpl
from mdiff.core.host import Host, Record

PAGES = Path(__file__).parents[1] / "docs" / "hooks"
HOOKS = {name: spec for name, spec in vars(Specs).items() if name.startswith("mdiff_")}
ARGUMENTS = {
    "mdiff_build": {"card": None, "device": "cpu", "dtype": None},
    "mdiff_event": {"event": Event(name="saved", data={"path": "a.xyz"})},
}
ANSWERS = {
    "mdiff_info": PluginInfo,
    "mdiff_models": list,
    "mdiff_build": Model,
    "mdiff_components": Components,
    "mdiff_media": list,
    "mdiff_commands": list,
    "mdiff_event": type(None),
}


def blocks(hook: str, language: str) -> list[str]:
    text = (PAGES / f"{hook}.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def plugin(hook: str) -> Host:
    """A host with one plugin: the example of a page."""
    module = ModuleType(f"page_{hook}")
    for block in blocks(hook, "python"):
        exec(compile(block, f"{hook}.md", "exec"), vars(module))  # noqa: S102 (our own pages)
    if hook != "mdiff_info":
        info = PluginInfo(name="example", api=(1, 0), modality="pointcloud", summary="x")
        vars(module)["mdiff_info"] = hookimpl(lambda: info)
    sys.modules[module.__name__] = module
    return Host([Record(name="example", value=module.__name__, dist="example")])


def test_there_is_a_page_for_each_hook():
    assert {path.stem for path in PAGES.glob("*.md")} == set(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_a_page_has_the_exact_arguments(hook):
    names = [name for name in inspect.signature(HOOKS[hook]).parameters if name != "self"]
    text = (PAGES / f"{hook}.md").read_text()
    assert text.splitlines()[0] == f"# {hook}({', '.join(names)})"
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == names
    assert all(len(line) <= 120 for line in text.splitlines())


@pytest.mark.parametrize("hook", HOOKS)
def test_its_example_works_in_a_plugin(hook):
    arguments = ARGUMENTS.get(hook, {})
    if hook == "mdiff_build":
        import torch

        arguments = {**arguments, "dtype": torch.float32}
    answer = plugin(hook).call("example", hook, **arguments)
    assert isinstance(answer, ANSWERS.get(hook, dict))


def test_the_example_media_keep_sample_and_record(tmp_path):
    import torch

    (media,) = plugin("mdiff_media").call("example", "mdiff_media")
    assert isinstance(media, Media)
    made = {"schema": 1, "model": "example/chairs"}
    media.write(tmp_path / "a.xyz", {"points": torch.eye(3)}, made, {})
    assert media.read_record(tmp_path / "a.xyz") == made
    assert torch.equal(media.read(tmp_path / "a.xyz")["points"], torch.eye(3))


def test_the_example_registry_is_right(tmp_path):
    (block,) = blocks("mdiff_models", "toml")
    (tmp_path / "registry.toml").write_text(block)
    cards, defaults, _ = registry.read(tmp_path / "registry.toml", ["example"])
    assert defaults == {"example": "example/chairs"}
    assert cards["example/chairs"].options[0].maximum == 2048


def test_the_example_entry_point_is_toml():
    (block,) = blocks("mdiff_info", "toml")
    assert tomllib.loads(block)["project"]["entry-points"]["mdiff.plugins"]


def test_the_example_encoder_and_grid_do_what_they_say():
    from mdiff.core import schedules

    encoder = plugin("mdiff_text_encoders").text_encoder("example/letters")
    states = encoder.encode(["aab", ""])
    assert states.pooled.shape == (2, 26) and states.pooled[0, 0] == 2 and states.mask.all()
    grid = plugin("mdiff_components").offer("grids", "example/late")(8)
    times = grid(schedules.cosine())
    assert len(times) == 9 and times[-1] == 0 and (times.diff() < 0).all()
    assert (times < 0.25 * times[0]).sum() >= 4


def test_philosophy_is_one_screen():
    lines = (PAGES.parent / "philosophy.md").read_text().splitlines()
    assert len(lines) <= 60
