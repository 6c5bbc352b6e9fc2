"""The training loop: a loss, batches drawn by (seed, step), AdamW or Muon, an exponential moving average, checkpoints.

A run is a folder: `log.jsonl` and `checkpoint.safetensors`, which holds network, average, optimizer and step, and is
replaced whole. A run that finds a checkpoint goes on from it.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mdiff.core.errors import MdiffError
from mdiff.core.names import pick
from mdiff.core.record import atomic_write

Loss = Callable[[int, torch.Generator], Tensor]
"""loss(step, generator) -> scalar; all randomness of a step comes from its generator."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """When training ends and how it is tuned; `steps` and `minutes` are both upper bounds.

    Parameters whose names begin with one of `freeze` stay as they are. `optimizer` is a row of `OPTIMIZERS`.
    """

    steps: int = 10**9
    minutes: float = math.inf
    rate: float = 3e-4
    warmup: int = 200
    decay: float = 0.999
    weight_decay: float = 0.01
    clip: float = 1.0
    precision: str = "bf16"
    seed: int = 0
    save_every: int = 250
    freeze: tuple[str, ...] = ()
    optimizer: str = "adamw"

    def progress(self, step: int, seconds: float) -> float:
        """Share of the budget that is used up, 0 to 1."""
        return min(1.0, max(step / self.steps, seconds / (60 * self.minutes)))

    def rate_at(self, step: int, progress: float) -> float:
        """Learning rate: linear warm-up, then half a cosine down to 2 % of the peak."""
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
        return self.rate * min(1.0, (step + 1) / self.warmup) * cosine


def ema_decay(decay: float, step: int) -> float:
    """Decay of the average at a step, ramped so that early weights are forgotten: min(decay, (1 + n) / (10 + n))."""
    return min(decay, (1 + step) / (10 + step))


def _adamw(parameters: Iterable[Tensor], budget: Budget) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters, lr=budget.rate, betas=(0.9, 0.99), weight_decay=budget.weight_decay
    )


def _all_adamw(module: nn.Module, budget: Budget) -> list[torch.optim.Optimizer]:
    return [_adamw(module.parameters(), budget)]


def _muon(module: nn.Module, budget: Budget) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for matrices and kernels, AdamW for the rest.

    Muon takes matrices: a kernel (O, I, ...) is given to it as the matrix (O, I ...) in the same memory.
    """
    large = [p for p in module.parameters() if p.ndim > 1 and min(len(p), p[0].numel()) >= 16]
    flat = [nn.Parameter(p.detach().flatten(1)) for p in large]
    for whole, matrix in zip(large, flat, strict=True):
        whole.register_post_accumulate_grad_hook(partial(_hand_over, matrix))
    others = {id(p) for p in large}
    muon = torch.optim.Muon(
        flat,
        lr=budget.rate,
        weight_decay=budget.weight_decay,
        adjust_lr_fn="match_rms_adamw",  # so that one rate serves both
    )
    return [muon, _adamw([p for p in module.parameters() if id(p) not in others], budget)]


def _hand_over(matrix: Tensor, whole: Tensor) -> None:
    matrix.grad = None if whole.grad is None else whole.grad.flatten(1)


OPTIMIZERS: dict[str, Callable[[nn.Module, Budget], list[torch.optim.Optimizer]]] = {
    "adamw": _all_adamw,
    "muon": _muon,
}


