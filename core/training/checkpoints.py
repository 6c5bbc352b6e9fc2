"""Checkpoints of a run: folders that are there as a whole or not at all, and say of themselves what they hold.

`RUN/checkpoints/00001234/` has safetensors files and `manifest.json` with the size and sha256 of each, which is written
last. All of it is written under a hidden name beside, brought to the disk, and renamed: whenever the process is killed,
what has a number for its name is whole. What reads them trusts none of this and compares the hashes.
"""

import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from mdiff.core import record, weights
from mdiff.core.errors import IntegrityError, MdiffError, MissingError
from mdiff.core.hooks import File

MANIFEST = "manifest.json"
SCHEMA = 1
_NAME = re.compile(r"\d{8,}")
_ASIDE = re.compile(r"\.\d{8,}-[0-9a-f]{12}")
"""What is being written or removed; a process that was killed leaves it behind."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint by its manifest.

    Attributes:
        path: its folder.
        step: steps that were done.
        facts: what the run keeps beside tensors, JSON values.
        files: stem of a file -> its name, size and hash.
    """

    path: Path
    step: int
    facts: Mapping[str, Any]
    files: Mapping[str, File]

    def read(self, name: str) -> dict[str, Tensor]:
        """The tensors of the file `name` ("model", "optimizer", ...).

        Raises:
            IntegrityError: there is no such file, or it is not what the manifest says.
        """
        if name not in self.files:
            raise IntegrityError(f"{self.path} has no {name!r}; it has: {', '.join(self.files)}")
        file = self.files[name]
        try:
            content = weights.verified(
                self.path / file.name, file, "go on from an older checkpoint"
            )
        except MissingError as error:
            raise IntegrityError(str(error)) from error
        return weights.parse(content, str(self.path / file.name))


