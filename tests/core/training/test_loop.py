"""The loop: it learns, equals itself however it is split or broken off, and stops in words."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from platform import libc_ver
from resource import RUSAGE_SELF, getrusage
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mdiff.core.errors import MdiffError, NonFiniteError
from mdiff.core.training import checkpoints, loop
from mdiff.core.training.draws import Draws
from mdiff.core.training.log import Log
from mdiff.core.training.optimizers import Optimizer
from mdiff.core.training.recipe import Average, Batch, Budget, Recipe, Save
from mdiff.core.training.recipe import Log as LogSettings

RECIPE = Recipe(
    model="toy/net",
    part="net",
    precision="fp32",
    optimizer=Optimizer(rate=0.02, warmup=5),
    batch=Batch(size=8),
    budget=Budget(steps=40),
    save=Save(minutes=0.0, steps=10, keep=3),
    log=LogSettings(steps=5),
)
TRUTH = torch.tensor([[1.0, -2.0, 0.5]])


class Net(nn.Module):
    """A network with a matrix that Muon takes, a vector, a buffer and dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Dropout(0.1), nn.Linear(32, 16))
        self.head = nn.Linear(16, 1)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)) * self.scale


def fit(net: nn.Module) -> Callable[[Draws], Tensor]:
    def loss(draws: Draws) -> Tensor:
        x = draws.normal(3)
        return (net(x) - x @ TRUTH.T).square().mean(1)

    return loss


def run(folder: Path, recipe: Recipe = RECIPE, **more: Any) -> nn.Module:
    net = Net()
    loop.train(net, more.pop("loss", fit)(net), folder, recipe, log=Log(folder, quiet=True), **more)
    return net


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_it_learns(tmp_path: Path) -> None:
    run(tmp_path, replace(RECIPE, budget=Budget(steps=400)))
    seen = losses(tmp_path)
    assert seen[-1] < 0.1 * seen[0]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("broken", [10, 17])
