"""Picture files: what goes in comes out, records inside, and every odd picture that people have."""

import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from mdiff.core import record
from mdiff.core.errors import MdiffError, MissingError, NonFiniteError, UsageError
from mdiff.core.hooks import ModelCard, Request
from mdiff.plugins.image import io

CARD = ModelCard(
    id="image/tiny",
    plugin="image",
    modality="image",
    system="DDPM",
    summary="",
    licence="",
    source="",
    root=Path(),
)


def made(**fields: Any) -> dict[str, Any]:
    request = Request(**{"model": "image/tiny", "text": "ein Äpfel 🍎", "seed": 7} | fields)
    return record.make(request, CARD, dist="d", dist_version="1", threads=1)


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def saved(path: Path, picture: Image.Image, **settings: Any) -> Path:
    picture.save(path, **settings)
    return path


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


# --- writing and reading back ---------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".webp"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_lossless_files_hold_eight_bits_exactly(tmp_path: Path, suffix: str, channels: int) -> None:
    image = noise(channels, 13, 21)
    image[-1] = image[-1].clamp(min=0.01)  # a WebP keeps no colour under full transparency
    path = tmp_path / f"a{suffix}"
    io.write(path, {"image": image}, made(), {})
    back = io.read(path, channels)["image"]
    assert torch.equal((back * 255).round(), (image * 255).round())
    assert back.dtype == torch.float32 and back.shape == image.shape


def test_grey_and_colour_stay_what_they_are(tmp_path: Path) -> None:
    for channels in (1, 3):
        path = tmp_path / f"{channels}.png"
        io.write(path, {"image": noise(channels, 8, 8)}, made(), {})
        assert io.read(path)["image"].shape == (channels, 8, 8)


def test_jpeg_is_near(tmp_path: Path) -> None:
    ramp = torch.linspace(0, 1, 64).expand(3, 64, 64)
    for suffix in (".jpg", ".jpeg"):
        io.write(tmp_path / f"a{suffix}", {"image": ramp}, made(), {})
        assert (io.read(tmp_path / f"a{suffix}")["image"] - ramp).abs().max() < 0.02


