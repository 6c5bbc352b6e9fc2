"""A training run: what a recipe says put together, and trained.

The model of the recipe's card is built, its other parts get their weights, the plugin says how the part is trained, the
examples of the folder become rows, and the loop does the rest. From its first checkpoint on, the run's folder is itself
a model that `mdiff run` takes.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mdiff.core import data, losses, pipeline, record, registry, request, times, weights
from mdiff.core.errors import MdiffError, MissingError, UsageError, nearest
from mdiff.core.hooks import Example, File, Model, ModelCard, Task
from mdiff.core.host import Host
from mdiff.core.losses import Outcome
from mdiff.core.training import export, loop
from mdiff.core.training import recipe as recipes
from mdiff.core.training.checkpoints import Checkpoint
from mdiff.core.training.draws import Draws
from mdiff.core.training.log import Log
from mdiff.core.training.loop import Loss
from mdiff.core.training.recipe import Named, Recipe
from mdiff.core.training.rows import Rows, prepare


def start(
    recipe: Recipe,
    *,
    models: registry.Registry,
    out: Path,
    init: str | None = None,
    resume: bool = False,
    log: Log,
) -> None:
    """Trains what a recipe says into the folder `out`.

    Args:
        init: a model or a run whose weights the part begins with. Other parts are its too where the recipe has an
            architecture of its own and does not say where they come from.
        resume: go on with the run that is in `out`.

    Raises:
        UsageError: the recipe does not fit its model, or `out` holds a run that was not to be resumed, or another one.
        MissingError: a model, a part's weights or the data is not there.
        MdiffError: as `loop.train`.
    """
    on = loop.accelerator()
    recipe = _decided(recipe, out, on.device.type)
    if not _check(out, recipe, resume) and resume:
        log.say(f"there is no run in {out} to go on with: beginning one")
    card = recipes.card_of(recipe, models)
    examples = _examples(card, recipe, models.host)
    record.make_folder(out)
    torch.manual_seed(recipe.seed)  # the weights to begin with
    model = _build(card, models.host, str(on.device))
    module = _part(model, card, recipe.part)
    if init is not None and recipe.model is None:
        beside = _beside(init, model, recipe, models)
        recipe = replace(recipe, parts={**beside, **recipe.parts})
    with on.main_process_first():
        frozen = _parts(model, card, recipe, models, out / "parts")
    task = models.host.call(
        card.plugin, "mdiff_train", card=card, model=model, part=recipe.part, settings=recipe.task
    )
    task = _checked(task, card, recipe, frozen)
    if init is not None:
        _, tensors = source(init, recipe.part, models)
        weights.fill(module, weights.parse(tensors, init), init)
    with on.main_process_first():
        rows = prepare(examples, task, out / "cache", seed=recipe.seed, say=log.say)
    if on.is_main_process:  # from here on the folder is that of a run
        with record.atomic_write(out / recipes.NAME) as temporary:
            temporary.write_text(recipes.to_toml(recipe))
    files = {file.module: file for file in frozen}
    whole = all(name in files or name == recipe.part for name in _filled(model))

    def saved(checkpoint: Checkpoint) -> None:
        export.write_entry(out, card, recipe, checkpoint, files)

    def preview(step: int, average: Mapping[str, Tensor]) -> None:
        with _with_weights(module, average):
            _show(model, card, recipe, models.host, out / "previews", step, log)

    try:
        loop.train(
            module,
            objective(task, rows, recipe),
            out,
            recipe,
            log=log,
            on=on,
            schedule=task.denoiser.schedule if task.denoiser is not None else None,
            on_save=saved,
            on_preview=preview if whole else None,
            facts={"rows": len(rows), "model": card.id, **({"init": init} if init else {})},
        )
    finally:
        on.end_training()  # a process that leaves its group open may be aborted by the end of another


def objective(task: Task, rows: Rows, recipe: Recipe) -> Loss:
    """The loss of a step: a plugin's own, or one of the core's on its denoiser."""
    own = task.loss
    if own is not None:
        return lambda draws: own(rows.draw(draws), draws)
    denoiser, batch = task.denoiser, task.batch
    if denoiser is None or batch is None:
        raise MdiffError(
            f"the task of {recipe.part!r} has neither a loss nor a denoiser with batches"
        )
    wanted = recipe.loss or Named(name=denoiser.predicts)
    loss = losses.from_name(wanted.name, **wanted.parameters)
    # evenly over the entries of a table, or over [0, 1]
    evenly = "uniform" if denoiser.schedule.steps is None else "entries"
    drawn_by = recipe.times or Named(name=evenly, parameters={"spread": "stratified"})
    law = times.from_name(drawn_by.name, **drawn_by.parameters)

    def diffusion(draws: Draws) -> Outcome:
        x0, cond = batch(rows.draw(draws), draws)
        drawn = law(denoiser.schedule, draws.total, draws.generator)
        t, weight = (value[draws.mine].to(x0.device) for value in drawn)
        each = loss(denoiser.bind(**cond), x0, t, draws.normal(*x0.shape[1:]))
        return Outcome(mean=(each * weight.to(each)).mean(), each=each.detach(), t=t)

    return diffusion


def source(name: str, part: str, models: registry.Registry) -> tuple[File, bytes]:
    """The file that fills a part of a model or of a run, and its bytes.

    Raises:
        MissingError: there is no such model, or it has no such part.
    """
    card = models.resolve(name)
    for file in card.files:
        if file.module == part:
            return file, weights.verified(card.root / file.name, file)
    known = [file.module for file in card.files]
    raise MissingError(f"{name} has no weights for {part!r}{nearest(part, known)}")


def _decided(recipe: Recipe, out: Path, device: str) -> Recipe:
    """The recipe with what a run decides at its beginning: as the one in the folder has, where there is one.

    That is the precision, which suits the device, and where the weights of parts come from.
    """
    path = out / recipes.NAME
    if path.exists():
        old = recipes.read(path)
        precision = old.precision if recipe.precision == "auto" else recipe.precision
        return replace(recipe, precision=precision, parts={**old.parts, **recipe.parts})
    half = request.precision(recipe.precision, device) == "bf16"
    return replace(recipe, precision="bf16" if half else "fp32")


def _beside(init: str, model: Model, recipe: Recipe, models: registry.Registry) -> dict[str, str]:
    """Parts that a recipe says nothing of, and that the model to begin with has: they come from there."""
    has = {file.module for file in models.resolve(init).files}
    return {
        name: init
        for name in _filled(model)
        if name in has and name != recipe.part and name not in recipe.parts
    }


def _check(out: Path, recipe: Recipe, resume: bool) -> bool:
    """Whether there is a run in a folder, whose recipe has to be the same."""
    path = out / recipes.NAME
    if not path.exists():
        return False
    if not resume:
        raise UsageError(
            f"{out} holds a run already: --resume goes on with it, another --out begins anew"
        )
    recipes.check_same(recipes.read(path), recipe)
    return True


def _build(card: ModelCard, host: Host, device: str) -> Model:
    model = host.call(card.plugin, "mdiff_build", card=card, device=device, dtype=torch.float32)
    if not isinstance(model, Model):
        raise MdiffError(
            f"plugin {card.plugin!r} builds {model!r} for {card.id} instead of a Model"
        )
    for module in model.modules.values():
        module.eval().requires_grad_(False)
    return model


def _filled(model: Model) -> list[str]:
    """The parts that have weights."""
    return [name for name, module in model.modules.items() if module.state_dict()]


def _part(model: Model, card: ModelCard, part: str) -> nn.Module:
    if part not in model.modules:
        raise UsageError(f"{card.id} has no part {part!r}{nearest(part, model.modules)}")
    return model.modules[part]


def _parts(
    model: Model, card: ModelCard, recipe: Recipe, models: registry.Registry, folder: Path
) -> list[File]:
    """Fills the other parts of a model, and keeps a copy of their files in the run's folder."""
    for name in recipe.parts:
        _part(model, card, name)
    own = {file.module for file in card.files}
    files = []
    for name in _filled(model):
        origin = recipe.parts.get(name) or (recipe.model if name in own else None)
        if name == recipe.part or not origin:
            continue
        file, content = source(origin, name, models)
        weights.fill(model.modules[name], weights.parse(content, file.name), file.name)
        path = folder / f"{name}.safetensors"
        if not path.exists() or sha256(path.read_bytes()).hexdigest() != file.sha256:
            with record.atomic_write(path) as temporary:
                temporary.write_bytes(content)
        files.append(replace(file, name=f"{folder.name}/{path.name}"))
    return files


