"""The data set `image/emoji`: its phrases and captions, its held-out pairs, and a folder built from tiny packages."""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from mdiff.core import data
from mdiff.core.errors import IntegrityError, MdiffError, MissingError
from mdiff.core.icons import FAINT
from mdiff.plugins.image.data import DATASETS, SETS, pictures
from mdiff.plugins.image.data import packages as packages_of
from mdiff.plugins.image.data.captions import STYLES, UNSTYLED, WORDINGS, plain, wordings
from mdiff.plugins.image.data.concepts import Concept, phrase
from mdiff.plugins.image.data.emoji import FOLDS, HELD_OUT, LEAST_STYLES, fold, held_out

RESVG = """
from io import BytesIO
from PIL import Image

def svg_to_bytes(svg_string, width, skip_system_fonts):
    if "<path" not in svg_string:
        raise ValueError("no path")
    colour = svg_string.split('fill="')[1].split('"')[0]
    image = Image.new("RGBA", (width, width))
    image.paste(Image.new("RGBA", (width // 2, width // 4), colour), (0, 0))
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
"""
"""Stands for the package that draws: a rectangle of the colour that the path has."""

NAMES = {
    "🍎": ("red apple", "Food & Drink"),
    "🦉": ("owl", "Animals & Nature"),
    "🧔": ("person: beard", "People & Body"),
    "🕐": ("one o’clock", "Travel & Places"),
    "🔣": ("input symbols", "Symbols"),
    "🇫🇷": ("flag: France", "Flags"),
}
WORDNET = {
    "data.noun": "  1 the licence stands here\n"
    '00000001 05 n 02 owl 0 bird_of_night 0 000 | a bird of the night; "it hoots"\n'
    "00000002 18 n 01 owl 1 000 | someone who is awake late\n",
    "index.noun": "  1 the licence stands here\nowl n 2 0 2 1 00000002 00000001\n",
}


def _path(colour: str) -> dict[str, str]:
    return {"body": f'<path fill="{colour}" d=""/>'}


def _json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), "utf-8")


PACKAGES = {**packages_of("emoji-judge"), **packages_of("emoji")}


