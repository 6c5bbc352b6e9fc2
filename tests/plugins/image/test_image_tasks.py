"""Tasks with pictures, on random weights: what is kept, what is measured, sizes, and bad files."""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from mdiff.cli import main
from mdiff.core import host as hosts
from mdiff.core import operators, pipeline, record, registry
from mdiff.core.errors import UsageError
from mdiff.core.request import resolve
from mdiff.plugins.image import io

Folder = Callable[..., Path]
SYSTEMS = ("ddpm", "stable-diffusion")
TAKES = {
    "ddpm": ["input", "mask", "operator"],
    "stable-diffusion": ["text", "negative", "input", "mask", "operator"],
}
SIZE = {"ddpm": 8, "stable-diffusion": 16}


def save(path: Path, image: Tensor) -> str:
    io.to_pillow(image).save(path)
    return str(path)


@pytest.fixture(params=SYSTEMS)
def system(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def picture(folder: Folder, system: str) -> Callable[..., Tensor]:
    """picture(...) -> what the model makes of the fields of a request."""
    at = folder(system, accepts=TAKES[system])
    models = registry.load(hosts.current())
    card = models.resolve(str(at))
    request = resolve(card, {"text": "a cat"} if system != "ddpm" else {}, models.host)
    model = pipeline.open_model(card, request, models.host)

    def picture(on_step: pipeline.OnStep | None = None, **fields: Any) -> Tensor:
        if system != "ddpm":
            fields = {"text": "a cat", **fields}
        asked = resolve(card, {"device": "cpu", "steps": 3, **fields}, models.host)
        made = pipeline.generate(model, card, asked, host=models.host, on_step=on_step)
        return made["image"]

    return picture


@pytest.fixture
def soft(tmp_path: Path, system: str) -> tuple[Tensor, str]:
    """A picture of the model's size in the middle of what pixels can be, and its file."""
    size = SIZE[system]
    image = 0.3 + 0.4 * torch.rand(3, size, size, generator=torch.Generator().manual_seed(0))
    path = save(tmp_path / "soft.png", image)
    return io.read(Path(path))["image"], path


def test_from_a_picture(picture: Callable[..., Tensor], soft: tuple[Tensor, str]) -> None:
    _, path = soft
    assert torch.equal(picture(input=path, strength=1.0), picture())
    made = [picture(input=path, strength=strength) for strength in (0.001, 0.5)]
    assert not torch.equal(made[0], made[1])
    assert not torch.equal(made[1], picture(input=path, strength=0.5, seed=1))


def test_hardly_any_strength_gives_the_picture_back(
    picture: Callable[..., Tensor], soft: tuple[Tensor, str], system: str
) -> None:
    image, path = soft
    made = picture(input=path, strength=0.001)
    if system == "ddpm":
        assert (made - image).abs().max() < 0.05
    else:  # a random autoencoder gives back something else, and always the same
        assert (made - picture(input=path, strength=0.001, seed=1)).abs().mean() < 0.05


def test_what_a_mask_keeps_is_kept_to_the_bit(
    picture: Callable[..., Tensor], soft: tuple[Tensor, str], tmp_path: Path
) -> None:
    image, path = soft
    mask = torch.zeros(1, *image.shape[1:])
    mask[:, 2:6, 3:7] = 1
    made = picture(input=path, mask=save(tmp_path / "mask.png", mask))
    torch.testing.assert_close(made[:, mask[0] == 0], image[:, mask[0] == 0], atol=1e-4, rtol=0)
    assert (made - image)[:, mask[0] == 1].abs().mean() > 0.01
    hole = picture(input=path, operator="hole 2:6 3:7")
    torch.testing.assert_close(hole, made)


def test_outpainting(
    picture: Callable[..., Tensor], soft: tuple[Tensor, str], tmp_path: Path
) -> None:
    image, _ = soft
    inner = image[:, 2:-1, 1:-2]
    made = picture(input=save(tmp_path / "inner.png", inner), operator="extend 2:1 1:2")
    assert made.shape == image.shape
    torch.testing.assert_close(made[:, 2:-1, 1:-2], inner, atol=1e-2, rtol=0)


def test_what_was_measured_is_met(
    picture: Callable[..., Tensor], soft: tuple[Tensor, str], tmp_path: Path, system: str
) -> None:
    """Before pixels that leave their range are cut off, which random networks make most of them do."""
    image, _ = soft
    down, grey = operators.downsample([2, 2]), operators.channel_mix([io.LUMA])
    for operator, measure in (("upscale 2", down), ("colour", grey)):
        path = save(tmp_path / f"{operator}.png", measure(image[None])[0])
        moments: list[pipeline.Moment] = []
        made = picture(input=path, operator=operator, on_step=moments.append)
        assert not torch.equal(made, picture(input=path, operator=operator, seed=1))
        if system == "ddpm":
            wanted = io.read(Path(path))["image"] * 2 - 1
            found = measure(moments[-1].state.x)[0]
            torch.testing.assert_close(found, wanted[: len(found)], atol=1e-4, rtol=0)


@pytest.mark.parametrize("system", ["ddpm"], indirect=True)
def test_inversion_comes_back_the_better_the_more_steps(
    picture: Callable[..., Tensor], soft: tuple[Tensor, str]
) -> None:
    image, path = soft
    found = [
        float((picture(input=path, invert=1, steps=steps, grid="linear") - image).abs().mean())
        for steps in (5, 50)
    ]
    assert found[1] < found[0]


def test_between_two_ends(picture: Callable[..., Tensor], system: str) -> None:
    ends = [picture(seed=1, to_seed=2, position=p) for p in (0.0, 1.0)]
    for end, seed in zip(ends, (1, 2), strict=True):
        torch.testing.assert_close(end, picture(seed=seed), atol=1e-3, rtol=0)
    if system != "ddpm":
        texts = [picture(text="a cat", to_text="a dog", position=p) for p in (0.0, 0.5, 1.0)]
        assert torch.equal(texts[0], picture(text="a cat"))
        torch.testing.assert_close(texts[2], picture(text="a dog"))
        assert not torch.equal(texts[1], texts[0]) and not torch.equal(texts[1], texts[2])
        same = picture(text="a cat :0.5 | a cat :0.5", guidance=2.0)
        torch.testing.assert_close(same, picture(text="a cat", guidance=2.0), atol=1e-3, rtol=0)


def test_a_picture_of_any_size_and_kind_is_fitted(
    picture: Callable[..., Tensor], system: str, tmp_path: Path
) -> None:
    wide = torch.zeros(1, 40, 90)
    wide[:, :, 45:] = 1  # grey, and twice as wide as high
    path = save(tmp_path / "wide.gif", wide)
    made = picture(input=path, operator="hole 0:1 0:1")
    size = SIZE[system]
    assert made.shape == (3, size, size)
    assert made[:, 2:, : size // 2 - 1].max() < 0.05 and made[:, 2:, size // 2 + 1 :].min() > 0.95


def test_fitted_to_a_height_and_a_width() -> None:
    image = torch.arange(6.0).reshape(1, 1, 6).expand(3, 3, 6) / 6
    assert torch.equal(io.fitted(image, (3, 6)), image)
    assert torch.equal(io.fitted(image, (3, 4)), image[:, :, 1:5])
    assert io.fitted(image, (12, 12)).shape == (3, 12, 12)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--input", "none.png"], 3, "cannot read none.png: No such file"),
        (["--input", ""], 3, "cannot read '': No such file"),
        (["--input", "text.png"], 2, "text.png is not a picture that can be read"),
        (["--input", "cut.png"], 2, "cut.png is damaged"),
        (["--input", "a.png", "--mask", "b.png"], 2, "the mask b.png has the size [(4, 4)]"),
        (["--input", "a.png", "--mask", "cut.png"], 2, "cut.png is damaged"),
        (["--input", "a.png", "--strength", "0"], 2, "--strength should be at least"),
        (["--input", "a.png", "--strength", "1.01"], 2, "--strength should be at most 1"),
        (["--input", "a.png", "--operator", "colours"], 2, "did you mean 'colour'?"),
        (["--input", "a.png", "--operator", "colour 3"], 2, "'colour' takes no number"),
        (["--input", "a.png", "--operator", "upscale 3"], 2, "are no multiples"),
    ],
)
def test_what_is_wrong_is_one_line_and_no_file(
    folder: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    at = folder("ddpm", accepts=TAKES["ddpm"])
    monkeypatch.chdir(tmp_path)
    save(Path("a.png"), torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)))
    save(Path("b.png"), torch.zeros(1, 4, 4))
    Path("text.png").write_text("no picture")
    Path("cut.png").write_bytes(Path("a.png").read_bytes()[:100])
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert main(["run", str(at), "--seed", "1", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and words in err.splitlines()[-1]
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before


def test_weights_that_are_cut_or_those_of_another(
    folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at, out = folder("ddpm"), tmp_path / "a.png"
    own, foreign = (at / "unet.safetensors").read_bytes(), save_tensors({"a": torch.zeros(2)})
    wrong = {own[:-9]: "bytes and should have", foreign: "does not fit its network"}
    for content, words in wrong.items():
        (at / "unet.safetensors").write_bytes(content)
        if content is foreign:  # a file that its entry knows
            entry = (at / "registry.toml").read_text()
            entry = entry.replace(sha256(own).hexdigest(), sha256(foreign).hexdigest())
            entry = entry.replace(f"= {len(own)}", f"= {len(foreign)}")
            (at / "registry.toml").write_text(entry)
        assert main(["run", str(at), "--seed", "1", "--out", str(out)]) == 4
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("mdiff: ") and words in said and not out.exists()


def test_the_record_of_a_picture_made_of_a_picture(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = folder("ddpm", accepts=TAKES["ddpm"])
    monkeypatch.chdir(tmp_path)
    save(Path("a.png"), torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)))
    asked = ["--seed", "1", "--input", "a.png", "--strength", "0.5", "--out", "b.png"]
    assert main(["run", str(at), *asked]) == 0
    made = io.read_record(Path("b.png"))
    assert made is not None
    assert made["request"]["sha256"] == {"input": record.sha256("a.png")}
    assert main(["run", "--again", "b.png", "--out", "c.png"]) == 0
    assert Path("b.png").read_bytes() == Path("c.png").read_bytes()


def test_a_picture_for_a_model_of_texts_alone(folder: Folder) -> None:
    card = registry.load(hosts.current()).resolve(str(folder("stable-diffusion")))
    words = "does not take --input; of such fields it takes: text, negative"
    with pytest.raises(UsageError, match=words):
        resolve(card, {"text": "a cat", "input": "a.png"}, hosts.current())
