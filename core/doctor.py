"""What `mdiff doctor` looks at: the installation, piece by piece, each with a finding."""

import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mdiff
from mdiff.core import record, request
from mdiff.core.errors import MdiffError
from mdiff.core.hooks import ModelCard
from mdiff.core.host import line
from mdiff.core.registry import Registry
from mdiff.core.testing import Check

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")


def examine(registry: Registry, out: Path) -> Iterator[Check]:
    """The findings, in the order in which a person would look.

    Args:
        out: the folder that outputs would go into; whether it can be written to is tried where it
            would be made.
    """
    versions = f"mdiff {mdiff.__version__}, torch {record.installed('torch')}"
    yield Check("versions", True, f"{versions}, python {platform.python_version()}")
    device = request.device("auto")
    flags = [flag for flag in FLAGS if flag in request.cpu_flags()]
    yield Check("processor", True, f"{platform.machine()} {' '.join(flags)}; device {device}")
    yield Check("precision", True, f"{request.precision('auto', device)} on {device}")
    registry.host.load_all()
    for found in registry.host.records:
        fine = found.status in ("loaded", "blocked")
        where = f"{found.dist} {found.version}, {found.seconds:.2f} s"
        yield Check(
            f"plugin {found.name}", fine, where if found.status == "loaded" else line(found)
        )
    for problem in registry.problems:
        yield Check("registry", False, problem)
    for cards in (registry.cards, *registry.apart.values()):
        yield from map(_weights, cards.values())
    yield _writable(out)


def _weights(card: ModelCard) -> Check:
    from mdiff.core.weights import verified

    try:
        size = sum(len(verified(card.root / file.name, file)) for file in card.files)
    except MdiffError as error:
        return Check(f"weights {card.id}", False, str(error))
    return Check(
        f"weights {card.id}", True, f"{len(card.files)} files, {size / 1e6:.1f} MB, sha256 right"
    )


def _writable(out: Path) -> Check:
    existing = next(
        folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists()
    )
    try:
        with tempfile.TemporaryFile(dir=existing):
            return Check("output folder", True, str(out))
    except OSError as error:
        return Check("output folder", False, f"cannot write into {existing}: {error.strerror}")
