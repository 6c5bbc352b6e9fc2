"""The training loop: a loss, batches drawn by (seed, step), AdamW, an exponential moving average, checkpoints.

A run is a folder: `log.jsonl` and `checkpoint.safetensors`, which holds network, average, optimizer and step, and is
replaced whole. A run that finds a checkpoint goes on from it.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mdiff.core.errors import MdiffError
from mdiff.core.record import atomic_write

Loss = Callable[[int, torch.Generator], Tensor]
"""loss(step, generator) -> scalar; all randomness of a step comes from its generator."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """When training ends and how it is tuned; `steps` and `minutes` are both upper bounds."""

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
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=budget.rate, betas=(0.9, 0.99), weight_decay=budget.weight_decay
    )
    average = {k: v.detach().clone().float() for k, v in module.state_dict().items()}
    step, spent = 0, 0.0
    if checkpoint.exists():
        step, spent = _restore(checkpoint, module, average, optimizer)
        say(f"going on from step {step} ({spent / 60:.1f} minutes)")
    device = next(module.parameters()).device.type
    amp = {"bf16": torch.bfloat16, "fp32": torch.float32}[budget.precision]
    start = time.monotonic() - spent
    recent: list[Tensor] = []
    with (folder / "log.jsonl").open("a") as log:
        while (progress := budget.progress(step, time.monotonic() - start)) < 1.0:
            for group in optimizer.param_groups:
                group["lr"] = budget.rate_at(step, progress)
            generator = torch.Generator().manual_seed(budget.seed * 1_000_003 + step)
            with torch.autocast(device, amp, enabled=amp is not torch.float32):
                value = loss(step, generator)
            value.backward()
            nn.utils.clip_grad_norm_(module.parameters(), budget.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
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
                _save(checkpoint, module, average, optimizer, step, time.monotonic() - start)
                if preview is not None:
                    preview(step)
    _save(checkpoint, module, average, optimizer, step, time.monotonic() - start)
    return average


def averaged(folder: Path) -> dict[str, Tensor]:
    """The averaged weights of a run's checkpoint."""
    with safe_open(folder / "checkpoint.safetensors", "pt") as file:
        names = [name for name in list(file.keys()) if name.startswith("average.")]
        return {name.removeprefix("average."): file.get_tensor(name) for name in names}


def _save(
    path: Path,
    module: nn.Module,
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    step: int,
    seconds: float,
) -> None:
    tensors = {f"module.{k}": v for k, v in module.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
    meta = {"step": str(step), "seconds": str(seconds)}
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata=meta)


def _restore(
    path: Path, module: nn.Module, average: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    with safe_open(path, "pt") as file:
        module.load_state_dict({k: file.get_tensor(f"module.{k}") for k in module.state_dict()})
        for name, value in average.items():
            value.copy_(file.get_tensor(f"average.{name}"))
        state: dict[int, dict[str, Tensor]] = {}
        for key in list(file.keys()):
            if key.startswith("optimizer."):
                _, i, name = key.split(".")
                state.setdefault(int(i), {})[name] = file.get_tensor(key)
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        meta = file.metadata()
    return int(meta["step"]), float(meta["seconds"])
