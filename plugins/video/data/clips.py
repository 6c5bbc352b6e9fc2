"""The data set `video/motion`: things that move, with exact captions, as a folder.

Each thing has clips of every motion, drawn with numbers that its name and the motion's decide. Some pairs of thing and
motion are kept from training and asked for afterwards: see `held_out`. Stills of the things lie beside the clips, each
of which names some that are learnt along with it.
"""

import hashlib
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageOps

from mdiff.core import data, icons
from mdiff.core.errors import IntegrityError, MdiffError
from mdiff.core.hooks import Example
from mdiff.core.icons import Icons
from mdiff.plugins.video import pictures
from mdiff.plugins.video.data import PACKAGES, motions
from mdiff.plugins.video.data.motions import COMPASS, CROSSING, SPEEDS, Motion, Pose
from mdiff.plugins.video.data.things import THINGS, Thing

SIDE, RATE = 64, Fraction(8)
"""Pixels of an edge, frames a second."""
FINER = 2
"""Frames are drawn so many times larger, and made smaller then."""
HELD_OUT = 0.08
"""The part of pairs of a thing and a motion that is held out, on average."""
CROSSINGS = 1.5
"""Clips of two things that pass each other, for each thing."""
STILLS = 8
"""Stills that a clip names."""
GROUNDS: Mapping[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "light blue": (200, 226, 248),
    "light green": (206, 236, 206),
    "light yellow": (250, 240, 188),
    "pink": (250, 212, 222),
    "light gray": (222, 222, 228),
}
WHITE = 0.4
"""The share of clips on white, as far as things can be seen on it."""
APART, VISIBLE = 40, 0.5
"""A thing is seen on a ground where this part of it differs from it by so much (of 255)."""

_HEAD = """# Licences of this data set

The pictures were made smaller, put on coloured grounds, turned and moved; nothing else was changed.

| package | clips | licence | author and source |
|---|---|---|---|
"""


Layers = Sequence[tuple["Sprite", bool, Sequence[Pose]]]
"""Sprites, whether they are turned round, and the path of each."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sprite:
    """A thing as it is drawn in one style.

    Attributes:
        image: RGBA, its longer side as large as the finer frame.
        grounds: those on which it is seen.
    """

    thing: Thing
    style: str
    source: str
    image: Image.Image
    grounds: tuple[str, ...]

    @property
    def extent(self) -> tuple[float, float]:
        width, height = self.image.size
        return width / max(self.image.size), height / max(self.image.size)


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A clip to be made, and what is said of it."""

    example: Example
    layers: Layers
    ground: str


def build(folder: Path, fetch: Callable[[str], Path]) -> None:
    """Writes the clips, stills, `metadata.jsonl` and `LICENSES.md` into an empty folder.

    A picture that cannot be drawn is left out, with a line on the error stream.

    Args:
        fetch: "npm:name@1.0" -> the folder of the unpacked package.

    Raises:
        IntegrityError: a package does not hold what it should.
        MissingError: the package that draws SVG does not load.
    """
    at = {name: fetch(spec) for name, spec in PACKAGES.items()}
    try:
        flat = icons.vectors(
            at["fluent-flat"], icons.codes(at["fluent-flat"]), icons.drawer(at["resvg"])
        )
        styles = {
            ("3D", "fluent-3d"): icons.files(at["fluent-3d"] / "assets"),
            ("flat", "fluent-flat"): flat,
        }
    except (OSError, ValueError, KeyError) as error:
        raise IntegrityError(
            f"a package of video/motion is not what it was: {error!r}; fetch it again"
        ) from error
    sprites = {thing: found for thing in THINGS if (found := list(_sprites(thing, styles)))}
    if not sprites:
        raise IntegrityError("the packages of video/motion hold none of its pictures: fetch again")
    stills = list(_stills(folder, sprites))
    wanted = [*_single(folder, sprites, stills), *_crossing(folder, sprites, stills)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(_write, wanted))
    data.write_metadata(folder, (clip.example for clip in wanted))
    counts = Counter(clip.example.facts["source"] for clip in wanted)
    lines = [
        f"| {PACKAGES[name]} | {counts[name]} | {' | '.join(icons.CREDITS[name])} |\n"
        for name in PACKAGES
        if name in icons.CREDITS
    ]
    (folder / data.LICENCES).write_text(_HEAD + "".join(lines) + icons.LICENCE_TEXTS, "utf-8")


