"""What pictures look like on sheets and on the way, and the linear map from latents to colours."""

import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mdiff.cli import main
from mdiff.core import host as hosts
from mdiff.core import pipeline, registry, request
from mdiff.core.errors import MissingError, UsageError
from mdiff.core.nn.autoencoder import AutoencoderKL, DiagonalGaussian
from mdiff.plugins.image import io, latent_rgb

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
    model = folder("stable-diffusion", config={"latent_rgb": TABLE})
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
    code, out, err = mdiff("image", "latent-rgb", model, "--data", pictures)
    assert code == 0 and "% of the colours' variance" in err
    table = tomllib.loads(out)["latent_rgb"]
    assert len(table) == 3 and all(len(row) == 3 for row in table)
    entry = model / "registry.toml"
    lines = entry.read_text().replace("latent_scale", f"{out}latent_scale")
    entry.write_text(lines)
    card = registry.load(hosts.current()).resolve(str(model))
    assert card.config["latent_rgb"] == table
    built = hosts.current().call(
        "image", "mdiff_build", card=card, device="cpu", dtype=torch.float32
    )
    assert built.stages[0].preview(torch.zeros(1, 2, 8, 8)).size == (16, 16)


def test_what_cannot_be_fitted(mdiff: Run, folder: Callable[..., Path], pictures: Path) -> None:
    code, _, err = mdiff("image", "latent-rgb", folder("ddpm"), "--data", pictures)
    assert code == 2 and "has no autoencoder: what it denoises are pictures already" in err
    code, _, err = mdiff("image", "latent-rgb", folder("stable-diffusion"), "--data", "nowhere")
    assert code == MissingError.exit_code and "nowhere" in err


# --- the map --------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """A stand-in for an autoencoder, whose latents are colours of squares, mixed."""

    def __init__(self, mix: Tensor, factor: int = 2) -> None:
        super().__init__()
        self.mix, self.factor = nn.Parameter(mix), factor

    def encode(self, x: Tensor) -> DiagonalGaussian:
        means = nn.functional.avg_pool2d(x, self.factor)
        z = torch.einsum("bchw,cz->bzhw", means, self.mix) + 0.5
        return DiagonalGaussian(mean=z, log_variance=torch.zeros_like(z))


def noise(count: int, channels: int = 3) -> Iterator[Tensor]:
    draw = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.rand(channels, 8, 8, generator=draw)


def test_a_linear_autoencoder_is_inverted() -> None:
    mix = torch.tensor([[1.0, 0.5, 0.0], [0.0, 2.0, 0.3], [0.4, 0.0, -1.0]])
    found = latent_rgb.fit(Mixed(mix), noise(4))
    table = torch.tensor(found.table)
    assert torch.allclose(table[:3], mix.inverse(), atol=1e-3)
    assert torch.allclose(table[3], -0.5 * mix.inverse().sum(0), atol=1e-3)
    assert found.explained == pytest.approx(1, abs=1e-6)


def test_what_latents_do_not_say_is_not_explained() -> None:
    only_red = torch.tensor([[1.0], [0.0], [0.0]])
    found = latent_rgb.fit(Mixed(only_red), noise(30))
    assert found.explained == pytest.approx(1 / 3, abs=0.03)


def test_a_channel_that_is_always_the_same_does_no_harm() -> None:
    mix = torch.cat([torch.eye(3), torch.zeros(3, 2)], 1)
    found = latent_rgb.fit(Mixed(mix), noise(4))
    assert found.explained == pytest.approx(1, abs=1e-6)
    assert max(abs(v) for row in found.table for v in row) < 2


@pytest.mark.parametrize("channels", [1, 3])
def test_the_map_of_a_network_is_that_of_least_squares(channels: int) -> None:
    torch.manual_seed(0)
    net = AutoencoderKL(
        axes=2, in_channels=channels, latent=4, channels=8, multipliers=(1, 2), blocks=1, groups=4
    )
    found = latent_rgb.fit(net, noise(6, channels))
    with torch.no_grad():
        x = 2 * torch.stack(list(noise(6, channels))) - 1
        z = net.encode(x).mean
    rows = torch.cat([z, torch.ones_like(z[:, :1])], 1).movedim(1, -1).reshape(-1, 5).double()
    squares = nn.functional.avg_pool2d(x, 2).expand(-1, 3, -1, -1)
    wanted = squares.movedim(1, -1).reshape(-1, 3).double()
    solution = torch.linalg.lstsq(rows, wanted).solution
    assert torch.allclose(rows @ torch.tensor(found.table).double(), rows @ solution, atol=5e-3)
    assert 0 < found.explained < 1


def test_the_map_applied(tmp_path: Path) -> None:
    latent = torch.zeros(1, 2, 3, 4)
    latent[0, 0, :, 2:] = 1.0
    seen = latent_rgb.picture(latent, TABLE, 4)
    assert seen.size == (16, 12)
    left, right = seen.getpixel((0, 6)), seen.getpixel((15, 6))
    assert left == tuple(round((1 + v) / 2 * 255) for v in TABLE[2])
    assert right == tuple(round((1 + v + w) / 2 * 255) for v, w in zip(*TABLE[::2], strict=True))


def test_a_map_for_other_latents() -> None:
    with pytest.raises(UsageError, match=r"latent_rgb should be 5 rows of 3 numbers.*\(3, 3\)"):
        latent_rgb.picture(torch.zeros(1, 4, 8, 8), TABLE, 8)


def test_too_few_pictures() -> None:
    with pytest.raises(UsageError, match="needs more pictures"):
        latent_rgb.fit(Mixed(torch.eye(3)), [])
    with pytest.raises(UsageError, match="needs more pictures"):
        latent_rgb.fit(Mixed(torch.eye(3), factor=8), noise(2))


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
