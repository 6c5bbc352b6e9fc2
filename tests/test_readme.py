"""The README is true: its commands run, its Python runs, and CI runs its test command as it stands."""

import re
import runpy
import subprocess
from pathlib import Path

import pytest

from mdiff import cli

README = (Path(__file__).parents[1] / "README.md").read_text()
CONSOLE = [
    line.removeprefix("$ mdiff ")
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]


def marked(name: str) -> str:
    (command,) = re.findall(rf"<!-- {name} -->\n```sh\n(.*?)\n```", README, re.DOTALL)
    return command


def words(command: str) -> list[str]:
    return [bare or quoted for quoted, bare in re.findall(r'"([^"]*)"|(\S+)', command)]


@pytest.mark.parametrize("command", [*CONSOLE, marked("run").split("mdiff ")[-1]])
def test_commands(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = cli.main(words(command))
    out, err = capfd.readouterr()
    assert code == 0, err
    assert out.strip()
    if command.startswith("run"):
        made = [path for path in tmp_path.rglob("*") if path.suffix in (".wav", ".flac")]
        assert made and all(path.stat().st_size > 10_000 for path in made)


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python(code: str, tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(code)
    runpy.run_path(str(tmp_path / "example.py"))


def test_ci_runs_the_test_command_as_it_stands(tmp_path: Path) -> None:
    """What .ci/run cuts out of the README is the README's test command, to the letter."""
    script = (Path(__file__).parents[1] / ".ci" / "run").read_text()
    (cut,) = re.findall(r"^test_command=\$\((.*)\)$", script, re.MULTILINE)
    found = subprocess.run(
        ["bash", "-c", cut],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == marked("test")
    assert 'bash -euo pipefail -c "$test_command"' in script