def held_out(code: str, motion: Motion) -> bool:
    """Whether a thing is never seen in a motion in training: a digest of the pair decides."""
    digest = hashlib.sha256(f"{motion} {code}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48 < HELD_OUT


# --- what is made ---------------------------------------------------------------------------------


def _sprites(thing: Thing, styles: Mapping[tuple[str, str], Icons]) -> Iterator[Sprite]:
    for (style, source), found in styles.items():
        if thing.code not in found:
            continue
        try:
            image = icons.trimmed(found[thing.code]())
        except MdiffError as error:
            print(f"skipped {thing.name} of {source}: {error}", file=sys.stderr)
            continue
        scale = FINER * SIDE / max(image.size)
        size = [max(1, round(edge * scale)) for edge in image.size]
        small = image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
        grounds = tuple(name for name in GROUNDS if _visible(small, name))
        yield Sprite(thing=thing, style=style, source=source, image=small, grounds=grounds)


def _single(
    folder: Path, sprites: Mapping[Thing, Sequence[Sprite]], stills: Sequence[tuple[str, str]]
) -> Iterator[Clip]:
    """The clips of one thing each."""
    for thing, drawn in sprites.items():
        for motion, count in motions.CLIPS.items():
            for number in range(count):
                rng = Random(f"{thing.code} {motion} {number}")
                sprite, speed = rng.choice(drawn), _speed(motion, number, count, rng)
                ground = _ground(sprite.grounds, rng)
                path = motions.poses(motion, SPEEDS[speed], sprite.extent, rng)
                texts = motions.wordings(thing.phrases, motion, speed, sprite.style, ground, rng)
                example = Example(
                    path=folder / _file_name(thing.name, motion, number),
                    texts=texts,
                    split="held_out" if held_out(thing.code, motion) else "train",
                    facts=_facts([sprite], motion, speed, ground, stills, rng),
                )
                layer = (sprite, _turned(thing, motion.direction), path)
                yield Clip(example=example, layers=[layer], ground=ground)


def _crossing(
    folder: Path, sprites: Mapping[Thing, Sequence[Sprite]], stills: Sequence[tuple[str, str]]
) -> Iterator[Clip]:
    """The clips of two things that pass each other, both of one style."""
    for number in range(round(CROSSINGS * len(sprites))):
        rng = Random(f"{CROSSING} {number}")
        things = rng.sample(list(sprites), min(2, len(sprites)))
        style = rng.choice(sprites[things[0]]).style
        pair = [sprite for thing in things for sprite in sprites[thing] if sprite.style == style]
        shared = [name for name in GROUNDS if all(name in sprite.grounds for sprite in pair)]
        if len(pair) < 2 or not shared:
            continue
        rightwards, ground = rng.random() < 0.5, _ground(shared, rng)
        paths = motions.crossing(rng.uniform(0.36, 0.4), rightwards, rng)
        ways = ("right", "left") if rightwards else ("left", "right")
        names = " and ".join(thing.name for thing in things)
        one, other = (thing.phrases[0] for thing in things)
        above = paths[0][0].y < paths[1][0].y
        example = Example(
            path=folder / _file_name(names, CROSSING, number),
            texts=motions.crossing_wordings(one, other, rightwards, above, style, ground),
            split="held_out" if any(held_out(t.code, CROSSING) for t in things) else "train",
            facts=_facts(pair, CROSSING, "medium", ground, stills, rng),
        )
        layers = [
            (sprite, _turned(sprite.thing, way), path)
            for sprite, way, path in zip(pair, ways, paths, strict=True)
        ]
        yield Clip(example=example, layers=layers, ground=ground)


def _stills(folder: Path, sprites: Mapping[Thing, Sequence[Sprite]]) -> Iterator[tuple[str, str]]:
    """Pictures of every sprite, large on white and smaller on a ground: (file, text)."""
    (folder / "stills").mkdir()
    for thing, drawn in sprites.items():
        for sprite in drawn:
            rng = Random(f"{thing.code} {sprite.style}")
            ground = _ground(sprite.grounds, rng)
            small = motions.poses(Motion(kind="still"), SPEEDS["medium"], sprite.extent, rng)[0]
            shown = {
                ("large", "white", ""): Pose(x=0.5, y=0.5, size=0.86),
                ("small", ground, f" on a {ground} background"): small,
            }
            for (size, colour, on), pose in shown.items():
                file = f"stills/{thing.name}-{sprite.style}-{size}.png".replace(" ", "-")
                frame(_coloured(colour), [(_scaler(sprite.image), pose)]).save(folder / file, "PNG")
                yield file, f"{thing.phrases[0]}{on}, {sprite.style}"


def _speed(motion: Motion, number: int, count: int, rng: Random) -> str:
    """Of two clips of a motion one has the middle speed and the other does not; of one, every other has."""
    middle = number == 0 if count > 1 else rng.random() < 0.5
    return "medium" if middle or motion.kind == "still" else rng.choice(("slow", "fast"))


def _file_name(names: str, motion: Motion, number: int) -> str:
    return f"{names} {motion} {number}.webp".replace(" ", "-")


def _facts(
    shown: Sequence[Sprite],
    motion: Motion,
    speed: str,
    ground: str,
    stills: Sequence[tuple[str, str]],
    rng: Random,
) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "concept": shown[0].thing.name,
        "phrase": shown[0].thing.phrases[0],
        "motion": motion.kind,
        "direction": motion.direction,
        "speed": speed,
        "ground": ground,
        "style": shown[0].style,
        "source": shown[0].source,
        "stills": [list(still) for still in rng.sample(stills, min(STILLS, len(stills)))],
    }
    return facts | ({"other": shown[1].thing.name} if len(shown) > 1 else {})


