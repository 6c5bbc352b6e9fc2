"""DDPM's stage on random weights: sizes, classes, clipping, and the conformance kit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mdiff.cli import main
from mdiff.core import host as hosts
from mdiff.core import pipeline, registry, tasks
from mdiff.core.errors import PluginError, UsageError
from mdiff.core.hooks import ModelCard, Request
from mdiff.core.host import Host
from mdiff.core.request import resolve
from mdiff.core.testing import conforms
from mdiff.plugins.image import io, mdiff_build
from mdiff.plugins.image.ddpm import label_of, to_picture, to_signed

Folder = Callable[..., Path]


def picture(folder: Path, **fields: Any) -> torch.Tensor:
    """What a model in a folder makes of a request."""
    models = registry.load(hosts.current())
    card = models.resolve(str(folder))
    request = resolve(card, {"device": "cpu", "seed": 1, **fields}, models.host)
    model = pipeline.open_model(card, request, models.host)
    return pipeline.generate(model, card, request, host=models.host)["image"]


def test_pixels_and_what_networks_see_are_inverse() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    seen = to_signed(pixels)
    assert seen.min() == -1 and seen.max() == 1
    torch.testing.assert_close(to_picture(seen) * 255, pixels[0].float())


def test_a_folder_runs_by_the_command_line(
    folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.png"
    assert main(["run", str(folder("ddpm")), "--seed", "3", "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    made = io.read_record(out)
    assert io.read(out)["image"].shape == (3, 8, 8)
    assert made is not None and made["seed"] == 3
    # and a text for a model that takes none is refused
    assert main(["run", str(tmp_path / "ddpm"), "--text", "a cat", "--out", str(out)]) == 2
    assert "does not take --text" in capsys.readouterr().err


def test_options_of_size(folder: Folder) -> None:
    options = [{"name": name, "type": "int", "default": 8} for name in ("height", "width")]
    at = folder("ddpm", options=options)
    assert picture(at).shape == (3, 8, 8)
    assert picture(at, options={"height": 12, "width": 20}).shape == (3, 12, 20)
    with pytest.raises(UsageError, match="multiples of 2, they are 9 and 8"):
        picture(at, options={"height": 9})


def test_grey_pictures(folder: Folder) -> None:
    at = folder("ddpm", config={"unet": {"in_channels": 1, "out_channels": 1}})
    assert picture(at).shape == (1, 8, 8)


def test_samples_are_clipped_as_the_card_says(card: Callable[..., ModelCard]) -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    request = Request(model="image/ddpm")
    for clip in (True, 0.9, False):
        torch.manual_seed(0)
        model = mdiff_build(card("ddpm", clip=clip), "cpu", torch.float32)
        (stage,) = model.stages
        assert stage.denoiser is not None
        denoise, _ = tasks.followed(stage.denoiser, stage.prepare(request, {}), (), request)
        with torch.no_grad():
            x0 = denoise(x, 1.0).x0
        assert bool((x0.abs() <= 1).all()) == bool(clip)


def test_learned_variance(folder: Folder) -> None:
    config = {"learned_variance": True, "time": "index_scaled", "unet": {"out_channels": 6}}
    assert picture(folder("ddpm", config=config)).shape == (3, 8, 8)


def test_classes(folder: Folder) -> None:
    config = {"classes": ["cat", "dog"], "unet": {"classes": 3}}
    at = folder("ddpm", config=config, accepts=["class_name"])
    cat, dog, any_ = (picture(at, class_name=name) for name in ("cat", "dog", None))
    assert not torch.equal(cat, dog) and not torch.equal(cat, any_)
    # with a label for no class there is guidance
    assert not torch.equal(cat, picture(at, class_name="cat", guidance=3.0))
    with pytest.raises(UsageError, match="no class 'cot'; did you mean 'cat'"):
        picture(at, class_name="cot")


def test_classes_without_names_have_numbers(folder: Folder) -> None:
    at = folder("ddpm", config={"unet": {"classes": 3}}, accepts=["class_name"])
    assert not torch.equal(picture(at, class_name="0"), picture(at, class_name="2"))
    with pytest.raises(UsageError, match="needs a class"):
        picture(at)


def test_a_model_of_classes_alone_needs_one() -> None:
    assert label_of("dog", ("cat", "dog"), 2) == 1
    with pytest.raises(UsageError, match="needs a class: --class NAME; known: cat, dog"):
        label_of(None, ("cat", "dog"), 2)


def test_an_unknown_system_names_the_nearest(card: Callable[..., ModelCard]) -> None:
    with pytest.raises(UsageError, match="no system 'DDMP'; did you mean 'DDPM'"):
        mdiff_build(replace(card("ddpm"), system="DDMP"), "cpu", torch.float32)


def test_a_network_that_does_not_exist_is_a_fault_with_a_name(folder: Folder) -> None:
    at = folder("ddpm")
    text = (at / "registry.toml").read_text().replace("channels = 16", "chanels = 16", 1)
    (at / "registry.toml").write_text(text)
    with pytest.raises(PluginError, match="image.*chanels"):
        picture(at)


@pytest.mark.parametrize("system", ["ddpm", "stable-diffusion"])
def test_a_key_that_no_config_has_names_the_nearest(
    card: Callable[..., ModelCard], system: str
) -> None:
    with pytest.raises(UsageError, match=r"config: unknown key 'predict'; did you mean 'predicts'"):
        mdiff_build(card(system, predict="v"), "cpu", torch.float32)


@pytest.mark.parametrize("system", ["ddpm", "stable-diffusion"])
def test_conformance(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    """The kit on the plugin with one tiny model in its registry."""
    text = ["text"] if system == "stable-diffusion" else []
    at = folder(system, accepts=[*text, "input", "mask", "operator"])
    package = tmp_path / f"pictures_{system.replace('-', '_')}"
    package.mkdir()
    for file in at.iterdir():
        file.rename(package / file.name)
    (package / "__init__.py").write_text(
        "from mdiff.plugins.image import mdiff_build, mdiff_info, mdiff_media\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    image = hosts.Record(name="image", value=package.name, dist="mdiffusion", version="0")
    others = [record for record in hosts.installed() if record.name != "image"]
    own = Host([image, *others])
    with hosts.use(own):
        conforms("image", own)


def test_requests_are_complete(card: Callable[..., ModelCard]) -> None:
    request = Request(model="image/ddpm")
    model = mdiff_build(card("ddpm"), "cpu", torch.float32)
    problem = model.stages[0].prepare(request, {})
    assert problem.shape == (3, 8, 8) and problem.cond == {} and problem.uncond is None
