"""Contact sheets, trajectories and previews: what is on them, where they go, and what is said when they cannot be."""

import errno
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from mdiff.cli import main
from mdiff.core import looking, pipeline, record
from mdiff.core.errors import MdiffError, UsageError
from mdiff.core.hooks import Model, Request

RAIN = ("run", "toy", "--text", "rain", "--seed", "3")


@pytest.fixture
def mdiff(toy, tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder with the toy plugin: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def files(folder: str = ".") -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def ask(**fields: object) -> Request:
    return Request(**{"model": "toy/gauss", "text": "rain", **fields})


def dots(*colours: str, size: tuple[int, int] = (96, 96)) -> list[Image.Image]:
    return [Image.new("RGB", size, colour) for colour in colours]


def places(sheet: Image.Image, colour: str) -> tuple[int, int, int, int]:
    """Where a colour is on a sheet: left, top, right, bottom."""
    wanted = Image.new("RGB", (1, 1), colour).getpixel((0, 0))
    here = [
        (i % sheet.width, i // sheet.width)
        for i, pixel in enumerate(sheet.get_flattened_data())
        if pixel == wanted
    ]
    xs, ys = zip(*here, strict=True)
    return min(xs), min(ys), max(xs) + 1, max(ys) + 1


# --- sheets ---------------------------------------------------------------------------------------


def test_a_sheet_is_written_beside_what_is_written_anyway(mdiff):
    code, out, err = mdiff(*RAIN, "--count", 4, "--sheet", "sheets/all.png")
    assert code == 0 and len(out.splitlines()) == 4
    assert err.splitlines()[-1] == "sheet: sheets/all.png"
    assert files("sheets") == ["all.png"] and len(files("outputs")) == 8
    once = Path("sheets/all.png").read_bytes()
    assert mdiff(*RAIN, "--count", 4, "--sheet", "again.png")[0] == 0
    assert Path("again.png").read_bytes() == once


def test_outputs_made_before_are_on_the_sheet_too(mdiff):
    mdiff(*RAIN, "--count", 3, "--sheet", "whole.png")
    mdiff(*RAIN, "--count", 2, "--out", "part")
    assert mdiff(*RAIN, "--count", 3, "--out", "part", "--resume", "--sheet", "a.png")[0] == 0
    assert Path("a.png").read_bytes() == Path("whole.png").read_bytes()


def test_weighted_texts_are_one_output_like_any_other(mdiff):
    looks = ("--trajectory", "strip", "--preview", "now", "--sheet", "a.png")
    weighted = ("run", "toy", "--text", "rain :2 | snow :-1", "--seed", 3, "--out", "a")
    code, out, err = mdiff(*weighted, *looks)
    assert code == 0 and files("now") == [f"{Path(out.strip()).stem}.png"], err


@pytest.mark.parametrize("suffix", [".webp", ".jpg"])
def test_a_sheet_of_one_output_in_another_kind_of_file(mdiff, suffix):
    assert mdiff(*RAIN, "--sheet", f"one{suffix}")[0] == 0
    with Image.open(f"one{suffix}") as sheet:
        assert sheet.width >= looking.SMALL


def test_tiles_stand_in_the_order_of_the_requests():
    colours = ["red", "lime", "blue", "cyan", "magenta"]
    sheet = looking.contact_sheet([ask(seed=i) for i in range(5)], dots(*colours))
    corners = [places(sheet, colour) for colour in colours]
    assert all((right - left, low - top) == (96, 96) for left, top, right, low in corners)
    order = sorted(corners, key=lambda c: (c[1], c[0]))
    assert order == corners and len({top for _, top, _, _ in corners}) == 2


def test_two_fields_that_vary_make_a_table():
    requests = [ask(guidance=g, seed=s) for g in (1.0, 4.0) for s in (7, 8, 9)]
    colours = ["red", "lime", "blue", "cyan", "magenta", "yellow"]
    sheet = looking.contact_sheet(requests, dots(*colours))
    corners = [places(sheet, colour)[:2] for colour in colours]
    xs, ys = sorted({x for x, _ in corners}), sorted({y for _, y in corners})
    assert corners == [(x, y) for y in ys for x in xs], "a row a guidance, a column a seed"
    mixed = [requests[i] for i in (5, 0, 3, 1, 4, 2)]
    again = looking.contact_sheet(mixed, dots(*[colours[i] for i in (5, 0, 3, 1, 4, 2)]))
    assert sorted(places(again, colour)[:2] for colour in colours) == sorted(corners)


def test_a_table_with_a_gap_is_none():
    facts = [looking.facts_of(ask(guidance=g, seed=s)) for g, s in ((1.0, 7), (4.0, 8))]
    assert looking.varying(facts) == {"seed": ["7", "8"], "guidance": ["1", "4"]}
    sheet = looking.contact_sheet([ask(seed=7), ask(seed=8, guidance=4.0)], dots("red", "blue"))
    assert places(sheet, "red")[1] == places(sheet, "blue")[1]


def test_options_and_what_a_field_does_not_say_count_as_facts():
    facts = looking.facts_of(ask(options={"gain": 0.5, "digits": 7}))
    assert (facts["gain"], facts["digits"], facts["negative"]) == ("0.5", "7", "")
    assert "options" not in facts


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """All lines of text that are drawn, in their order."""
    lines: list[str] = []
    write = looking._write

    def listen(page: Image.Image, said: list[str], *place: int) -> None:
        lines.extend(said)
        write(page, said, *place)

    monkeypatch.setattr(looking, "_write", listen)
    return lines


def test_the_labels_say_what_differs_and_the_headline_the_rest(written):
    requests = [ask(seed=s, options={"gain": 2.0}) for s in (5, 6)]
    looking.contact_sheet(requests, dots("red", "blue"))
    one, other, head, text, *facts = written
    assert (one, other, head, text) == ("seed 5", "seed 6", "toy/gauss", "rain")
    said = " ".join(facts)
    assert "steps 20" in said and "gain 2" in said and "seed" not in said and "negative" not in said


def test_texts_one_above_the_other_and_seeds_side_by_side(written):
    texts = ["a red apple, 3D", "a very long wish " * 40]
    looking.contact_sheet(
        [ask(text=t, seed=s) for t in texts for s in (1, 2, 3)], dots(*["red"] * 6)
    )
    assert written[:4] == ["seed 1", "seed 2", "seed 3", "a red apple, 3D"]
    assert any(line.endswith("...") for line in written), "long texts are cut off"


def test_letters_that_the_font_does_not_have():
    assert looking.wrapped("Käse\n 中 plain", 500, 1) == ["Kase ? plain"]


@pytest.mark.parametrize("text", ["", "a", "word " * 50, "x" * 300, "two words"])
@pytest.mark.parametrize("most", [1, 3])
def test_lines_fit(text, most):
    lines = looking.wrapped(text, 96, most)
    assert len(lines) <= most and all(looking._length(line) <= 96 for line in lines)
    assert "".join(lines).replace("...", "").replace(" ", "") in text.replace(" ", "")


def test_pictures_of_any_size_and_mode_fit():
    assert looking.fitted(Image.new("L", (8, 4)), 256).size == (96, 48)
    assert looking.fitted(Image.new("RGB", (1024, 512)), 256).size == (256, 128)
    assert looking.fitted(Image.new("RGB", (2000, 1)), 256).size == (256, 1)
    assert looking.fitted(Image.new("RGBA", (96, 96)), 256).getpixel((5, 5)) == (255, 255, 255)
    assert looking.fitted(Image.new("RGB", (200, 100), "red"), 64).size == (64, 32)


def test_values_that_vary_on_the_command_line_make_a_table(mdiff, written):
    code, out, err = mdiff(*RAIN, "--count", 3, "--vary", "guidance=1,2.5", "--sheet", "table.png")
    assert code == 0 and len(out.splitlines()) == 6, err
    assert written[:5] == ["seed 3", "seed 4", "seed 5", "guidance 1", "guidance 2.5"]
    assert written[5:7] == ["toy/gauss", "rain"]


# --- trajectories ---------------------------------------------------------------------------------


def test_a_strip_shows_what_x0_would_have_become(mdiff):
    code, out, err = mdiff(*RAIN, "--trajectory", "strip")
    path = Path(out.strip())
    strip = path.with_suffix(".steps.png")
    assert code == 0 and err.splitlines()[-1] == f"trajectory: {strip}"
    assert files("outputs") == sorted([path.name, f"{path.name}.json", strip.name])
    with Image.open(strip) as picture:
        # six steps of 8 values, each value 12 pixels wide
        assert picture.width == looking.GAP + 6 * (96 + looking.GAP)
    plain = path.read_bytes()
    path.unlink()
    assert mdiff(*RAIN)[1] == out and path.read_bytes() == plain, "looking changes nothing"


def test_the_record_is_inside_a_strip(mdiff):
    _, out, _ = mdiff(*RAIN, "--trajectory", "strip")
    path = Path(out.strip())
    with Image.open(path.with_suffix(".steps.png")) as picture:
        made = json.loads(picture.info["mdiff"])
    assert record.digest(made) == record.digest(record.read_sidecar(path))


def test_an_animation_has_a_frame_a_step_and_stays_at_the_end(mdiff):
    _, out, _ = mdiff(*RAIN, "--trajectory", "animation", "--steps", 50, "--count", 2)
    for line in out.splitlines():
        with Image.open(Path(line).with_suffix(".steps.webp")) as picture:
            assert picture.n_frames == looking.FRAMES["animation"]
            picture.seek(picture.n_frames - 1)
            picture.load()
            assert picture.info["duration"] == looking.LAST_MS


def test_steps_are_spread_from_the_first_to_the_last():
    assert looking.spread(1, 10) == {1} and looking.spread(4, 10) == {1, 2, 3, 4}
    assert looking.spread(1000, 10) == {1, 112, 223, 334, 445, 556, 667, 778, 889, 1000}


def test_x0_of_an_earlier_stage_does_not_become_a_sample(toy, toy_registry):
    card = toy_registry.resolve("toy")
    request = ask(steps=2, precision="fp32", options={"gain": 1.0, "digits": 7})
    model = pipeline.open_model(card, request, toy)
    told = []
    pipeline.generate(
        model, card, request, host=toy, on_step=lambda m: told.append((m.number, m.sample()))
    )
    assert [(number, sample is None) for number, sample in told] == [
        (0, True),
        (0, True),
        (1, False),
        (1, False),
    ]


def test_a_model_without_a_denoiser_has_no_trajectory(mdiff, monkeypatch):
    opened = pipeline.open_model

    def plain(*arguments: object) -> Model:
        model = opened(*arguments)
        fine = replace(
            model.stages[1], denoiser=None, finish=lambda r, p, x, c: {"fine": c["coarse"]}
        )
        coarse = replace(
            model.stages[0],
            denoiser=None,
            finish=lambda r, p, x, c: {"coarse": model.modules["net"].width.expand(1, 8)},
        )
        return replace(model, stages=(coarse, fine, model.stages[2]))

    monkeypatch.setattr(pipeline, "open_model", plain)
    code, out, err = mdiff(*RAIN, "--trajectory", "strip")
    assert code == 2 and Path(out.strip()).is_file(), "the output stays"
    assert "took no step that could be shown: leave --trajectory out for toy/gauss" in err


def test_what_is_there_already_has_no_trajectory(mdiff):
    mdiff(*RAIN)
    code, _, err = mdiff(*RAIN, "--resume", "--trajectory", "strip")
    assert code == 0 and "trajectory" not in err


# --- previews -------------------------------------------------------------------------------------


def test_a_preview_is_there_while_it_runs(mdiff, monkeypatch):
    seen = []
    save = looking.save
    monkeypatch.setattr(
        looking, "save", lambda *a: (save(*a), seen.append(Path("now.png").is_file()))
    )
    monkeypatch.setattr(looking, "EVERY", 0)
    code, _, err = mdiff(*RAIN, "--preview", "now.png")
    assert code == 0 and seen == [True] * 6 and "preview" not in err
    with Image.open("now.png") as picture:
        assert picture.size == (96, 12)


def test_previews_in_a_folder_have_the_names_of_the_outputs(mdiff):
    _, out, _ = mdiff(*RAIN, "--count", 2, "--preview", "previews")
    assert files("previews") == sorted(f"{Path(line).stem}.png" for line in out.splitlines())


def test_between_two_previews_is_some_time(mdiff, monkeypatch):
    seen = []
    monkeypatch.setattr(looking, "save", lambda *a: seen.append(a))
    monkeypatch.setattr(looking, "EVERY", 1e6)
    mdiff(*RAIN, "--preview", "now.png")
    assert len(seen) == 2, "the first and the last"


def test_a_model_without_previews_says_so_once(mdiff, monkeypatch):
    opened = pipeline.open_model

    def blind(*arguments: object) -> Model:
        model = opened(*arguments)
        return replace(model, stages=tuple(replace(s, preview=None) for s in model.stages))

    monkeypatch.setattr(pipeline, "open_model", blind)
    code, _, err = mdiff(*RAIN, "--count", 2, "--preview", "previews")
    assert code == 0 and files("previews") == []
    assert err.count("no previews: toy/gauss does not say what its x0 looks like") == 1


# --- what cannot be -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--sheet", "sheet.gif"], 2, "a picture goes into one of .png, .webp, .jpg, .jpeg"),
        (["--preview", "now.txt"], 2, "not into 'now.txt'"),
        (["--trajectory", "film"], 2, "'film' is not one of 'strip', 'animation'"),
        (["--sheet", "s.png", "--format", "csv"], 2, "does not say what a sample in a .csv file"),
        (["--trajectory", "strip", "--format", "csv"], 2, "leave --sheet and --trajectory out"),
        (
            ["--count", "1001", "--sheet", "s.png"],
            2,
            "a sheet has room for 1000 outputs, not for 1001",
        ),
        (["--sheet", "file/s.png"], 1, "cannot write into file: "),
        (["--preview", "file/now"], 1, "cannot write into file/now: "),
    ],
)
def test_what_cannot_be_shown_is_said_before_the_work(mdiff, arguments, code, words):
    Path("file").write_text("")
    got, out, err = mdiff(*RAIN, *arguments)
    assert (got, out) == (code, "") and words in err.splitlines()[-1]
    assert files() == ["file"]