def _ground(among: Sequence[str], rng: Random) -> str:
    """One of the names of grounds, white as often as `WHITE` says; light blue where there is none."""
    colours = [name for name in among if name != "white"]
    white = "white" in among and (not colours or rng.random() < WHITE)
    return "white" if white else rng.choice(colours or ["light blue"])


def _turned(thing: Thing, direction: str) -> bool:
    """Whether a thing is turned round, so that it looks where it goes."""
    back = {"left": "right", "right": "left"}.get(thing.faces)
    return back is not None and direction in COMPASS and direction.endswith(back)


# --- drawing --------------------------------------------------------------------------------------

Scaled = Callable[[float], Image.Image]
"""Pixels of the longer side -> the image of that size."""


def frame(ground: Image.Image, layers: Sequence[tuple[Scaled, Pose]]) -> Image.Image:
    """A frame, RGB of `SIDE`, of images at their poses on a ground (RGBA) that is `FINER` times as large."""
    canvas, edge = ground.copy(), ground.width
    for scaled, pose in layers:
        drawn = scaled(pose.size * edge)
        if pose.angle:
            drawn = drawn.rotate(-pose.angle, Image.Resampling.BICUBIC, expand=True)
        corner = pose.x * edge - drawn.width / 2, pose.y * edge - drawn.height / 2
        whole = [math.floor(at) for at in corner]
        part = [at - pixel for at, pixel in zip(corner, whole, strict=True)]
        placed = drawn.transform(
            (drawn.width + 1, drawn.height + 1),
            Image.Transform.AFFINE,
            (1, 0, -part[0], 0, 1, -part[1]),
            Image.Resampling.BICUBIC,
        )
        # empty corners of what is turned may be outside
        (x, cut_x), (y, cut_y) = [(max(0, at), max(0, -at)) for at in whole]
        canvas.alpha_composite(placed, (x, y), (cut_x, cut_y))
    return canvas.convert("RGB").reduce(FINER)


def _scaler(image: Image.Image) -> Scaled:
    """Of an image; most paths have one size throughout, which is made once.

    Around it is a pixel of nothing: an edge that lies between two pixels needs one beyond it.
    """

    @cache
    def scaled(side: float) -> Image.Image:
        scale = side / max(image.size)
        width, height = (max(1, round(edge * scale)) for edge in image.size)
        small = image.resize((width, height), Image.Resampling.LANCZOS)
        return ImageOps.expand(small, 1, (0, 0, 0, 0))

    return scaled


def _write(clip: Clip) -> None:
    layers = [
        (_scaler(sprite.image.transpose(FLIP) if turned else sprite.image), path)
        for sprite, turned, path in clip.layers
    ]
    ground = _coloured(clip.ground)
    frames = [
        np.asarray(frame(ground, [(scaled, path[k]) for scaled, path in layers]))
        for k in range(motions.FRAMES)
    ]
    note = pictures.Note(motions.FRAMES, (SIDE, SIDE), RATE)
    pictures.write_webp(clip.example.path, frames, text="", note=note, effort=0)


FLIP = Image.Transpose.FLIP_LEFT_RIGHT


def _coloured(ground: str, size: tuple[int, int] = (FINER * SIDE, FINER * SIDE)) -> Image.Image:
    return Image.new("RGBA", size, GROUNDS[ground])


def _visible(image: Image.Image, ground: str) -> bool:
    """Whether enough of an image (RGBA) differs from a ground."""
    plain = _coloured(ground, image.size)
    seen = Image.alpha_composite(plain, image).convert("RGB")
    differs = np.asarray(ImageChops.difference(seen, plain.convert("RGB"))).max(2)
    solid = np.asarray(image.getchannel("A")) > 128
    return bool(solid.any() and (differs[solid] >= APART).mean() >= VISIBLE)
