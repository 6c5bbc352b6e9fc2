"""The data set `video/motion`: clips that do what captions say, held-out pairs, stills, a folder like any other."""

import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image

from mdiff.core import data
from mdiff.core import host as hosts
from mdiff.core.errors import IntegrityError
from mdiff.core.hooks import Example
from mdiff.plugins.video import io, tracking
from mdiff.plugins.video.data import DATASETS, PACKAGES, clips, motions
from mdiff.plugins.video.data.motions import CLIPS, COMPASS, CROSSING, SPEEDS, Motion
from mdiff.plugins.video.data.things import THINGS
from mdiff.plugins.video.metrics import METRICS

DOG, APPLE, CAR = "1f415", "1f34e", "1f697"
RESVG = """
from io import BytesIO
from PIL import Image

def svg_to_bytes(svg_string, width, skip_system_fonts):
    if "<path" not in svg_string:
        raise ValueError("no path")
    image = Image.new("RGBA", (width, width))
    image.paste(Image.new("RGBA", (width // 2, width // 2), (200, 30, 30)), (9, 40))
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Tiny packages: a dog of two halves (its red side is where it looks), a red apple, a car that cannot be drawn."""
    at = {name: tmp_path_factory.mktemp(name) for name in PACKAGES}
    assets = at["fluent-3d"] / "assets"
    assets.mkdir()
    dog = Image.new("RGBA", (60, 40))
    dog.paste((220, 20, 20, 255), (0, 0, 30, 40))
    dog.paste((20, 20, 220, 255), (30, 0, 60, 40))
    dog.save(assets / f"{DOG}.webp", lossless=True)
    icons = {"red-apple": {"body": "<path/>"}, "automobile": {"body": "<broken"}}
    (at["fluent-flat"] / "icons.json").write_text(json.dumps({"icons": icons, "width": 32}))
    codes = {APPLE: "red-apple", CAR: "automobile"}
    (at["fluent-flat"] / "chars.json").write_text(json.dumps(codes))
    (at["resvg"] / "resvg_py.py").write_text(RESVG)
    sys.modules.pop("resvg_py", None)
    yield at
    sys.modules.pop("resvg_py", None)


def fetcher(at: dict[str, Path]) -> Callable[[str], Path]:
    return {PACKAGES[name]: folder for name, folder in at.items()}.__getitem__


