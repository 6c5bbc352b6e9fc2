"""The README is true: its commands run, its Python runs, and CI runs its test command as it stands."""

import re
import runpy
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run one after another, beside a reader's own files."""
    here = tmp_path_factory.mktemp("reader")
    for name in ("my_pictures", "my_sounds"):
        (here / name).mkdir()
    for k in range(4):
        picture = Image.new("RGB", (80, 64), (60 * k, 120, 200))
        picture.save(here / "my_pictures" / f"{k}.png")
        tone = np.sin(np.arange(16_000) * 0.1 * (k + 1)).astype(np.float32)
        soundfile.write(here / "my_sounds" / f"{k}.wav", 0.3 * tone, 16_000)
    lines = [
        f'{{"file_name": "{k}.wav", "text": "a tone", "split": "held_out"}}\n' for k in range(4)
    ]
    (here / "my_sounds" / "metadata.jsonl").write_text("".join(lines))
    return here


@pytest.mark.parametrize("command", [*CONSOLE, marked("run").split("mdiff ")[-1]])
def test_commands(
    command: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    before = set(folder.rglob("*"))
    shorter = ["--steps", "2"] if command.startswith("train ") and "--minutes" in command else []
    code = cli.main([*words(command), *shorter])
    out, err = capfd.readouterr()
    assert code == 0, err
    assert out.strip()
    if command.startswith("run"):
        made = set(folder.rglob("*.*")) - before
        media = [path for path in made if path.suffix in (".wav", ".flac", ".png", ".mp4", ".gif")]
        assert media and all(path.stat().st_size > 1_000 for path in media)


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
