"""Picture files: a sample {"image": float32 (C, H, W) in [0, 1]} to a file with its record inside, and back.

C is 1 (grey), 3 (RGB) or 4 (RGB and alpha). Pictures are 8 bits deep. The same sample gives the same bytes. A PNG has
the record as text; a WebP or JPEG in its EXIF description. Each also has what other tools look for: the `parameters`
text. Neither torch nor Pillow is imported before a file is touched.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdiff.core import record
from mdiff.core.errors import MdiffError, MissingError, NonFiniteError, UsageError
from mdiff.core.hooks import Media

if TYPE_CHECKING:
    from PIL.Image import Exif, Image
    from PIL.PngImagePlugin import PngInfo
    from torch import Tensor

CHUNK = "mdiff"
"""The key of the record among a PNG's texts."""
DESCRIPTION, EXIF_PART, COMMENT = 0x010E, 0x8769, 0x9286
"""EXIF tags: ImageDescription, the part that holds the next, UserComment."""
EXIF_LIMIT, COMMENT_LIMIT = 60_000, 8_000
"""Characters: a JPEG's EXIF has to stay below 64 KiB."""
PIXELS = 2**27
"""A picture of more is refused: it would fill the memory."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a kind of file holds: Pillow's name of it, the longest edge, the modes, how it is saved."""

    form: str
    edge: int
    modes: tuple[str, ...] = ("L", "RGB", "RGBA")
    settings: Mapping[str, Any] = field(default_factory=dict)


JPEG = Kind(
    form="JPEG", edge=65_500, modes=("L", "RGB"), settings={"quality": 95, "subsampling": 0}
)
KINDS: Mapping[str, Kind] = {
    ".png": Kind(form="PNG", edge=2**20),
    ".webp": Kind(form="WEBP", edge=16_383, settings={"lossless": True}),
    ".jpg": JPEG,
    ".jpeg": JPEG,
}
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def write(
    path: Path, sample: Mapping[str, Any], made: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    """Writes a sample into a file of the kind that its suffix names, with the record `made` inside.

    Raises:
        UsageError: not (1, 3 or 4, H, W), or alpha or a size that the file cannot hold.
        NonFiniteError: the sample has a NaN or an infinity.
        MdiffError: the system refused.
    """
    picture = to_pillow(sample["image"])
    suffix = path.suffix.lower()
    kind = KINDS[suffix]
    if picture.mode not in kind.modes:
        raise UsageError(f"a {suffix} file holds no alpha: write .png or .webp")
    if max(picture.size) > kind.edge:
        width, height = picture.size
        raise UsageError(
            f"an edge in a {suffix} file has at most {kind.edge} pixels, this picture has "
            f"{width} x {height}: write .png"
        )
    text = parameters(made, picture.size)
    inside: dict[str, Any] = (
        {"pnginfo": _png_texts(made, text)} if kind.form == "PNG" else {"exif": _exif(made, text)}
    )
    try:
        picture.save(path, format=kind.form, **kind.settings, **inside)
    except OSError as error:
        raise MdiffError(f"cannot write {path.name}: {error.strerror or error}") from error


def to_pillow(image: Tensor) -> Image:
    """A picture (C, H, W) in [0, 1] as Pillow has it, rounded to 8 bits. Raises as `write`."""
    from PIL.Image import fromarray

    image = image.detach().float().cpu()
    if image.ndim != 3 or image.shape[0] not in MODES or 0 in image.shape:
        raise UsageError(f"a picture is (1, 3 or 4 channels, height, width), not {(*image.shape,)}")
    if not bool(image.isfinite().all()):
        raise NonFiniteError(
            "the picture has a NaN or an infinity and was not written: try another precision or "
            "seed"
        )
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def thumbnail(sample: Mapping[str, Any]) -> Image:
    """A sample as a picture to look at, which it is. Raises as `write`."""
    return to_pillow(sample["image"])


def parameters(made: Mapping[str, Any], size: tuple[int, int]) -> str:
    """The text in which tools around Stable Diffusion say how a picture was made."""
    request = made["request"]
    lines = [request["text"] or ""]
    if request["negative"]:
        lines.append(f"Negative prompt: {request['negative']}")
    facts = {
        "Steps": request["steps"],
        "Sampler": request["sampler"],
        "CFG scale": format(request["guidance"], "g"),
        "Seed": request["seed"],
        "Size": f"{size[0]}x{size[1]}",
        "Model": made["model"],
    }
    if "strength" in request:
        facts["Denoising strength"] = format(request["strength"], "g")
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in facts.items())])


def _png_texts(made: Mapping[str, Any], text: str) -> PngInfo:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", text)
    info.add_text(CHUNK, record.canonical(made))
    return info


def _exif(made: Mapping[str, Any], text: str) -> Exif:
    from PIL.Image import Exif

    exif = Exif()
    exif[DESCRIPTION] = record.short(made, EXIF_LIMIT - 2 * COMMENT_LIMIT)
    comment = text[:COMMENT_LIMIT].encode("utf-16-be", "surrogatepass")
    exif.get_ifd(EXIF_PART)[COMMENT] = b"UNICODE\0" + comment
    return exif


