"""The training loop, on accelerate: one process or many, bf16 or float32, micro-batches, checkpoints to go on from.

A step is a function of (seed, step) alone: which samples, at what times, with what noise comes from `Draws`, and what
modules draw from the global generator (dropout) is seeded anew each step. So a resumed run needs no random state but
the number of its step, and equals an unbroken one bit for bit; and n processes with a share of the batch each take the
step that one takes with the whole, but for the order of sums.

Nothing in a step waits for the device: losses are read when a line of the log is due.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint as recomputed

from mdiff.core import weights
from mdiff.core.errors import MdiffError, NonFiniteError, UsageError
from mdiff.core.losses import Outcome, by_level
from mdiff.core.training import checkpoints, optimizers
from mdiff.core.training.averages import Averages, profiles, write_snapshot
from mdiff.core.training.checkpoints import Checkpoint
from mdiff.core.training.draws import Draws, derived
from mdiff.core.training.log import Log
from mdiff.core.training.recipe import Recipe, digest

Loss = Callable[[Draws], Outcome | Tensor]
"""loss(draws) -> one loss per sample (b,), one for all of them, or an `Outcome`"""
OnSave = Callable[[Checkpoint], None]
LINE = 20.0
"""Seconds after which the log has a line, however few steps there were."""
OnPreview = Callable[[int, Mapping[str, Tensor]], None]
"""(step, averaged weights) -> None"""


def accelerator(recipe: Recipe, device: str = "auto") -> Accelerator:
    """What runs a recipe: the processes that torchrun or accelerate started, its device and its precision."""
    cpu = device == "cpu" or not torch.cuda.is_available()
    return Accelerator(cpu=cpu, mixed_precision="bf16" if recipe.precision == "bf16" else "no")


class _Objective(nn.Module):
    """The loss as a module around what is trained, so that wrappers of any kind see one forward pass.

    forward(draws) -> the part of the batch's mean loss that comes from these samples, and what the log wants of it.
    """

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.module = module
        self.loss = loss

    def forward(self, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        said = self.loss(draws)
        none = torch.empty(0)
        value = said.mean if isinstance(said, Outcome) else said
        each, t = (said.each, said.t) if isinstance(said, Outcome) else (none, none)
        return value.float().mean() * (len(draws) / draws.total), each, t


@dataclass
class _Clock:
    """Steps and seconds spent, those before a resume included."""

    step: int = 0
    spent: float = 0.0
    since: float = 0.0

    def start(self) -> None:
        self.since = time.monotonic() - self.spent

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.since


def train(
    module: nn.Module,
    loss: Loss,
    folder: Path,
    recipe: Recipe,
    *,
    log: Log,
    on: Accelerator | None = None,
    schedule: Any = None,
    on_save: OnSave | None = None,
    on_preview: OnPreview | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Averages:
    """Trains `module` in place until the recipe's budget is used up, going on from the folder's newest checkpoint.

    Args:
        schedule: of the denoiser, for losses by noise level in the log.
        on_save: told of each checkpoint, in the main process.
        on_preview: called every so many steps, in the main process.
        facts: JSON values that every checkpoint keeps.

    Returns:
        the averages of the weights; the first profile is the one that models are made of.

    Raises:
        NonFiniteError: the loss became NaN or infinite: the newest checkpoint is from before.
        UsageError: the folder's checkpoint is of another recipe.
        MdiffError: the disk is full; the batch does not split over the processes.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after a checkpoint.
    """
    run = on or accelerator(recipe)
    log = log if run.is_main_process else Log(folder, silent=True)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    shares = _shares(recipe, run)
    module.to(run.device).train()
    module.requires_grad_(True)
    if recipe.checkpointing:
        recompute(module)
    if recipe.compile:
        module.compile()
    objective = run.prepare(_Objective(module, loss))
    optimizer = optimizers.build(module, recipe.optimizer)
    averages = Averages(module, profiles(recipe.average.decays, recipe.average.powers))
    clock = _Clock()
    found = checkpoints.newest(folder / "checkpoints", log.say)
    if found is not None:
        if found.facts["recipe"] != digest(recipe):
            raise UsageError(
                f"{found.path} is of another recipe: give another folder, or begin there with its weights"
            )
        _restore(found, module, averages, optimizer, clock)
        log.say(f"going on from step {clock.step} ({clock.spent / 60:.1f} minutes)")
        facts = {**found.facts, **(facts or {})}
        if on_save is not None and run.is_main_process:
            on_save(found)  # whoever was killed in between had no time for it
    clock.start()
    recent = _Recent(run, schedule)
    saved_step = clock.step if found else -1
    saved_at = told_at = clock.seconds

    def save() -> None:
        nonlocal saved_step, saved_at
        _finite(recent.mean(), clock.step, saved_step)
        if clock.step > saved_step:
            saved = _save(folder, module, averages, optimizer, clock, recipe, run, facts or {})
            if saved is not None and on_save is not None:
                on_save(saved)
        saved_step, saved_at = clock.step, clock.seconds

    def line(rate: float, norm: Tensor) -> None:
        nonlocal told_at
        mean = recent.mean()
        _finite(mean, clock.step, saved_step)
        log.step(
            step=clock.step,
            loss=mean,
            levels=recent.levels(),
            rate=rate,
            norm=float(norm),
            samples=clock.step * recipe.batch.size,
            seconds=clock.seconds,
            progress=recipe.budget.progress(clock.step, clock.seconds),
        )
        recent.clear()
        told_at = clock.seconds

    with _stopping() as stopped:
        while True:
            spent = recipe.budget.progress(clock.step, clock.seconds)
            old = clock.seconds - saved_at > 60 * recipe.save.minutes > 0
            quiet = clock.seconds - told_at > LINE
            progress, stop, due, tell = _agree(run, spent, stopped(), old, quiet)
            if progress >= 1.0 or stop:
                break
            rate = optimizers.rate_at(recipe.optimizer, clock.step, progress)
            optimizers.set_rate(optimizer, rate)
            for share in shares:
                draws = Draws.of(recipe.seed, clock.step, recipe.batch.size, share, run.device)
                # what modules draw by themselves (dropout)
                torch.manual_seed(derived(recipe.seed, "modules", clock.step, share.start))
                with nullcontext() if share is shares[-1] else run.no_sync(objective):
                    part, each, t = objective(draws)
                    # wrappers take the mean over processes, and shares are parts of one mean
                    run.backward(part * run.num_processes)
                recent.add(part, each, t)
            norm = run.clip_grad_norm_(module.parameters(), recipe.optimizer.clip or math.inf)
            for one in optimizer:
                one.step()
            module.zero_grad(set_to_none=True)
            clock.step += 1
            recent.steps += 1
            averages.update(clock.step)
            log.tick(clock.step, progress)
            if tell or clock.step % recipe.log.steps == 0:
                line(rate, norm)
            every = recipe.average.snapshots
            if every and clock.step % every == 0:
                for name in averages.names:
                    state = _whole(averages.state(name))
                    if run.is_main_process:
                        write_snapshot(folder / "snapshots", clock.step, name, state)
            if due or (recipe.save.steps and clock.step % recipe.save.steps == 0):
                save()
            if on_preview and recipe.preview.every and clock.step % recipe.preview.every == 0:
                state = _whole(averages.state(averages.names[0]))
                if run.is_main_process:
                    on_preview(clock.step, state)
                run.wait_for_everyone()
        if recent.steps:
            line(rate, norm)
        save()
    if stop:
        raise KeyboardInterrupt
    return averages


def _shares(recipe: Recipe, run: Accelerator) -> list[slice]:
    """The samples of a batch that this process takes, in micro-batches."""
    total, count = recipe.batch.size, run.num_processes
    if total % count:
        raise MdiffError(
            f"a batch of {total} does not split over {count} processes: --set batch.size="
            f"{total // count * count or count}"
        )
    own = total // count
    micro = min(recipe.batch.micro or own, own)
    first = run.process_index * own
    return [slice(i, min(i + micro, first + own)) for i in range(first, first + own, micro)]


def _agree(run: Accelerator, progress: float, stop: bool, *due: bool) -> tuple[Any, ...]:
    """What the main process says of the budget and of what is due, and whether any process was told to stop."""
    if run.num_processes == 1:
        return progress, stop, *due
    said = torch.tensor([progress, *map(float, due)], dtype=torch.float64, device=run.device)
    torch.distributed.broadcast(said, 0)
    stops = run.reduce(torch.tensor(float(stop), device=run.device), "sum")
    return said[0].item(), bool(stops), *(bool(one) for one in said[1:])


@contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """Tells whether Ctrl-C or SIGTERM came: the first ends the run after its step, the second at once."""
    told: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if told:
            raise KeyboardInterrupt
        told.append(number)

    try:
        before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: whoever called handles signals
        yield lambda: False
        return
    try:
        yield lambda: bool(told)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Recent:
    """Losses since the last line of the log, left on their device until they are read."""

    def __init__(self, run: Accelerator, schedule: Any) -> None:
        self.run = run
        self.schedule = schedule
        self.clear()

    def clear(self) -> None:
        self.steps = 0
        self.parts: list[Tensor] = []
        self.each: list[Tensor] = []
        self.t: list[Tensor] = []

    def add(self, part: Tensor, each: Tensor, t: Tensor) -> None:
        self.parts.append(part.detach())
        self.each.append(each.detach())
        self.t.append(t.detach())

    def mean(self) -> float:
        """The mean loss of a step, over all processes: waits for the device."""
        if not self.steps:
            return 0.0
        total = self.run.reduce(torch.stack(self.parts).sum(), "sum")
        return float(total) / self.steps

    def levels(self) -> list[float | None]:
        """The mean loss by noise level, None where there was none; empty for what has no levels."""
        each, t = (self.run.gather(torch.cat(values)) for values in (self.each, self.t))
        if self.schedule is None or not len(t):
            return []
        found = by_level(self.schedule, t, each.double()).tolist()
        return [None if math.isnan(value) else round(value, 6) for value in found]


def _finite(loss: float, step: int, saved: int) -> None:
    if not math.isfinite(loss):
        kept = f"the checkpoint of step {saved} is whole" if saved else "there is no checkpoint yet"
        raise NonFiniteError(
            f"the loss is {loss} at step {step}; {kept}: go on from it with a lower rate, in another "
            "--out with --init and --set optimizer.rate=..."
        )


def recompute(module: nn.Module) -> None:
    """Lets the blocks of a network forget what they computed and compute it again in the backward pass.

    Blocks are the members of its lists and sequences, the outermost ones (Chen et al., 2016, arXiv:1604.06174).
    """
    for child in module.children():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            child.forward = partial(recomputed, child.forward, use_reentrant=False)  # type: ignore[method-assign]
        else:
            recompute(child)


# --- checkpoints ----------------------------------------------------------------------------------


def _whole(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of which each process may have a part, put together; every process has to take part, in one order."""
    parts = ((name, state[name]) for name in sorted(state))
    return {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in parts}


