"""Checkpoints: whole or not there, whatever happens while they are written; and the state of optimizers in them."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mdiff.core import weights
from mdiff.core.errors import IntegrityError, MdiffError
from mdiff.core.training import checkpoints
from mdiff.core.training.checkpoints import flatten, newest, save, unflatten
from mdiff.core.training.optimizers import OPTIMIZERS, Optimizer, build

FACTS = {"seconds": 1.5, "recipe": "abc", "seed": 3, "versions": {"torch": "2"}}


def tensors(number: float) -> dict[str, dict[str, Tensor]]:
    return {
        "model": {"w": torch.full((3, 4), number), "n": torch.tensor(7)},
        "average-0.999": {"w": torch.full((3, 4), number + 0.5)},
        "optimizer": {},
    }


def never(line: str) -> None:
    raise AssertionError(line)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    for step in (10, 20):
        saved = save(tmp_path, step, tensors(step), FACTS, keep=3)
    found = newest(tmp_path, never)
    assert found == saved
    assert found is not None and found.step == 20 and found.facts == FACTS
    for name, wanted in tensors(20).items():
        got = found.read(name)
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[k], v) and got[k].dtype == v.dtype for k, v in wanted.items())
    assert names(found.path) == [
        "average-0.999.safetensors",
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
    ]
    with pytest.raises(IntegrityError, match="has no 'average-0.9'; it has: model, average-0.999"):
        found.read("average-0.9")


def test_tensors_are_written_however_they_lie_in_memory(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(2, 3, 2, 2)
    state = {
        "last": base.to(memory_format=torch.channels_last),
        "turned": base.flatten(1).T,
        "tied": base,
        "tied again": base,
        "part": base[0],
        "empty": torch.empty(0, 3),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    got = save(tmp_path, 1, {"model": state}, {}, keep=1).read("model")
    for name, value in state.items():
        assert torch.equal(got[name], value.detach())


def test_there_is_none_in_a_folder_without(tmp_path: Path) -> None:
    assert newest(tmp_path / "nowhere", never) is None
    (tmp_path / "notes").mkdir()
    assert newest(tmp_path, never) is None


def test_the_oldest_go_and_what_killed_processes_left(tmp_path: Path) -> None:
    left = tmp_path / ".00000005-0123456789ab"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    for step in (10, 20, 30, 40):
        save(tmp_path, step, tensors(step), FACTS, keep=2)
    assert names(tmp_path) == [".hidden", "00000030", "00000040", "notes.txt"]


# --- damage ------------------------------------------------------------------------------------------


def _lose(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def _cut(path: Path) -> None:
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:-1])


def _flip(path: Path) -> None:
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)


def _edit(field: str, value: object) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        body = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps({**body, field: value}))

    return edit


DAMAGE = {
    "a file is missing": (_lose("optimizer.safetensors"), "optimizer.safetensors cannot be read"),
    "a file is short": (_cut, r"model.safetensors has \d+ bytes and should have \d+"),
    "a bit is wrong": (_flip, r"model.safetensors has sha256 \w+... and should have"),
    "no manifest": (_lose("manifest.json"), "manifest.json cannot be read"),
    "half a manifest": (
        lambda path: (path / "manifest.json").write_text('{"schema": 1, "st'),
        "is not a manifest",
    ),
    "not an object": (lambda path: (path / "manifest.json").write_text("[1]"), "is not a manifest"),
    "not text": (lambda path: (path / "manifest.json").write_bytes(b"\xff"), "is not a manifest"),
    "another schema": (_edit("schema", 99), "has schema 99, this version reads 1"),
    "other facts": (_edit("facts", {"seconds": 0}), "manifest.json was altered"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_one_is_passed_over_with_its_reason_and_left_as_it_is(
    tmp_path: Path, kind: str
) -> None:
    save(tmp_path, 10, tensors(10), FACTS, keep=3)
    path = save(tmp_path, 20, tensors(20), FACTS, keep=3).path
    damage, why = DAMAGE[kind]
    damage(path)
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    said: list[str] = []
    found = newest(tmp_path, said.append)
    assert found is not None and found.step == 10
    (line,) = said
    assert line.startswith("passing over the checkpoint of step 20: ")
    assert pytest.raises(IntegrityError, checkpoints.verified, path).match(why)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    # a run that goes on from step 10 replaces it when it gets there, and not before
    save(tmp_path, 15, tensors(15), FACTS, keep=1)
    assert names(tmp_path) == ["00000015", "00000020"]
    save(tmp_path, 20, tensors(21), FACTS, keep=2)
    again = newest(tmp_path, never)
    assert again is not None and again.step == 20 and again.read("model")["w"][0, 0] == 21


def test_a_file_that_changes_after_it_was_found_is_refused_when_read(tmp_path: Path) -> None:
    save(tmp_path, 10, tensors(10), FACTS, keep=3)
    found = newest(tmp_path, never)
    assert found is not None
    _flip(found.path)
    with pytest.raises(IntegrityError, match="has sha256"):
        found.read("model")
    _lose("model.safetensors")(found.path)
    with pytest.raises(IntegrityError, match="cannot be read"):
        found.read("model")


# --- failures while writing --------------------------------------------------------------------------


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10, tensors(10), FACTS, keep=1)
    before = (tmp_path / "00000010" / "manifest.json").read_bytes()
    whole = weights.write

    def full(path: Path, state: dict[str, Tensor]) -> None:
        if path.name.startswith("average"):
            raise OSError(28, os.strerror(28))
        whole(path, state)

    monkeypatch.setattr(weights, "write", full)
    with pytest.raises(MdiffError) as caught:
        save(tmp_path, 20, tensors(20), FACTS, keep=1)
    assert str(caught.value) == (
        f"cannot write the checkpoint of step 20 in {tmp_path}: No space left on device; "
        "make room and go on with --resume"
    )
    assert names(tmp_path) == ["00000010"]
    assert (tmp_path / "00000010" / "manifest.json").read_bytes() == before
    assert newest(tmp_path, never) is not None


LIMITED = """
import resource, sys, torch
from pathlib import Path
from mdiff.core.errors import MdiffError
from mdiff.core.training.checkpoints import save
folder = Path(sys.argv[1])
save(folder, 10, {"model": {"w": torch.zeros(100)}}, {}, keep=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save(folder, 20, {"model": {"w": torch.zeros(100_000)}}, {}, keep=1)
except MdiffError as error:
    print(error)
"""


def test_a_file_that_the_system_cuts_off_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert said.stdout.startswith("cannot write the checkpoint of step 20 in")
    assert "File too large" in said.stdout and said.stdout.count("\n") == 1
    assert names(tmp_path) == ["00000010"]
    found = newest(tmp_path, never)
    assert found is not None and found.step == 10


WRITER = """
import sys, torch
from pathlib import Path
from mdiff.core.training.checkpoints import newest, save
folder = Path(sys.argv[1])
found = newest(folder, lambda line: sys.exit(line))
step = found.step if found else 0
print("ready", flush=True)
while True:
    step += 1
    state = {"w": torch.full((200_000,), float(step))}
    save(folder, step, {"model": state, "average": state}, {"cursor": step}, keep=2)
    print(step, flush=True)
"""


def test_killed_at_any_moment_it_loses_nothing_that_was_said_to_be_saved(tmp_path: Path) -> None:
    chance = random.Random(0)
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.05 + 0.2 * chance.random())
        process.send_signal(signal.SIGKILL)
        told = [int(line) for line in process.stdout.read().split()]
        process.wait()
        found = newest(tmp_path, never)
        assert found is not None and found.facts["cursor"] == found.step
        assert found.step >= max(told, default=0)
        assert found.read("model")["w"].unique().tolist() == [found.step]
    save(tmp_path, 10**6, {}, {}, keep=2)
    assert len(names(tmp_path)) == 2


# --- optimizers --------------------------------------------------------------------------------------


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(4, 16, 3, padding=1), nn.SiLU(), nn.Conv1d(16, 16, 1))


def train(module: nn.Module, optimizers: list[torch.optim.Optimizer], steps: range) -> None:
    for n in steps:
        x = torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(n))
        module(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        module.zero_grad()


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_go_on_bit_for_bit(tmp_path: Path, name: str) -> None:
    settings = Optimizer(name=name, rate=0.01, decayed="matrices")
    straight, first, second = net(), net(), net()
    train(straight, build(straight, settings), range(12))
    optimizers = build(first, settings)
    train(first, optimizers, range(7))
    files = {"model": first.state_dict(), "optimizer": flatten(optimizers)}
    saved = save(tmp_path, 7, files, {}, keep=1)
    second.load_state_dict(saved.read("model"))
    again = build(second, settings)
    unflatten(again, saved.read("optimizer"))
    old, new = flatten(optimizers), flatten(again)
    assert old.keys() == new.keys()
    assert all(torch.equal(old[k], new[k]) and old[k].dtype == new[k].dtype for k in old)
    train(second, again, range(7, 12))
    assert same(straight, second)


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: torch.optim.Adafactor(ps, lr=0.01),
        lambda ps: torch.optim.NAdam(ps, lr=0.01, foreach=False),
        lambda ps: torch.optim.Rprop(ps, lr=0.01),
        lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9),
    ],
)
def test_optimizers_that_keep_other_things_go_on_too(
    make: Callable[[object], torch.optim.Optimizer],
) -> None:
    straight, second = net(), net()
    one = make(straight.parameters())
    train(straight, [one], range(5))
    second.load_state_dict(straight.state_dict())
    other = make(second.parameters())
    unflatten([other], {k: v.clone() for k, v in flatten([one]).items()})
    train(straight, [one], range(5, 8))
    train(second, [other], range(5, 8))
    assert same(straight, second)


class Counting(torch.optim.SGD):
    """Keeps numbers that are no tensors."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["count"] = state.get("count", 0) + 1
                state["rate"] = 0.1 / state["count"]
                state["warm"] = state["count"] < 3


def test_numbers_keep_their_type_and_value() -> None:
    module = net()
    first = Counting(module.parameters(), lr=0.1)
    for _ in range(3):
        first.step()
    flat = flatten([first])
    assert sorted(flat)[:3] == [
        f"optimizer.0.0.{x}" for x in ("count:int", "rate:float", "warm:bool")
    ]
    second = Counting(module.parameters(), lr=0.1)
    unflatten([second], flat)
    state = second.state[next(module.parameters())]
    assert state == {"count": 3, "rate": 0.1 / 3, "warm": False}
    assert [type(v) for v in state.values()] == [int, float, bool]


def test_the_state_of_another_optimizer_is_refused() -> None:
    module = net()
    optimizers = build(module, Optimizer(name="adamw"))
    train(module, optimizers, range(1))
    flat = flatten(optimizers)
    for name in ("optimizer.1.0.step", "optimizer.0.9.step", "model.0.weight"):
        with pytest.raises(IntegrityError, match=f"unexpected '{name}'"):
            unflatten(optimizers, {**flat, name: torch.zeros(())})
    with pytest.raises(IntegrityError, match=r"exp_avg' is \(3,\) for a parameter \(16, 4, 3\)"):
        unflatten(optimizers, {**flat, "optimizer.0.0.exp_avg": torch.zeros(3)})
    lbfgs = torch.optim.LBFGS(module.parameters())
    lbfgs.state[next(module.parameters())]["old_dirs"] = [torch.zeros(2)]
    with pytest.raises(MdiffError, match="LBFGS keeps a list as 'old_dirs'"):
        flatten([lbfgs])
