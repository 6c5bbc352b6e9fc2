"""Clips from the command line, of a tiny random network: long ones, and whatever goes wrong in one line."""

import hashlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile
import tomli_w
import torch
from PIL import Image
from safetensors.torch import save_file

from mdiff.cli import main
from mdiff.core import looking, registry
from mdiff.plugins.video import ffmpeg, io, mdiff_build

CONFIG: dict[str, Any] = {
    "size": 8,
    "frames": 4,
    "fps": 8,
    "predicts": "v",
    "schedule": {"name": "cosine_betas"},
    "unet": {
        "axes": 2,
        "in_channels": 3,
        "out_channels": 3,
        "channels": 8,
        "groups": 4,
        "multipliers": [1],
        "blocks": 1,
        "frame_heads": 2,
        "frame_levels": [0],
    },
}
ENTRY: dict[str, Any] = {
    "system": "Video Diffusion Models",
    "summary": "made up",
    "licence": "made up",
    "source": "made up",
    "accepts": ["duration", "input", "operator"],
    "defaults": {"steps": 2, "precision": "fp32", "sampler": "ddpm", "grid": "trailing"},
    "options": [
        {"name": "frames", "type": "int", "default": 4, "minimum": 1, "maximum": 100},
        {"name": "reconstruction", "type": "float", "default": 2.0, "minimum": 0.0},
        {"name": "overlap", "type": "int", "default": 2, "minimum": 1, "maximum": 3},
    ],
}

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """run(...) -> exit code, stdout and stderr of `mdiff run` with such a model, in an empty folder."""
    at, here = tmp_path / "model", tmp_path / "here"
    at.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    entry = ENTRY | {"config": CONFIG}
    card = registry.card_of(registry.Checker("test"), "video/tiny", entry, at)
    net = mdiff_build(card, "cpu", torch.float32).modules["unet"]
    draws = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=draws)
    save_file(net.state_dict(), at / "unet.safetensors")
    data = (at / "unet.safetensors").read_bytes()
    file = {"name": "unet.safetensors", "module": "unet", "size": len(data)}
    file["sha256"] = hashlib.sha256(data).hexdigest()
    (at / "registry.toml").write_text(
        tomli_w.dumps({"models": {"video/tiny": entry | {"files": [file]}}})
    )

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(["run", str(at), "--seed", "3", *arguments])
        return (code, *capsys.readouterr())

    return run


def files() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


def test_a_long_clip_and_how_it_came_about(run: Run) -> None:
    asked = ("-o", "frames=9", "--steps", "3", "--trajectory", "strip", "--preview", "now.png")
    code, _, err = run(*asked, "--out", "a.zip", "--json")
    assert code == 0, err
    clip = io.read(Path("a.zip"))
    assert clip["video"].shape == (3, 9, 8, 8) and clip["fps"] == 8
    assert files() == ["a.steps.png", "a.zip", "a.zip.json", "now.png"]
    # ten of the twelve steps of its four blocks
    with Image.open("a.steps.png") as strip:
        shown = (strip.width - 6) // (looking.fitted(io.thumbnail(clip), 256).width + 6)
        assert shown == 10
    before = Path("a.zip").read_bytes()
    assert main(["run", "--again", "a.zip", "--out", "b.zip"]) == 0
    assert Path("b.zip").read_bytes() == before
    code, _, err = run("--duration", "1.125", "--steps", "3", "--out", "c.zip")
    assert code == 0 and torch.equal(io.read(Path("c.zip"))["video"], clip["video"])


def test_a_clip_goes_on_from_a_file(run: Run) -> None:
    io.write(Path("start.zip"), {"video": torch.rand(3, 5, 8, 8), "fps": 8}, {}, {})
    go_on = ("--input", "start.zip", "--operator", "extend 0:6", "-o", "frames=10")
    code, _, err = run(*go_on, "--out", "a.zip")
    assert code == 0, err
    made, given = (io.read(Path(name))["video"] for name in ("a.zip", "start.zip"))
    assert made.shape == (3, 10, 8, 8) and torch.equal(made[:, :4], given[:, 1:])
    request = json.loads(Path("a.zip.json").read_text())["request"]
    assert request["options"] == {"frames": 10, "reconstruction": 2.0, "overlap": 2}