def _save(
    folder: Path,
    module: nn.Module,
    averages: Averages,
    optimizer: Sequence[torch.optim.Optimizer],
    clock: _Clock,
    recipe: Recipe,
    run: Accelerator,
    facts: Mapping[str, Any],
) -> Checkpoint | None:
    """Writes a checkpoint, in the main process."""
    files = {"model": _whole(module.state_dict())}
    files |= {f"average-{name}": _whole(averages.state(name)) for name in averages.names}
    files |= {"optimizer": _whole(checkpoints.flatten(optimizer))}
    saved = None
    if run.is_main_process:
        about = {
            **facts,
            "seconds": round(clock.seconds, 3),
            "samples": clock.step * recipe.batch.size,
            "recipe": digest(recipe),
            "seed": recipe.seed,
            "processes": run.num_processes,
            "torch": torch.__version__,
        }
        saved = checkpoints.save(folder / "checkpoints", clock.step, files, about, recipe.save.keep)
    run.wait_for_everyone()
    return saved


def _restore(
    found: Checkpoint,
    module: nn.Module,
    averages: Averages,
    optimizer: Sequence[torch.optim.Optimizer],
    clock: _Clock,
) -> None:
    own = module.state_dict()
    tensors = found.read("model")
    there = {k: checkpoints.placed(v, own[k]) if k in own else v for k, v in tensors.items()}
    weights.fill(module, there, str(found.path))
    for name in averages.names:
        averages.load(name, found.read(f"average-{name}"))
    checkpoints.unflatten(optimizer, found.read("optimizer"))
    clock.step, clock.spent = found.step, float(found.facts["seconds"])
