"""The pipeline: requests -> stages -> files. What the command line does, a notebook does with
these.

    registry = registry.load(host.current())
    jobs = plan([request], registry, Path("outputs"))
    for output in run(jobs, registry.host):
        print(output.path)

Every request runs as a batch of its own, so an output does not depend on its neighbours: it is
bit-equal alone and among a thousand. The pipeline knows no modality: a sample is what the last
stage says it is.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from itertools import count
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mdiff.core import grids, noise, record, tasks, weights
from mdiff.core.denoiser import Denoise
from mdiff.core.errors import IntegrityError, MdiffError, UsageError
from mdiff.core.hooks import DataSet, Event, Media, Model, ModelCard, Problem, Request, Stage
from mdiff.core.host import KINDS, Host
from mdiff.core.names import Described, about
from mdiff.core.registry import Registry
from mdiff.core.request import component
from mdiff.core.sampling import State, steps

SAVE_EVERY = 10.0
"""Seconds between two saves of a sample in progress."""

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Where a run is after a step of one of its stages; good until the next step.

    Attributes:
        number: of the stage.
        part: how often the stage has run before.
        turn: how many stages have run before, each as often as it did.
        problem, carry: what the stage was asked, and what earlier stages left.
        state: `state.x0` is what the denoiser believes in, (copies, C, *axes).
    """

    request: Request
    model: Model
    number: int
    part: int
    turn: int
    problem: Problem
    carry: Mapping[str, Any]
    state: State

    @property
    def stage(self) -> Stage:
        """The stage that takes the steps."""
        return self.model.stages[self.number]

    @property
    def index(self) -> int:
        """Steps that the stage has taken, in all of its parts."""
        return self.part * self.state.total + self.state.index

    @property
    def total(self) -> int:
        """Steps that the stage takes, in all of its parts."""
        return (self.part + 1 + self.problem.more) * self.state.total

    def sample(self) -> Mapping[str, Any] | None:
        """The sample that x0 would become, were it the end of the stage.

        None where a later stage takes steps of its own. The parts of the model that follow do run.
        """
        rest = self.model.stages[self.number + 1 :]
        if self.state.x0 is None or any(stage.denoiser is not None for stage in rest):
            return None
        carry, request = dict(self.carry), tasks.first(self.request)
        carry |= self.stage.finish(request, self.problem, self.state.x0, carry)
        for stage in rest:
            more = True
            while more:
                problem = stage.prepare(request, carry)
                carry |= stage.finish(request, problem, None, carry)
                more = problem.more > 0
        return carry["sample"]


OnStep = Callable[[Moment], None]
"""Told after each step of a stage."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One output to make: what, with which model, and where it goes."""

    request: Request
    card: ModelCard
    media: Media
    path: Path


@dataclass(frozen=True, kw_only=True)
class Output:
    """One output made: `seconds` is what it took without loading the model, 0 where it was there
    already.
    """

    path: Path
    request: Request
    card: ModelCard
    record: Mapping[str, Any]
    seconds: float = 0.0
    done_before: bool = False


def plan(requests: Sequence[Request], registry: Registry, out: Path, suffix: str = "") -> list[Job]:
    """What a run would make, without weights and without touching the disk.

    Args:
        out: a folder, in which an output is named by its model, seed and request; or, with a
            suffix, the file to write.
        suffix: of the files, with or without its dot; empty for the plugin's default.

    Raises:
        UsageError: the model does not write such files, or several outputs would go into one file.
    """
    wanted = f".{suffix.lower().lstrip('.')}" if suffix else ""
    into_file = bool(out.suffix) and not out.is_dir()
    if into_file and len(requests) > 1:
        raise UsageError(f"{len(requests)} outputs do not fit into the file {out}: give a folder")
    if into_file and wanted not in ("", out.suffix.lower()):
        raise UsageError(f"--format {suffix} and the file {out.name} say different things")
    wanted = out.suffix.lower() if into_file else wanted
    found: dict[str, tuple[ModelCard, Media]] = {}
    jobs = []
    for request in requests:
        if request.model not in found:
            card = registry.resolve(request.model)
            found[request.model] = card, medium(card, registry.host, wanted)
        card, media = found[request.model]
        name = f"{card.id.split('/')[1]}-{request.seed}-{record.key(request)}{media.suffix}"
        path = out if into_file else out / name
        jobs.append(Job(request=request, card=card, media=media, path=path))
    return jobs