def wrong_files() -> None:
    """Files that are no clips."""
    program = ffmpeg.program()
    grey = [program, "-loglevel", "error", "-f", "lavfi", "-i", "color=s=16x16:r=8"]
    for name, more in {
        "zero.mp4": (),
        "none.mp4": ("-movflags", "frag_keyframe+empty_moov"),
    }.items():
        subprocess.run([*grey, "-frames:v", "0", *more, name], check=True)
    Path("zero.gif").write_bytes(b"GIF89a\x10\x00\x10\x00\x00\x00\x00;")
    Path("empty.mp4").write_bytes(b"")
    Image.new("RGB", (8, 8)).save("still.png")
    soundfile.write("sound.wav", torch.zeros(1000).numpy(), 16_000)
    io.write(Path("two.zip"), {"video": torch.rand(3, 2, 8, 8), "fps": 8}, {}, {})


WRONG: list[tuple[tuple[str, ...], int, str]] = [
    (("--input", "zero.mp4"), 2, "zero.mp4 holds no moving picture: give a clip"),
    (("--input", "none.mp4"), 2, "none.mp4 holds no frame"),
    (("--input", "zero.gif"), 4, "zero.gif is damaged"),
    (("--input", "empty.mp4"), 2, "empty.mp4 is not a clip that can be read"),
    (("--input", "still.png"), 2, "still.png is a still picture: give a clip"),
    (("--input", "sound.wav"), 2, "sound.wav holds sound and no moving picture: give a clip"),
    (("--input", "gone.mp4"), 3, "gone.mp4"),
    (("--input", "two.zip"), 2, "has 2 frames at 8 a second, and 4 are asked of it"),
    (("--input", "two.zip", "--operator", "extend 0:9"), 2, "leaves no room"),
    (("--input", "two.zip", "--operator", "end"), 2, "did you mean 'ends'?"),
    (("-o", "frames=1000"), 2, "option frames should be at most 100, it is 1000"),
    (("-o", "frames=0"), 2, "option frames should be at least 1, it is 0"),
    (("-o", "overlap=4"), 2, "option overlap should be at most 3, it is 4"),
    (("--duration", "0.05"), 2, "a clip has at least one frame"),
]


@pytest.mark.parametrize(("arguments", "code", "words"), WRONG, ids=[" ".join(w[0]) for w in WRONG])
def test_what_is_wrong_is_one_line_and_no_file(
    run: Run, arguments: tuple[str, ...], code: int, words: str
) -> None:
    wrong_files()
    before = files()
    got, out, err = run(*arguments)
    said = [line for line in err.splitlines() if line.startswith("mdiff: ")]
    assert (got, out) == (code, "") and len(said) == 1 and words in said[0], err
    assert err.splitlines()[-1] == said[0] and "frame=" not in said[0]
    assert files() == before


def test_an_option_that_there_is_not_names_the_nearest(run: Run) -> None:
    code, _, err = run("-o", "frame=64")
    assert code == 2 and "has no option 'frame'; did you mean 'frames'?" in err


def test_an_encoder_that_fails_midway_leaves_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "fake"
    script = "open(sys.argv[-1][5:], 'w').write('half'); sys.stdin.buffer.read(100)"
    ending = "print('[x @ 0x1] disk full', file=sys.stderr); sys.exit(1)"
    program.write_text(f"#!{sys.executable}\nimport sys\n{script}\n{ending}\n")
    os.chmod(program, program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(ffmpeg, "program", lambda: str(program))
    code, out, err = run("--out", "a.mp4")
    assert (code, out, files()) == (1, "", [])
    assert err.splitlines()[-1].startswith("mdiff: cannot write") and "disk full" in err
