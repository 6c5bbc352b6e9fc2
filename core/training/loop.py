"""The training loop, on accelerate: one process or many, bf16 or float32, micro-batches, checkpoints to go on from.

A step is a function of (seed, step) alone: which samples, at what times, with what noise comes from `Draws`, and what
modules draw from the global generator (dropout) is seeded anew each step. So a resumed run needs no random state but
the number of its step, and equals an unbroken one bit for bit; and n processes with a share of the batch each take the
step that one takes with the whole, but for the order of sums.

Nothing in a step waits for the device: losses are read when a line of the log is due.
"""

import ctypes
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint as recomputed

from mdiff.core import request, weights
from mdiff.core.errors import NonFiniteError, UsageError
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
OnPreview = Callable[[int, Mapping[str, Tensor]], None]
"""(step, averaged weights) -> None"""
LINE = 20.0
"""Seconds after which the log has a line, however few steps there were."""


def accelerator(device: str = "auto") -> Accelerator:
    """What runs training: the processes that torchrun or accelerate started, and their devices.

    The precision is the objective's: accelerate keeps one for a whole process, and a notebook trains twice.
    """
    cpu = device == "cpu" or not torch.cuda.is_available()
    return Accelerator(cpu=cpu, mixed_precision="no")


class _Objective(nn.Module):
    """The loss as a module around what is trained, so that wrappers of any kind see one forward pass.

    forward(draws) -> the part of the batch's mean loss that comes from these samples, and what the log wants of it.
    """

    def __init__(self, module: nn.Module, loss: Loss, precision: str) -> None:
        super().__init__()
        self.module = module
        self.loss = loss
        self.bf16 = precision == "bf16"

    def forward(self, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(draws.device.type, torch.bfloat16, enabled=self.bf16):
            said = self.loss(draws)
        none = torch.empty(0)
        value = said.mean if isinstance(said, Outcome) else said
        each, t = (said.each, said.t) if isinstance(said, Outcome) else (none, none)
        return value.float().mean() * (len(draws) / draws.total), each, t


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
        UsageError: the folder's checkpoint is of another recipe; the batch does not split over the processes.
        MdiffError: the disk is full.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after a checkpoint.
    """
    run = on or accelerator()
    if run.device.type == "cpu":
        _keep_memory()
    log = log if run.is_main_process else Log(folder, silent=True)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    module.to(run.device).train()
    module.requires_grad_(True)
    if recipe.checkpointing:
        recompute(module)
    if recipe.compile:
        module.compile()
    objective = run.prepare(
        _Objective(module, loss, request.precision(recipe.precision, run.device.type))
    )
    training = _Training(
        module=module,
        objective=objective,
        shares=_shares(recipe, run),
        folder=folder,
        recipe=recipe,
        run=run,
        log=log,
        # after they are where the wrapper wants them
        optimizer=optimizers.build(module, recipe.optimizer),
        averages=Averages(module, profiles(recipe.average.decays, recipe.average.powers)),
        recent=_Recent(run, schedule),
        on_save=on_save,
        on_preview=on_preview,
        facts=dict(facts or {}),
    )
    training.resume()
    # modules that draw by themselves are seeded, the caller's random state stays what it is
    with torch.random.fork_rng(devices=[]), _stopping(run.num_processes > 1) as stopped:
        while True:
            progress, stop, save, tell = _agree(run, *training.due(), stopped())
            if progress >= 1.0 or stop:
                break
            training.step(progress)
            training.after_step(save=save, tell=tell)
        training.end()
    if stop:
        raise KeyboardInterrupt
    return training.averages


def _keep_memory() -> None:
    """Has glibc keep what a step frees for the step that follows.

    It gives large blocks back at once and gets them again page by page, which is a sixth of a step on clips.
    """
    if sys.platform != "linux":
        return
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)
    if adjust is not None:
        trim_threshold, mmap_max = -1, -4  # of malloc.h
        adjust(mmap_max, 0)
        adjust(trim_threshold, 2**31 - 1)


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


@dataclass(kw_only=True)
class _Training:
    """A run in progress."""

    module: nn.Module
    objective: nn.Module
    shares: list[slice]
    folder: Path
    recipe: Recipe
    run: Accelerator
    log: Log
    optimizer: list[torch.optim.Optimizer]
    averages: Averages
    recent: _Recent
    on_save: OnSave | None
    on_preview: OnPreview | None
    facts: dict[str, Any]
    clock: _Clock = field(default_factory=_Clock)
    rate: float = 0.0
    norm: float | Tensor = 0.0
    saved_step: int = -1
    saved_at: float = 0.0
    told_at: float = 0.0

    def resume(self) -> None:
        """Goes on from the newest checkpoint that is whole, and starts the clock."""
        found = checkpoints.newest(self.folder / "checkpoints", self.log.say)
        if found is None and (self.folder / "checkpoints").is_dir():
            self.log.say("no checkpoint is whole: beginning anew")
        if found is not None:
            if found.facts["recipe"] != digest(self.recipe):
                raise UsageError(
                    f"{found.path} is of another recipe: give another folder, or begin there with its "
                    "weights"
                )
            _restore(found, self.module, self.averages, self.optimizer)
            self.clock.step, self.clock.spent = found.step, float(found.facts["seconds"])
            self.facts = {**found.facts, **self.facts}
            self.saved_step = found.step
            used = self.recipe.budget.progress(found.step, self.clock.spent) >= 1
            more = "; the budget is used up: a larger --steps or --minutes goes on" if used else ""
            self.log.say(
                f"going on from step {found.step} ({self.clock.spent / 60:.1f} minutes){more}"
            )
            if self.on_save is not None and self.run.is_main_process:
                self.on_save(found)  # whoever was killed in between had no time for it
        self.clock.start()
        self.saved_at = self.told_at = self.clock.seconds

    def due(self) -> tuple[float, bool, bool]:
        """Share of the budget that is used up, and whether a checkpoint and a line of the log are due by the clock."""
        seconds = self.clock.seconds
        old = seconds - self.saved_at > 60 * self.recipe.save.minutes > 0
        return (
            self.recipe.budget.progress(self.clock.step, seconds),
            old,
            seconds - self.told_at > LINE,
        )

    def step(self, progress: float) -> None:
        """One step of the optimizers, on one batch."""
        recipe, clock, run = self.recipe, self.clock, self.run
        self.rate = optimizers.rate_at(recipe.optimizer, clock.step, progress)
        optimizers.set_rate(self.optimizer, self.rate)
        for share in self.shares:
            draws = Draws.of(recipe.seed, clock.step, recipe.batch.size, share, run.device)
            # what modules draw by themselves (dropout)
            torch.manual_seed(derived(recipe.seed, "modules", clock.step, share.start))
            last = share is self.shares[-1]
            with nullcontext() if last else run.no_sync(self.objective):
                part, each, t = self.objective(draws)
                # wrappers take the mean over processes, and shares are parts of one mean
                run.backward(part * run.num_processes)
            self.recent.add(part, each, t)
        self.norm = run.clip_grad_norm_(self.module.parameters(), recipe.optimizer.clip or math.inf)
        for one in self.optimizer:
            one.step()
        self.module.zero_grad(set_to_none=True)
        clock.step += 1
        self.recent.steps += 1
        self.averages.update(clock.step)
        self.log.tick(clock.step, progress)

    def after_step(self, *, save: bool, tell: bool) -> None:
        """Whatever is due, by the clock or by the count of steps."""
        recipe, step = self.recipe, self.clock.step

        def turn(every: int) -> bool:
            return every > 0 and step % every == 0

        if tell or turn(recipe.log.steps):
            self.line()
        if turn(recipe.average.snapshots):
            for name in self.averages.names:
                state = _whole(self.averages.state(name))
                if self.run.is_main_process:
                    write_snapshot(self.folder / "snapshots", step, name, state)
        if save or turn(recipe.save.steps):
            self.save()
        if self.on_preview is not None and turn(recipe.preview.every):
            names = self.averages.names
            state = self.averages.state(names[0]) if names else self.module.state_dict()
            state = _whole(state)
            if self.run.is_main_process:
                self.on_preview(step, state)
            self.run.wait_for_everyone()

    def end(self) -> None:
        """The last line and the last checkpoint."""
        if self.recent.steps:
            self.line()
        self.save()

    def line(self) -> None:
        """A line of the log, over the steps since the one before."""
        mean, seconds = self.checked_mean(), self.clock.seconds
        self.log.step(
            step=self.clock.step,
            loss=mean,
            levels=self.recent.levels(),
            rate=self.rate,
            norm=float(self.norm),
            samples=self.clock.step * self.recipe.batch.size,
            seconds=seconds,
            progress=self.recipe.budget.progress(self.clock.step, seconds),
        )
        self.recent.clear()
        self.told_at = seconds

    def save(self) -> None:
        """A checkpoint, unless there is one of this step."""
        self.checked_mean()
        if self.clock.step > self.saved_step:
            saved = self._write()
            if saved is not None and self.on_save is not None:
                self.on_save(saved)
        self.saved_step, self.saved_at = self.clock.step, self.clock.seconds

    def checked_mean(self) -> float:
        """The mean loss since the last line. Raises a NonFiniteError where it is none."""
        mean, saved = self.recent.mean(), self.saved_step
        if not math.isfinite(mean):
            kept = (
                f"the checkpoint of step {saved} is whole" if saved > 0 else "nothing is saved yet"
            )
            raise NonFiniteError(
                f"the loss is {mean} at step {self.clock.step}; {kept}: begin anew in another --out "
                "with --init and a lower --set optimizer.rate=..."
            )
        return mean

    def _write(self) -> Checkpoint | None:
        """Every process puts its tensors in, the main one writes."""
        names = self.averages.names
        files = {"model": _whole(self.module.state_dict())}
        files |= {f"average-{name}": _whole(self.averages.state(name)) for name in names}
        files |= {"optimizer": _whole(checkpoints.flatten(self.optimizer))}
        saved = None
        if self.run.is_main_process:
            about = {
                **self.facts,
                "seconds": round(self.clock.seconds, 3),
                "samples": self.clock.step * self.recipe.batch.size,
                "recipe": digest(self.recipe),
                "seed": self.recipe.seed,
                "processes": self.run.num_processes,
                "torch": torch.__version__,
            }
            folder, keep = self.folder / "checkpoints", self.recipe.save.keep
            saved = checkpoints.save(folder, self.clock.step, files, about, keep)
        self.run.wait_for_everyone()
        return saved


def _shares(recipe: Recipe, run: Accelerator) -> list[slice]:
    """The samples of a batch that this process takes, in micro-batches."""
    total, count = recipe.batch.size, run.num_processes
    if total % count:
        raise UsageError(
            f"a batch of {total} does not split over {count} processes: --set batch.size="
            f"{total // count * count or count}"
        )
    own = total // count
    micro = min(recipe.batch.micro or own, own)
    first = run.process_index * own
    return [slice(i, min(i + micro, first + own)) for i in range(first, first + own, micro)]


def _agree(
    run: Accelerator, progress: float, save: bool, tell: bool, stop: bool
) -> tuple[float, bool, bool, bool]:
    """(progress, stop, save, tell): as the main process says; to stop, where any process was told to."""
    if run.num_processes == 1:
        return progress, stop, save, tell
    said = torch.tensor([progress, save, tell], dtype=torch.float64, device=run.device)
    torch.distributed.broadcast(said, 0)
    stops = run.reduce(torch.tensor(float(stop), device=run.device), "sum")
    return said[0].item(), bool(stops), bool(said[1]), bool(said[2])


@contextmanager
def _stopping(launched: bool) -> Iterator[Callable[[], bool]]:
    """Tells whether Ctrl-C or SIGTERM came: the first ends the run after its step, the second at once.

    Where processes were launched together, one Ctrl-C comes from the terminal and from the launcher, which kills those
    that take longer than half a minute: so there only the first counts.
    """
    told: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if told and not launched:
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


def recompute(module: nn.Module) -> None:
    """Lets the blocks of a network forget what they computed and compute it again in the backward pass.

    Blocks are the members of its lists and sequences, the outermost ones (Chen et al., 2016, arXiv:1604.06174).
    """
    for child in module.children():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            child.forward = partial(recomputed, child.forward, use_reentrant=False)
        else:
            recompute(child)


# --- checkpoints ----------------------------------------------------------------------------------


def _whole(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of which each process may have a part, put together; every process has to take part, in one order."""
    parts = ((name, state[name]) for name in sorted(state))
    return {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in parts}


def _restore(
    found: Checkpoint,
    module: nn.Module,
    averages: Averages,
    optimizer: Sequence[torch.optim.Optimizer],
) -> None:
    own = module.state_dict()
    tensors = found.read("model")
    there = {k: checkpoints.placed(v, own[k]) if k in own else v for k, v in tensors.items()}
    weights.fill(module, there, str(found.path))
    for name in averages.names:
        averages.load(name, found.read(f"average-{name}"))
    checkpoints.unflatten(optimizer, found.read("optimizer"))
