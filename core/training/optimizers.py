"""Optimizers and the schedule of their learning rate, each a row of a table.

The loop runs `backward` as often as it likes, clips the gradients of the module's parameters, calls `step` of every
optimizer and then `module.zero_grad()`. An optimizer looks at the gradients when it steps and not before, so that
accumulating, clipping and averaging over processes all reach it.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mdiff.core.errors import UsageError, nearest
from mdiff.core.names import pick

FUSED = ("cpu", "cuda", "mps", "xpu")
"""Devices on which torch updates all parameters by one call."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """How parameters follow their gradients: the table [optimizer] of a recipe.

    Attributes:
        name: a row of `OPTIMIZERS`.
        rate: the learning rate at its highest.
        warmup: steps in which the rate rises to that in a straight line.
        schedule: a row of `SCHEDULES`.
        floor: what the rate ends at, as a share of the highest.
        hold: steps before "invsqrt" begins to fall.
        betas: of Adam.
        eps: of Adam.
        weight_decay: decoupled, except for "adam", where it is an L2 penalty.
        decayed: which parameters decay: "all", or "matrices": no biases, norms or other vectors.
        clip: the largest norm of all gradients together; 0 leaves them as they are.
        freeze: parameters whose names begin with one of these stay as they are.
    """

    name: str = "adamw"
    rate: float = 3e-4
    warmup: int = 200
    schedule: str = "cosine"
    floor: float = 0.02
    hold: int = 1000
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.01
    decayed: Literal["all", "matrices"] = "all"
    clip: float = 1.0
    freeze: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        pick("optimizer", OPTIMIZERS, self.name)
        pick("schedule", SCHEDULES, self.schedule)
        pick("value of decayed", {"all": 0, "matrices": 0}, self.decayed)
        bounds = {
            "rate": (self.rate > 0, "above 0"),
            "warmup": (self.warmup >= 0, "0 or more steps"),
            "floor": (0 <= self.floor <= 1, "a share of the rate, 0 to 1"),
            "hold": (self.hold >= 1, "1 step or more"),
            "betas": (
                len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
                "two in [0, 1)",
            ),
            "eps": (self.eps > 0, "above 0"),
            "weight_decay": (self.weight_decay >= 0, "0 or more"),
            "clip": (self.clip >= 0, "0 or more"),
        }
        for field, (holds, right) in bounds.items():
            if not holds:
                raise UsageError(
                    f"optimizer: {field} is {getattr(self, field)}, it has to be {right}"
                )


def rate_at(settings: Optimizer, step: int, progress: float) -> float:
    """The learning rate of step number `step`, from 0, when `progress` (0 to 1) of the budget is used up."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup))
    return settings.rate * warm * SCHEDULES[settings.schedule](settings, step, progress)


