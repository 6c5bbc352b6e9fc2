"""What a training run tells: `log.jsonl` in its folder, TensorBoard if wanted, JSON on stdout, talk on stderr.

Nothing here looks at a tensor: the loop reads its numbers when a line is due and not before. A line of `log.jsonl` is a
JSON object: `step`, `loss` (mean since the line before), `loss_by_noise` (the same in even bins of log-SNR from -10 to
10, noisiest first, null where a bin was not met), `rate`, `gradient_norm`, `samples` and `seconds` since the run began,
and `samples_per_second`.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, final

from mdiff.core.errors import MdiffError, MissingError
from mdiff.core.record import atomic_write

NAME = "log.jsonl"
EVERY = 10.0
"""Seconds between two lines of talk where there is no terminal."""


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; empty where there is none. A last line that was cut off is left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise MdiffError(f"cannot read {path}: {error}") from error
    found = []
    for number, line in enumerate(lines):
        try:
            found.append(json.loads(line))
        except ValueError:
            if number + 1 < len(lines):
                raise MdiffError(
                    f"line {number + 1} of {path} is not JSON: take it out, or the file away"
                ) from None
    return found


@final
class Log:
    """The log of a run in a folder; a context, within which a terminal shows a live line.

    Args:
        steps: of the whole run, where that is known.
        quiet: nothing on stderr.
        as_json: lines on stdout too.
        silent: nothing anywhere: of the processes of a run, one writes.

    Raises:
        MissingError: TensorBoard is wanted and not installed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        steps: int | None = None,
        tensorboard: bool = False,
        quiet: bool = False,
        as_json: bool = False,
        silent: bool = False,
    ) -> None:
        if tensorboard and find_spec("tensorboard") is None:
            raise MissingError(
                "TensorBoard is not installed: pip install 'mdiffusion[train]', or leave out "
                "log.tensorboard"
            )
        self.folder = folder
        self.steps = steps
        self.quiet = quiet or silent
        self.as_json = as_json and not silent
        self.silent = silent
        self._tensorboard = tensorboard and not silent
        self._open = ExitStack()
        self._file: IO[str] | None = None
        self._board: Any = None
        self._bar: Any = None
        self._before = (0, 0.0)  # samples and seconds at the line before
        self._said = -EVERY
        self._began: tuple[float, float] | None = (
            None  # clock and progress at the first sign of life
        )

    def __enter__(self) -> Self:
        if not self.quiet and sys.stderr.isatty():
            self._bar = self._open.enter_context(_bar())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):  # what could not be written was said when it was to be
            self._open.close()
        self._file = self._board = self._bar = None

    def say(self, line: str) -> None:
        """A line of talk."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def tick(self, step: int, progress: float) -> None:
        """A step is done: moves the live line, and costs nothing where there is none."""
        if self._began is None:
            self._began = (time.monotonic(), progress)
        if self._bar is not None:
            task = self._bar.task_ids[0]
            self._bar.update(
                task, completed=progress, done=self._count(step), left=self._left(progress)
            )

    def step(
        self,
        *,
        step: int,
        loss: float,
        levels: Sequence[float | None] = (),
        rate: float,
        norm: float,
        samples: int,
        seconds: float,
        progress: float,
    ) -> None:
        """A line of the log.

        Args:
            loss: mean since the line before.
            levels: the same by noise level.
            rate: learning rate.
            norm: of the gradients, before clipping.
            samples, seconds: since the run began.
            progress: share of the budget that is used up.

        Raises:
            MdiffError: the log cannot be written.
        """
        if self.silent:
            return
        self._begin(step)
        speed = (samples - self._before[0]) / max(seconds - self._before[1], 1e-9)
        self._before = (samples, seconds)
        line = {
            "step": step,
            "loss": _short(loss),
            "loss_by_noise": [None if value is None else _short(value) for value in levels],
            "rate": _short(rate),
            "gradient_norm": _short(norm),
            "samples": samples,
            "samples_per_second": _short(speed),
            "seconds": round(seconds, 2),
        }
        self._write(line)
        if self.as_json:
            print(json.dumps(line), flush=True)
        if self._board is not None:
            _to_board(self._board, line)
        self.tick(step, progress)
        said = f"loss {loss:.4f}  {speed:.3g} samples/s"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], said=said)
        elif time.monotonic() - self._said >= EVERY:
            self._said = time.monotonic()
            left = self._left(progress)
            self.say(
                f"step {self._count(step)}  {said}  {seconds / 60:.1f} min{left and f', {left}'}"
            )

    def _begin(self, step: int) -> None:
        """Opens the files, without the lines of steps that were lost when the run was last broken off."""
        if self._file is not None:
            return
        path = self.folder / NAME
        lines = read(path)
        kept = [line for line in lines if line["step"] < step]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        if kept:
            self._before = (kept[-1]["samples"], kept[-1]["seconds"])
        try:
            self._file = self._open.enter_context(path.open("a", encoding="utf-8"))
        except OSError as error:
            raise MdiffError(f"cannot write {path}: {error.strerror}") from error
        if self._tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step)
            self._open.callback(self._board.close)

    def _write(self, line: Mapping[str, Any]) -> None:
        assert self._file is not None
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise MdiffError(f"cannot write {self.folder / NAME}: {error.strerror}") from error

    def _count(self, step: int) -> str:
        return f"{step}/{self.steps}" if self.steps else str(step)

    def _left(self, progress: float) -> str:
        """How long the rest of the budget takes at the pace since this process began; empty where that is unknown."""
        clock, first = self._began or (0.0, 0.0)
        if progress <= first:
            return ""
        minutes = (time.monotonic() - clock) * (1 - progress) / (progress - first) / 60
        return f"{minutes:.1f} min to go"


def _short(value: float) -> float:
    """Six digits."""
    return float(f"{value:.6g}")


def _to_board(board: Any, line: Mapping[str, Any]) -> None:
    for name in ("loss", "rate", "gradient_norm", "samples_per_second"):
        board.add_scalar(name, line[name], line["step"])
    for i, value in enumerate(line["loss_by_noise"]):
        if value is not None:
            board.add_scalar(f"loss_by_noise/{i}", value, line["step"])


def _bar() -> Any:
    """A live line of one task: step, loss and speed, minutes, minutes to go."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = ("step {task.fields[done]}", "{task.fields[said]}", "{task.fields[left]}")
    step, said, left = (TextColumn(text) for text in columns)
    bar = Progress(
        step,
        BarColumn(),
        said,
        TimeElapsedColumn(),
        left,
        console=Console(stderr=True),
        transient=True,
    )
    bar.add_task("", total=1.0, done="0", said="", left="")
    return bar
