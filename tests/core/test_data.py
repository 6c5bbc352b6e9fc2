"""Folders as people have them become examples; what does not fit is one line that says how to mend it."""

import csv
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdiff.cli import main
from mdiff.core import data
from mdiff.core.errors import MdiffError, MissingError, UsageError
from mdiff.core.hooks import DataSet, Example, Media, PluginInfo, hookimpl
from mdiff.core.host import Host, Record, use

PNG = (".png", ".JPG")


def fill(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def lines(*rows: object) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def read(folder: Path) -> dict[str, Example]:
    return {e.path.relative_to(folder).as_posix(): e for e in data.examples(folder, PNG)}


def test_files_are_found_everywhere_and_sorted(tmp_path):
    files = ["b.png", "a/z.JPG", "a/b/c.png", "a.Png"]
    hidden = [".h.png", ".git/x.png", "b.png.json", "notes.md", "c.webp"]
    found = read(fill(tmp_path, dict.fromkeys(files + hidden, "")))
    assert list(found) == sorted(files)
    assert found["b.png"] == Example(path=tmp_path / "b.png")


def test_captions_beside_the_file_are_one_wording_a_line(tmp_path):
    text = "\ufeffa red kite\n\n  a kite in the sky  \r\n"
    found = read(fill(tmp_path, {"a.png": "", "a.txt": text, "d/b.v2.png": "", "d/b.v2.txt": "é"}))
    assert found["a.png"].texts == ("a red kite", "a kite in the sky")
    assert found["d/b.v2.png"].texts == ("é",)


def test_metadata_of_json_lines(tmp_path):
    rows = (
        {
            "file_name": "a.png",
            "text": "one",
            "label": 3,
            "split": "held_out",
            "artist": None,
            "size": [1, 2],
        },
        {"file_name": "./d/b.png", "texts": ["two", "zwei"], "text": "two", "label": None},
    )
    found = read(fill(tmp_path, {"a.png": "", "d/b.png": "", "metadata.jsonl": lines(*rows)}))
    assert found["a.png"] == Example(
        path=tmp_path / "a.png",
        texts=("one",),
        label="3",
        split="held_out",
        facts={"artist": None, "size": [1, 2]},
    )
    assert found["d/b.png"].texts == ("two", "zwei") and found["d/b.png"].label is None


def test_metadata_of_commas_in_a_subfolder(tmp_path):
    text = '\ufefffile_name,text,label,split,by\nb.png,"a, ""b""\nc",dogs,,\nd/e.png,two,,test,me\n'
    found = read(fill(tmp_path, {"s/b.png": "", "s/d/e.png": "", "s/metadata.csv": text}))
    assert found["s/b.png"] == Example(
        path=tmp_path / "s/b.png", texts=('a, "b"\nc',), label="dogs"
    )
    assert found["s/d/e.png"].split == "test" and found["s/d/e.png"].facts == {"by": "me"}


def test_a_text_file_says_what_the_metadata_does_not(tmp_path):
    rows = lines(
        {"file_name": "a.png", "text": "from metadata"}, {"file_name": "b.png", "by": "me"}
    )
    files = {"a.png": "", "a.txt": "beside", "b.png": "", "b.txt": "beside", "metadata.jsonl": rows}
    found = read(fill(tmp_path, files))
    assert found["a.png"].texts == ("from metadata",)
    assert found["b.png"].texts == ("beside",) and found["b.png"].facts == {"by": "me"}


def test_folders_are_classes_where_nothing_else_is_said(tmp_path):
    found = read(fill(tmp_path / "x", {"dogs/a.png": "", "cats/deep/b.png": "", "c.png": ""}))
    assert [found[n].label for n in ("dogs/a.png", "cats/deep/b.png", "c.png")] == [
        "dogs",
        "cats",
        None,
    ]
    one = read(fill(tmp_path / "y", {"dogs/a.png": "", "c.png": ""}))
    assert [e.label for e in one.values()] == [None, None]
    said = read(
        fill(tmp_path / "z", {"d/a.png": "", "c/b.png": "", "d/a.txt": "x", "c/b.txt": "y"})
    )
    assert [e.label for e in said.values()] == [None, None]


def test_folders_named_like_splits_are_splits(tmp_path):
    rows = lines({"file_name": "c.png"}, {"file_name": "d.png", "split": "train"})
    files = {"train/dogs/a.png": "", "train/cats/b.png": "", "test/c.png": "", "test/d.png": ""}
    found = read(fill(tmp_path, files | {"test/metadata.jsonl": rows}))
    assert [(e.split, e.label) for e in found.values()] == [
        ("test", None),
        ("train", None),
        ("train", "cats"),
        ("train", "dogs"),
    ]
    found = read(fill(tmp_path, {"other/e.png": "", "train/f.png": ""}))
    assert {e.split for e in found.values()} == {"train"} and found["train/f.png"].label == "train"


def test_metadata_may_speak_of_other_kinds_of_file(tmp_path):
    rows = lines({"file_name": "a.png"}, {"file_name": "a.wav"})
    assert list(read(fill(tmp_path, {"a.png": "", "a.wav": "", "metadata.jsonl": rows}))) == [
        "a.png"
    ]


def test_links_are_followed_and_a_loop_ends(tmp_path):
    fill(tmp_path, {"big/a.png": ""})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "big").symlink_to(tmp_path / "big")
    (tmp_path / "mine" / "loop").symlink_to(tmp_path / "mine")
    assert list(read(tmp_path / "mine")) == ["big/a.png"]


