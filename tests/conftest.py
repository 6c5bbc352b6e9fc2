"""Fixtures: a stranger's plugin with analytic weights, as a real package on a path of its own."""

import hashlib
import shutil
import sys
from pathlib import Path

import pytest

from mdiff.core import host, registry
from mdiff.core.host import Host, Record

HERE = Path(__file__).parent

REGISTRY = """
[defaults]
toy = "toy/gauss"

[models."toy/gauss"]
system = "Gauss"
summary = "Numbers around a mean"
licence = "MIT"
source = "made up"
accepts = ["text", "negative", "duration", "input", "mask", "operator"]
[models."toy/gauss".config]
[models."toy/gauss".defaults]
steps = 6
guidance = 2.0
duration = 1.0
precision = "fp32"
sampler = "ddpm"
grid = "linear"
[[models."toy/gauss".options]]
name = "duration"
type = "float"
minimum = 0.5
maximum = 4
[[models."toy/gauss".options]]
name = "digits"
type = "int"
default = 7
minimum = 0
maximum = 9
help = "digits that are kept"
[[models."toy/gauss".options]]
name = "gain"
type = "float"
default = 1.0
[[models."toy/gauss".files]]
name = "weights.safetensors"
sha256 = "{sha256}"
size = {size}
module = "net"
[models."toy/gauss".measured]
error = 0.01

[models."toy/free"]
system = "Gauss"
summary = "Numbers around nothing"
licence = "MIT"
source = "made up"
[[models."toy/free".options]]
name = "digits"
type = "int"
default = 7
[[models."toy/free".options]]
name = "gain"
type = "float"
default = 1.0
[[models."toy/free".files]]
name = "weights.safetensors"
sha256 = "{sha256}"
size = {size}
module = "net"
"""


def write_dist(folder: Path, name: str, value: str, dist: str, version: str = "1.0") -> None:
    """The metadata that pip leaves of a distribution with one plugin."""
    info = folder / f"{dist.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[mdiff.plugins]\n{name} = {value}\n")


@pytest.fixture(scope="session")
def toy_files(tmp_path_factory) -> Path:
    """A folder as pip would fill it: the package `mdiff_toy` and its metadata."""
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("site")
    package = folder / "mdiff_toy"
    package.mkdir()
    shutil.copy(HERE / "toy" / "plugin.py", package / "__init__.py")
    for name in ("model.py", "default.toml"):
        shutil.copy(HERE / "toy" / name, package / name)
    weights = package / "weights.safetensors"
    save_file({"width": torch.tensor([0.5])}, weights)
    data = weights.read_bytes()
    text = REGISTRY.format(sha256=hashlib.sha256(data).hexdigest(), size=len(data))
    (package / "registry.toml").write_text(text)
    write_dist(folder, "toy", "mdiff_toy", "mdiff-toy")
    return folder


@pytest.fixture
def toy_site(toy_files, tmp_path_factory, monkeypatch) -> Path:
    """A copy of the toy's files on sys.path, to break at will; forgotten after the test."""
    folder = tmp_path_factory.mktemp("copy") / "site"
    shutil.copytree(toy_files, folder)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "mdiff_toy"]:
        del sys.modules[name]


@pytest.fixture
def toy(toy_site) -> Host:
    """The current host, with the toy as its only plugin."""
    only = Host([Record(name="toy", value="mdiff_toy", dist="mdiff-toy", version="1.0")])
    with host.use(only):
        yield only


@pytest.fixture
def toy_registry(toy) -> registry.Registry:
    return registry.load(toy)