@pytest.fixture
def packages(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """Tiny packages, by the names of `PACKAGES`."""
    at = {name: tmp_path / "packages" / name for name in PACKAGES}
    _json(
        at["names"] / "data-by-emoji.json",
        {emoji: {"name": name, "group": group} for emoji, (name, group) in NAMES.items()},
    )
    words = ["red_apple", "fruit", "mac", "school_lunch", "an_apple", ":)"]
    _json(at["keywords"] / "dist" / "emoji-en-US.json", {"🍎": words, "🦉": ["owl", "hoot"]})
    for file, text in WORDNET.items():
        (at["wordnet"] / "dict").mkdir(parents=True, exist_ok=True)
        (at["wordnet"] / "dict" / file).write_text(text, "utf-8")
    (at["wordnet"] / "LICENSE").write_text("WordNet's own licence\n", "utf-8")
    assets = at["fluent-3d"] / "assets"
    assets.mkdir(parents=True)
    image = Image.new("RGBA", (64, 64))
    image.paste((200, 20, 20, 255), (30, 10, 60, 50))
    image.save(assets / "1f34e.webp", lossless=True)
    codes = {"1f34e": "red-apple", "1f989": "owl", "1f9d4": "person-beard"}
    keys = codes.values()
    for number, name in enumerate(("fluent-flat", "fluent-contrast", "noto")):
        icons = {key: _path(f"#{number}{at_}0") for at_, key in enumerate(keys)}
        if name == "fluent-flat":
            icons["owl"] = {"body": "<broken"}
        if name == "noto":  # has one picture for two things
            icons["person-beard"] = icons["owl"]
        _json(at[name] / "icons.json", {"icons": icons, "width": 32, "height": 32})
        _json(at[name] / "chars.json", codes)
    _json(at["noto-v1"] / "icons.json", {"icons": {"owl": _path("#706050")}, "width": 32})
    _json(at["fxemoji"] / "icons.json", {"icons": {"redapple": _path("#f0f0f0")}, "width": 32})
    for number, name in enumerate(SETS["emoji-judge"]):
        _json(at[name] / "icons.json", {"icons": {"red-apple": _path(f"#a{number}0")}, "width": 32})
    at["resvg"].mkdir()
    (at["resvg"] / "resvg_py.py").write_text(RESVG, "utf-8")
    sys.modules.pop("resvg_py", None)
    yield at
    sys.modules.pop("resvg_py", None)


def _fetch(at: dict[str, Path]) -> Callable[[str], Path]:
    folders = {PACKAGES[name]: folder for name, folder in at.items()}
    return folders.__getitem__


def _built(at: dict[str, Path], folder: Path, name: str = "emoji") -> dict[str, bytes]:
    folder.mkdir()
    DATASETS[name].build(folder, _fetch(at))
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_folder_is_built_of_things_only_each_picture_once(
    packages: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = _built(packages, tmp_path / "a")
    assert sorted(files) == [
        "LICENSES.md",
        "metadata.jsonl",
        "owl-black-and-white.png",
        "owl-cartoon.png",
        "owl-sticker.png",
        "person-with-a-beard-black-and-white.png",
        "person-with-a-beard-flat.png",
        "red-apple-3d.png",
        "red-apple-black-and-white.png",
        "red-apple-cartoon.png",
        "red-apple-flat.png",
    ]
    assert sorted(capsys.readouterr().err.splitlines()) == [
        "skipped owl-flat.png of fluent-flat: not an SVG that can be drawn: no path",
        "skipped red-apple-clip-art.png of fxemoji: it cannot be seen on white",
    ]


def test_what_the_judge_learns_from_no_generator_sees(
    packages: dict[str, Path], tmp_path: Path
) -> None:
    assert not SETS["emoji"].keys() & SETS["emoji-judge"].keys()
    files = _built(packages, tmp_path / "judge", "emoji-judge")
    apples = data.examples(tmp_path / "judge", [".png"])
    assert {e.facts["source"] for e in apples} == SETS["emoji-judge"].keys()
    assert {e.split for e in apples} == {"train"}
    text = files["LICENSES.md"].decode()
    assert "twemoji@1.2.5 | 1 | CC-BY-4.0 | Twitter" in text and "json/noto" not in text


def test_building_again_gives_the_same_bytes(packages: dict[str, Path], tmp_path: Path) -> None:
    assert _built(packages, tmp_path / "a") == _built(packages, tmp_path / "b")


def test_the_folder_reads_as_every_data_set_does(packages: dict[str, Path], tmp_path: Path) -> None:
    _built(packages, tmp_path / "a")
    examples = data.examples(tmp_path / "a", [".png"])
    apple = next(e for e in examples if e.path.name == "red-apple-3d.png")
    assert apple.texts[0] == "a red apple, 3D"
    assert len(apple.texts) == WORDINGS
    assert apple.label == "Food & Drink"
    assert apple.facts["concept"] == "red apple"
    assert apple.facts["style"] == "3D"
    assert apple.facts["source"] == "fluent-3d"
    assert apple.facts["keywords"] == ["fruit", "school lunch"]
    assert apple.facts["fold"] == fold("1f34e")
    owl = next(e for e in examples if e.path.name == "owl-cartoon.png")
    assert owl.facts["gloss"] == "a bird of the night"  # the animal, not the person
    assert owl.texts[-2:] == ("a bird of night, cartoon", "a bird of the night, cartoon")
    apples = {str(e.facts["style"]): e.split for e in examples if "apple" in e.path.name}
    order = [style.word for style in STYLES if style.word in apples]
    out = held_out("1f34e", order)
    assert apples == {style: "held_out" if style == out else "train" for style in order}


def test_licences_name_every_package_of_pictures_and_words(
    packages: dict[str, Path], tmp_path: Path
) -> None:
    text = _built(packages, tmp_path / "a")["LICENSES.md"].decode()
    wanted = packages_of("emoji")
    assert all(spec in text for name, spec in wanted.items() if name != "resvg")
    assert "npm:@lobehub/fluent-emoji-3d@1.1.0 | 1 | MIT" in text
    assert "Permission is hereby granted" in text and "WordNet's own licence" in text


def test_a_package_that_is_not_what_it_was_is_refused(
    packages: dict[str, Path], tmp_path: Path
) -> None:
    (packages["noto"] / "icons.json").write_text("{}", "utf-8")
    with pytest.raises(IntegrityError, match="image/emoji is not what it was.*fetch it again"):
        _built(packages, tmp_path / "a")


def test_without_what_draws_svg_the_command_is_named(
    packages: dict[str, Path], tmp_path: Path
) -> None:
    (packages["resvg"] / "resvg_py.py").write_text("raise ImportError('another machine')\n")
    before = list(sys.path)
    with pytest.raises(MissingError, match="another machine.*pip install resvg-py"):
        _built(packages, tmp_path / "a")
    assert sys.path == before


def test_a_picture_is_centred_on_white_and_fills_its_part() -> None:
    image = Image.new("RGBA", (300, 200))
    image.paste((0, 0, 0, 255), (10, 150, 110, 190))  # 100 x 40, in a corner
    image.putpixel((299, 0), (0, 0, 0, FAINT))  # a trace that must not move the centre
    made = pictures.picture(image)
    assert (made.mode, made.size) == ("RGB", (pictures.SIDE, pictures.SIDE))
    dark = made.convert("L").point(lambda value: 255 * (value < 128))
    left, top, right, bottom = dark.getbbox() or (0, 0, 0, 0)
    assert abs((left + right) - pictures.SIDE) <= 2 and abs((top + bottom) - pictures.SIDE) <= 2
    assert abs((right - left) - pictures.FILLED * pictures.SIDE) <= 2
    assert abs((bottom - top) - 0.4 * pictures.FILLED * pictures.SIDE) <= 2
    assert made.getpixel((0, 0)) == (255, 255, 255)


def test_half_opaque_colour_is_mixed_with_white() -> None:
    image = Image.new("RGBA", (100, 100), (255, 0, 0, 128))
    assert pictures.picture(image).getpixel((64, 64)) == pytest.approx((255, 127, 127), abs=1)


@pytest.mark.parametrize("colour", [(0, 0, 0, 0), (250, 250, 250, 255)])
def test_a_picture_of_nothing_is_refused(colour: tuple[int, ...]) -> None:
    with pytest.raises(MdiffError):
        pictures.picture(Image.new("RGBA", (50, 50), colour))


@pytest.mark.parametrize(
    ("official", "said"),
    [
        ("red apple", "a red apple"),
        ("owl", "an owl"),
        ("unicorn", "a unicorn"),
        ("euro banknote", "a euro banknote"),
        ("ewe", "a ewe"),
        ("one-piece swimsuit", "a one-piece swimsuit"),
        ("x-ray", "an x-ray"),
        ("hourglass done", "an hourglass that has run out"),
        ("grapes", "grapes"),
        ("piñata", "a pinata"),
        ("T-Rex", "a tyrannosaurus rex"),
        ("Mrs. Claus", "mrs claus"),
        ("woman’s hat", "a woman's hat"),
        ("person: beard", "a person with a beard"),
        ("man: bald", "a bald man"),
        ("woman astronaut", "a female astronaut"),
        ("woman dancing", "a woman dancing"),
        ("man in tuxedo", "a man in a tuxedo"),
        ("person rowing boat", "a person rowing a boat"),
        ("heart with arrow", "a heart with an arrow"),
        ("ear with hearing aid", "an ear with a hearing aid"),
        ("person in lotus position", "a person in the lotus position"),
        ("sun behind rain cloud", "a sun behind a rain cloud"),
        ("closed mailbox with raised flag", "a closed mailbox with a raised flag"),
        ("family: man, woman, girl, boy", "a family of a man, a woman, a girl and a boy"),
        ("family: adult, adult, child, child", "a family of two adults and two children"),
    ],
)
def test_a_name_becomes_what_one_says(official: str, said: str) -> None:
    assert phrase(official) == said


CONCEPTS = [
    Concept(code="1f34e", official="red apple", phrase="a red apple", group="Food & Drink"),
    Concept(code="1f347", official="grapes", phrase="grapes", group="Food & Drink"),
    Concept(
        code="1f989",
        official="owl",
        phrase="an owl",
        group="Animals & Nature",
        keywords=("hoot", "wise", "bird"),
        synonyms=("a bird of night",),
        gloss="nocturnal bird of prey",
    ),
]


@pytest.mark.parametrize("concept", CONCEPTS, ids=lambda concept: concept.slug)
@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.word)
def test_wordings_are_sentences_of_their_own(concept: Concept, style) -> None:  # type: ignore[no-untyped-def]
    texts = wordings(concept, style)
    assert texts == wordings(concept, style)
    assert texts[0] == plain(concept, style) == f"{concept.phrase}, {style.word}"
    assert len(texts) == len(set(texts)) == WORDINGS
    said = style.word.lower()
    unstyled = {frame.format(concept.phrase) for frame in UNSTYLED}
    for text in texts:
        assert text == text.replace("3D", "3d").lower().replace("3d", "3D")
        assert re.fullmatch(r"[a-z0-9D' ,-]+", text)
        assert not re.search(r"\b(\w+) \1\b|  |\ba [aeio]|\ban [^aeio]", text)
        assert said in text.lower() or text in unstyled or "ink" in text
    assert any(text in unstyled for text in texts)


def test_what_is_known_of_a_thing_gets_into_its_wordings() -> None:
    texts = wordings(CONCEPTS[2], STYLES[0])
    assert "a bird of night, 3D" in texts and "nocturnal bird of prey, 3D" in texts
    assert any(re.fullmatch(r"an owl, (hoot|wise|bird), (hoot|wise|bird), 3D", t) for t in texts)


def test_styles_share_no_wording_but_the_unstyled() -> None:
    unstyled = {frame.format(CONCEPTS[0].phrase) for frame in UNSTYLED}
    seen = Counter(text for style in STYLES for text in wordings(CONCEPTS[0], style))
    assert {text for text, number in seen.items() if number > 1} <= unstyled


def test_pairs_are_held_out_evenly_and_one_of_a_concept() -> None:
    styles = [style.word for style in STYLES]
    codes = [f"{code:x}" for code in Random(0).sample(range(0x20000), 6000)]
    out = Counter(held_out(code, styles) for code in codes)
    for style in styles:  # six standard errors of a binomial
        assert out[style] / 6000 == pytest.approx(HELD_OUT, abs=6 * (HELD_OUT / 6000) ** 0.5)
    assert {held_out(code, styles[: LEAST_STYLES - 1]) for code in codes} == {None}
    assert {held_out(code, styles[:3]) for code in codes} == {None, *styles[:3]}


def test_a_concept_that_is_held_out_stays_so_when_styles_are_added() -> None:
    styles = [style.word for style in STYLES]
    for code in (f"{code:x}" for code in range(0x1F300, 0x1F400)):
        few = held_out(code, styles[:4])
        assert few is None or few == held_out(code, styles)


def test_folds_are_of_a_concept_and_about_alike() -> None:
    sizes = Counter(fold(f"{code:x}") for code in range(5000))
    assert sorted(sizes) == list(range(FOLDS))
    assert min(sizes.values()) > 400


def test_the_table_of_the_plugin_names_what_it_fetches() -> None:
    made = DATASETS["emoji"]
    assert made.packages == tuple(packages_of("emoji").values())
    assert all(re.fullmatch(r"npm:.+@\d[\d.]+|pip:.+==\d[\d.]+", spec) for spec in made.packages)
