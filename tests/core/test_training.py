"""The training loop: it learns, its average is the closed form, it goes on bit for bit, it stops at a NaN."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mdiff.core.errors import MdiffError
from mdiff.core.training import OPTIMIZERS, Budget, averaged, begin, ema_decay, train

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


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(16, 16, 3, padding=1), nn.SiLU(), nn.Conv1d(16, 2, 3, padding=1))


def denoise(net: nn.Module) -> object:
    def loss(step: int, generator: torch.Generator) -> Tensor:
        x = torch.randn(8, 16, 12, generator=generator)
        return (net(x) - x[:, :2].roll(1, -1)).square().mean()

    return loss


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_learns_and_goes_on_bit_for_bit(tmp_path: Path, optimizer: str) -> None:
    def go(folder: str, steps: int) -> nn.Module:
        net = small()
        budget = Budget(
            steps=120, rate=0.01, precision="fp32", save_every=10, warmup=5, optimizer=optimizer
        )
        preview = (lambda step: (_ for _ in ()).throw(KeyboardInterrupt)) if steps < 120 else None
        train(net, denoise(net), tmp_path / folder, budget, preview=preview, **QUIET)  # type: ignore[arg-type]
        return net

    straight = go("straight", 120)
    with pytest.raises(KeyboardInterrupt):
        go("broken", 10)
    resumed = go("broken", 120)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert denoise(straight)(0, torch.Generator().manual_seed(1)) < 0.3  # type: ignore[operator]


def test_muon_turns_a_kernel_as_an_orthogonal_matrix() -> None:
    """After one step the kernel has moved by a matrix whose singular values are about equal."""
    net = small()
    before = net[0].weight.detach().clone()
    budget = Budget(steps=1, rate=0.01, warmup=1, weight_decay=0.0, precision="fp32")
    optimizers = OPTIMIZERS["muon"](net, budget)
    net(
        torch.randn(8, 16, 12, generator=torch.Generator().manual_seed(0))
    ).square().sum().backward()
    for one in optimizers:
        one.step()
    singular = torch.linalg.svdvals((net[0].weight - before).flatten(1))
    assert singular.min() > 0.5 * singular.max()


def test_a_run_begins_from_the_weights_that_fit_and_leaves_the_frozen(tmp_path: Path) -> None:
    net, given = small(), {k: v + 1 for k, v in small().state_dict().items()}
    given["2.weight"] = torch.zeros(3)  # of another shape
    begin(tmp_path, net, given)
    start = averaged(tmp_path)
    assert torch.equal(start["0.weight"], given["0.weight"])
    assert torch.equal(start["2.weight"], net.state_dict()["2.weight"])
    begin(tmp_path, net, {})  # a run that is there stays
    budget = Budget(steps=10, rate=0.01, precision="fp32", freeze=("0.",))
    train(net, denoise(net), tmp_path, budget, **QUIET)  # type: ignore[arg-type]
    assert torch.equal(net[0].weight, given["0.weight"])
    assert not torch.equal(net[2].weight, start["2.weight"])