def read_record(path: Path) -> dict[str, Any] | None:
    """The record in a picture file; None where there is none."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            text = picture.info.get(CHUNK) or picture.getexif().get(DESCRIPTION)
    except Exception:  # noqa: BLE001 (damaged files make decoders raise anything)
        return None
    return record.parse(text) if isinstance(text, str) else None


def read(path: Path, channels: int | None = None) -> dict[str, Any]:
    """The sample in a picture file, upright, the first frame of several, in sRGB.

    Args:
        channels: 1, 3 or 4; None for 1 where the file is grey and 3 where it is not. What is transparent lies on
            white, except with 4.

    Raises:
        MissingError: no such file.
        UsageError: not a picture, a damaged one, or one of more than `PIXELS` pixels.
    """
    if not path.is_file():
        raise MissingError(f"no file {str(path)!r}: give the path of a picture")
    values = _decoded(path)
    return {"image": in_channels(values, channels or (1 if len(values) in (1, 2) else 3))}


def _decoded(path: Path) -> Tensor:
    """The picture of a file, float32 (1 to 4, H, W): grey or RGB, alpha last where it has one."""
    from PIL import Image, ImageOps

    large = f"{path} has more than {PIXELS} pixels: make it smaller first"
    try:
        with warnings.catch_warnings():
            # of odd tags, and of sizes: its limit is below ours, and beyond twice that it raises all the same
            warnings.simplefilter("ignore")
            with Image.open(path) as file:
                if file.width * file.height > PIXELS:
                    raise UsageError(large)
                file.load()
                return _values(ImageOps.exif_transpose(file))
    except Image.DecompressionBombError as error:
        raise UsageError(large) from error
    except Image.UnidentifiedImageError as error:
        raise UsageError(
            f"{path} is not a picture that can be read: give a PNG, JPEG, WebP, GIF, BMP or TIFF "
            "file"
        ) from error
    except MdiffError:
        raise
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{path} is damaged ({why}): export or copy it again") from error


def _values(picture: Image) -> Tensor:
    """What `_decoded` gives, of a picture in any of Pillow's modes."""
    import numpy as np
    import torch

    if picture.mode == "F" or picture.mode.startswith("I"):
        deep = np.asarray(picture).astype(np.float32)
        peak = float(deep.max())
        # whole numbers are 16 bits deep if they fit; floats have whichever of the usual ranges does
        tops = (1.0, 255.0, 65_535.0) if picture.mode == "F" else (65_535.0,)
        top = next((top for top in tops if peak <= top), peak)
        values = [np.nan_to_num(deep / top).clip(0, 1)]
        if isinstance(clear := picture.info.get("transparency"), int):
            values.append((deep != clear).astype(np.float32))
        return torch.from_numpy(np.stack(values))
    transparent = picture.has_transparency_data
    grey = picture.mode in ("1", "L", "LA", "La")
    mode = ("LA" if transparent else "L") if grey else ("RGBA" if transparent else "RGB")
    if picture.mode != "CMYK":  # whose colours are right by its profile alone
        picture = _converted(picture, mode)
    picture = _converted(picture if grey else _in_srgb(picture), mode)
    pixels = torch.from_numpy(np.array(picture)).float() / 255
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def _converted(picture: Image, mode: str) -> Image:
    if picture.mode == mode:
        return picture
    # Pillow goes from a grey picture with a transparent value to alpha by way of RGBA alone
    return (picture.convert("RGBA") if mode == "LA" else picture).convert(mode)


def _in_srgb(picture: Image) -> Image:
    """A picture in RGB, RGBA or CMYK as its colour profile has it, where that can be used; itself otherwise."""
    from PIL import ImageCms

    profile = picture.info.get("icc_profile")
    if not profile:
        return picture
    to = "RGB" if picture.mode == "CMYK" else picture.mode
    try:
        own = ImageCms.getOpenProfile(BytesIO(profile))
        if picture.mode == to and "sRGB" in ImageCms.getProfileDescription(own):
            return picture
        converted = ImageCms.profileToProfile(
            picture, own, ImageCms.createProfile("sRGB"), outputMode=to
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        return picture
    return converted or picture


LUMA = (0.299, 0.587, 0.114)
"""What red, green and blue count in grey (ITU-R BT.601)."""


def in_channels(image: Tensor, channels: int) -> Tensor:
    """A picture (1 to 4, H, W), alpha last where there are 2 or 4, in 1, 3 or 4 channels; on white without alpha.

    Raises:
        UsageError: another number of channels.
    """
    import torch

    if channels not in MODES:
        raise UsageError(f"a picture has 1, 3 or 4 channels, not {channels}")
    colour, alpha = (image[:-1], image[-1:]) if len(image) in (2, 4) else (image, None)
    if channels == 4:
        opaque = torch.ones_like(image[:1]) if alpha is None else alpha
        return torch.cat([colour.expand(3, -1, -1), opaque])
    if alpha is not None:
        colour = 1 - alpha * (1 - colour)
    if len(colour) == channels:
        return colour
    if channels == 3:
        return colour.expand(3, -1, -1).contiguous()
    return (colour * colour.new_tensor(LUMA).reshape(3, 1, 1)).sum(0, keepdim=True)


def fitted(image: Tensor, size: int | tuple[int, int]) -> Tensor:
    """A picture (C, H, W) in another size, of a square's edge or (height, width): resized, antialiased, until it covers
    that, and the middle cut out.
    """
    import torch.nn.functional as F

    high, wide = (size, size) if isinstance(size, int) else size
    _, height, width = image.shape
    scale = max(high / height, wide / width)
    if scale != 1:
        shape = [max(high, round(height * scale)), max(wide, round(width * scale))]
        image = F.interpolate(image[None], size=shape, mode="bicubic", antialias=True)[0]
        image = image.clamp(0, 1)
    top, left = (image.shape[1] - high) // 2, (image.shape[2] - wide) // 2
    return image[:, top : top + high, left : left + wide]


MEDIA = tuple(
    Media(
        suffix=suffix,
        write=write,
        read=read,
        read_record=read_record,
        default=suffix == ".png",
        thumbnail=thumbnail,
    )
    for suffix in KINDS
)
"""The kinds of file of this modality."""