def save(
    folder: Path,
    step: int,
    files: Mapping[str, Mapping[str, Tensor]],
    facts: Mapping[str, Any],
    keep: int,
) -> Checkpoint:
    """Writes a checkpoint, then removes the oldest beyond `keep` and what killed processes left behind.

    Args:
        folder: of all the checkpoints of a run, which one process at a time writes.
        files: stem of a file -> its tensors by name.
        facts: JSON values.

    Raises:
        MdiffError: the system refused (full disk, no permission): the older checkpoints are as they were.
    """
    path = folder / f"{step:08d}"
    aside = _aside(path)
    try:
        aside.mkdir(parents=True)
        written = {stem: _write(aside / f"{stem}.safetensors", files[stem]) for stem in files}
        _write_manifest(aside / MANIFEST, step, written, facts)
        record.flush(aside)
        if path.exists():  # a damaged one, or one of a run that went back to an older step
            path.rename(_aside(path))
        aside.rename(path)
        record.flush(folder)
    except OSError as error:
        raise MdiffError(
            f"cannot write the checkpoint of step {step} in {folder}: {error.strerror or error}; "
            "make room and go on with --resume"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _tidy(folder, step, keep)
    return Checkpoint(path=path, step=step, facts=dict(facts), files=written)


def newest(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None; every newer one is passed over with a line that says why."""
    for path in reversed(_all(folder)):
        try:
            return verified(path)
        except IntegrityError as error:
            say(f"passing over the checkpoint of step {int(path.name)}: {error}")
    return None


def verified(path: Path) -> Checkpoint:
    """The checkpoint in a folder, each of its files compared with the manifest.

    Raises:
        IntegrityError: it is partial, damaged or of another version.
    """
    found = _manifest(path)
    for file in found.files.values():
        inside = path / file.name
        try:
            size = inside.stat().st_size
            sha256 = _sha256(inside) if size == file.size else ""
        except OSError as error:
            raise IntegrityError(f"{inside} cannot be read ({error.strerror})") from error
        if size != file.size:
            raise IntegrityError(f"{inside} has {size} bytes and should have {file.size}")
        if sha256 != file.sha256:
            raise IntegrityError(
                f"{inside} has sha256 {sha256[:12]}... and should have {file.sha256[:12]}..."
            )
    return found


def _write(path: Path, tensors: Mapping[str, Tensor]) -> File:
    weights.write(path, tensors)
    sha256 = _sha256(path)  # out of the system's memory: it was written this moment
    record.flush(path)
    return File(name=path.name, sha256=sha256, size=path.stat().st_size, module=path.stem)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_manifest(
    path: Path, step: int, files: Mapping[str, File], facts: Mapping[str, Any]
) -> None:
    body = {
        "schema": SCHEMA,
        "step": step,
        "facts": dict(facts),
        "files": {stem: {"size": f.size, "sha256": f.sha256} for stem, f in files.items()},
    }
    path.write_text(json.dumps({**body, "sha256": record.digest(body)}, indent=1) + "\n")
    record.flush(path)


def _manifest(path: Path) -> Checkpoint:
    where = path / MANIFEST
    try:
        body = json.loads(where.read_text())
        schema, sha256 = body["schema"], body.pop("sha256")
    except OSError as error:
        raise IntegrityError(f"{where} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{where} is not a manifest") from error
    if schema != SCHEMA:
        raise IntegrityError(f"{where} has schema {schema}, this version reads {SCHEMA}")
    if sha256 != record.digest(body):
        raise IntegrityError(f"{where} was altered")
    files = {
        stem: File(name=f"{stem}.safetensors", module=stem, **about)
        for stem, about in body["files"].items()
    }
    return Checkpoint(path=path, step=body["step"], facts=body["facts"], files=files)


def _all(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, by their step."""
    if not folder.is_dir():
        return []
    return sorted(
        (p for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=lambda p: int(p.name)
    )


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}-{secrets.token_hex(6)}")


def _tidy(folder: Path, step: int, keep: int) -> None:
    """Removes what is not needed any more. A failure to do so is left for the next time.

    Later steps than the one just written are left alone: they were passed over, and are replaced when they come.
    """
    done = [path for path in _all(folder) if int(path.name) <= step]
    try:
        for path in done[: max(0, len(done) - max(1, keep))]:
            path.rename(_aside(path))  # so that none is ever seen half removed
        for path in folder.iterdir():
            if _ASIDE.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
    except OSError:
        pass


_STATE = re.compile(
    r"optimizer\.(?P<n>\d+)\.(?P<i>\d+)\.(?P<key>[^:]+)(?P<number>:(?:bool|int|float))?"
)
_NUMBERS: dict[type, torch.dtype] = {bool: torch.bool, int: torch.int64, float: torch.float64}


def flatten(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The state of optimizers as named tensors: `optimizer.0.17.exp_avg`, of the 17th parameter of the first.

    A number that is no tensor has its type at the end of its name: `optimizer.0.17.step:int`. Learning rates and other
    settings are not in it: a run has them from its recipe.

    Raises:
        MdiffError: an optimizer keeps something else.
    """
    found: dict[str, Tensor] = {}
    for n, optimizer in enumerate(optimizers):
        for i, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                name = f"optimizer.{n}.{i}.{key}"
                if isinstance(value, Tensor):
                    found[name] = value
                elif type(value) in _NUMBERS:
                    kind = type(value)
                    found[f"{name}:{kind.__name__}"] = torch.tensor(value, dtype=_NUMBERS[kind])
                else:
                    raise MdiffError(
                        f"{type(optimizer).__name__} keeps a {type(value).__name__} as "
                        f"{key!r}: tensors and numbers can be saved"
                    )
    return found


def unflatten(optimizers: Sequence[torch.optim.Optimizer], tensors: Mapping[str, Tensor]) -> None:
    """Gives optimizers the state that `flatten` took from others of the same parameters.

    Raises:
        IntegrityError: it is not the state of these optimizers.
    """
    states: list[dict[int, dict[str, Any]]] = [{} for _ in optimizers]
    parameters = [[p for group in o.param_groups for p in group["params"]] for o in optimizers]
    for name, tensor in tensors.items():
        where = _STATE.fullmatch(name)
        n, i = (int(where["n"]), int(where["i"])) if where else (-1, -1)
        if where is None or n >= len(parameters) or i >= len(parameters[n]):
            raise IntegrityError(f"the state of the optimizer does not fit it: unexpected {name!r}")
        shape = parameters[n][i].shape
        if not _fits(tensor.shape, shape):
            raise IntegrityError(
                f"the state of the optimizer does not fit it: {name!r} is {tuple(tensor.shape)} for "
                f"a parameter {tuple(shape)}"
            )
        value = tensor.item() if where["number"] else placed(tensor, parameters[n][i])
        states[n].setdefault(i, {})[where["key"]] = value
    for optimizer, state in zip(optimizers, states, strict=True):
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as another one is: shared out over the processes where that one is."""
    if isinstance(like, DTensor) and tensor.shape == like.shape:
        # every process has read the whole, so none is sent
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor


def _fits(state: Sequence[int], parameter: Sequence[int]) -> bool:
    """Whether a state is a number, of the parameter's shape, or of that with sums taken along some axes."""
    same = len(state) == len(parameter)
    return not state or same and all(a in (1, b) for a, b in zip(state, parameter, strict=True))