def medium(card: ModelCard, host: Host, suffix: str = "") -> Media:
    """What writes a model's samples into files of a suffix, empty for the plugin's default."""
    media = host.media(card.plugin)
    if not media:
        raise MdiffError(f"plugin {card.plugin!r} writes no kind of file for {card.modality}")
    if not suffix:
        return next((m for m in media if m.default), media[0])
    for one in media:
        if one.suffix == suffix:
            return one
    kinds = ", ".join(m.suffix for m in media)
    raise UsageError(f"{card.id} does not write {suffix} files; it writes: {kinds}")


def run(
    jobs: Sequence[Job],
    host: Host,
    *,
    resume: bool = False,
    keep: bool = False,
    on_step: OnStep | None = None,
) -> Iterator[Output]:
    """Makes the outputs one after another and yields each when it is on the disk, with its record
    beside it.

    Args:
        resume: leave out what is complete, and go on with a sample from its saved state.
        keep: save the state of a sample in progress, now and then and when interrupted.

    Raises:
        MissingError, IntegrityError: the weights are not there, or not what they should be.
        MdiffError: a stage or a file failed; earlier outputs stay.
    """
    for folder in {job.path.parent for job in jobs}:
        record.make_folder(folder)
    loaded: tuple[Any, Model] | None = None
    for job in jobs:
        request, card = job.request, job.card
        made = describe(card, request, host)
        if resume and record.complete(job.path, made):
            yield Output(path=job.path, request=request, card=card, record=made, done_before=True)
            continue
        host.tell(Event(name="started", data={"request": request, "path": job.path}))
        try:
            # before the model, which may take a while to load
            files = read_files(request, card, host)
            which = (card.id, card.root, request.device, request.precision)
            if loaded is None or loaded[0] != which:
                loaded = (which, open_model(card, request, host))
            start = time.perf_counter()
            saved = _Saved(job.path.with_name(f"{record.digest(made)[:12]}.state"), keep)
            before = saved.load(request.device) if resume else {}
            try:
                sample = generate(
                    loaded[1],
                    card,
                    request,
                    host=host,
                    on_step=several(saved.step, on_step),
                    resume=before,
                    files=files,
                )
            except KeyboardInterrupt:
                saved.save()
                raise
            with (
                host.blame(card.plugin, f"writing {job.media.suffix}"),
                record.output(job.path, made) as temporary,
            ):
                job.media.write(temporary, sample, made, request.options)
            saved.remove()
        except Exception as error:
            host.tell(Event(name="failed", data={"request": request, "error": error}))
            raise
        seconds = time.perf_counter() - start
        output = Output(path=job.path, request=request, card=card, record=made, seconds=seconds)
        host.tell(Event(name="saved", data={"request": request, "path": job.path}))
        yield output


def several(*told: OnStep | None) -> OnStep:
    """Tells all of them, in order; None stands for nobody."""

    def on_step(moment: Moment) -> None:
        for one in told:
            if one is not None:
                one(moment)

    return on_step


def describe(card: ModelCard, request: Request, host: Host) -> dict[str, Any]:
    """The record that an output of this request has here and now."""
    plugin = host.record(card.plugin)
    return record.make(
        request,
        card,
        dist=plugin.dist,
        dist_version=plugin.version,
        threads=torch.get_num_threads(),
    )