def train(
    module: nn.Module,
    loss: Loss,
    folder: Path,
    budget: Budget,
    *,
    preview: Callable[[int], None] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Tensor]:
    """Trains `module` in place and returns the averaged weights.

    Raises:
        MdiffError: the loss became NaN or infinite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.safetensors"
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not name.startswith(budget.freeze))
    optimizers = pick("optimizer", OPTIMIZERS, budget.optimizer)(module, budget)
    average = {k: v.detach().clone().float() for k, v in module.state_dict().items()}
    step, spent = 0, 0.0
    if checkpoint.exists():
        step, spent = _restore(checkpoint, module, average, optimizers)
        say(f"going on from step {step} ({spent / 60:.1f} minutes)")
    device = next(module.parameters()).device.type
    amp = {"bf16": torch.bfloat16, "fp32": torch.float32}[budget.precision]
    start = time.monotonic() - spent
    recent: list[Tensor] = []
    with (folder / "log.jsonl").open("a") as log:
        while (progress := budget.progress(step, time.monotonic() - start)) < 1.0:
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = budget.rate_at(step, progress)
            generator = torch.Generator().manual_seed(budget.seed * 1_000_003 + step)
            with torch.autocast(device, amp, enabled=amp is not torch.float32):
                value = loss(step, generator)
            value.backward()
            nn.utils.clip_grad_norm_(module.parameters(), budget.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            module.zero_grad(set_to_none=True)
            keep = ema_decay(budget.decay, step)
            with torch.no_grad():
                state = module.state_dict()
                torch._foreach_lerp_(list(average.values()), list(state.values()), 1 - keep)
            recent.append(value.detach())
            step += 1
            if step % 50 == 0:
                mean = torch.stack(recent).mean().item()
                recent.clear()
                if not math.isfinite(mean):
                    raise MdiffError(f"the loss is {mean} at step {step}: lower the learning rate")
                seconds = time.monotonic() - start
                line = {"step": step, "loss": round(mean, 5), "seconds": round(seconds, 1)}
                log.write(json.dumps(line) + "\n")
                log.flush()
                say(f"step {step}  loss {mean:.4f}  {seconds / 60:.1f} min")
            if step % budget.save_every == 0:
                _save(checkpoint, module, average, optimizers, step, time.monotonic() - start)
                if preview is not None:
                    preview(step)
    _save(checkpoint, module, average, optimizers, step, time.monotonic() - start)
    return average


def begin(folder: Path, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Makes a run of `module` that starts from these weights, where they fit it, and from its own where not.

    A run that has a checkpoint is left as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        own = module.state_dict()
        fit = {k: v.float() for k, v in weights.items() if k in own and v.shape == own[k].shape}
        weights = {**own, **fit}
        _write(path, weights, weights, [], 0, 0.0)


def averaged(folder: Path) -> dict[str, Tensor]:
    """The averaged weights of a run's checkpoint."""
    with safe_open(folder / "checkpoint.safetensors", "pt") as file:
        names = [name for name in list(file.keys()) if name.startswith("average.")]
        return {name.removeprefix("average."): file.get_tensor(name) for name in names}


def _save(
    path: Path,
    module: nn.Module,
    average: dict[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    step: int,
    seconds: float,
) -> None:
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    _write(path, module.state_dict(), average, states, step, seconds)


def _write(
    path: Path,
    module: Mapping[str, Tensor],
    average: Mapping[str, Tensor],
    optimizers: Sequence[Mapping[int, Mapping[str, Tensor]]],
    step: int,
    seconds: float,
) -> None:
    tensors = {f"module.{k}": v for k, v in module.items()}
    tensors |= {f"average.{k}": v.float().clone() for k, v in average.items()}
    for n, states in enumerate(optimizers):
        for i, state in states.items():
            tensors |= {f"optimizer.{n}.{i}.{k}": v for k, v in state.items()}
    meta = {"step": str(step), "seconds": str(seconds)}
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata=meta)


def _restore(
    path: Path,
    module: nn.Module,
    average: dict[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
) -> tuple[int, float]:
    with safe_open(path, "pt") as file:
        module.load_state_dict({k: file.get_tensor(f"module.{k}") for k in module.state_dict()})
        for name, value in average.items():
            value.copy_(file.get_tensor(f"average.{name}"))
        for n, optimizer in enumerate(optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for key in list(file.keys()):
                if key.startswith(f"optimizer.{n}."):
                    *_, i, name = key.split(".")
                    state.setdefault(int(i), {})[name] = file.get_tensor(key)
            groups = optimizer.state_dict()["param_groups"]  # of a new run the state is empty
            optimizer.load_state_dict({"state": state, "param_groups": groups})
        meta = file.metadata()
    return int(meta["step"]), float(meta["seconds"])
