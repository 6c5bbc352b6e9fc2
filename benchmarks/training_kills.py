"""What `kill -9` at random moments costs a training.

    python benchmarks/training_kills.py [--kills 100] [--steps 120] [--every 5] [--seed 0]

The claims: no resume fails; no half-written file has a name that anything reads; no more steps are lost than lie
between two checkpoints; and the last checkpoint equals that of a run that nobody stopped, bit for bit. A small DiffWave
learns tones that are made here. A kill takes ten seconds or so, most of which are imports; Ctrl-C ends it early and
prints what was seen.
"""

import argparse
import math
import random
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
import torch

from mdiff.core.errors import IntegrityError
from mdiff.core.training import checkpoints, log

RECIPE = """
part = "diffwave"
precision = "fp32"
threads = 1

[card]
plugin = "audio"
system = "DiffWave"
summary = "Tones"
licence = "none"
source = "benchmarks/training_kills.py"
accepts = ["duration"]

[card.config]
rate = 16_000
network = { channels = 8, layers = 4, cycle = 2 }
betas = { start = 1e-4, end = 0.05, steps = 50 }

[task]
seconds = 0.1

[optimizer]
name = "muon"
warmup = 10

[average]
decays = [0.999]
powers = [0.05, 0.10]

[batch]
size = 4

[save]
minutes = 0
keep = 2

[log]
steps = 1
"""


@dataclass
class Tally:
    """What was seen. A resume that was killed before its first step says nothing of itself."""

    kills: int = 0
    early: int = 0
    resumes: int = 0
    bad_resumes: int = 0
    failed: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    leftovers: int = 0
    lost: list[int] = field(default_factory=list)
    finished: int = 0
    unequal: int = 0


def make_data(folder: Path) -> None:
    folder.mkdir()
    chance = np.random.default_rng(0)
    for n in range(8):
        wave = 0.3 * np.sin(np.arange(8000) * chance.uniform(0.05, 0.5)) + 0.05 * chance.normal(
            size=8000
        )
        soundfile.write(folder / f"{n}.wav", wave.astype(np.float32), 16_000)


def command(work: Path, run: Path, steps: int, every: int) -> list[str]:
    call = [sys.executable, "-m", "mdiff", "train", str(work / "recipe.toml"), "--out", str(run)]
    call += ["--data", str(work / "data"), "--steps", str(steps), "--set", f"save.steps={every}"]
    return [*call, "--quiet"]


def logged(run: Path) -> int | None:
    """The last step in a run's log."""
    lines = log.read(run / log.NAME)
    return lines[-1]["step"] if lines else None


def state(path: Path) -> tuple[int, int]:
    """What changes whenever a file is written to or replaced."""
    about = path.stat() if path.exists() else None
    return (about.st_ino, about.st_mtime_ns) if about else (0, 0)


def inspect(run: Path, tally: Tally) -> int:
    """Counts what is damaged in a run's folder; gives the step of its newest whole checkpoint, or 0."""
    folder, newest = run / "checkpoints", 0
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name.startswith("."):
            tally.leftovers += 1
            continue
        try:
            newest = max(newest, checkpoints.verified(path).step)
        except IntegrityError as error:
            tally.damaged.append(str(error))
    for path in run.glob("*.toml"):
        try:
            tomllib.loads(path.read_text())
        except ValueError as error:
            tally.damaged.append(f"{path}: {error}")
    return newest


def same(a: Path, b: Path) -> bool:
    """Whether the newest checkpoints of two runs hold the same tensors, bit for bit."""
    one, other = (checkpoints.newest(run / "checkpoints", print) for run in (a, b))
    if one is None or other is None or one.files.keys() != other.files.keys():
        return False
    for name in one.files:
        x, y = one.read(name), other.read(name)
        if x.keys() != y.keys() or not all(torch.equal(x[k], y[k]) for k in x):
            return False
    return one.step == other.step