def test_a_folder_without_permission(mdiff, monkeypatch):
    def refused(dir):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(dir))

    Path("closed").mkdir()
    monkeypatch.setattr(record, "TemporaryFile", refused)  # root may write anywhere
    code, out, err = mdiff(*RAIN, "--sheet", "closed/s.png")
    assert (code, out) == (1, "") and "cannot write into closed: Permission denied" in err


def test_a_sheet_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "sheet.webp"
    path.write_bytes(b"old")
    with pytest.raises(MdiffError, match=r"cannot write .*sheet.webp"):
        looking.save(Image.new("RGB", (20_000, 1)), path)
    assert path.read_bytes() == b"old" and files(str(tmp_path)) == ["sheet.webp"]
    with pytest.raises(UsageError, match="not into 'sheet'"):
        looking.save(Image.new("RGB", (1, 1)), tmp_path / "sheet")


# --- pace -----------------------------------------------------------------------------------------


def test_pace_counts_outputs_and_parts_of_them(toy, toy_registry, monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(looking.time, "monotonic", lambda: next(now) / 4)
    card = toy_registry.resolve("toy")
    common = {"steps": 3, "precision": "fp32", "options": {"gain": 1.0, "digits": 7}}
    requests = [ask(seed=seed, text="rain :2 | snow :-1", **common) for seed in (1, 2, 3)]
    model = pipeline.open_model(card, requests[0], toy)
    pace, seen = looking.Pace(requests), []

    def look(moment: pipeline.Moment) -> None:
        pace.step(moment)
        seen.append(pace.done)

    for request in (requests[0], requests[2]):  # the second was there already
        pipeline.generate(model, card, request, host=toy, on_step=look)
    sixths = [part / 6 for part in (1, 2, 3, 4, 5, 6, 13, 14, 15, 16, 17, 18)]
    assert seen == pytest.approx(sixths)
    assert pace.place == "3 of 3" and pace.speed == "4.0 steps/s"


def test_on_a_terminal_a_bar_counts_outputs(mdiff, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    code, _, err = mdiff(*RAIN, "--count", 2, "--steps", 20)
    assert code == 0 and "2 of 2" in err and "100%" in err and "steps/s" in err
    assert "\x1b[" in err and "2 of 2" not in mdiff(*RAIN, "--count", 2, "--quiet")[2]