def as_recorded(made: Mapping[str, Any], card: ModelCard) -> None:
    """Sets up what a record says of how it was made, before it is run again.

    Raises:
        IntegrityError: the model's weights are not those of the record.
    """
    here = {file.name: file.sha256 for file in card.files}
    if made["model"] == card.id and made["weights"] != here:
        raise IntegrityError(
            f"the weights of {card.id} are not those that the record names: install mdiff "
            f"{made['mdiff']} to make the same again, or give the model and its options anew"
        )
    # How work is split over threads decides the order of sums, and so the last bit.
    torch.set_num_threads(made["threads"])


OWN = ("schedules", "grids", "samplers", "guidance", "operators", "losses", "times")
"""The modules of the core with a table `NAMES`."""


def catalogue(host: Host) -> dict[str, dict[str, Described]]:
    """All that goes by a name, by kind: the core's own, and each plugin's as `plugin/name`, each
    with what it is and its source; what a plugin offers comes from it, where it says no more.
    """
    rows = {kind: dict(import_module(f"mdiff.core.{kind}").NAMES) for kind in OWN}
    rows["grids"] |= import_module("mdiff.core.grids").LISTS
    kinds = dict.fromkeys((*OWN, *KINDS))
    found = {kind: {n: about(row) for n, row in rows.get(kind, {}).items()} for kind in kinds}
    host.load_all()
    for plugin in host.names():
        for kind in KINDS:
            for name, row in host.offers(plugin, kind).items():
                said = Described(row.summary, "") if isinstance(row, DataSet) else about(row)
                source = said.source or f"plugin {plugin}"
                found[kind][f"{plugin}/{name}"] = said._replace(source=source)
    return {kind: dict(sorted(names.items())) for kind, names in found.items() if names}


def open_model(card: ModelCard, request: Request, host: Host) -> Model:
    """Builds a model on the request's device and in its precision, and loads its weights.

    Raises:
        MissingError, IntegrityError: as `weights.load`.
        PluginError: the plugin could not build it.
    """
    dtype = DTYPES[request.precision]
    model = host.call(card.plugin, "mdiff_build", card=card, device=request.device, dtype=dtype)
    if not isinstance(model, Model):
        raise MdiffError(
            f"plugin {card.plugin!r} builds {model!r} for {card.id} instead of a Model"
        )
    weights.load(model, card)
    for module in model.modules.values():
        module.eval().requires_grad_(False)
    return model


@torch.no_grad()
def generate(
    model: Model,
    card: ModelCard,
    request: Request,
    *,
    host: Host,
    on_step: OnStep | None = None,
    resume: Mapping[int, State] | None = None,
    files: Mapping[str, Any] | None = None,
) -> Mapping[str, Any]:
    """Runs the stages of one request and returns its sample.

    Args:
        resume: states of stages, by turn: a stage goes on from its state, and one that is at its
            end is not run again.
        files: what `read_files` gives, if it was asked before.

    Raises:
        PluginError: the plugin failed in a stage, or left no sample.
        NonFiniteError: the sampler met a NaN or an infinity.
        MissingError, UsageError: as `read_files`; a task that a stage cannot do.
    """
    carry = dict(read_files(request, card, host) if files is None else files)
    asked, request, heard = request, tasks.first(request), False
    turn, more = 0, 0
    for number, stage in enumerate(model.stages):
        where = f"stage {stage.name!r} of {card.id}"
        for part in count():
            with host.blame(card.plugin, where):
                problem, others = tasks.prepared(stage, asked, carry)
                heard = heard or (part == 0 and problem.given is not None)
                x = None
                if stage.denoiser is not None:
                    here = partial(
                        Moment,
                        request=asked,
                        model=model,
                        number=number,
                        part=part,
                        turn=turn,
                        problem=problem,
                        carry=carry,
                    )
                    tell, place = _teller(on_step, here), (number, part)
                    state = (resume or {}).get(turn)
                    x = _solve(stage.denoiser, problem, others, asked, place, host, tell, state)
                carry |= stage.finish(request, problem, x, carry)
            if part and problem.more >= more:
                raise MdiffError(f"plugin {card.plugin!r}: {where} comes to no end")
            turn, more = turn + 1, problem.more
            if not more:
                break
    if asked.input is not None and not heard:
        raise MdiffError(
            f"plugin {card.plugin!r}: no stage of {card.id} did anything with the input"
        )
    if not isinstance(carry.get("sample"), Mapping):
        raise MdiffError(f"plugin {card.plugin!r}: the last stage of {card.id} left no sample")
    return carry["sample"]


