"""From a run to a model: the registry.toml of a run's folder, and a folder to give away.

A run's own registry.toml names the averaged weights of its newest checkpoint, so that `mdiff run RUN` takes them at any
moment. `export` copies what a model needs out of a run: weights in the precision that is wanted, a registry.toml with
their hashes and the facts of the training, and a README.md that says the same to people.
"""

import hashlib
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import tomli_w
import torch
from torch import Tensor

import mdiff
from mdiff.core import data, pipeline, record, registry, weights
from mdiff.core.errors import MdiffError, MissingError, UsageError, nearest
from mdiff.core.hooks import File, Model, ModelCard, Option
from mdiff.core.host import Host
from mdiff.core.training import checkpoints, log
from mdiff.core.training import recipe as recipes
from mdiff.core.training.averages import power_name, profiles, read_snapshots, synthesise
from mdiff.core.training.checkpoints import Checkpoint
from mdiff.core.training.recipe import Recipe

Precision = Literal["fp32", "fp16", "bf16"]
DTYPES: Mapping[str, torch.dtype] = {**pipeline.DTYPES, "fp16": torch.float16}
README = "README.md"


# --- the entry of a run ---------------------------------------------------------------------------


def write_entry(
    run: Path, card: ModelCard, recipe: Recipe, checkpoint: Checkpoint, parts: Mapping[str, File]
) -> ModelCard:
    """Writes the registry.toml of a run: the newest averaged weights of what is trained, and the other parts.

    Args:
        card: of what is trained.
        parts: module -> its file, relative to the run's folder.

    Raises:
        MdiffError: the system refused; the file is as it was.
    """
    stem = _running(recipe)
    own = checkpoint.files[stem]
    place = checkpoint.path.relative_to(run).as_posix()
    trained = replace(own, name=f"{place}/{own.name}", module=recipe.part)
    others = [file for module, file in parts.items() if module != recipe.part]
    made = replace(
        card,
        id=f"{card.plugin}/{recipes.slug(run.resolve().name)}",
        source=f"`mdiff train`, recipe {recipe.name or 'without a name'}",
        files=(*others, trained),
        measured=_facts(run, recipe, checkpoint),
        root=run,
    )
    with record.atomic_write(run / registry.NAME) as temporary:
        temporary.write_text(entry(made), encoding="utf-8")
    return made


def entry(card: ModelCard) -> str:
    """The text of a registry.toml with one card, which `registry.read_folder` reads back."""
    table = {
        "system": card.system,
        "summary": card.summary,
        "licence": card.licence,
        "source": card.source,
        "modality": card.modality,
        "accepts": list(card.accepts),
        "config": card.config,
        "defaults": card.defaults,
        "options": [_given(option) for option in card.options],
        "files": [_given(file) for file in card.files],
        "measured": card.measured,
    }
    return tomli_w.dumps({"models": {card.id: table}})


def _given(row: Option | File) -> dict[str, Any]:
    """The fields of a row that are not what they are by default."""
    values = {f.name: (getattr(row, f.name), f.default) for f in fields(row)}
    return {n: v for n, (v, default) in values.items() if default is MISSING or v != default}


def _running(recipe: Recipe) -> str:
    """The file of a checkpoint whose weights a model runs on: the first average, where there is one."""
    names = list(profiles(recipe.average.decays, recipe.average.powers))
    return f"average-{names[0]}" if names else "model"


def _facts(run: Path, recipe: Recipe, checkpoint: Checkpoint) -> dict[str, Any]:
    """What there is to say of a training in figures."""
    facts = checkpoint.facts
    lines = [line for line in log.read(run / log.NAME) if line["step"] <= checkpoint.step]
    found = {
        "steps": checkpoint.step,
        "began_with": facts.get("init"),
        "samples": facts.get("samples"),
        "minutes": round(facts["seconds"] / 60, 1) if "seconds" in facts else None,
        "final_loss": lines[-1]["loss"] if lines else None,
        "data": recipe.data.folder.name if recipe.data.folder else None,
        "data_rows": facts.get("rows"),
    }
    return {name: value for name, value in found.items() if value is not None}


# --- a folder to give away ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Export:
    """What became of a run: the model's card, and the parts that it has no weights for."""

    card: ModelCard
    missing: tuple[str, ...]


