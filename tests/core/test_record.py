"""Records: small enough for any container, found again, and files that are whole or not there."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mdiff.core import record
from mdiff.core.errors import IntegrityError, MdiffError, MissingError, UsageError
from mdiff.core.hooks import Media, Request
from mdiff.core.record import atomic_write


@pytest.fixture
def made(toy_registry) -> dict:
    request = Request(model="toy/gauss", text="rain", options={"digits": 7})
    card = toy_registry.cards["toy/gauss"]
    return record.make(request, card, dist="mdiff-toy", dist_version="1.0", threads=1)


def test_a_record_is_json_and_names_all_that_matters(made):
    assert json.loads(record.canonical(made)) == made
    assert made["schema"] == 1 and made["model"] == "toy/gauss" and made["seed"] == 0
    assert set(made["weights"]) == {"weights.safetensors"} and made["torch"] == "2.11.0"
    assert made["plugin"] == {"name": "toy", "dist": "mdiff-toy", "version": "1.0"}
    assert record.request_of(made) == Request(model="toy/gauss", text="rain", options={"digits": 7})


def test_short_is_all_of_it_or_a_summary_that_fits(made):
    assert record.parse(record.short(made)) == made
    made["request"]["text"] = "ä☂" * 1000
    text = record.short(made)
    assert len(text.encode()) <= record.LIMIT and text.isascii()
    assert record.parse(text)["record"] == record.digest(made)
    assert record.parse(text)["seed"] == 0


@pytest.mark.parametrize("text", ["", "hello", "[1]", "3", '{"a": 1}', "{"])
def test_other_texts_are_no_records(text):
    assert record.parse(text) is None


def put(path: Path, made: dict) -> None:
    with record.output(path, made) as temporary:
        temporary.write_text("data")


def media(inside) -> list[Media]:
    return [Media(suffix=".x", write=None, read=None, read_record=lambda path: inside)]


def test_find_looks_inside_then_beside(tmp_path, made):
    path = tmp_path / "a.x"
    with pytest.raises(MissingError, match="no file"):
        record.find(path, media(None))
    path.write_text("data")
    with pytest.raises(MissingError, match="holds no record and a.x.json is not beside it"):
        record.find(path, media(None))
    assert record.find(path, media(made)) == made
    put(path, made)
    beside = record.find(path, media(None))
    assert beside["file"]["bytes"] == 4 and record.digest(beside) == record.digest(made)
    summary = {"schema": 1, "model": "toy/gauss", "record": record.digest(made)}
    assert record.find(path, media(summary)) == beside
    with pytest.raises(IntegrityError, match="is not the record that was written into a.x"):
        record.find(path, media({**summary, "record": "0" * 64}))


def test_complete_means_whole_and_of_the_same_request(tmp_path, made):
    path = tmp_path / "a.x"
    assert not record.complete(path, made)
    path.write_text("data")
    assert not record.complete(path, made)
    put(path, made)
    assert record.complete(path, made)
    assert record.complete(path, {**made, "threads": 9})
    assert not record.complete(path, {**made, "weights": {}})
    path.write_text("date")
    assert not record.complete(path, made)
    record.sidecar(path).write_text("{")
    assert not record.complete(path, made)


def test_a_record_of_another_form_is_refused(made):
    for other in ({**made, "schema": 99}, {**made, "request": {"colour": 1}}, {"schema": 1}):
        with pytest.raises(UsageError, match="install that version"):
            record.request_of(other)


def names(folder) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_atomic_write_replaces_whole_files_and_keeps_the_suffix(tmp_path):
    path = tmp_path / "new" / "a.wav"
    with atomic_write(path) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == ".wav"
        temporary.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one" and names(path.parent) == ["a.wav"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_atomic_write_leaves_the_old_file_when_something_happens(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_a_full_disk_is_one_line(tmp_path):
    full = pytest.raises(MdiffError, match="cannot write .*: No space left on device")
    with full, atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert names(tmp_path) == []


def test_an_output_and_its_sidecar_appear_together_or_not_at_all(tmp_path, made, monkeypatch):
    with pytest.raises(TypeError), record.output(tmp_path / "a.x", {**made, "seed": print}) as path:
        path.write_text("data")
    assert names(tmp_path) == []
    put(tmp_path / "a.x", made)
    assert names(tmp_path) == ["a.x", "a.x.json"]


def test_a_file_where_the_folder_should_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    refused = pytest.raises(MdiffError, match="cannot write .*: (Not a directory|File exists)")
    with refused, atomic_write(tmp_path / "file" / "a.txt") as temporary:
        temporary.write_text("")
    with pytest.raises(MdiffError, match="cannot write into"):
        record.make_folder(tmp_path / "file")


def test_a_writer_that_writes_nothing_is_found_out(tmp_path):
    with pytest.raises(MdiffError, match="No such file"), atomic_write(tmp_path / "a.txt"):
        pass


def test_a_killed_process_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    code = (
        "import sys, time; from pathlib import Path; from mdiff.core.record import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as t:\n"
        "    t.write_text('half'); print('now', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as child:
        assert child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        child.wait()
    time.sleep(0.01)
    assert path.read_text() == "old"
