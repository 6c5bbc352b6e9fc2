"""Packages: a spec is a name and nothing else, clients are asked once, archives stay inside their folder."""

import io
import stat
import tarfile
from pathlib import Path

import pytest

from mdiff.core import packages
from mdiff.core.errors import IntegrityError, MissingError, UsageError

NPM = """#!/bin/sh
echo asked >> "$ASKED"
case "$5$4" in *missing*) echo '{"error": {"code": "E404", "summary": "No matching version found."}}'; exit 1;; esac
cp "$SOURCE" package-1.0.tgz
"""


def archive(path: Path, *members: tarfile.TarInfo | str) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for member in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = 2 if info.isreg() else 0
            tar.addfile(info, io.BytesIO(b"{}"))
    return path


def link(name: str, to: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, to
    return info


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """An npm of our own on the path: it copies an archive, and notes that it was asked."""
    program = tmp_path / "bin" / "npm"
    program.parent.mkdir()
    program.write_text(NPM)
    program.chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setenv("SOURCE", str(archive(tmp_path / "a.tgz", "package/icons.json")))
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    monkeypatch.setenv("MDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_a_package_is_fetched_once_and_its_root_is_given(npm):
    folder = packages.fetch("npm:@icons/noto@1.2.9")
    assert [p.name for p in folder.iterdir()] == ["icons.json"]
    assert folder.is_relative_to(npm / "cache")
    assert packages.fetch("npm:@icons/noto@1.2.9") == folder
    assert (npm / "asked").read_text().split() == ["asked"]
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]  # nothing left aside


def test_a_client_that_fails_gives_its_reason_and_leaves_nothing(npm):
    with pytest.raises(
        MissingError, match="npm:missing@9: npm failed: No matching version found;.*by hand"
    ):
        packages.fetch("npm:missing@9")
    assert list((npm / "cache" / "packages" / "npm").iterdir()) == []


def test_a_client_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for spec, program in (("npm:a", "npm"), ("apt:a1", "apt-get")):
        with pytest.raises(MissingError, match=f"there is no {program} here; install"):
            packages.fetch(spec, tmp_path / "cache")


@pytest.mark.parametrize(
    "spec",
    [
        "name",
        "npm:../x",
        "npm:./x",
        "npm:--help",
        "npm:a/b",
        "npm:a@git+x",
        "pip:-r",
        "pip:a==1 b",
        "pip:/a",
    ]
    + ["pip:a @ file", "apt:-o", "apt:a b", "npm:", "nmp:a", "npm:a@1/../..", "pip:..", "apt:../a"],
)
def test_a_spec_is_a_name_and_nothing_else(spec, tmp_path):
    with pytest.raises(UsageError, match="package "):
        packages.fetch(spec, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../out.txt", "package/../../out.txt"])
def test_a_member_that_would_leave_the_folder_is_refused(name, npm):
    archive(npm / "a.tgz", "package/icons.json", name)
    with pytest.raises(IntegrityError, match="out.txt"):
        packages.fetch("npm:evil@1.0")
    assert not list((npm / "cache").rglob("*.txt")) and not list((npm / "cache").rglob("*.json"))


def test_links_that_point_outside_are_left_out(tmp_path):
    path = archive(
        tmp_path / "a.tgz", "a", link("in", "a"), link("up", "../x"), link("etc", "/etc/passwd")
    )
    packages.extract(path, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a", "in"]


def test_an_archive_that_is_none(npm):
    (npm / "a.tgz").write_bytes(b"<html>")
    with pytest.raises(IntegrityError, match="npm:page is not an archive"):
        packages.fetch("npm:page")


def test_pip_unpacks_a_wheel(tmp_path, monkeypatch):
    import zipfile

    with zipfile.ZipFile(tmp_path / "tiny-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny/data.json", "{}")
        wheel.writestr(
            "tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n"
        )
        wheel.writestr(
            "tiny-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr("tiny-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    folder = packages.fetch("pip:tiny==1.0", tmp_path / "cache")
    assert (folder / "tiny" / "data.json").read_text() == "{}"
    with pytest.raises(
        MissingError, match="pip failed: ERROR: No matching distribution found for tiny==2"
    ):
        packages.fetch("pip:tiny==2", tmp_path / "cache")