def export(
    run: Path,
    to: Path,
    host: Host,
    *,
    average: str = "",
    precision: Precision = "fp16",
    licence: str = "",
    name: str = "",
    say: Callable[[str], None] = print,
) -> Export:
    """Makes a folder of a run that is a model by itself: weights, registry.toml, README.md.

    Args:
        to: a folder that is not there yet, or empty.
        average: "0.999", "power-0.10" or another that the run keeps; another power, made of the run's snapshots; "none"
            for the weights themselves; empty for what `mdiff run RUN` takes.
        precision: of the weights that are written.
        licence: of the model; empty for that of the card that was trained.
        name: of the model; empty for that of the folder.
        say: told of checkpoints that are passed over.

    Raises:
        MissingError: the run is none, or has no whole checkpoint.
        UsageError: there is no such average, the precision does not hold the weights, or the folder is not empty.
        IntegrityError: a file of the run is not what it was.
        MdiffError: the system refused: the folder is as it was.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UsageError(f"{to} is there and not empty: give another --to")
    recipe, checkpoint, card = _opened(run, host, say)
    tensors, which = _weights(run, recipe, checkpoint, average)
    contents = {file.module: weights.read(run / file.name, file) for file in card.files}
    contents[recipe.part] = tensors
    if name and recipes.slug(name) != name:
        raise UsageError(
            f"--name {name!r} should be small letters, digits, _ . -, as {recipes.slug(name)}"
        )
    with _aside(to) as folder:
        files = []
        for module, own in contents.items():
            weights.write(folder / f"{module}.safetensors", _cast(own, precision, module))
            files.append(_file(folder, f"{module}.safetensors", module))
        licences = recipe.data.folder and recipe.data.folder / data.LICENCES
        if licences and licences.is_file():
            shutil.copy(licences, folder / data.LICENCES)
        also = {"data_licences": data.LICENCES} if licences and licences.is_file() else {}
        made = replace(
            card,
            id=f"{card.plugin}/{name or recipes.slug(to.resolve().name)}",
            licence=licence or card.licence,
            source=f"`mdiff train` of mdiff {mdiff.__version__}, by the recipe in {README}",
            files=tuple(files),
            measured={
                **_facts(run, recipe, checkpoint),
                **also,
                "average": which,
                "weights": precision,
            },
            root=to,
        )
        (folder / registry.NAME).write_text(entry(made), encoding="utf-8")
        missing = _missing(replace(made, root=folder), host)
        (folder / README).write_text(_readme(made, recipe, to, missing), encoding="utf-8")
    return Export(card=made, missing=missing)


def _opened(
    run: Path, host: Host, say: Callable[[str], None]
) -> tuple[Recipe, Checkpoint, ModelCard]:
    if not (run / recipes.NAME).is_file():
        raise MissingError(f"{run} is no run: it has no {recipes.NAME}, which `mdiff train` writes")
    recipe = recipes.read(run / recipes.NAME)
    checkpoint = checkpoints.newest(run / "checkpoints", say)
    if checkpoint is None or not (run / registry.NAME).is_file():
        raise MissingError(
            f"{run} has no whole checkpoint to make a model of: `mdiff train {run} --resume` goes on until "
            "there is one"
        )
    card = registry.read_folder(run, host)
    return (
        recipe,
        checkpoint,
        replace(card, files=tuple(f for f in card.files if f.module != recipe.part)),
    )


def _weights(
    run: Path, recipe: Recipe, checkpoint: Checkpoint, average: str
) -> tuple[dict[str, Tensor], str]:
    """The trained part's tensors, and the name of what they are."""
    stem = {"": _running(recipe), "none": "model"}.get(average, f"average-{average}")
    if stem in checkpoint.files:
        return checkpoint.read(stem), stem.removeprefix("average-").replace("model", "none")
    width = _width(average)
    if width is None:
        kept = [n.removeprefix("average-") for n in checkpoint.files if n.startswith("average-")]
        raise UsageError(
            f"{run} keeps no average {average!r}{nearest(average, [*kept, 'none'])} (power-0.12 and the "
            "like are made of snapshots)"
        )
    snapshots = [s for s in read_snapshots(run / "snapshots") if s.step <= checkpoint.step]
    last = max((s.step for s in snapshots), default=0)
    return synthesise(snapshots, width, last), power_name(width)


