"""Optimizers and learning rates: what each schedule gives, what decays and what is frozen, and that a kernel trained by
an optimizer of matrices sees the gradient as it is when the step is taken: accumulated, clipped, averaged.
"""

import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mdiff.core.errors import UsageError
from mdiff.core.training.optimizers import (
    OPTIMIZERS,
    SCHEDULES,
    Optimizer,
    build,
    orthogonalised,
    rate_at,
    set_rate,
)


def net(axes: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    return nn.Sequential(
        conv(4, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU(), conv(16, 16, 3, padding=1)
    )


def data(axes: int = 2, count: int = 8) -> Tensor:
    shape = (count, 4, *(4,) * axes)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def loss(module: nn.Module, x: Tensor) -> Tensor:
    return (module(x) - x.repeat(1, 4, *(1,) * (x.ndim - 2)).roll(1, -1)).square().mean()


def step(module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.step()
    module.zero_grad()


# --- learning rates ----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_rises_to_its_rate_and_falls_no_further_than_its_floor(
    schedule: str,
) -> None:
    settings = Optimizer(rate=0.5, warmup=10, schedule=schedule, floor=0.1, hold=50)
    rates = [rate_at(settings, n, n / 9999) for n in range(10_000)]
    assert rates[0] == pytest.approx(0.05)
    assert rates[9] == pytest.approx(0.5, rel=1e-3)
    assert all(a >= b for a, b in pairwise(rates[9:]))
    assert min(rates[9:]) >= 0.05 - 1e-12
    if schedule != "constant":
        assert rates[-1] == pytest.approx(0.05)


def test_schedules_are_their_formulas() -> None:
    def at(schedule: str, n: int, progress: float) -> float:
        return rate_at(
            Optimizer(rate=1.0, warmup=0, schedule=schedule, floor=0.2, hold=100), n, progress
        )

    assert at("cosine", 9, 0.25) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert at("linear", 9, 0.25) == pytest.approx(1 - 0.8 * 0.25)
    assert at("constant", 9, 0.25) == 1.0
    assert at("invsqrt", 100, 0.25) == 1.0
    assert at("invsqrt", 400, 0.25) == pytest.approx(0.5)


def test_set_rate_reaches_every_group() -> None:
    optimizers = build(net(), Optimizer(name="muon", decayed="matrices"))
    set_rate(optimizers, 0.125)
    assert [g["lr"] for o in optimizers for g in o.param_groups] == [0.125] * 2


# --- settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"name": "adamv"}, "unknown optimizer 'adamv'; did you mean 'adam"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin'; did you mean 'cosine'"),
        ({"rate": 0.0}, "rate is 0.0, it has to be above 0"),
        ({"betas": (0.9, 1.0)}, "betas is"),
        ({"clip": -1.0}, "clip is -1.0, it has to be 0 or more"),
        ({"decayed": "none"}, "unknown value of decayed 'none'"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Optimizer(**wrong)  # type: ignore[arg-type]


def test_what_is_frozen_stays(tmp_path: Path) -> None:
    module = net()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    optimizers = build(module, Optimizer(freeze=("0.", "1.bias"), rate=0.01))
    loss(module, data()).backward()
    step(module, optimizers)
    moved = {k for k, v in module.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"1.weight", "3.weight", "3.bias"}


def test_freezing_what_is_not_there_or_all_is_refused() -> None:
    with pytest.raises(UsageError, match="no parameter begins with 'down.'"):
        build(net(), Optimizer(freeze=("down.",)))
    with pytest.raises(UsageError, match="no parameter is left to train"):
        build(net(), Optimizer(freeze=("",)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_vectors_may_be_spared_from_weight_decay(name: str) -> None:
    decays: dict[str, list[tuple[bool, float]]] = {}
    for decayed in ("all", "matrices"):
        module = net()
        for optimizer in build(module, Optimizer(name=name, weight_decay=0.1, decayed=decayed)):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    decays.setdefault(decayed, []).append(
                        (parameter.ndim > 1, group["weight_decay"])
                    )
    assert {decay for _, decay in decays["all"]} == {0.1}
    assert set(decays["matrices"]) == {(True, 0.1), (False, 0.0)}


# --- steps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns(name: str, axes: int) -> None:
    module = net(axes)
    optimizers = build(module, Optimizer(name=name, rate=0.01, weight_decay=0.0))
    first = loss(module, data(axes)).item()
    for _ in range(60):
        loss(module, data(axes)).backward()
        step(module, optimizers)
    assert loss(module, data(axes)).item() < 0.3 * first


def test_a_fused_step_is_a_plain_step() -> None:
    """One call for all parameters and one parameter after another differ by rounding alone."""
    ours, plain = net(), net()
    settings = Optimizer(rate=0.01)
    optimizers = build(ours, settings)
    reference = torch.optim.AdamW(
        plain.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=0.01, foreach=False
    )
    for _ in range(5):
        for module in (ours, plain):
            loss(module, data()).backward()
        step(ours, optimizers)
        step(plain, [reference])
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def muon_by_hand(kernels: list[Tensor], grads: list[list[Tensor]], rate: float) -> list[Tensor]:
    """torch's own Muon on matrices with the gradients of each step: ours, but for its bf16."""
    matrices = [nn.Parameter(k.detach().clone().flatten(1)) for k in kernels]
    muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for of_step in grads:
        for matrix, grad in zip(matrices, of_step, strict=True):
            matrix.grad = grad.flatten(1)
        muon.step()
    return [m.detach().view_as(k) for m, k in zip(matrices, kernels, strict=True)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_kernels_see_accumulated_and_clipped_gradients(layout: torch.memory_format) -> None:
    module = net()
    kernels = [p for p in module.parameters() if p.ndim > 1]
    for kernel in kernels:
        kernel.data = kernel.data.contiguous(memory_format=layout)
    begin = [k.detach().clone() for k in kernels]
    optimizers = build(module, Optimizer(name="muon", rate=0.05))
    seen: list[list[Tensor]] = []
    for _ in range(3):
        for part in data().chunk(4):  # micro-batches
            (loss(module, part) / 4).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1e-9)
        seen.append([k.grad.clone() for k in kernels if k.grad is not None])
        # Muon scales gradients away, but not ones of about its eps: a clip that did not reach it would show
        step(module, optimizers)
    for ours, by_hand in zip(kernels, muon_by_hand(begin, seen, 0.05), strict=True):
        torch.testing.assert_close(ours.detach(), by_hand, rtol=0, atol=2e-4)
    unclipped = [[g * 1e9 for g in of_step] for of_step in seen]
    other = muon_by_hand(begin, unclipped, 0.05)
    assert (other[1] - kernels[1]).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(16, 16), (16, 300), (200, 32)])
def test_what_is_orthogonalised_keeps_its_directions_and_loses_its_sizes(
    shape: tuple[int, int],
) -> None:
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrix = left @ torch.diag(torch.logspace(0, -1.5, min(shape))) @ right
    inner = left.T @ orthogonalised(matrix) @ right.T
    sizes = inner.diagonal()
    assert 0.6 < sizes.min() and sizes.max() < 1.25
    assert (inner - torch.diag(sizes)).abs().max() < 1e-4


def test_a_kernel_without_a_gradient_is_left_alone() -> None:
    module = net()
    optimizers = build(module, Optimizer(name="muon", rate=0.05))
    loss(module, data()).backward()
    step(module, optimizers)
    last = module.get_parameter("3.weight")
    before = last.detach().clone()
    module[:1](data()).square().mean().backward()
    step(module, optimizers)
    assert torch.equal(last, before)


PROCESS = """
import sys
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from mdiff.core.training.averages import Averages, profiles
from mdiff.core.training.checkpoints import flatten, unflatten
from mdiff.core.training.optimizers import Optimizer, build

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)

def whole(state):
    return {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state.items()}

def train(wrap, share):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv1d(4, 16, 3, padding=1), nn.SiLU(), nn.Conv1d(16, 16, 3, padding=1))
    wrapped = wrap(module)
    settings = Optimizer(name="muon", rate=0.01)
    optimizers = build(module, settings)
    averages = Averages(module, profiles([0.5], []))
    x = torch.randn(8, 4, 6, generator=torch.Generator().manual_seed(1))[share]
    for n in range(6):
        if n == 3:  # what is saved is whole, and comes back to where it was
            state = whole(flatten(optimizers))
            optimizers = build(module, settings)
            unflatten(optimizers, state)
            averages.load("0.5", whole(averages.state("0.5")))
        (wrapped(x) - x.repeat(1, 4, 1)).square().mean().backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.01)
        for optimizer in optimizers:
            optimizer.step()
        module.zero_grad()
        averages.update(n + 1)
    return whole(averages.state("0.5"))

mine = slice(4 * rank, 4 * rank + 4)
alone = train(lambda m: m, slice(None))
ddp = train(nn.parallel.DistributedDataParallel, mine)
mesh = init_device_mesh("cpu", (2,))
fsdp = train(lambda m: fully_shard(m, mesh=mesh), mine)
begin = train(lambda m: m, slice(0, 4))
for name, got in {"ddp": ddp, "fsdp": fsdp}.items():
    far = max((alone[k] - begin[k]).abs().max() for k in alone)
    off = max((alone[k] - got[k]).abs().max() for k in alone)
    print(name, float(off), float(far))
    assert off < 1e-4 < 5e-3 < far, (name, off, far)
dist.destroy_process_group()
"""


def test_two_processes_with_half_the_batch_each_take_the_step_of_one(tmp_path: Path) -> None:
    """By DDP and by FSDP, within what orthogonalising makes of rounding; half the data alone is further off."""
    command = [sys.executable, "-c", PROCESS]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
