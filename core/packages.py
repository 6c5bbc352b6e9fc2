"""Packages as sources of data: fetched by the client that brings them, unpacked, kept.

    fetch("npm:@iconify-json/noto@1.2.9")    # the folder that holds package.json
    fetch("pip:name==1.0")                   # the folder that one would import from
    fetch("apt:fluid-soundfont-gm")          # the root of its files: usr/share/...

Packages come through npm, pip and apt as those are set up on this machine, and nothing inside a package is executed.
An unpacked package appears whole or not at all, and a second call finds it.
"""

import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import IO

from mdiff.core.errors import IntegrityError, MdiffError, MissingError, UsageError, nearest


def cache_folder() -> Path:
    """Where everything is kept that can be had again: $MDIFF_CACHE, else ~/.cache/mdiff."""
    named = os.environ.get("MDIFF_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "mdiff"


def fetch(spec: str, cache: Path | None = None) -> Path:
    """The folder of an unpacked package, fetched at first.

    Args:
        spec: "npm:name@1.0", "pip:name==1.0" or "apt:name=1.0"; the version may be left out.
        cache: `cache_folder()` where None.

    Raises:
        UsageError: a spec of another form.
        MissingError: the client is not installed, or could not get the package.
        IntegrityError: the archive holds a file that would leave the folder.
    """
    kind, _, name = spec.partition(":")
    client = _CLIENTS.get(kind)
    if client is None:
        raise UsageError(
            f"package {spec!r} should begin with npm:, pip: or apt:{nearest(kind, _CLIENTS)}"
        )
    if not re.fullmatch(client.form, name):
        raise UsageError(f"package {spec!r} should look like {client.example}")
    folder = (cache or cache_folder()) / "packages" / kind / name.replace("/", "+")
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(mkdtemp(prefix=".", dir=folder.parent))
        try:
            _keep(client.unpack(name, aside), folder)
        finally:
            rmtree(aside, ignore_errors=True)
    except MissingError as error:
        raise MissingError(
            f"cannot fetch {spec}: {error}; or unpack it by hand into {folder}"
        ) from error
    except tarfile.TarError as error:
        raise IntegrityError(f"{spec} is not an archive that can be unpacked: {error}") from error
    except OSError as error:
        raise MdiffError(f"cannot write {folder}: {error.strerror or error}") from error
    return folder


def extract(archive: Path, folder: Path) -> None:
    """Unpacks a tar archive. Links that point out of the folder are left out: what they point at is not in the archive.

    Raises:
        IntegrityError: a member would leave the folder, or is a device.
    """

    def inside(member: tarfile.TarInfo, to: str) -> tarfile.TarInfo | None:
        try:
            return tarfile.data_filter(member, to)
        except (tarfile.AbsoluteLinkError, tarfile.LinkOutsideDestinationError):
            return None
        except tarfile.FilterError as error:
            raise IntegrityError(f"{archive.name} was not unpacked: {error}") from error

    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter=inside)


def _npm(name: str, aside: Path) -> Path:
    _run(["npm", "pack", "--json", "--ignore-scripts", name], aside, client="npm")
    (archive,) = aside.glob("*.tgz")
    out = aside / "files"
    extract(archive, out)
    inner = list(out.iterdir())  # one folder, by custom named "package"
    return inner[0] if len(inner) == 1 and inner[0].is_dir() else out


def _pip(name: str, aside: Path) -> Path:
    # Wheels only: a source distribution would run its own set-up. pip refuses members that leave the target.
    options = [
        "--no-deps",
        "--no-compile",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--quiet",
    ]
    out = aside / "files"
    _run(
        [sys.executable, "-m", "pip", "install", *options, f"--target={out}", name],
        aside,
        client="pip",
    )
    return out


def _apt(name: str, aside: Path) -> Path:
    _run(
        ["apt-get", "download", name],
        aside,
        client="apt",
        hint="`apt-get update` may be needed first",
    )
    (archive,) = aside.glob("*.deb")
    files, out = aside / "files.tar", aside / "files"
    with files.open("wb") as pipe:
        _run(["dpkg-deb", "--fsys-tarfile", archive.name], aside, client="dpkg", stdout=pipe)
    extract(files, out)
    return out


@dataclass(frozen=True, kw_only=True)
class _Client:
    """A package manager: the form of its names, and (name, empty folder) -> the folder of the unpacked package."""

    form: str
    example: str
    unpack: Callable[[str, Path], Path]


# Names only: no path, address or option can be written in these forms.
_CLIENTS: Mapping[str, _Client] = {
    "npm": _Client(
        form=r"(@[\w.-]+/)?[\w][\w.-]*(@\d[\w.+-]*)?", example="npm:@scope/name@1.0.0", unpack=_npm
    ),
    "pip": _Client(form=r"[\w][\w.-]*(==\d[\w.!+-]*)?", example="pip:name==1.0", unpack=_pip),
    "apt": _Client(
        form=r"[a-z0-9][a-z0-9.+-]*(=\d[\w.:+~-]*)?", example="apt:name=1.0-1", unpack=_apt
    ),
}


def _run(
    command: Sequence[str],
    folder: Path,
    *,
    client: str,
    hint: str = "",
    stdout: int | IO[bytes] = subprocess.PIPE,
) -> None:
    """Runs a command of a client in a folder.

    Raises:
        MissingError: it is not there or failed, with the reason that it gives.
    """
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            check=False,
        )
    except FileNotFoundError:
        raise MissingError(f"there is no {command[0]} here; install {client}") from None
    if done.returncode:
        said = f"{client} failed: {_reason(done.stdout or b'', done.stderr)}"
        raise MissingError(f"{said} ({hint})" if hint else said)


def _reason(out: bytes, err: bytes) -> str:
    """Why a client failed: the summary where it speaks JSON, else its last line."""
    try:
        return json.loads(out)["error"]["summary"].rstrip(".")
    except (ValueError, KeyError, TypeError):
        lines = err.decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else "it does not say why"


def _keep(made: Path, folder: Path) -> None:
    """Gives a folder its final name, unless another process was first."""
    try:
        os.rename(made, folder)
    except OSError:
        if not folder.is_dir():
            raise