def _checked(task: Any, card: ModelCard, recipe: Recipe, frozen: list[File]) -> Task:
    """The task, with all that its rows depend on in its key."""
    if not isinstance(task, Task):
        raise UsageError(f"plugin {card.plugin!r} does not say how {recipe.part!r} is trained")
    hashes = {file.module: file.sha256 for file in frozen}
    for name in task.needs:
        if name not in hashes:
            raise UsageError(
                f"training {recipe.part!r} of {card.id} needs the weights of {name!r}: "
                f"--set parts.{name}=MODEL, or the folder of a run that trained it"
            )
    needed = {name: hashes[name] for name in task.needs}
    made_by = {"config": card.config, "part": recipe.part, "parts": needed, **task.made_by}
    return replace(task, made_by=made_by)


def _examples(card: ModelCard, recipe: Recipe, host: Host) -> list[Example]:
    """What there is to learn from."""
    folder = recipe.data.folder
    if folder is None:
        raise UsageError("nothing to train on: give a folder with --data FOLDER")
    found = data.examples(folder, [media.suffix for media in host.media(card.plugin)])
    chosen = [example for example in found if example.split == recipe.data.split]
    if not chosen:
        splits = ", ".join(sorted({example.split for example in found}))
        raise UsageError(f"{folder} has no split {recipe.data.split!r}; it has: {splits}")
    return chosen


@contextmanager
def _with_weights(module: nn.Module, average: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, the module has other weights, and is in evaluation."""
    own = {name: value.clone() for name, value in module.state_dict().items()}
    module.load_state_dict(dict(average))
    module.eval()
    try:
        yield
    finally:
        module.load_state_dict(own)
        module.train()


def _show(
    model: Model, card: ModelCard, recipe: Recipe, host: Host, folder: Path, step: int, log: Log
) -> None:
    """Makes the previews of a step and writes them as any output is written."""
    preview = recipe.preview
    texts = preview.texts if "text" in card.accepts else ()
    asked: list[dict[str, Any]] = [{"text": text} for text in texts] or [{}]
    media = pipeline.medium(card, host)
    for number in range(max(preview.count, len(asked))):
        fields = {**preview.request, **asked[number % len(asked)], "seed": number}
        one = request.resolve(card, {**fields, "device": "cpu", "precision": "fp32"}, host)
        path = folder / f"{step:08}-{number}{media.suffix}"
        made = pipeline.describe(card, one, host)
        try:
            sample = pipeline.generate(model, card, one, host=host)
            with record.output(path, made) as temporary:
                media.write(temporary, sample, made, one.options)
        except MdiffError as error:  # early weights may make what cannot be written
            log.say(f"no preview of step {step}: {error}")
            return
    log.say(f"previews of step {step}: {folder}")
