"""What pictures look like on sheets and on the way, in pixels and in latents."""

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w
import torch
from PIL import Image
from torch import Tensor

from mdiff.cli import main
from mdiff.core import host as hosts
from mdiff.core import pipeline, registry, request
from mdiff.core.errors import MissingError, UsageError
from mdiff.core.hooks import Model, ModelCard
from mdiff.plugins.image import io

TABLE = [[0.5, 0.1, -0.2], [-0.3, 0.4, 0.2], [0.0, 0.1, 0.2]]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def mdiff(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Run:
    """Runs a command in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of coloured noise."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    draw = torch.Generator().manual_seed(0)
    for number in range(4):
        colours = torch.rand(3, 6, 6, generator=draw)
        io.to_pillow(colours).resize((20, 24)).save(folder / f"{number}.png")
    return folder


def image(path: Path | str) -> Image.Image:
    with Image.open(path) as file:
        file.load()
        return file


def built(card: ModelCard) -> Model:
    return hosts.current().call(
        "image", "mdiff_build", card=card, device="cpu", dtype=torch.float32
    )


# --- on the command line --------------------------------------------------------------------------


def test_pixels_are_their_own_preview(mdiff: Run, folder: Callable[..., Path]) -> None:
    model = folder("ddpm")
    looks = ("--sheet", "sheet.png", "--trajectory", "strip", "--preview", "now.png")
    code, out, err = mdiff(
        "run", model, "--seed", 1, "--sampler", "ddim", "--steps", 3, *looks, "--out", "a.png"
    )
    assert (code, out) == (0, "a.png\n"), err
    # 8 pixels become 96, each in 12 x 12, and the last x0 is what comes out
    large = image("a.png").resize((96, 96), Image.Resampling.NEAREST)
    assert image("now.png").tobytes() == large.tobytes()
    strip = image("a.steps.png")
    assert strip.width == 6 + 3 * (96 + 6)
    last = strip.crop((6 + 2 * 102, 6, 6 + 2 * 102 + 96, 102))
    assert last.tobytes() == large.tobytes()
    sheet = image("sheet.png")
    assert any(
        sheet.crop((6, top, 102, top + 96)).tobytes() == large.tobytes()
        for top in range(sheet.height - 95)
    )


def test_latents_show_by_the_map_of_the_card(mdiff: Run, folder: Callable[..., Path]) -> None:
    model = folder("stable-diffusion", config={"latent_map": TABLE})
    code, out, err = mdiff(
        *("run", model, "--text", "a", "--seed", 1, "--out", "a.png", "--preview", "now.png"),
        *("--trajectory", "animation"),
    )
    assert (code, out) == (0, "a.png\n"), err
    assert image("now.png").size == (96, 96), "16 pixels, enlarged"
    with Image.open("a.steps.webp") as film:
        assert film.n_frames == 2


def test_latents_without_a_map_have_no_preview(mdiff: Run, folder: Callable[..., Path]) -> None:
    model = folder("stable-diffusion")
    code, _, err = mdiff(
        "run", model, "--text", "a", "--seed", 1, "--out", "a.png", "--preview", "now.png"
    )
    assert code == 0 and "no previews: " in err and not Path("now.png").exists()


def test_the_command_prints_what_gives_a_card_previews(
    mdiff: Run, folder: Callable[..., Path], pictures: Path
) -> None:
    model = folder("stable-diffusion")
    code, out, err = mdiff("image", "latent-map", model, "--data", pictures)
    assert code == 0 and "% of the variance of colours" in err
    table = tomllib.loads(out)["latent_map"]
    assert len(table) == 3 and all(len(row) == 3 for row in table)
    entry = model / "registry.toml"
    lines = entry.read_text().replace("latent_scale", f"{out}latent_scale")
    entry.write_text(lines)
    card = registry.load(hosts.current()).resolve(str(model))
    assert card.config["latent_map"] == table
    preview = built(card).stages[0].preview
    assert preview is not None and preview(torch.zeros(1, 2, 8, 8)).size == (16, 16)


def test_what_cannot_be_fitted(mdiff: Run, folder: Callable[..., Path], pictures: Path) -> None:
    code, _, err = mdiff("image", "latent-map", folder("ddpm"), "--data", pictures)
    assert code == 2 and "has no autoencoder: it has no latents to map" in err
    code, _, err = mdiff("image", "latent-map", folder("stable-diffusion"), "--data", "nowhere")
    assert code == MissingError.exit_code and "nowhere" in err


def test_a_run_of_the_autoencoder_alone_will_do(
    mdiff: Run, folder: Callable[..., Path], pictures: Path
) -> None:
    model = folder("stable-diffusion")
    entry = model / "registry.toml"
    whole = mdiff("image", "latent-map", model, "--data", pictures)[1]
    for part, code in (("unet", 0), ("autoencoder", MissingError.exit_code)):
        table = tomllib.loads(entry.read_text())
        (one,) = table["models"].values()
        one["files"] = [file for file in one["files"] if file["module"] != part]
        entry.write_text(tomli_w.dumps(table))
        got, out, err = mdiff("image", "latent-map", model, "--data", pictures)
        assert got == code, err
        assert out == whole if code == 0 else "has no weights for its autoencoder" in err


def test_latents_are_the_colours_that_the_map_says(card: Callable[..., ModelCard]) -> None:
    stage = built(card("stable-diffusion", latent_map=TABLE)).stages[0]
    x0 = torch.zeros(1, 2, 3, 4)
    x0[0, 0, :, 2:] = 2.0  # latents are scaled by 2
    assert stage.preview is not None
    seen = stage.preview(x0)
    assert seen.size == (8, 6)
    left, right = seen.getpixel((0, 3)), seen.getpixel((7, 3))
    assert left == tuple(round((1 + v) / 2 * 255) for v in TABLE[2])
    assert right == tuple(round((1 + v + w) / 2 * 255) for v, w in zip(*TABLE[::2], strict=True))
    with pytest.raises(UsageError, match="latent_map should be 5 rows"):
        stage.preview(torch.zeros(1, 4, 8, 8))


# --- samples --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_a_picture_is_its_own_thumbnail(channels: int, mode: str) -> None:
    seen = io.thumbnail({"image": torch.full((channels, 4, 6), 0.2)})
    assert (seen.mode, seen.size) == (mode, (6, 4))


def test_the_last_x0_is_the_sample(folder: Callable[..., Path]) -> None:
    models = registry.load(hosts.current())
    card = models.resolve(str(folder("stable-diffusion")))
    asked = request.resolve(card, {"text": "a", "sampler": "ddim", "steps": 2}, models.host)
    model = pipeline.open_model(card, asked, models.host)
    seen: list[Tensor] = []

    def look(moment: pipeline.Moment) -> None:
        sample = moment.sample()
        assert sample is not None
        seen.append(sample["image"])

    made = pipeline.generate(model, card, asked, host=models.host, on_step=look)["image"]
    assert len(seen) == 2 and not torch.allclose(seen[0], made, atol=1e-3)
    assert torch.allclose(seen[1], made, atol=1e-5)