@pytest.fixture(scope="module")
def folder(packages: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("motion")
    DATASETS["motion"].build(at, fetcher(packages))
    return at


@pytest.fixture(scope="module")
def examples(folder: Path) -> list[Example]:
    return data.examples(folder, [media.suffix for media in io.MEDIA])


def test_each_thing_has_every_motion(examples: list[Example]) -> None:
    made = Counter((e.facts["concept"], e.facts["motion"], e.facts["direction"]) for e in examples)
    for name in ("dog", "red apple"):
        for motion, count in CLIPS.items():
            assert made[name, motion.kind, motion.direction] == count
    assert {e.facts["concept"] for e in examples} == {"dog", "red apple"}  # no car can be drawn
    assert sum(e.facts["motion"] == "crossing" for e in examples) <= 3
    assert all(1 < len(set(e.texts)) == len(e.texts) <= motions.WORDINGS for e in examples)


def test_things_move_as_their_captions_say(examples: list[Example]) -> None:
    judges = [METRICS["direction"](), METRICS["motion"]()]
    judged = Counter[int]()
    ways = defaultdict(list)
    for example in examples:
        sample = io.read(example.path, frames=16, fps=8, size=64)
        assert sample["video"].shape == (3, 16, 64, 64)
        for k, judge in enumerate(judges):
            if judge.applies(example):
                judged[k] += 1
                assert judge.measure(sample, example)[0] == 1, example.path.name
        if example.facts["motion"] == "moving":
            x, y = tracking.track(sample["video"]).way
            ways[example.facts["speed"]].append((x**2 + y**2) ** 0.5)
    assert judged[0] == 2 * 14 and judged[1] == 2 * sum(CLIPS.values())
    for speed, found in ways.items():
        assert found == pytest.approx([SPEEDS[speed].way] * len(found), abs=0.025)


def test_captions_are_exact(examples: list[Example]) -> None:
    for example in examples:
        facts, plain = example.facts, example.texts[0]
        if facts["motion"] == "crossing":
            assert plain.count("moving to the") == 2 and facts["other"] in plain
            continue
        assert plain.startswith(f"{facts['phrase']} ")
        assert ("slowly" in plain, "quickly" in plain) == (
            facts["speed"] == "slow",
            facts["speed"] == "fast",
        )
        words = set(facts["direction"].split("-")) - {""}
        for word in ("left", "right", "up", "down", "clockwise", "counterclockwise"):
            said = re.search(rf"\b{word}\b", plain.replace("up and down", "")) is not None
            assert said == (word in words), plain
        assert f"{plain} on a {facts['ground']} background" in example.texts
        assert f"{plain}, {facts['style']}" in example.texts


def test_two_things_pass_each_other() -> None:
    one, other = motions.crossing(0.4, True, Random(0))
    assert one[0].x < other[0].x and one[-1].x > other[-1].x
    assert abs(one[0].y - other[0].y) > 0.4
    texts = motions.crossing_wordings("a dog", "a car", False, True, "flat", "pink")
    assert texts[0] == "a dog moving to the left and a car moving to the right"
    assert texts[3] == "a dog moving leftwards above a car moving rightwards"


def test_a_thing_looks_where_it_goes(folder: Path) -> None:
    for way, first in (("left", 0), ("right", 2)):
        video = io.read(folder / f"dog-moving-{way}-0.webp")["video"]
        red = video[0, 0] - video[2, 0]
        columns = red.sum(0)
        leading = columns.argmax() < columns.argmin()
        assert bool(leading) == (first == 0)


@pytest.mark.parametrize("motion", [*CLIPS, CROSSING], ids=str)
@pytest.mark.parametrize("extent", [(1.0, 1.0), (1.0, 0.3), (0.4, 1.0)])
def test_nothing_leaves_the_frame(motion: Motion, extent: tuple[float, float]) -> None:
    for seed, speed in enumerate(SPEEDS.values()):
        rng = Random(seed)
        paths = (
            motions.crossing(0.4, True, rng)
            if motion == CROSSING
            else [motions.poses(motion, speed, extent, rng)]
        )
        for pose in (pose for path in paths for pose in path):
            for at, side in zip((pose.x, pose.y), extent, strict=True):
                assert side * pose.size / 2 <= at + 1e-9 and at + side * pose.size / 2 <= 1 + 1e-9


# --- what is held out -----------------------------------------------------------------------------


def test_a_pair_is_held_out_or_trained_on_and_never_both(examples: list[Example]) -> None:
    for example in examples:
        facts = example.facts
        motion = Motion(kind=facts["motion"], direction=facts["direction"])
        shown = [facts["concept"], *([facts["other"]] if "other" in facts else [])]
        codes = [thing.code for name in shown for thing in THINGS if thing.name == name]
        out = any(clips.held_out(code, motion) for code in codes)
        assert example.split == ("held_out" if out else "train")


def test_about_one_pair_in_twelve_is_held_out_and_everything_is_seen_otherwise() -> None:
    every = [*CLIPS, CROSSING]
    out = {(t.code, m): clips.held_out(t.code, m) for t in THINGS for m in every}
    assert sum(out.values()) / len(out) == pytest.approx(clips.HELD_OUT, abs=0.01)
    assert all(sum(out[t.code, m] for m in every) < len(every) / 2 for t in THINGS)
    for motion in every:
        share = sum(out[t.code, motion] for t in THINGS) / len(THINGS)
        assert 0.01 < share < 0.2, motion


# --- the folder -----------------------------------------------------------------------------------


def test_stills_are_named_and_are_no_examples(folder: Path, examples: list[Example]) -> None:
    named = {tuple(still) for e in examples for still in e.facts["stills"]}
    files = {f"stills/{path.name}" for path in (folder / "stills").iterdir()}
    assert files == {file for file, _ in named} and len(files) == 2 * 2
    assert ("stills/dog-3D-large.png", "a dog, 3D") in named
    with Image.open(folder / "stills" / "dog-3D-large.png") as image:
        assert image.size == (64, 64) and image.getpixel((0, 0)) == (255, 255, 255)
    assert all(e.path.suffix == ".webp" for e in examples)


def test_the_same_bytes_again(packages: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    DATASETS["motion"].build(again, fetcher(packages))
    names = sorted(path.relative_to(folder) for path in folder.rglob("*.*"))
    assert names == sorted(path.relative_to(again) for path in again.rglob("*.*"))
    assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in names)


def test_licences_name_the_packages(folder: Path) -> None:
    text = (folder / "LICENSES.md").read_text()
    assert PACKAGES["fluent-3d"] in text and PACKAGES["fluent-flat"] in text
    assert "Microsoft" in text and "Permission is hereby granted" in text


def test_packages_without_pictures_are_refused(packages: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "icons.json").write_text("{}")
    (tmp_path / "chars.json").write_text(json.dumps({DOG: "dog"}))
    with pytest.raises(IntegrityError, match="video/motion is not what it was.*fetch it again"):
        DATASETS["motion"].build(tmp_path, fetcher(packages | {"fluent-flat": tmp_path}))
    (tmp_path / "icons.json").write_text('{"icons": {}}')
    with pytest.raises(IntegrityError, match="hold none of its pictures"):
        DATASETS["motion"].build(
            tmp_path, fetcher(packages | {"fluent-flat": tmp_path, "fluent-3d": tmp_path})
        )


def test_a_thing_is_shown_on_grounds_on_which_it_is_seen(examples: list[Example]) -> None:
    assert {e.facts["ground"] for e in examples} == set(clips.GROUNDS)
    pale = Image.new("RGBA", (20, 20), (250, 250, 250, 255))
    seen = {name for name in clips.GROUNDS if clips._visible(pale, name)}
    assert "white" not in seen and "light blue" in seen
    assert clips._ground(["white"], Random(0)) == "white"


def test_the_things_and_the_entry() -> None:
    assert 120 <= len(THINGS) <= 250
    assert len({t.code for t in THINGS}) == len({t.name for t in THINGS}) == len(THINGS)
    assert all(phrase and phrase == phrase.strip() for t in THINGS for phrase in t.phrases)
    made = data.datasets(hosts.current())["video/motion"]
    assert made.packages == tuple(PACKAGES.values()) and str(len(THINGS)) in made.summary
    assert torch.tensor(list(COMPASS.values())).norm(dim=1).sub(1).abs().max() < 1e-6
