"""Weights: safetensors files that are what their card says, loaded strictly into a model's modules.

A file is read once and its size and sha256 are checked before its bytes are parsed, so what was
verified is what is used. No other format is read, and nothing here can run code.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
from safetensors.torch import save_file
from torch import Tensor, nn

from mdiff.core.errors import IntegrityError, MissingError
from mdiff.core.hooks import File, Model, ModelCard


def load(model: Model, card: ModelCard) -> None:
    """Fills the modules of a model from the files of its card.

    Raises:
        MissingError: a file is not there.
        IntegrityError: a file, or the model it is for, is not what the card says.
    """
    filled = {file.module for file in card.files}
    for name, module in model.modules.items():
        if name not in filled and module.state_dict():
            raise IntegrityError(
                f"{card.id}: no file fills {name!r}, it would run on random weights"
            )
    for file in card.files:
        if file.module not in model.modules:
            known = ", ".join(model.modules)
            raise IntegrityError(f"{card.id}: {file.name} is for {file.module!r}; it has: {known}")
        fill(model.modules[file.module], read(card.root / file.name, file), file.name)


def read(path: Path, file: File) -> dict[str, Tensor]:
    """The tensors of a file that is what its entry says. Raises as `load`."""
    return parse(verified(path, file), path.name)


def verified(
    path: Path, file: File, mend: str = "install the package (or copy the folder) again"
) -> bytes:
    """The bytes of a file whose size and sha256 are those of its entry. Raises as `load`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MissingError(f"{path} cannot be read ({error.strerror}): {mend}") from error
    if len(data) != file.size:
        raise IntegrityError(f"{path} has {len(data)} bytes and should have {file.size}: {mend}")
    found = hashlib.sha256(data).hexdigest()
    if found != file.sha256:
        raise IntegrityError(
            f"{path} has sha256 {found[:12]}... and should have {file.sha256[:12]}...: {mend}"
        )
    return data


def parse(data: bytes, name: str) -> dict[str, Tensor]:
    """The tensors in the bytes of a safetensors file called `name`.

    Raises:
        IntegrityError: the bytes are not one.
    """
    try:
        return tensors_of(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise IntegrityError(f"{name} is not a whole safetensors file: {error}") from error


def metadata(data: bytes) -> dict[str, str]:
    """The texts in the header of a safetensors file, by name: of bytes that `parse` takes."""
    length = int.from_bytes(data[:8], "little")
    found: dict[str, str] = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    return found


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors as a safetensors file, wherever they are and however they lie in memory.

    Raises:
        OSError: the system refused: full disk, no permission.
    """
    plain: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        shared = value.numel() and value.untyped_storage().data_ptr() in memory  # tied weights
        plain[name] = value.clone() if shared else value
        memory.add(plain[name].untyped_storage().data_ptr())
    try:
        save_file(plain, path)
        path.chmod(0o644)  # the library leaves it to its writer alone
    except SafetensorError as error:
        # the library hands over the system's number in words alone
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


def fill(module: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    """Copies tensors into a module, each to its namesake, in the module's own precision and place.

    Raises:
        IntegrityError: names or shapes differ; one line names the first few of each.
    """
    own = module.state_dict()
    shapes = [
        f"{key} {tuple(tensors[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in tensors and tensors[key].shape != own[key].shape
    ]
    wrong = {
        "missing": [key for key in own if key not in tensors],
        "unexpected": [key for key in tensors if key not in own],
        "of another shape": shapes,
    }
    said = [f"{len(keys)} {what} ({_few(keys)})" for what, keys in wrong.items() if keys]
    if said:
        raise IntegrityError(f"{name} does not fit its network: {'; '.join(said)}")
    module.load_state_dict(dict(tensors))


def _few(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