@pytest.mark.parametrize("suffix", list(io.KINDS))
def test_the_record_is_inside(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    io.write(path, {"image": noise(3, 8, 8)}, made(), {})
    assert io.read_record(path) == made()


@pytest.mark.parametrize("suffix", list(io.KINDS))
def test_the_longest_request_fits(tmp_path: Path, suffix: str) -> None:
    long = "äöü " * 5000
    path = tmp_path / f"a{suffix}"
    whole = made(text=long, negative=long)
    io.write(path, {"image": noise(3, 8, 8)}, whole, {})
    found = io.read_record(path)
    assert found == whole or found is not None and found["record"] == record.digest(whole)
    assert suffix != ".png" or found == whole


def test_same_sample_same_bytes(tmp_path: Path) -> None:
    for suffix in io.KINDS:
        for name in "ab":
            io.write(tmp_path / f"{name}{suffix}", {"image": noise(3, 8, 8)}, made(), {})
        one, two = ((tmp_path / f"{name}{suffix}").read_bytes() for name in "ab")
        assert one == two, suffix


def test_parameters_are_where_other_tools_look(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"negative": "blur", "steps": 25, "guidance": 7.5, "seed": 7}
    wanted = (
        "ein Äpfel 🍎\nNegative prompt: blur\nSteps: 25, Sampler: dpmpp_2m, CFG scale: 7.5, "
        "Seed: 7, Size: 8x6, Model: image/tiny"
    )
    for suffix in (".png", ".webp", ".jpg"):
        io.write(tmp_path / f"a{suffix}", {"image": noise(3, 6, 8)}, made(**fields), {})
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.info["parameters"] == wanted
    for suffix in (".webp", ".jpg"):
        with Image.open(tmp_path / f"a{suffix}") as picture:
            comment = picture.getexif().get_ifd(0x8769)[0x9286]
        assert comment[:8] == b"UNICODE\0" and comment[8:].decode("utf-16-be") == wanted


def test_a_request_without_text_has_parameters() -> None:
    assert io.parameters(made(text=None), (4, 4)).splitlines()[0] == ""


def test_values_beyond_the_range_are_cut_off(tmp_path: Path) -> None:
    io.write(tmp_path / "a.png", {"image": torch.tensor([[[-0.5, 1.5]]])}, made(), {})
    assert io.read(tmp_path / "a.png")["image"].tolist() == [[[0.0, 1.0]]]


@pytest.mark.parametrize(
    ("image", "suffix", "kind", "said"),
    [
        (torch.zeros(2, 4, 4), ".png", UsageError, "1, 3 or 4 channels"),
        (torch.zeros(4, 4), ".png", UsageError, "1, 3 or 4 channels"),
        (torch.zeros(3, 0, 4), ".png", UsageError, "1, 3 or 4 channels"),
        (torch.full((3, 4, 4), float("nan")), ".png", NonFiniteError, "NaN or an infinity"),
        (torch.zeros(4, 4, 4), ".jpg", UsageError, "write .png or .webp"),
        (torch.zeros(1, 1, 20_000), ".webp", UsageError, "at most 16383 pixels"),
    ],
)
def test_what_cannot_be_written(
    tmp_path: Path, image: torch.Tensor, suffix: str, kind: type[MdiffError], said: str
) -> None:
    with pytest.raises(kind, match=said):
        io.write(tmp_path / f"a{suffix}", {"image": image}, made(), {})
    assert not list(tmp_path.iterdir())


def test_a_file_that_the_system_refuses(tmp_path: Path) -> None:
    with pytest.raises(MdiffError, match=r"cannot write a\.png: No such file"):
        io.write(tmp_path / "none" / "a.png", {"image": noise(3, 4, 4)}, made(), {})


# --- pictures that people have --------------------------------------------------------------------


def test_palette(tmp_path: Path) -> None:
    rgb = Image.fromarray(pixels(8, 8, 3)).quantize(16)
    for suffix in ("png", "gif"):
        image = io.read(saved(tmp_path / f"a.{suffix}", rgb))["image"]
        assert torch.equal(
            image, torch.from_numpy(np.array(rgb.convert("RGB"))).permute(2, 0, 1) / 255
        )


def test_transparent_colours_of_a_palette_and_of_grey(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1])
    path = saved(tmp_path / "p.png", palette, transparency=0)
    assert io.read(path)["image"][:, 0].T.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert io.read(path, 4)["image"][3, 0].tolist() == [0, 1]
    grey = Image.new("L", (2, 1))
    grey.putdata([10, 51])
    path = saved(tmp_path / "g.png", grey, transparency=10)
    assert io.read(path)["image"][0, 0].tolist() == pytest.approx([1, 0.2])


def test_alpha_lies_on_white_unless_asked_for(tmp_path: Path) -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = [0, 51, 255]
    path = saved(tmp_path / "a.png", Image.fromarray(rgba))
    assert io.read(path)["image"][0, 0].tolist() == pytest.approx([1, 0.8, 0])
    assert io.read(path)["image"].shape == (3, 1, 3)
    assert io.read(path, 4)["image"][3, 0].tolist() == pytest.approx([0, 0.2, 1])
    assert io.read(path, 1)["image"][0, 0].tolist() == pytest.approx([1, 0.8, 0])
    path = saved(tmp_path / "la.png", Image.fromarray(rgba).convert("LA"))
    assert io.read(path)["image"][0, 0].tolist() == pytest.approx([1, 0.8, 0])


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_rotation(tmp_path: Path, turn: int) -> None:
    upright = Image.new("RGB", (48, 32), "white")
    upright.paste("black", (0, 0, 16, 8))
    back = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = upright
    for operation in back.get(turn, []):
        stored = stored.transpose(operation)
    exif = Image.Exif()
    exif[0x0112] = turn
    image = io.read(saved(tmp_path / "a.jpg", stored, exif=exif, quality=100))["image"]
    assert image.shape == (3, 32, 48)
    assert image[:, :6, :14].max() < 0.1 and image[:, 10:].min() > 0.9


def test_sixteen_bits(tmp_path: Path) -> None:
    deep = np.array([[0, 6554, 65535]], np.uint16)
    for suffix in ("png", "tiff"):
        image = io.read(saved(tmp_path / f"a.{suffix}", Image.fromarray(deep)))["image"]
        assert image[0, 0].tolist() == pytest.approx([0, 0.1, 1], abs=1e-5)
        assert image.shape == (1, 1, 3)


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0])
def test_floats(tmp_path: Path, top: float) -> None:
    values = np.array([[0, 0.5, 1]], np.float32) * top
    image = io.read(saved(tmp_path / "a.tiff", Image.fromarray(values)))["image"]
    assert image[0, 0].tolist() == pytest.approx([0, 0.5, 1])


