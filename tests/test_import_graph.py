"""Who may import whom: the core no plugin, a plugin no other, and what lists and helps no torch."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for folder in (ROOT / "core", ROOT / "plugins") for path in folder.rglob("*.py")
) + [ROOT / name for name in ("__init__.py", "__main__.py", "cli.py")]
LIGHT = [
    ROOT / "core" / f"{name}.py"
    for name in ["data", "errors", "hooks", "host", "packages", "registry", "request", "record"]
]
LIGHT += [ROOT / "cli.py", ROOT / "__main__.py", ROOT / "__init__.py"]
LIGHT += sorted((ROOT / "plugins").glob("*/__init__.py")) + [ROOT / "plugins" / "__init__.py"]
HEAVY = {"torch", "torchaudio", "torchvision", "safetensors", "numpy", "scipy", "PIL", "soundfile"}
HEAVY |= {"tokenizers", "imageio_ffmpeg", "rich"}


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path, *, at_start: bool = False) -> Iterator[str]:
    """The modules that a file imports; with `at_start` only those that importing it imports."""
    tree = ast.parse(path.read_text())
    for node in _at_start(tree.body) if at_start else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{names(path)}: imports are absolute"
            yield str(node.module)
            # `from mdiff.core import pipeline` imports mdiff.core.pipeline
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _at_start(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """Statements that run on import: not those in functions, nor under `if TYPE_CHECKING`."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        for part in ("body", "orelse", "finalbody", "handlers"):
            yield from _at_start(getattr(node, part, []))


def module_file(name: str) -> Path | None:
    base = ROOT.joinpath(*name.split(".")[1:])
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


def reached(path: Path) -> set[str]:
    """All that importing a file imports, through files of ours."""
    seen: set[str] = set()
    todo = [path]
    while todo:
        for name in imports(todo.pop(), at_start=True):
            if name not in seen:
                seen.add(name)
                file = module_file(name) if name.startswith("mdiff.") else None
                todo += [file] if file is not None else []
    return seen


@pytest.mark.parametrize("path", LIGHT, ids=names)
def test_what_lists_and_helps_imports_nothing_heavy(path):
    assert not {name.split(".")[0] for name in reached(path)} & HEAVY


@pytest.mark.parametrize("path", [p for p in SOURCES if p.is_relative_to(ROOT / "core")], ids=names)
def test_the_core_imports_no_plugin_and_no_command_line(path):
    for name in imports(path):
        assert not name.startswith(("mdiff.plugins", "mdiff.cli")), name


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.is_relative_to(ROOT / "plugins")], ids=names
)
def test_a_plugin_imports_the_core_and_itself(path):
    own = f"mdiff.plugins.{path.relative_to(ROOT / 'plugins').parts[0]}"
    for name in imports(path):
        ours = name.split(".")[0] == "mdiff"
        assert (
            not ours or name in ("mdiff", "mdiff.core") or name.startswith(("mdiff.core.", own))
        ), name


ORDER = ["schedules", "grids", "noise", "denoiser", "samplers", "guidance", "sampling", "pipeline"]


@pytest.mark.parametrize("path", [p for p in SOURCES if p.is_relative_to(ROOT / "core")], ids=names)
def test_the_core_imports_run_one_way(path):
    own = path.relative_to(ROOT / "core").parts[0].removesuffix(".py")
    if own not in ORDER:
        return
    later = ORDER[ORDER.index(own) + 1 :]
    for name in imports(path):
        if name.startswith("mdiff.core."):
            assert name.split(".")[2] not in later, name


FORBIDDEN = {"pickle", "dill", "joblib", "cloudpickle", "marshal", "shelve"}
CALLS = {"torch.load", "torch.hub.load", "eval", "exec", "compile"}


@pytest.mark.parametrize("path", SOURCES, ids=names)
def test_no_file_can_execute_code_from_data(path):
    assert not {name.split(".")[0] for name in imports(path)} & FORBIDDEN
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            assert call not in CALLS, f"{names(path)}:{node.lineno}: {call}"
            for keyword in node.keywords:
                allowed = ast.unparse(keyword.value) != "False"
                assert not (keyword.arg == "allow_pickle" and allowed), f"{names(path)}: {call}"


@pytest.mark.parametrize("path", SOURCES, ids=names)
def test_every_module_says_what_it_holds(path):
    tree = ast.parse(path.read_text())
    assert not tree.body or ast.get_docstring(tree), names(path)
