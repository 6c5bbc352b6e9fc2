"""Rows: made once, found again, every one once an epoch, and the same ones however a batch is split."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mdiff.core.errors import MdiffError, MissingError, UsageError
from mdiff.core.hooks import Example, Task
from mdiff.core.training import rows
from mdiff.core.training.draws import Draws
from mdiff.core.training.rows import Rows, prepare

Read = Callable[[Example], list[dict[str, Tensor]]]


def numbered(count: int, seed: int = 5, weights: list[float] | None = None) -> Rows:
    """Rows that hold their own numbers."""
    given = None if weights is None else torch.tensor(weights)
    return Rows({"n": torch.arange(count)}, seed=seed, weights=given)


def seen(data: Rows, step: int, total: int, mine: slice | None = None) -> list[int]:
    return data.draw(Draws.of(0, step, total, mine))["n"].tolist()


# --- the order -------------------------------------------------------------------------------------

# below, at and above the number of rows whose order is drawn at once
COUNTS, TOTALS = st.integers(1, 40) | st.integers(1020, 1030), st.integers(1, 25)


@settings(deadline=None)
@given(COUNTS, TOTALS, st.integers(0, 1000), st.integers(1, 4), st.booleans())
def test_processes_with_their_shares_see_what_one_sees(count, total, step, parts, weighted):
    data = numbered(count, weights=[1.0 + i for i in range(count)] if weighted else None)
    whole = seen(data, step, total)
    bounds = [total * i // parts for i in range(parts + 1)]
    shares = [slice(a, b) for a, b in pairwise(bounds)]
    assert [n for share in shares for n in seen(data, step, total, share)] == whole
    for part in range(parts):
        assert seen(data, step, total, slice(part, None, parts)) == whole[part::parts]


@settings(deadline=None)
@given(st.integers(1, 40), TOTALS, st.integers(0, 2**31))
def test_every_row_comes_once_in_an_epoch(count, total, seed):
    data = numbered(count, seed)
    steps = -(-3 * count // total)
    stream = [n for step in range(steps) for n in seen(data, step, total)]
    for epoch in range(3):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))


@settings(deadline=None)
@given(COUNTS, TOTALS, st.lists(st.integers(0, 50), min_size=1, max_size=3))
def test_a_step_is_the_same_wherever_one_begins(count, total, steps):
    running = numbered(count)
    before = {step: seen(running, step, total) for step in range(max(steps) + 1)}
    for step in steps:
        assert seen(numbered(count), step, total) == before[step]


@settings(deadline=None)
@given(COUNTS, TOTALS, st.integers(0, 1000))
def test_the_order_does_not_depend_on_the_size_of_batches(count, total, step):
    data = numbered(count)
    assert seen(data, step, total) == [seen(data, total * step + j, 1)[0] for j in range(total)]


@settings(deadline=None)
@given(COUNTS, TOTALS, st.integers(0, 100))
def test_the_cursor_says_how_far_the_data_was_seen(count, total, step):
    at = numbered(count).cursor(step, total)
    assert at["epoch"] * count + at["place"] == step * total and 0 <= at["place"] < count


def test_epochs_and_seeds_have_orders_of_their_own():
    for count in (20, 2000):
        orders = {tuple(seen(numbered(count, s), e, count)) for s in range(3) for e in range(3)}
        assert len(orders) == 9


def test_drawing_moves_no_generator():
    draws, state = Draws.of(0, 0, 4), torch.random.get_rng_state()
    before = draws.generator.get_state()
    numbered(9).draw(draws)
    numbered(9, weights=[1.0] * 9).draw(draws)
    assert torch.equal(draws.generator.get_state(), before)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_weighted_rows_come_as_often_as_their_weights_say():
    data = numbered(4, weights=[1.0, 0.0, 3.0, 4.0])
    counts = torch.bincount(
        torch.tensor([n for s in range(40) for n in seen(data, s, 500)]), minlength=4
    )
    # four standard deviations of a share of one half among 20,000 draws are 0.014
    torch.testing.assert_close(counts / 20_000, torch.tensor([1, 0, 3, 4]) / 8, atol=0.015, rtol=0)
    assert counts[1] == 0


# --- made and kept ---------------------------------------------------------------------------------


def files(folder: Path, *contents: str) -> list[Example]:
    folder.mkdir(exist_ok=True)
    examples = []
    for i, content in enumerate(contents):
        path = folder / f"{i:02}.num"
        if not path.exists() or path.read_text() != content:
            path.write_text(content)
        examples.append(Example(path=path, texts=(content,)))
    return examples


def numbers(example: Example) -> list[dict[str, Tensor]]:
    """A row for each number in a file."""
    return [
        {"n": torch.tensor(int(w)), "x": torch.full((2, 3), float(w)).half()}
        for w in example.path.read_text().split()
    ]


def task(read: Read = numbers, **more: object) -> Task:
    return Task(module=nn.Identity(), read=read, **more)  # type: ignore[arg-type]


def counting(calls: list[str]) -> Read:
    def read(example: Example) -> list[dict[str, Tensor]]:
        calls.append(example.path.name)
        return numbers(example)

    return read


def made(examples: list[Example], what: Task, cache: Path, **more: int) -> tuple[Rows, list[str]]:
    said: list[str] = []
    return prepare(examples, what, cache, seed=1, say=said.append, **more), said


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("loaded", [0, rows.LOADED])
def test_rows_hold_what_was_read(tmp_path, monkeypatch, workers, loaded):
    monkeypatch.setattr(rows, "LOADED", loaded)
    data, said = made(
        files(tmp_path / "d", "1 2", "3", "4 5 6", "7"), task(), tmp_path / "c", workers=workers
    )
    assert (
        len(data) == 7
        and data.sources == (0, 0, 1, 2, 2, 2, 3)
        and said[-1].startswith("7 rows of 4 files")
    )
    assert data.tensors["n"].tolist() == [1, 2, 3, 4, 5, 6, 7]
    batch = data.draw(Draws.of(0, 0, 7))
    assert batch["x"].dtype == torch.float16 and batch["x"].shape == (7, 2, 3)
    assert torch.equal(batch["x"][:, 0, 0].long(), batch["n"]) and sorted(batch["n"].tolist()) == [
        *range(1, 8)
    ]


def test_the_files_are_plain_arrays_that_numpy_reads(tmp_path):
    made(files(tmp_path / "d", "1 2", "3"), task(), tmp_path / "c")
    (folder,) = (tmp_path / "c").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["index.json", "n.npy", "x.npy"]
    array = np.load(folder / "x.npy")
    assert array.dtype == np.float16 and array.shape == (3, 2, 3) and array[2, 0, 0] == 3


def test_what_was_made_is_found_again(tmp_path):
    calls: list[str] = []
    examples, what = files(tmp_path / "d", "1", "x", "3"), task(counting(calls))
    first, _ = made(examples, what, tmp_path / "c")
    again, said = made(examples, what, tmp_path / "c")
    assert calls == ["00.num", "01.num", "02.num"]
    assert torch.equal(first.tensors["n"], again.tensors["n"]) and first.skipped == again.skipped
    assert first.sources == again.sources == (0, 2)
    assert "2 rows found in" in said[0] and "1 files left out" in said[0]


def test_a_folder_that_moves_with_its_files_is_the_same_data(tmp_path):
    calls: list[str] = []
    made(files(tmp_path / "d", "1", "2"), task(counting(calls)), tmp_path / "c")
    (tmp_path / "d").rename(tmp_path / "e")
    made(files(tmp_path / "e", "1", "2"), task(counting(calls)), tmp_path / "c")
    assert len(calls) == 2


def test_rows_are_made_again_where_anything_has_changed(tmp_path):
    calls: list[str] = []

    def count(examples: list[Example], **settings: object) -> int:
        calls.clear()
        made(examples, task(counting(calls), **settings), tmp_path / "c")
        return len(calls)

    examples = files(tmp_path / "d", "1", "2")
    assert count(examples) == 2 and count(examples) == 0
    assert count(examples, made_by={"rate": 16000}) == 2
    assert count(examples[:1]) == 1
    assert count([examples[0], Example(path=examples[1].path, texts=("other",))]) == 2
    assert count([examples[0], Example(path=examples[1].path, texts=("2",), facts={"a": 1})]) == 2
    assert count(files(tmp_path / "d", "1", "22")) == 2


@pytest.mark.parametrize("harm", ["truncate", "index", "other", "noise", "missing"])
def test_a_cache_that_is_not_whole_is_made_again(tmp_path, harm):
    examples = files(tmp_path / "d", "1", "2")
    made(examples, task(), tmp_path / "c")
    (folder,) = (tmp_path / "c").iterdir()
    if harm == "truncate":
        (folder / "x.npy").write_bytes((folder / "x.npy").read_bytes()[:-1])
    elif harm == "index":
        (folder / "index.json").write_text('{"tensors"')
    elif harm == "other":
        (folder / "index.json").write_text("[]")
    elif harm == "noise":
        (folder / "x.npy").write_bytes(bytes((folder / "x.npy").stat().st_size))
    else:
        (folder / "n.npy").unlink()
    data, said = made(examples, task(), tmp_path / "c")
    assert said[-1].startswith("2 rows of 2 files") and data.tensors["n"].tolist() == [1, 2]
    assert [p.name for p in (tmp_path / "c").iterdir()] == [folder.name]


def test_new_rows_take_the_place_of_old_ones_and_of_what_was_killed(tmp_path):
    made(files(tmp_path / "d", "1", "2"), task(), tmp_path / "c")
    (old,) = (tmp_path / "c").iterdir()
    killed, other = (tmp_path / "c" / name for name in (f".{old.name}-abc_1234", "mine"))
    killed.mkdir(), other.mkdir()
    made(files(tmp_path / "d", "1", "2"), task(), tmp_path / "c")  # found: nothing is touched
    assert killed.is_dir()
    made(files(tmp_path / "d", "1", "2", "3"), task(), tmp_path / "c")
    assert not old.exists() and not killed.exists() and other.is_dir()
    assert len(list((tmp_path / "c").iterdir())) == 2


def test_bad_files_are_told_counted_and_left_out(tmp_path):
    def read(example: Example) -> list[dict[str, Tensor]]:
        word = example.path.read_text()
        if word == "gone":
            raise MissingError("cannot read it")
        return numbers(example) if word != "nan" else [{"x": torch.tensor([float("nan")])}]

    examples = files(tmp_path / "d", "1", "gone", "nan", "", *["x"] * 12, "2")
    data, said = made(examples, task(read), tmp_path / "c")
    assert data.tensors["n"].tolist() == [1, 2] and len(data.skipped) == 15
    told = [line for line in said if line.startswith("left out")]
    assert len(told) == 10 and said[-1].endswith("15 of 17 files could not be used")
    assert told[:3] == [
        "left out 01.num: cannot read it",
        "left out 02.num: a value of 'x' is not finite",
        "left out 03.num: no rows come of it",
    ]
    assert "ValueError: invalid literal" in told[3]


def test_nothing_that_can_be_used(tmp_path):
    with pytest.raises(MdiffError, match=r"none of the 2 files can be used: 00\.num: ValueError"):
        made(files(tmp_path / "d", "x", "y"), task(), tmp_path / "c")
    assert list((tmp_path / "c").iterdir()) == []
    with pytest.raises(UsageError, match="no examples"):
        made([], task(), tmp_path / "c")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (
            {"x": torch.zeros(4)},
            r"01\.num gives rows of x float32 \(4,\), and 00\.num of x float32 \(3,\)",
        ),
        ({"x": torch.zeros(3).half()}, r"x float16 \(3,\), and 00\.num of x float32"),
        ({"y": torch.zeros(3)}, r"y float32 \(3,\), and 00\.num of x"),
        ({"x": torch.zeros(3).bfloat16()}, "'x' is bfloat16"),
    ],
)
def test_rows_that_are_not_alike(tmp_path, other, words):
    kinds = {"a": {"x": torch.zeros(3)}, "b": other}
    what = task(lambda example: [kinds[example.path.read_text()]])
    with pytest.raises(MdiffError, match=words):
        made(files(tmp_path / "d", "a", "b"), what, tmp_path / "c")
    assert list((tmp_path / "c").iterdir()) == []


def test_an_interrupted_reading_leaves_nothing(tmp_path):
    def read(example: Example) -> list[dict[str, Tensor]]:
        if example.path.read_text() == "2":
            raise KeyboardInterrupt
        return numbers(example)

    with pytest.raises(KeyboardInterrupt):
        made(files(tmp_path / "d", "1", "2"), task(read), tmp_path / "c")
    assert list((tmp_path / "c").iterdir()) == []


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(MdiffError, match="cannot write .*No space left on device"):
            made(files(tmp_path / "d", "1"), task(), tmp_path / "c")
    assert list((tmp_path / "c").iterdir()) == []


def test_an_example_is_seen_as_often_as_it_is_weighed_whatever_rows_it_has(tmp_path):
    what = task(weigh=lambda example: 3.0 if " " in example.path.read_text() else 1.0)
    data, _ = made(files(tmp_path / "d", "1 2 3", "4", "x"), what, tmp_path / "c")
    drawn = torch.tensor([n for s in range(40) for n in seen(data, s, 250)])
    shares = torch.bincount(drawn, minlength=5)[1:] / len(drawn)
    torch.testing.assert_close(shares, torch.full((4,), 0.25), atol=0.02, rtol=0)
    for weight in (-1.0, float("nan"), 0.0):
        with pytest.raises(UsageError, match="weight"):
            made(
                files(tmp_path / "d", "1"), task(weigh=lambda example, w=weight: w), tmp_path / "c"
            )


def test_the_index_names_what_was_left_out(tmp_path):
    made(files(tmp_path / "d", "1", "x"), task(), tmp_path / "c")
    (folder,) = (tmp_path / "c").iterdir()
    index = json.loads((folder / "index.json").read_text())
    assert index["sources"] == [0] and list(index["skipped"]) == ["01.num"]
