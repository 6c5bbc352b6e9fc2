"""The pages about hooks: one for each, with its exact arguments, and examples that work in a
plugin.
"""

import inspect
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mdiff.core import registry
from mdiff.core.hooks import (
    Components,
    DataSet,
    Event,
    Example,
    Media,
    Metric,
    Model,
    PluginInfo,
    Specs,
    Task,
    hookimpl,
)
from mdiff.core.host import Host, Record

PAGES = Path(__file__).parents[1] / "docs" / "hooks"
HOOKS = {name: spec for name, spec in vars(Specs).items() if name.startswith("mdiff_")}
ARGUMENTS = {
    "mdiff_build": {"card": None, "device": "cpu", "dtype": None},
    "mdiff_train": {"card": None, "model": None, "part": "net", "settings": {}},
    "mdiff_event": {"event": Event(name="saved", data={"path": "a.xyz"})},
}
ANSWERS = {
    "mdiff_info": PluginInfo,
    "mdiff_models": list,
    "mdiff_build": Model,
    "mdiff_components": Components,
    "mdiff_train": Task,
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
    module.__file__ = str(PAGES / f"{hook}.md")
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


def answer(hook: str) -> Any:
    """What the example of a page gives."""
    arguments = ARGUMENTS.get(hook, {})
    if hook == "mdiff_build":
        import torch

        arguments = {**arguments, "dtype": torch.float32}
    if hook == "mdiff_train":
        arguments = {**arguments, "model": answer("mdiff_build")}
    return plugin(hook).call("example", hook, **arguments)


@pytest.mark.parametrize("hook", HOOKS)
def test_its_example_works_in_a_plugin(hook):
    assert isinstance(answer(hook), ANSWERS.get(hook, dict))


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


def test_the_example_data_set_is_built_and_read(tmp_path):
    from mdiff.core import data

    chairs = answer("mdiff_datasets")["chairs"]
    assert isinstance(chairs, DataSet)
    package, folder = tmp_path / "package", tmp_path / "chairs"
    package.mkdir()
    folder.mkdir()
    for i in range(11):
        (package / f"{i:02}.xyz").write_text("# \n0 0 0\n1 1 1\n")
    chairs.build(folder, {chairs.packages[0]: package}.__getitem__)
    found = data.examples(folder, [".xyz"])
    assert [example.split for example in found].count("held_out") == 2 and len(found) == 11
    assert found[3].texts == ("a chair", "chair 3") and (folder / "LICENSES.md").is_file()


def test_the_example_task_trains_on_what_it_reads(tmp_path):
    from mdiff.core.errors import UsageError
    from mdiff.core.training.draws import Draws

    task = answer("mdiff_train")
    (tmp_path / "a.xyz").write_text("# \n0 0 1\n1 1 2\n")
    (row,) = task.read(Example(path=tmp_path / "a.xyz"))
    assert row["points"].tolist() == [[0, 1], [0, 1], [1, 2]]
    points = row["points"].expand(8, 3, 2)
    x0, cond = task.batch({"points": points}, Draws.of(0, 0, 8))
    assert cond == {} and {float(one) for one in (x0 / points)[:, 2, 0]} == {-1.0, 1.0}
    assert task.denoiser is not None and task.module is not None
    (tmp_path / "b.xyz").write_text("# \n0 0\n")
    with pytest.raises(UsageError, match="b.xyz has no points in three dimensions"):
        task.read(Example(path=tmp_path / "b.xyz"))


def test_the_example_metric_measures(tmp_path):
    import numpy as np
    import torch

    metric = answer("mdiff_metrics")["spread"]()
    assert isinstance(metric, Metric)
    points = {"points": torch.tensor([[0.0, 2.0]])}
    row = metric.measure(points, Example(path=tmp_path))
    assert metric.score(np.stack([row, row]), np.zeros((3, 1))) == pytest.approx(2**0.5)


def test_the_example_recipe_is_right():
    from mdiff.core.training import recipe

    (block,) = blocks("mdiff_recipes", "toml")
    assert recipe.from_table(tomllib.loads(block)).budget.minutes == 30
    (block,) = re.findall(
        r"```toml\n(.*?)```", (PAGES.parent / "training.md").read_text(), re.DOTALL
    )
    assert recipe.from_table(tomllib.loads(block)).part == "unet"


def test_philosophy_is_one_screen():
    lines = (PAGES.parent / "philosophy.md").read_text().splitlines()
    assert len(lines) <= 60