def _width(average: str) -> float | None:
    kind, _, number = average.partition("-")
    try:
        return float(number) if kind == "power" else None
    except ValueError:
        return None


def _cast(tensors: Mapping[str, Tensor], precision: Precision, module: str) -> dict[str, Tensor]:
    """Floating tensors in a precision; others as they are."""
    cast: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        cast[name] = tensor.to(DTYPES[precision]) if tensor.is_floating_point() else tensor
        if not torch.equal(cast[name].isfinite(), tensor.isfinite()):
            largest = tensor[tensor.isfinite()].abs().max().item()
            raise UsageError(
                f"{module}: {name} reaches {largest:.3g}, which {precision} does not hold: --precision bf16"
            )
    return cast


def _file(folder: Path, name: str, module: str) -> File:
    content = (folder / name).read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    return File(name=name, sha256=sha256, size=len(content), module=module)


def _missing(card: ModelCard, host: Host) -> tuple[str, ...]:
    """The parts of a model that no file fills; those that one fills are tried.

    Raises:
        IntegrityError: a file does not fit its part.
    """
    model = host.call(card.plugin, "mdiff_build", card=card, device="cpu", dtype=torch.float32)
    if not isinstance(model, Model):
        raise MdiffError(
            f"plugin {card.plugin!r} builds {model!r} for {card.id} instead of a Model"
        )
    filled = {file.module for file in card.files}
    missing = [n for n, module in model.modules.items() if n not in filled and module.state_dict()]
    there = {name: module for name, module in model.modules.items() if name not in missing}
    weights.load(replace(model, modules=there), card)
    return tuple(missing)


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which takes its place when all is written; gone if it is not."""
    aside = folder.with_name(f".{folder.name}-{secrets.token_hex(6)}")
    try:
        aside.mkdir(parents=True)
        yield aside
        for file in aside.iterdir():
            file.chmod(0o644)  # safetensors files come out readable by their owner alone
            record.flush(file)
        aside.replace(folder)
        record.flush(folder.parent)
    except OSError as error:
        raise MdiffError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


# --- for people -----------------------------------------------------------------------------------


def _readme(card: ModelCard, recipe: Recipe, folder: Path, missing: Sequence[str]) -> str:
    """The model card as text, from what the record says."""
    facts = dict(card.measured)
    size = sum(file.size for file in card.files) / 1e6
    rows = {
        "makes": card.modality,
        "system": card.system,
        "takes": ", ".join(card.accepts) or "nothing but a seed",
        "weights": f"{size:.3g} MB, {facts['weights']}, average {facts['average']}",
        "licence": card.licence,
    }
    # the folder of the data is of the machine where it was trained
    public = replace(recipe, data=replace(recipe.data, folder=None))
    started = recipe.model and f" Its architecture is that of {recipe.model}."
    trained = [
        f"Its {recipe.part!r} was trained for {facts['steps']} steps",
        f"from the weights of {facts['began_with']} on" if "began_with" in facts else "",
        f"{facts['samples']} samples" if "samples" in facts else "",
        f"{facts['minutes']} minutes" if "minutes" in facts else "",
        f"to a loss of {facts['final_loss']}" if "final_loss" in facts else "",
    ]
    learned = (
        f"`{facts['data']}`, {facts.get('data_rows', '?')} rows"
        if "data" in facts
        else "not recorded"
    )
    if "data_licences" in facts:
        learned += f"; their licences are in [{data.LICENCES}]({data.LICENCES})"
    text = ' --text "..."' if "text" in card.accepts else ""
    lacks = f"No weights are here for: {', '.join(missing)}. It does not run without them."
    return "\n".join(
        [
            f"# {card.id.split('/')[1]}",
            "",
            f"{card.summary.rstrip('.')}.{started or ''}",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows.items()),
            "",
            "## Run it",
            "",
            lacks if missing else f"```sh\nmdiff run ./{folder.name}{text}\n```",
            "",
            "## Training",
            "",
            f"{', '.join(part for part in trained if part)}. Data: {learned}.",
            "",
            f"The recipe, for `mdiff train` of mdiff {mdiff.__version__}:",
            "",
            f"```toml\n{recipes.to_toml(public)}```",
            "",
        ]
    )