def unbroken(work: Path, steps: int, every: int) -> tuple[float, float]:
    """Runs it once to the end; gives the seconds until its first step, and those of a step with its share of saving."""
    run, start, first = work / "unbroken", time.monotonic(), math.nan
    process = subprocess.Popen(command(work, run, steps, every), stdout=subprocess.DEVNULL)
    while process.poll() is None:
        if math.isnan(first) and logged(run) is not None:
            first = time.monotonic() - start
        time.sleep(0.01)
    if process.returncode:
        sys.exit(f"the unbroken run ended with {process.returncode}")
    return first, (time.monotonic() - start - first) / steps


def attempt(call: list[str], run: Path, early: float, late: float | None, tally: Tally) -> bool:
    """Starts or resumes a run and kills it, where it has not ended by itself: then it gives True.

    Args:
        early: seconds after the start at which it is killed, if it has not done its first step by then.
        late: seconds after that first step; None lets it go on to its end.
    """
    resume, before = run.exists(), state(run / log.NAME)
    process = subprocess.Popen(
        [*call, *(["--resume"] if resume else [])],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    end = time.monotonic() + early
    try:
        while state(run / log.NAME) == before and process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        if state(run / log.NAME) == before:
            late = None if process.poll() is not None else 0
        said = process.communicate(timeout=late)[1]
        killed = False
    except subprocess.TimeoutExpired:
        process.kill()
        said = process.communicate()[1]
        killed = True
    finally:
        process.kill()  # Ctrl-C came meanwhile
    # a run writes into its log when its first step is done
    reached = logged(run) if state(run / log.NAME) != before else None
    newest = inspect(run, tally)
    tally.kills += killed
    if killed and reached is None:
        tally.early += 1
    elif killed and reached is not None:
        tally.lost.append(max(0, reached - newest))
    failed = not killed and process.returncode != 0
    if failed:
        tally.failed.append(said.decode(errors="replace").strip() or f"code {process.returncode}")
    if resume and (reached is not None or failed):
        tally.resumes += 1
        tally.bad_resumes += failed
    return not killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--every", type=int, default=5, help="steps between two checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    chance, tally = random.Random(asked.seed), Tally()
    work = Path(tempfile.mkdtemp(prefix="training-kills-"))
    try:
        (work / "recipe.toml").write_text(RECIPE)
        make_data(work / "data")
        start, step = unbroken(work, asked.steps, asked.every)
        print(f"{start:.1f} s to the first step, then {step * 1e3:.0f} ms a step with its saving")
        rounds = 0
        while tally.kills < asked.kills and not tally.failed:
            rounds += 1
            run = work / f"broken-{rounds}"
            call = command(work, run, asked.steps, asked.every)
            while tally.kills < asked.kills:
                # one in five before training goes on, or about then
                early = chance.uniform(0, start) if chance.random() < 0.2 else math.inf
                late = chance.uniform(0, 4 * asked.every * step)
                if attempt(call, run, early, late, tally):
                    break
            else:
                attempt(call, run, math.inf, None, tally)
            if not tally.failed:
                tally.finished += 1
                tally.unequal += not same(work / "unbroken", run)
    except KeyboardInterrupt:
        print("stopped early")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"kills                        {tally.kills} ({tally.early} before the first step)")
    print(f"resumes that succeeded       {tally.resumes - tally.bad_resumes} of {tally.resumes}")
    print(f"half-written files found     {len(tally.damaged)}")
    print(f"hidden leftovers on the way  {tally.leftovers}")
    print(
        f"steps lost, at most          {max(tally.lost, default=0)}; between checkpoints {asked.every}"
    )
    equal = tally.finished - tally.unequal
    print(f"runs equal to the unbroken   {equal} of {tally.finished}, bit for bit")
    for line in [*tally.failed, *tally.damaged]:
        print(line)
    bad = tally.failed or tally.damaged or tally.unequal or max(tally.lost, default=0) > asked.every
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