def test_cmyk_without_profile(tmp_path: Path) -> None:
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    image = io.read(saved(tmp_path / "a.jpg", cmyk, quality=100))["image"]
    assert image[:, 0, 0].tolist() == pytest.approx([1, 0, 0], abs=0.02)


def test_a_colour_profile_counts(tmp_path: Path) -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = Image.new("RGB", (4, 4), (200, 100, 50))
    image = io.read(saved(tmp_path / "a.png", plain, icc_profile=lab))["image"]
    assert (image[:, 0, 0] * 255).round().tolist() == [200, 100, 50]
    # damaged profiles are as none
    image = io.read(saved(tmp_path / "b.png", plain, icc_profile=b"nonsense"))["image"]
    assert (image[:, 0, 0] * 255).round().tolist() == [200, 100, 50]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_of_another_profile_become_those_of_srgb(tmp_path: Path, mode: str) -> None:
    # sRGB with the primaries of red and green exchanged, under another name
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    tags = {profile[at : at + 4]: at for at in range(132, 132 + 12 * profile[131], 12)}
    red, green = (profile[tags[tag] : tags[tag] + 12] for tag in (b"rXYZ", b"gXYZ"))
    other = profile.replace(red, b"rXYZ" + green[4:]).replace(green, b"gXYZ" + red[4:])
    other = other.replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))
    picture = Image.new("RGBA", (4, 4), (200, 100, 50, 102))
    picture = picture.convert("RGB").quantize(4) if mode == "P" else picture.convert(mode)
    path = saved(tmp_path / "a.png", picture, icc_profile=other)
    colours = io.read(path, 4)["image"][:, 0, 0] * 255
    alpha = 102 if mode == "RGBA" else 255
    assert colours.tolist() == pytest.approx([100, 200, 50, alpha], abs=2)