def read_files(request: Request, card: ModelCard, host: Host) -> Mapping[str, Any]:
    """The samples in the files that a request names, by field.

    Raises:
        MissingError, UsageError: one that cannot be read, or a mask of another size than the input.
    """
    if request.input is None:
        return {}
    with host.blame(card.plugin, f"reading {request.input}"):
        return tasks.files(request, host.media(card.plugin))


def seeds(seed: int, copies: int, stage: int, part: int = 0) -> list[int]:
    """A seed for each candidate of a part of a stage: the first of all of them has the request's."""
    own = [derive(seed, "candidate", copy) for copy in range(copies)]
    return [derive(derive(one, "stage", stage), "part", part) for one in own]


def derive(seed: int, role: str, index: int) -> int:
    """A seed for the index-th of something, like none of the others; the 0th keeps the seed."""
    if index == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} {role} {index}".encode()).digest()[:4])


def _solve(
    denoise: Denoise,
    problem: Problem,
    others: Sequence[Problem],
    request: Request,
    place: tuple[int, int],
    host: Host,
    tell: Callable[[State], None],
    state: State | None,
) -> Tensor:
    """Samples one part of a stage, (copies, C, *axes): from where its task begins, or from a state on.

    Args:
        place: number of the stage, and of the part.
    """
    denoise, source = tasks.followed(denoise, problem, others, request)
    sampler = problem.sampler or request.sampler
    if isinstance(sampler, str):
        sampler = component("samplers", sampler, host)()
    grid = problem.grid or request.grid
    if isinstance(grid, str):
        grid = component("grids", grid, host)(problem.steps or request.steps)
    if problem.given is not None and request.strength is not None:
        grid = grids.partial(grid, request.strength)

    def streams(seed: int) -> noise.Noise:
        return noise.from_seeds(seeds(seed, problem.copies, *place), problem.shape)

    own, other = streams(request.seed), None
    if request.to_seed is not None:
        other = streams(request.to_seed)
    if state is None or state.index < state.total:
        x = tasks.begin(source, problem, request, grid, own, other) if state is None else None
        for now in steps(denoise, own, sampler=sampler, grid=grid, x=x, resume=state):
            state = now
            tell(now)
    if state is None:
        raise MdiffError(f"the grid of stage {place[0] + 1} has no step")
    return state.x


def _teller(on_step: OnStep | None, here: Callable[..., Moment]) -> Callable[[State], None]:
    if on_step is None:
        return lambda state: None
    return lambda state: on_step(here(state=state))


@dataclass
class _Saved:
    """The states of a sample in progress, one file a turn in a folder beside the output."""

    folder: Path
    keep: bool
    latest: dict[int, State] = field(default_factory=dict)
    at: float = field(default_factory=time.monotonic)

    def step(self, moment: Moment) -> None:
        if self.keep:
            self.latest[moment.turn] = moment.state
            if time.monotonic() - self.at > SAVE_EVERY:
                self.save()

    def save(self) -> None:
        for turn, state in self.latest.items():
            with record.atomic_write(self.folder / f"{turn}.safetensors") as temporary:
                save_file(state.save(), temporary)
        # what is at its end does not change any more, and is not written again
        self.latest.clear()
        self.at = time.monotonic()

    def load(self, device: str) -> dict[int, State]:
        found = {}
        for file in sorted(self.folder.glob("[0-9]*.safetensors")):
            tensors = weights.parse(file.read_bytes(), str(file))
            there = {name: tensor.to(device) for name, tensor in tensors.items()}
            found[int(file.stem)] = State.restore(there)
        return found

    def remove(self) -> None:
        rmtree(self.folder, ignore_errors=True)