def set_rate(optimizers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    """Gives all parameters of these optimizers one learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def _cosine(settings: Optimizer, step: int, progress: float) -> float:
    """Half a cosine down to the floor (Loshchilov and Hutter, 2017)."""
    return settings.floor + (1 - settings.floor) * 0.5 * (1 + math.cos(math.pi * progress))


def _linear(settings: Optimizer, step: int, progress: float) -> float:
    """A straight line down to the floor."""
    return 1 - (1 - settings.floor) * progress


def _constant(settings: Optimizer, step: int, progress: float) -> float:
    """The same to the end (Ho et al., 2020)."""
    return 1.0


def _invsqrt(settings: Optimizer, step: int, progress: float) -> float:
    """One over the root of the step, after `hold` steps at the top (Karras et al., 2024, section 3.1)."""
    return max(settings.floor, 1 / math.sqrt(max(1.0, step / settings.hold)))


SCHEDULES: dict[str, Callable[[Optimizer, int, float], float]] = {
    "cosine": _cosine,
    "constant": _constant,
    "linear": _linear,
    "invsqrt": _invsqrt,
}
"""(settings, step, progress) -> share of the highest rate."""


def build(module: nn.Module, settings: Optimizer) -> list[torch.optim.Optimizer]:
    """Freezes what is to be frozen and gives the optimizers of the rest, all of them to be stepped.

    Raises:
        UsageError: a prefix to freeze fits no parameter, or nothing is left to train.
    """
    names = [name for name, _ in module.named_parameters()]
    for prefix in settings.freeze:
        if not any(name.startswith(prefix) for name in names):
            known = {name.partition(".")[0] for name in names}
            raise UsageError(f"freeze: no parameter begins with {prefix!r}{nearest(prefix, known)}")
    for name, parameter in module.named_parameters():
        if name.startswith(settings.freeze):
            parameter.requires_grad_(False)
    trained = [p for p in module.parameters() if p.requires_grad]
    if not trained:
        raise UsageError("no parameter is left to train: freeze fewer of them")
    return OPTIMIZERS[settings.name](trained, settings)


def _groups(parameters: Sequence[Tensor], settings: Optimizer) -> list[dict[str, Any]]:
    """Parameters by their weight decay."""
    spared = [p for p in parameters if settings.decayed == "matrices" and p.ndim < 2]
    ids = {id(p) for p in spared}
    decayed = [p for p in parameters if id(p) not in ids]
    groups = [(decayed, settings.weight_decay), (spared, 0.0)]
    return [{"params": ps, "weight_decay": decay} for ps, decay in groups if ps]


def _fused(parameters: Sequence[Tensor]) -> bool:
    return all(p.device.type in FUSED and p.is_floating_point() for p in parameters)


def _adam(parameters: Sequence[Tensor], settings: Optimizer) -> list[torch.optim.Optimizer]:
    """Adam, with weight decay as an L2 penalty (Kingma and Ba, 2015)."""
    return [
        torch.optim.Adam(
            _groups(parameters, settings),
            lr=settings.rate,
            betas=settings.betas,
            eps=settings.eps,
            fused=_fused(parameters),
        )
    ]


def _adamw(parameters: Sequence[Tensor], settings: Optimizer) -> list[torch.optim.Optimizer]:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019)."""
    return [
        torch.optim.AdamW(
            _groups(parameters, settings),
            lr=settings.rate,
            betas=settings.betas,
            eps=settings.eps,
            fused=_fused(parameters),
        )
    ]


def _muon(parameters: Sequence[Tensor], settings: Optimizer) -> list[torch.optim.Optimizer]:
    """Orthogonalised momentum for matrices and kernels, AdamW for the rest (Jordan et al., 2024)."""
    large = [p for p in parameters if p.ndim > 1 and min(len(p), p[0].numel()) >= 16]
    ids = {id(p) for p in large}
    rest = [p for p in parameters if id(p) not in ids]
    optimizers = _adamw(rest, settings) if rest else []
    if not large:
        return optimizers
    return [Muon(large, lr=settings.rate, weight_decay=settings.weight_decay), *optimizers]


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum of matrices, and of kernels (O, I, ...) as matrices (Jordan et al., 2024).

    Steps are as large as AdamW's, so that one rate serves both (Liu et al., 2025: Muon is scalable for LLM training).
    torch's own takes matrices alone and always computes in bf16, which on most processors is a fraction of their speed.
    """

    MOMENTUM = 0.95

    def __init__(self, params: Iterable[Tensor], *, lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        for group in self.param_groups:
            rate, decay = group["lr"], group["weight_decay"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                momentum = state["momentum_buffer"].lerp_(p.grad, 1 - self.MOMENTUM)
                matrix = orthogonalised(p.grad.lerp(momentum, self.MOMENTUM).flatten(1))
                size = 0.2 * math.sqrt(max(matrix.shape))
                p.mul_(1 - rate * decay)
                p.add_(matrix.reshape(p.shape), alpha=-rate * size)


def orthogonalised(matrix: Tensor) -> Tensor:
    """About U V^T of a matrix U S V^T: singular values between 0.7 and 1.2, by five steps of Newton and Schulz.

    In bf16 on a GPU, where that is faster, and in float32 elsewhere (Jordan et al., 2024, for the coefficients).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.to(torch.bfloat16 if matrix.device.type == "cuda" else torch.float32)
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.T).to(matrix.dtype)


OPTIMIZERS: dict[str, Callable[[Sequence[Tensor], Optimizer], list[torch.optim.Optimizer]]] = {
    "adamw": _adamw,
    "adam": _adam,
    "muon": _muon,
}
"""(parameters, settings) -> optimizers."""