def deep_png(
    path: Path, values: list[list[int]], colour: int, *chunks: tuple[bytes, bytes]
) -> Path:
    """A row of pixels 16 bits deep, which Pillow reads and does not write; `colour` is the type of PNG's header."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    row = b"\0" + b"".join(struct.pack(f">{len(pixel)}H", *pixel) for pixel in values)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", len(values), 1, 16, colour, 0, 0, 0)), *chunks]
    parts += [(b"IDAT", zlib.compress(row)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))
    return path


def test_sixteen_bits_with_colour_and_alpha(tmp_path: Path) -> None:
    path = deep_png(tmp_path / "rgb.png", [[65535, 6554, 0]], 2)
    assert io.read(path)["image"][:, 0, 0].tolist() == pytest.approx([1, 0.1, 0], abs=0.005)
    path = deep_png(tmp_path / "rgba.png", [[65535, 0, 0, 32768]], 6)
    assert io.read(path, 4)["image"][:, 0, 0].tolist() == pytest.approx([1, 0, 0, 0.5], abs=0.005)
    path = deep_png(tmp_path / "la.png", [[6554, 65535], [6554, 0]], 4)
    assert io.read(path)["image"][0, 0].tolist() == pytest.approx([0.1, 1], abs=0.005)
    clear = (b"tRNS", struct.pack(">H", 6554))
    path = deep_png(tmp_path / "l.png", [[6554], [13107]], 0, clear)
    assert io.read(path)["image"][0, 0].tolist() == pytest.approx([1, 0.2], abs=1e-5)


def test_sixteen_bits_the_other_way_round(tmp_path: Path) -> None:
    deep = Image.fromarray(np.array([[6554, 65535]], ">u2"))
    assert io.read(saved(tmp_path / "a.tiff", deep))["image"][0, 0].tolist() == pytest.approx(
        [0.1, 1], abs=1e-5
    )


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
def test_rotation_in_other_files_than_jpeg(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the left column, from below, is the top row
    stored = Image.new("RGB", (4, 2), "white")
    stored.putpixel((0, 1), (0, 0, 0))
    settings = {"lossless": True} if suffix == "webp" else {}
    image = io.read(saved(tmp_path / f"a.{suffix}", stored, exif=exif, **settings))["image"]
    assert image.shape == (3, 4, 2) and image[0, 0].tolist() == [0, 1] and image[0, 1:].min() == 1


def test_transparent_frames_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGBA", (8, 8), (255, 0, 0, alpha)) for alpha in (102, 255)]
    for suffix, settings in (("webp", {"lossless": True}), ("png", {})):
        path = tmp_path / f"a.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], **settings)
        assert io.read(path)["image"][:, 0, 0].tolist() == pytest.approx([1, 0.6, 0.6])


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_first_frame_of_an_animation(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    settings = {"lossless": True} if suffix == "webp" else {}
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **settings)
    assert io.read(path)["image"][:, 4, 4].tolist() == [1, 0, 0]


def test_one_bit_and_other_modes(tmp_path: Path) -> None:
    bit = Image.new("1", (2, 1))
    bit.putdata([0, 255])
    assert io.read(saved(tmp_path / "a.png", bit))["image"].tolist() == [[[0.0, 1.0]]]
    ycc = Image.new("RGB", (4, 4), "lime").convert("YCbCr")
    image = io.read(saved(tmp_path / "a.tiff", ycc))["image"]
    assert image[:, 0, 0].tolist() == pytest.approx([0, 1, 0], abs=0.02)


# --- and files that are none ----------------------------------------------------------------------


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no file"):
        io.read(tmp_path / "a.png")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP"])
def test_not_a_picture(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        io.read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert io.read_record(path) is None


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg", ".gif", ".bmp", ".tiff"])
def test_truncated_and_damaged(tmp_path: Path, suffix: str) -> None:
    whole = saved(tmp_path / f"whole{suffix}", Image.fromarray(pixels(40, 40, 3))).read_bytes()
    path = tmp_path / f"a{suffix}"
    rng = np.random.default_rng(1)
    for _ in range(30):
        data = bytearray(whole[: rng.integers(1, len(whole))])
        for place in rng.integers(0, len(data), 3):
            data[place] = rng.integers(0, 256)
        path.write_bytes(data)
        try:
            io.read(path)
        except UsageError as error:
            assert str(path) in str(error) and "\n" not in str(error)
    path.write_bytes(whole[: len(whole) // 2])
    if suffix != ".gif":  # whose decoder takes what there is
        with pytest.raises(UsageError):
            io.read(path)


def test_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.png", Image.new("1", (2000, 2000)))
    monkeypatch.setattr(io, "PIXELS", 3_999_999)
    with pytest.raises(UsageError, match="more than 3999999 pixels"):
        io.read(path)
    for limit in (3_000_000, 1_000_000):  # where Pillow warns, and where it refuses
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        monkeypatch.setattr(io, "PIXELS", 2**27 if limit == 1_000_000 else 3_999_999)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UsageError, match="pixels: make it smaller"):
                io.read(path)


def test_a_record_of_someone_else_is_none(tmp_path: Path) -> None:
    assert io.read_record(saved(tmp_path / "a.png", Image.new("L", (2, 2)))) is None
    assert io.read_record(tmp_path / "none.png") is None


# --- sizes and channels ---------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (7, 100), (32, 32), (10, 20)])
def test_fitted_is_the_middle_at_the_size(shape: tuple[int, int]) -> None:
    height, width = shape
    # coordinates as colours: the centre must stay in the centre, and nothing is stretched
    y = torch.linspace(0, 1, height).reshape(-1, 1).expand(shape)
    x = torch.linspace(0, 1, width).expand(shape)
    found = io.fitted(torch.stack([y, x, torch.zeros(shape)]), 32)
    assert found.shape == (3, 32, 32)
    short = min(shape)
    for values, edge in zip(found[:2], shape, strict=True):
        assert values.mean() == pytest.approx(0.5, abs=0.6 / edge + 0.02)
        assert values.max() - values.min() == pytest.approx(short / edge, abs=0.12)


def test_fitted_is_antialiased_and_within_range() -> None:
    checks = (torch.arange(64).reshape(-1, 1) + torch.arange(64)).remainder(2).float()
    found = io.fitted(checks.expand(1, 64, 64), 16)
    assert (found - 0.5).abs().max() < 0.05
    edge = torch.zeros(1, 64, 64)
    edge[..., 32:] = 1
    assert 0 <= io.fitted(edge, 17).min() and io.fitted(edge, 17).max() <= 1


def test_channels() -> None:
    grey = torch.full((1, 2, 2), 0.5)
    assert torch.equal(io.in_channels(grey, 3), torch.full((3, 2, 2), 0.5))
    assert io.in_channels(grey, 4)[3].min() == 1
    assert io.in_channels(torch.ones(3, 2, 2), 1).allclose(torch.ones(1, 2, 2))
    with pytest.raises(UsageError, match="not 2"):
        io.in_channels(grey, 2)