ONE = {"a.png": "", "b.png": ""}
ROW = {"file_name": "a.png", "text": "x"}


@pytest.mark.parametrize(
    ("files", "kind", "words"),
    [
        ({"a.gif": ""}, MissingError, ["holds no file of the kinds .jpg, .png"]),
        (
            ONE | {"a.txt": "x"},
            UsageError,
            ["1 of 2 files", "no caption, such as b.png: write b.txt"],
        ),
        (ONE | {"a.txt": "x", "b.txt": " \n"}, UsageError, ["1 of 2 files", "b.png"]),
        ({"a.png": "", "a.txt": b"\xff"}, UsageError, ["a.txt is not UTF-8 text (byte 0)"]),
        ({"a.png": "", "metadata.csv": b"a\xff"}, UsageError, ["metadata.csv is not UTF-8"]),
        (
            {"a.png": "", "metadata.jsonl": lines(ROW, ROW)},
            UsageError,
            ["line 2: a.png has a row already"],
        ),
        (
            {
                "d/a.png": "",
                "d/metadata.csv": "file_name\na.png\n",
                "metadata.csv": "file_name\nd/a.png\n",
            },
            UsageError,
            ["line 2: d/a.png has a row already"],
        ),
        (
            {"a.png": "", "metadata.jsonl": lines({"file_name": "c.png"})},
            UsageError,
            ["1: there is no file c.png"],
        ),
        (
            {"a.png": "", "metadata.jsonl": lines({"file_name": "c.wav"})},
            UsageError,
            ["no file c.wav"],
        ),
        (
            {"a.png": "", "metadata.jsonl": lines({"file_name": "../a.png"})},
            UsageError,
            ["leads out"],
        ),
        (
            {"a.png": "", "metadata.jsonl": lines({"file_name": "/etc/a.png"})},
            UsageError,
            ["leads out"],
        ),
        (
            {"a.png": "", "d/metadata.jsonl": lines({"file_name": "../../a.png"})},
            UsageError,
            ["leads out"],
        ),
        (
            {"a.png": "", "metadata.jsonl": lines({"file": "a.png"})},
            UsageError,
            ["file_name; its columns are file"],
        ),
        ({"a.png": "", "metadata.jsonl": "\n{]"}, UsageError, ["line 2: not JSON"]),
        (
            {"a.png": "", "metadata.jsonl": "[1]"},
            UsageError,
            ["line 1: the row should be an object"],
        ),
        (
            {"a.png": "", "metadata.jsonl": '{"file_name": "a.png", "n": NaN}'},
            UsageError,
            ["NaN is no JSON"],
        ),
        (
            {"a.png": "", "metadata.jsonl": lines(ROW | {"text": 3})},
            UsageError,
            ["text should be a text and is 3"],
        ),
        (
            {"a.png": "", "metadata.jsonl": lines(ROW | {"texts": "x"})},
            UsageError,
            ["texts should be a list"],
        ),
        (
            {"a.png": "", "metadata.jsonl": lines(ROW | {"label": [1]})},
            UsageError,
            ["label should be a name"],
        ),
        (
            {"a.png": "", "metadata.jsonl": lines(ROW | {"split": 1})},
            UsageError,
            ["split should be a name"],
        ),
        (
            {"a.png": "", "metadata.csv": "file_name,text\na.png,b,c\n"},
            UsageError,
            ["line 2", "2 columns"],
        ),
        (
            {"a.png": "", "metadata.csv": "file_name,text\na.png\n"},
            UsageError,
            ["line 2", "2 columns"],
        ),
        ({"a.png": "", "metadata.csv": 'file_name\n"a.png'}, UsageError, ["not CSV"]),
        (
            {"a.png": "", "metadata.csv": "filename\na.png\n"},
            UsageError,
            ["line 1", "did you mean 'filename'?"],
        ),
        (
            {"a.png": "", "metadata.csv": ""},
            UsageError,
            ["line 1", "headings should have file_name"],
        ),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, files, kind, words):
    with pytest.raises(kind) as caught:
        data.examples(fill(tmp_path, files), PNG)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_no_folder(tmp_path):
    with pytest.raises(MissingError, match="there is no folder '.*none'"):
        data.examples(tmp_path / "none", PNG)
    (tmp_path / "a.png").touch()
    with pytest.raises(MissingError, match=r"'.*a.png': it is a file, give the folder"):
        data.examples(tmp_path / "a.png", PNG)


def test_a_scan_lists_all_problems_and_the_error_says_how_many(tmp_path):
    rows = lines({"file_name": "x.png"}, ROW, ROW) + "\n{"
    fill(tmp_path, ONE | {"b.txt": b"\xff", "c.png": "", "metadata.jsonl": rows})
    problems = [str(p) for p in data.scan(tmp_path, PNG).problems]
    for problem, words in zip(
        problems, ["no file x", "a row already", "not JSON", "UTF-8", "1 of 3"], strict=True
    ):
        assert words in problem
    with pytest.raises(UsageError, match=r"no file x\.png; `mdiff data check .*` lists 4 more"):
        data.examples(tmp_path, PNG)


WORDS = st.text(st.characters(exclude_categories=("Cs", "Cc", "Z")), min_size=1, max_size=8)
VALUES = st.none() | st.integers() | WORDS | st.lists(st.integers(), max_size=2)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(WORDS, min_size=1, max_size=3, unique=True),
            st.none() | WORDS,
            WORDS,
            st.dictionaries(WORDS, VALUES, max_size=2),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_what_is_written_is_read_again(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("set")
    found = []
    for i, (texts, label, split, facts) in enumerate(rows):
        path = fill(folder, {f"{i}.png": ""}) / f"{i}.png"
        facts = {"x" + name: value for name, value in facts.items()}
        found.append(Example(path=path, texts=tuple(texts), label=label, split=split, facts=facts))
    data.write_metadata(folder, reversed(found))
    assert data.examples(folder, PNG) == found


def test_csv_of_the_csv_module_is_read(tmp_path):
    fill(tmp_path, {"a.png": ""})
    with (tmp_path / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", "text"])
        writer.writeheader()
        writer.writerow({"file_name": "a.png", "text": 'x,"y"\nz'})
    assert read(tmp_path)["a.png"].texts == ('x,"y"\nz',)


def test_metadata_of_files_elsewhere_or_facts_like_columns_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is not in"):
        data.write_metadata(tmp_path / "x", [Example(path=tmp_path / "a.png")])
    with pytest.raises(UsageError, match="a fact cannot be named 'label'"):
        data.write_metadata(tmp_path, [Example(path=tmp_path / "a.png", facts={"label": 1})])
    assert list(tmp_path.iterdir()) == []


def dataset(build) -> DataSet:
    return DataSet(summary="", build=build, packages=(), licences="MIT")


def whole(folder, fetch):
    fill(folder, {"a.png": "x", "LICENSES.md": "MIT"})
    data.write_metadata(folder, [Example(path=folder / "a.png", texts=("x",))])


def test_a_built_data_set_is_a_folder_like_any_other(tmp_path):
    (tmp_path / "out").mkdir()
    data.build(dataset(whole), tmp_path / "out", say=print)
    assert [e.texts for e in data.examples(tmp_path / "out", PNG)] == [("x",)]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UsageError, match="out is not empty"):
        data.build(dataset(whole), tmp_path / "out", say=print)


def test_a_builder_is_given_packages_and_they_are_told(tmp_path):
    def build(folder, fetch):
        fill(folder, {"a.png": (fetch("npm:icons@1") / "a").read_bytes()})
        whole(folder, fetch)

    fill(tmp_path, {"cache/packages/npm/icons@1/a": "x"})
    said: list[str] = []
    data.build(dataset(build), tmp_path / "deep" / "out", said.append, tmp_path / "cache")
    assert said == ["package npm:icons@1"] and (tmp_path / "deep/out/a.png").read_text() == "x"


def test_what_a_killed_builder_left_is_swept(tmp_path):
    def build(folder, fetch):
        assert not list(folder.iterdir())
        (folder / "metadata.jsonl").touch()
        (folder / "LICENSES.md").touch()

    (tmp_path / ".set-unfinished").mkdir()
    (tmp_path / ".set-unfinished" / "half.png").touch()
    data.build(dataset(build), tmp_path / "set", print)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_builder_that_fails_or_forgets_leaves_nothing(tmp_path):
    def fails(folder, fetch):
        whole(folder, fetch)
        raise MissingError("no package")

    def forgets(folder, fetch):
        whole(folder, fetch)
        (folder / "LICENSES.md").unlink()

    with pytest.raises(MissingError, match="no package"):
        data.build(dataset(fails), tmp_path / "out", print)
    with pytest.raises(MdiffError, match="wrote no LICENSES.md"):
        data.build(dataset(forgets), tmp_path / "out", print)
    assert list(tmp_path.iterdir()) == []


def test_a_summary_says_what_a_training_would_see(tmp_path):
    found = [
        Example(path=tmp_path / f"{i}.png", texts=("x", "y"), label="ab"[i % 2]) for i in range(3)
    ]
    said = "\n".join(data.summary(found))
    for words in (
        "files     3",
        ".png 3",
        "a 2, b 1",
        "train 3",
        "6, 2 a file, 2 different; e.g. 'x'",
    ):
        assert words in said


# --- the command line ------------------------------------------------------------------------------


def number(path: Path) -> dict[str, int]:
    return {"number": int(path.read_text())}


@pytest.fixture
def mdiff(monkeypatch, tmp_path, capsys):
    """Runs a command in an empty folder with one plugin: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    plugin = ModuleType("page_numbers")
    media = Media(suffix=".num", write=print, read=number, read_record=lambda path: None)
    made = DataSet(summary="One", build=whole, packages=("npm:a", "pip:b"), licences="CC0-1.0")
    answers = {
        "mdiff_info": PluginInfo(name="numbers", api=(1, 0), modality="number", summary="x"),
        "mdiff_media": [media],
        "mdiff_datasets": {"one": made},
    }
    for hook, answer in answers.items():
        vars(plugin)[hook] = hookimpl(lambda answer=answer: answer)
    monkeypatch.setitem(sys.modules, plugin.__name__, plugin)
    host = Host([Record(name="numbers", value=plugin.__name__, dist="numbers")])

    def run(*arguments: str) -> tuple[int, str, str]:
        with use(host):
            code = main(["data", *arguments])
        return code, *capsys.readouterr()

    return run


def test_data_sets_are_listed_with_their_packages_and_licences(mdiff):
    assert mdiff("list") == (
        0,
        "numbers/one\n  One\n  packages  npm:a, pip:b\n  licences  CC0-1.0\n",
        "",
    )


def test_a_data_set_is_built_by_name(mdiff):
    assert mdiff("build", "numbers/one", "--out", "one") == (0, "one\n", "")
    assert sorted(p.name for p in Path("one").iterdir()) == [
        "LICENSES.md",
        "a.png",
        "metadata.jsonl",
    ]
    code, out, err = mdiff("build", "numbers/one", "--out", "one")
    assert code == 2 and not out and "one is not empty" in err
    code, _, err = mdiff("build", "numbers/two", "--out", "two")
    assert code == 3 and "no data set 'numbers/two'; did you mean 'numbers/one'?" in err


def test_a_check_says_what_is_there_and_every_problem(mdiff, tmp_path):
    fill(tmp_path / "d", {"a/1.num": "1", "b/2.num": "two", "b/3.num": "3"})
    code, out, _ = mdiff("check", "d")
    assert code == 0 and out.splitlines()[:2] == ["number", "  files     3"] and "b 2, a 1" in out
    fill(tmp_path / "d", {"a/1.txt": "one", "metadata.csv": "file_name\n4.num\n"})
    code, out, _ = mdiff("check", "d", "--read")
    problems = [line for line in out.splitlines() if line.startswith("  problem   ")]
    assert code == 1 and len(problems) == 3
    for line, words in zip(
        problems, ["no file 4.num", "2 of 3", "cannot read d/b/2.num: ValueError"], strict=True
    ):
        assert words in line
    code, out, err = mdiff("check", "none")
    assert code == 3 and not out and "there is no folder 'none'" in err