def test_a_broken_run_goes_on_bit_for_bit(tmp_path: Path, optimizer: str, broken: int) -> None:
    recipe = replace(RECIPE, optimizer=replace(RECIPE.optimizer, name=optimizer))
    straight = run(tmp_path / "straight", recipe)

    class Stop(Exception):
        pass

    def breaks(net: nn.Module) -> Callable[[Draws], Tensor]:
        inner = fit(net)

        def loss(draws: Draws) -> Tensor:
            if draws.step == broken:
                raise Stop
            return inner(draws)

        return loss

    with pytest.raises(Stop):
        run(tmp_path / "broken", recipe, loss=breaks)
    resumed = run(tmp_path / "broken", recipe)
    assert same(straight, resumed)
    first, second = (
        checkpoints.newest(tmp_path / name / "checkpoints", print)
        for name in ("straight", "broken")
    )
    assert first is not None and second is not None
    for name in ("model", "average-0.999", "optimizer"):
        a, b = first.read(name), second.read(name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_micro_batches_make_the_step_of_the_whole_batch(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", RECIPE, loss=still)
    split = run(tmp_path / "split", replace(RECIPE, batch=Batch(size=8, micro=3)), loss=still)
    for a, b in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_memory_that_a_step_frees_is_not_fetched_anew(tmp_path: Path) -> None:
    run(tmp_path, replace(RECIPE, budget=Budget(steps=1)))
    size = 64 * 2**20  # above what glibc ever keeps by itself
    faults = []
    for _ in range(8):
        before = getrusage(RUSAGE_SELF).ru_minflt
        torch.ones(size, dtype=torch.uint8)
        faults.append(getrusage(RUSAGE_SELF).ru_minflt - before)
    assert sum(faults[4:]) < 100, faults  # the first ones may fill what is kept


def test_recomputing_changes_no_gradient(tmp_path: Path) -> None:
    assert same(run(tmp_path / "a"), run(tmp_path / "b", replace(RECIPE, checkpointing=True)))


def test_the_average_is_the_closed_form(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    def watched(net: Any) -> Callable[[Draws], Tensor]:
        inner = fit(net)

        def loss(draws: Draws) -> Tensor:
            seen.append(net.head.weight.detach().double())
            return inner(draws)

        return loss

    recipe = replace(RECIPE, average=Average(decays=(0.9, 0.999)))
    net: Any = run(tmp_path, recipe, loss=watched)
    kept = checkpoints.newest(tmp_path / "checkpoints", print)
    assert kept is not None
    for decay in (0.9, 0.999):
        expected = seen[0]
        for n, weight in enumerate([*seen[1:], net.head.weight.detach().double()]):
            keep = min(decay, (1 + n) / (10 + n))
            expected = keep * expected + (1 - keep) * weight
        found = kept.read(f"average-{decay:g}")["head.weight"]
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


def test_a_loss_that_is_not_a_number_stops_the_run_and_spares_the_checkpoint(
    tmp_path: Path,
) -> None:
    def poisoned(net: nn.Module) -> Callable[[Draws], Tensor]:
        inner = fit(net)
        return lambda draws: inner(draws) * (float("nan") if draws.step == 22 else 1.0)

    with pytest.raises(
        NonFiniteError, match="the loss is nan at step 25; the checkpoint of step 20"
    ):
        run(tmp_path, loss=poisoned)
    kept = checkpoints.newest(tmp_path / "checkpoints", print)
    assert kept is not None and kept.step == 20
    assert all(bool(v.isfinite().all()) for v in kept.read("model").values())


def test_an_interrupt_ends_the_step_and_keeps_it(tmp_path: Path) -> None:
    def interrupted(net: nn.Module) -> Callable[[Draws], Tensor]:
        inner = fit(net)

        def loss(draws: Draws) -> Tensor:
            if draws.step == 13:
                signal.raise_signal(signal.SIGTERM)
            return inner(draws)

        return loss

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, loss=interrupted)
    assert signal.getsignal(signal.SIGTERM) is before
    kept = checkpoints.newest(tmp_path / "checkpoints", print)
    assert kept is not None and kept.step == 14
    assert same(run(tmp_path), run(tmp_path / "straight"))


@pytest.mark.parametrize("launched", [False, True])
def test_a_second_signal_ends_at_once_but_where_a_launcher_repeats_the_first(
    launched: bool,
) -> None:
    def twice() -> bool:
        with loop._stopping(launched) as stopped:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            return stopped()

    if launched:
        assert twice()
    else:
        pytest.raises(KeyboardInterrupt, twice)


def test_going_on_says_what_there_is_to_go_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path)
    loop.train(net := Net(), fit(net), tmp_path, RECIPE, log=Log(tmp_path))
    said = capsys.readouterr().err
    assert said == (
        "going on from step 40 (0.0 minutes); the budget is used up: a larger --steps or --minutes goes on\n"
    )
    for manifest in tmp_path.glob("checkpoints/*/manifest.json"):
        manifest.write_text("x")
    loop.train(net := Net(), fit(net), tmp_path, RECIPE, log=Log(tmp_path))
    assert "no checkpoint is whole: beginning anew" in capsys.readouterr().err


def test_it_runs_in_a_thread(tmp_path: Path) -> None:
    thread = threading.Thread(target=run, args=(tmp_path,))
    thread.start()
    thread.join()
    assert checkpoints.newest(tmp_path / "checkpoints", print) is not None


def test_frozen_parameters_stay(tmp_path: Path) -> None:
    recipe = replace(RECIPE, optimizer=replace(RECIPE.optimizer, freeze=("body",)))
    net: Any = run(tmp_path, recipe)
    first: Any = Net()
    assert torch.equal(net.body[0].weight, first.body[0].weight)
    assert not torch.equal(net.head.weight, first.head.weight)


SCRIPT = """
import os
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_loop
test_loop.several(Path(sys.argv[1]))
os._exit(0)  # all is written; torch sometimes aborts while it takes down the threads of a group
"""


def still(net: nn.Module) -> Callable[[Draws], Tensor]:
    """The loss without dropout, whose masks are those of a share of the batch."""
    net.body[2].p = 0.0  # type: ignore[index,union-attr]
    return fit(net)


class Sharded:
    """Processes that share the parameters out among them (FSDP2), as accelerate's configuration may say."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def prepare(self, objective: Any) -> Any:
        mesh = init_device_mesh("cpu", (self.num_processes,))
        fully_shard(objective.module.body, mesh=mesh)
        return fully_shard(objective, mesh=mesh)

    def no_sync(self, objective: nn.Module) -> Any:
        return nullcontext()


def several(folder: Path) -> None:
    """What each of several processes runs: copies of the network, then shares of it, then those broken off."""
    every_step = replace(RECIPE, log=LogSettings(steps=1))
    run(folder / "copies", every_step, loss=still)
    on = Sharded(loop.accelerator())
    run(folder / "shares", every_step, loss=still, on=on)
    recipe = replace(every_step, optimizer=replace(RECIPE.optimizer, schedule="constant"))
    run(folder / "straight", recipe, loss=still, on=on)
    run(folder / "broken", replace(recipe, budget=Budget(steps=25)), loss=still, on=on)
    run(folder / "broken", recipe, loss=still, on=on)
    on.inner.end_training()


def test_several_processes_follow_the_curve_of_one(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "--master-port", str(port), str(script), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-10_000:]
    run(tmp_path / "one", replace(RECIPE, log=LogSettings(steps=1)), loss=still)
    one = torch.tensor(losses(tmp_path / "one"))
    assert len(one) == 40
    for name in ("copies", "shares"):
        found = torch.tensor(losses(tmp_path / name))
        torch.testing.assert_close(found, one, rtol=1e-3, atol=1e-5)
    straight, resumed = (
        checkpoints.newest(tmp_path / name / "checkpoints", print)
        for name in ("straight", "broken")
    )
    assert straight is not None and resumed is not None and straight.step == resumed.step == 40
    for name in ("model", "average-0.999", "optimizer"):
        a, b = straight.read(name), resumed.read(name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_batch_that_does_not_split_is_refused(tmp_path: Path) -> None:
    class Three:
        num_processes, process_index = 3, 0

    with pytest.raises(MdiffError, match=r"a batch of 8 does not split over 3 .*batch.size=6"):
        loop._shares(RECIPE, Three())  # type: ignore[arg-type]


def test_one_process_trains_in_one_precision_after_the_other(tmp_path: Path) -> None:
    full = run(tmp_path / "fp32")
    half = run(tmp_path / "bf16", replace(RECIPE, precision="bf16"))
    assert not same(full, half)
    for a, b in zip(full.parameters(), half.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.1)
    assert all(p.dtype is torch.float32 for p in half.parameters())
