"""The distribution: the package list is the tree's, the wheel holds what it must and nothing else, the root is safe."""

import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def packages_in_tree() -> set[str]:
    found = {"mdiff"}
    for init in [*ROOT.glob("core/**/__init__.py"), *ROOT.glob("plugins/**/__init__.py")]:
        found.add(".".join(["mdiff", *init.parent.relative_to(ROOT).parts]))
    return found


def test_every_package_is_listed() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(config["tool"]["setuptools"]["packages"]) == packages_in_tree()


def test_wheel_contents(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns(
        "build", "*.egg-info", ".git", ".venv", "__pycache__", "outputs"
    )
    shutil.copytree(ROOT, source, ignore=ignore)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--quiet",
        "--wheel-dir",
        str(tmp_path),
    ]
    subprocess.run([*command, str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 100e6
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert all(top == "mdiff" or top.endswith(".dist-info") for top in tops), tops
    for path in [
        "registry.toml",
        "py.typed",
        "cli.py",
        "core/hooks.py",
        "plugins/audio/__init__.py",
    ]:
        assert f"mdiff/{path}" in names
    registry = tomllib.loads((ROOT / "registry.toml").read_text())
    for model in registry["models"].values():
        for file in model["files"]:
            assert f"mdiff/{file['name']}" in names
    assert not any("tests/" in name for name in names)


def test_shipped_weights_stay_small() -> None:
    files = list(ROOT.glob("plugins/*/weights/*"))
    assert sum(f.stat().st_size for f in files) < 90e6


def test_root_init_imports_under_any_name() -> None:
    """Tools that treat the root as a package load its __init__ under a foreign name."""
    assert "__version__" in runpy.run_path(str(ROOT / "__init__.py"), run_name="foreign")


def test_importing_mdiff_costs_nothing() -> None:
    code = "import sys, mdiff; print([m for m in sys.modules if m.split('.')[0] in ('torch', 'click')])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
