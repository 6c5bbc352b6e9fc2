"""The training loop: it learns, its average is the closed form, it goes on bit for bit, it stops at a NaN."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mdiff.core.errors import MdiffError
from mdiff.core.training import Budget, averaged, ema_decay, train

QUIET: dict[str, object] = {"say": lambda line: None}


def line() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def fit(net: nn.Module) -> object:
    truth = torch.tensor([[1.0, -2.0, 0.5]])

    def loss(step: int, generator: torch.Generator) -> Tensor:
        x = torch.randn(16, 3, generator=generator)
        return (net(x) - x @ truth.T).square().mean()

    return loss


def run(folder: Path, steps: int, total: int | None = None, **options: object) -> nn.Linear:
    net = line()
    budget = Budget(steps=steps, rate=0.05, precision="fp32", save_every=10, warmup=5, **options)  # type: ignore[arg-type]
    train(net, fit(net), folder, budget, **QUIET)  # type: ignore[arg-type]
    return net


def test_it_learns(tmp_path: Path) -> None:
    net = run(tmp_path, 300)
    torch.testing.assert_close(net.weight, torch.tensor([[1.0, -2.0, 0.5]]), atol=0.02, rtol=0)


def test_a_run_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = run(tmp_path / "straight", 40)

    class Stop(Exception):
        pass

    def stop(step: int) -> None:
        if step == 20:
            raise Stop

    net = line()
    budget = Budget(steps=40, rate=0.05, precision="fp32", save_every=10, warmup=5)
    with pytest.raises(Stop):
        train(net, fit(net), tmp_path / "broken", budget, preview=stop, **QUIET)  # type: ignore[arg-type]
    resumed = run(tmp_path / "broken", 40)
    assert torch.equal(straight.weight, resumed.weight)
    first, second = averaged(tmp_path / "straight"), averaged(tmp_path / "broken")
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_average_is_the_closed_form(tmp_path: Path) -> None:
    seen: list[Tensor] = []
    net = line()
    expected = net.weight.detach().clone()
    loss = fit(net)

    def watched(step: int, generator: torch.Generator) -> Tensor:
        if step:
            seen.append(net.weight.detach().clone())
        return loss(step, generator)  # type: ignore[operator]

    train(net, watched, tmp_path, Budget(steps=30, rate=0.05, precision="fp32"), **QUIET)  # type: ignore[arg-type]
    for step, weight in enumerate([*seen, net.weight.detach()]):
        keep = ema_decay(0.999, step)
        expected = keep * expected + (1 - keep) * weight
    torch.testing.assert_close(averaged(tmp_path)["weight"], expected)


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path: Path) -> None:
    net = line()

    def loss(step: int, generator: torch.Generator) -> Tensor:
        return net.weight.sum() * float("nan")

    with pytest.raises(MdiffError, match="the loss is nan at step 50"):
        train(net, loss, tmp_path, Budget(steps=60, precision="fp32"), **QUIET)  # type: ignore[arg-type]
