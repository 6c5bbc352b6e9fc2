"""Recipes: all that decides how a part of a model is trained, read strictly from a TOML file.

A table of the file is a frozen dataclass here, and its keys are the fields: what there is to set, of which type, and
what holds where nothing is said stands in one place. `read` turns a file into a `Recipe`, `overridden` lays
`--set optimizer.rate=1e-4` over it, `to_toml` writes it out whole, `find` looks one up by name.
"""

import hashlib
import json
import math
import tomllib
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeGuard, TypeVar, Union, get_args, get_origin, get_type_hints

import tomli_w

from mdiff.core import losses, registry, times
from mdiff.core.errors import MissingError, UsageError, nearest
from mdiff.core.hooks import ModelCard, Request
from mdiff.core.registry import Checker, Registry
from mdiff.core.training.averages import profiles
from mdiff.core.training.optimizers import Optimizer

NAME = "recipe.toml"
"""The recipe of a run, in its folder."""

S = TypeVar("S")

_OTHERS = "others"  # metadata of the field that takes the keys of a table which are no fields
_SET_ELSEWHERE = {"model", "text", "seed", "device", "precision", "sha256"}
_REQUEST = sorted({f.name for f in fields(Request)} - _SET_ELSEWHERE)


def _holds(where: str, settings: Any, rules: Mapping[str, tuple[bool, str]]) -> None:
    """Raises a UsageError for the first of the fields whose rule does not hold."""
    for name, (holds, right) in rules.items():
        if not holds:
            raise UsageError(f"{where}: {name} is {getattr(settings, name)}, it has to be {right}")


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is learned from: the table [data].

    Attributes:
        folder: of media files, with captions as `mdiff data` writes them or people keep them.
        split: the examples of the folder that are used.
    """

    folder: Path | None = None
    split: str = "train"


@dataclass(frozen=True, kw_only=True)
class Named:
    """Something of the core by its name, with its parameters: the tables [loss] and [times]. A text is a name alone."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict, metadata={_OTHERS: None})


@dataclass(frozen=True, kw_only=True)
class Average:
    """Running averages of the weights: the table [average].

    Attributes:
        decays: of exponential averages, each kept beside the weights; the first is what runs.
        powers: relative widths (sigma_rel) of power averages, from whose snapshots others are made afterwards.
        snapshots: steps between two snapshots; 0 for none.
    """

    decays: tuple[float, ...] = (0.999,)
    powers: tuple[float, ...] = ()
    snapshots: int = 0

    def __post_init__(self) -> None:
        _holds("average", self, {"snapshots": (self.snapshots >= 0, "0 or more")})
        profiles(self.decays, self.powers)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """How many samples a step sees: the table [batch].

    Attributes:
        size: of all processes together.
        micro: the most that one process works on at once; 0 for all of its share.
    """

    size: int = 32
    micro: int = 0

    def __post_init__(self) -> None:
        rules = {"size": (self.size >= 1, "1 or more"), "micro": (self.micro >= 0, "0 or more")}
        _holds("batch", self, rules)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """When training ends: the table [budget]. Where both are given, whichever comes first.

    Attributes:
        steps: in all, those before a resume included.
        minutes: of training, likewise.
    """

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        rules = {
            "steps": (self.steps is None or self.steps >= 1, "1 or more"),
            "minutes": (self.minutes is None or self.minutes > 0, "above 0"),
        }
        _holds("budget", self, rules)

    def progress(self, step: int, seconds: float) -> float:
        """Share of the budget that is used up, 0 to 1; always 0 where there is no end."""
        shares = (step / (self.steps or math.inf), seconds / (60 * (self.minutes or math.inf)))
        return min(1.0, max(shares))


@dataclass(frozen=True, kw_only=True)
class Save:
    """When checkpoints are written: the table [save]. There is always one at the end.

    Attributes:
        minutes: between two; 0 for never by the clock.
        steps: between two; 0 for never by the count.
        keep: how many of the newest stay.
    """

    minutes: float = 10.0
    steps: int = 0
    keep: int = 3

    def __post_init__(self) -> None:
        rules = {
            "minutes": (self.minutes >= 0, "0 or more"),
            "steps": (self.steps >= 0, "0 or more"),
            "keep": (self.keep >= 1, "1 or more"),
        }
        _holds("save", self, rules)


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Samples that are made on the way: the table [preview].

    Attributes:
        every: steps of training between two previews; 0 for none.
        texts: what is asked for; without texts, samples of a model that takes none.
        count: how many, of each text in turn, always from the same seeds; at least one of each.
        request: other fields of a request: guidance, sampler, duration, options, ...
    """

    every: int = 0
    texts: tuple[str, ...] = ()
    count: int = 1
    request: Mapping[str, Any] = field(default_factory=dict, metadata={_OTHERS: _REQUEST})

    def __post_init__(self) -> None:
        rules = {"every": (self.every >= 0, "0 or more"), "count": (self.count >= 1, "1 or more")}
        _holds("preview", self, rules)


@dataclass(frozen=True, kw_only=True)
class Log:
    """What is written down on the way: the table [log].

    Attributes:
        steps: between two lines of `log.jsonl`.
        tensorboard: whether the same goes to TensorBoard, into the folder `tensorboard`.
    """

    steps: int = 50
    tensorboard: bool = False

    def __post_init__(self) -> None:
        _holds("log", self, {"steps": (self.steps >= 1, "1 or more")})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run, in full.

    Attributes:
        name: of the recipe; where a file does not say, the name of the file.
        model: a card's id, or a folder with a model, whose architecture is trained; or instead of it
        card: the architecture itself: `plugin` and what an entry of registry.toml has but files.
        part: the module that is trained, a key of `Model.modules`.
        config: laid over the architecture's config.
        parts: module -> the model or run that its weights come from; else from `model`.
        task: the plugin's own settings of the training task.
        data: what is learned from.
        loss: a loss of the core; without it, that of what the network predicts.
        times: how noise levels are drawn; without it, evenly.
        optimizer: how parameters follow their gradients.
        average: running averages of the weights.
        batch: how many samples a step sees.
        budget: when training ends.
        precision: what the network computes in; its weights stay in fp32. "auto" is bf16 where the device is fast at
            it: a run begins by deciding, and its own recipe says which.
        seed: of everything that is drawn.
        compile: whether the network is compiled (`torch.compile`).
        checkpointing: whether activations are computed again instead of kept, which saves memory.
        threads: of the processor, in each process; 0 for as many as torch takes.
        save: when checkpoints are written.
        preview: samples that are made on the way.
        log: what is written down on the way.
    """

    name: str = ""
    model: str | None = None
    part: str
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    seed: int = 0
    compile: bool = False
    checkpointing: bool = False
    threads: int = 0
    card: Mapping[str, Any] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)
    data: Data = field(default_factory=Data)
    loss: Named | None = None
    times: Named | None = None
    optimizer: Optimizer = field(default_factory=Optimizer)
    average: Average = field(default_factory=Average)
    batch: Batch = field(default_factory=Batch)
    budget: Budget = field(default_factory=Budget)
    save: Save = field(default_factory=Save)
    preview: Preview = field(default_factory=Preview)
    log: Log = field(default_factory=Log)

    def __post_init__(self) -> None:
        rules = {
            "seed": (0 <= self.seed < 2**63, "0 or more"),
            "threads": (self.threads >= 0, "0 or more"),
        }
        _holds("recipe", self, rules)
        for named, make in ((self.loss, losses.from_name), (self.times, times.from_name)):
            if named is not None:
                make(named.name, **named.parameters)
        if (self.model is None) == (self.card is None):
            raise UsageError(
                "a recipe has either `model`, whose architecture is trained, or a table [card] "
                f"with an architecture of its own; this one has {'both' if self.model else 'none'}"
            )


# --- what training may not change in the middle ---------------------------------------------------

FREE = (
    *("name", "budget", "save", "preview", "log", "threads", "compile", "checkpointing"),
    *("batch.micro", "data.folder", "card.summary", "card.licence", "card.source"),
)
"""Keys that may change when a run goes on: all others decide what it computes."""


def changed(old: Recipe, new: Recipe) -> list[str]:
    """The keys in which two recipes differ so that a run of one cannot go on with the other."""
    before, after = _flat(_binding(old)), _flat(_binding(new))
    keys = dict.fromkeys((*before, *after))
    return [key for key in keys if before.get(key) != after.get(key)]


def check_same(old: Recipe, new: Recipe) -> None:
    """Raises a UsageError that names the first thing in which a run cannot go on with a new recipe."""
    keys = changed(old, new)
    if keys:
        key, *others = keys
        was, now = (_said(_flat(to_table(one)).get(key)) for one in (old, new))
        more = f" (and {len(others)} more: {', '.join(others)})" if others else ""
        raise UsageError(
            f"{key} was {was} in this run and is {now}{more}: give another --out, or --init RUN to "
            "start from its weights"
        )


def digest(recipe: Recipe) -> str:
    """sha256 of all that decides what a recipe computes: of everything but what is `FREE`."""
    return hashlib.sha256(json.dumps(_binding(recipe), sort_keys=True).encode()).hexdigest()


def _binding(recipe: Recipe) -> dict[str, Any]:
    """The table of a recipe without what is `FREE`."""
    table = to_table(recipe)
    for key in FREE:
        *path, last = key.split(".")
        inner = table
        for name in path:
            inner = inner.get(name, {})
        inner.pop(last, None)
    return table


def _flat(table: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Values by their dotted keys."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        key = f"{path}{name}"
        inside = isinstance(value, Mapping) and value
        found |= _flat(value, f"{key}.") if inside else {key: value}
    return found


def _said(value: Any) -> str:
    return "not set" if value is None else json.dumps(value)


# --- to and from tables ---------------------------------------------------------------------------


def read(path: Path) -> Recipe:
    """The recipe of a file.

    Raises:
        MissingError: the file cannot be read.
        UsageError: what is wrong in it, and where.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MissingError(f"no recipe {str(path)!r}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}") from error
    return from_table({"name": path.stem, **table}, str(path))


def from_table(table: Mapping[str, Any], file: str = "recipe") -> Recipe:
    """The recipe of a table as `tomllib` gives it; messages begin with `file`.

    Raises:
        UsageError: what is wrong, and where.
    """
    check = Checker(file)
    recipe: Recipe = _read(check, "", Recipe, table)
    if recipe.card is not None:
        _own_card(recipe, check)
    return recipe


def settings(kind: type[S], table: Mapping[str, Any]) -> S:
    """A plugin's own settings, a frozen dataclass, from the table [task]: as strictly as all else.

    Raises:
        UsageError: what is wrong.
    """
    found: S = _read(Checker("recipe"), "[task]", kind, table)
    return found


def within(settings: Any, **bounds: tuple[float, float]) -> None:
    """Raises a UsageError for the first of a plugin's settings that lies outside its bounds, (lowest, highest)."""
    for name, (low, high) in bounds.items():
        value = getattr(settings, name)
        if not low <= value <= high:
            right = f"{low} or more" if high == float("inf") else f"between {low} and {high}"
            raise UsageError(f"[task]: {name} is {value}, it has to be {right}")


def to_table(recipe: Recipe) -> dict[str, Any]:
    """A recipe as nested tables, with all that holds by default; `from_table` reads it back."""
    return _plain(recipe)


def to_toml(recipe: Recipe) -> str:
    """A recipe as the text of a file, with all that holds by default; `read` gives it back exactly."""
    return tomli_w.dumps(to_table(recipe))


def overridden(recipe: Recipe, pairs: Sequence[str]) -> Recipe:
    """A recipe with other values: `optimizer.rate=1e-4`, `config.unet.channels=64`, `model=image/ddpm-32`.

    Values are TOML; what is none is text.

    Raises:
        UsageError: not that form, no such key, or a value that does not fit.
    """
    table = to_table(recipe)
    for pair in pairs:
        key, equals, text = pair.partition("=")
        *path, last = key.strip().split(".")
        if not (equals and last and all(path)):
            raise UsageError(f"--set {pair!r} should be key=value, as in optimizer.rate=1e-4")
        inner = table
        for name in path:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise UsageError(f"--set {pair!r}: {name!r} is no table, it is {inner!r}")
        inner[last] = _value_of(text.strip())
    return from_table(table, "--set")


def _value_of(text: str) -> Any:
    """A text as TOML reads it, or the text itself."""
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = table["value"]
    # dates are none of our types, and a second line would be a second key
    return value if len(table) == 1 and isinstance(value, _TOML) else text


_TOML = (bool, int, float, str, list, dict)


def _read(check: Checker, where: str, kind: type, table: Any) -> Any:
    """A dataclass from a table whose keys are its fields, of their types."""
    check.that(isinstance(table, Mapping), where, f"should be a table, it is {table!r}")
    hints, others = _hints(kind), _others(kind)
    own = [f.name for f in fields(kind) if others is None or f.name != others.name]
    values: dict[str, Any] = {}
    for name, value in table.items():
        if name in own:
            values[name] = _typed(check, where, name, value, hints[name])
            continue
        allowed = () if others is None else others.metadata[_OTHERS]
        if allowed is not None:
            check.keys(where, {name: value}, (*own, *allowed))
        values.setdefault(others.name if others else "", {})[name] = value
    for f in fields(kind):
        needed = f.default is MISSING and f.default_factory is MISSING
        check.that(not needed or f.name in values, where, f"{f.name!r} is missing")
    try:
        return kind(**values)
    except UsageError as error:
        raise UsageError(f"{check.file}: {error}") from None


def _typed(check: Checker, where: str, name: str, value: Any, hint: Any) -> Any:
    """A value of a key, as a type hint has it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):  # X | None: what is absent is not in the table
        return _typed(check, where, name, value, next(a for a in arguments if a is not type(None)))
    if _is_dataclass(hint):
        alone = hint is Named and isinstance(value, str)
        return _read(check, f"[{name}]", hint, {"name": value} if alone else value)
    if origin is Literal:
        choices = " or ".join(map(repr, arguments))
        check.that(value in arguments, where, f"{name!r} should be {choices}, it is {value!r}")
        return value
    if origin is tuple:
        right = isinstance(value, list | tuple)
        check.that(right, where, f"{name!r} should be a list, it is {value!r}")
        return tuple(_typed(check, where, name, item, arguments[0]) for item in value)
    if origin is Mapping:
        right = isinstance(value, Mapping)
        check.that(right, where, f"{name!r} should be a table, it is {value!r}")
        inner = f"[{name}]"
        return {k: _typed(check, inner, k, v, arguments[1]) for k, v in value.items()}
    if hint is Any:
        return value
    accepted, words = _TYPES[hint]
    right = isinstance(value, accepted) and (hint is bool or not isinstance(value, bool))
    right = right and not (hint is float and not math.isfinite(value))
    check.that(right, where, f"{name!r} should be {words}, it is {value!r}")
    return hint(value)


_TYPES: Mapping[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "text"),
    Path: ((str, Path), "a path"),
}


def _plain(value: Any) -> Any:
    """Tables and lists instead of dataclasses and tuples; without fields that are None or an empty table."""
    if is_dataclass(value):
        others = _others(type(value))
        pairs = {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
        further = pairs.pop(others.name) if others is not None else {}
        return {name: inner for name, inner in pairs.items() if inner not in (None, {})} | further
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _others(kind: type) -> Any:
    """The field that takes what is no field, None where a table has no such keys."""
    return next((f for f in fields(kind) if _OTHERS in f.metadata), None)


def _is_dataclass(hint: Any) -> TypeGuard[type]:
    return isinstance(hint, type) and is_dataclass(hint)


# --- what it names --------------------------------------------------------------------------------


def find(target: str, models: Registry) -> Recipe:
    """The recipe that a name means: a file, `plugin/recipe`, a plugin or a modality (for its recipe "default"), a model
    that has a recipe of its name, or the folder of a run.

    Raises:
        MissingError: there is none; the message names the nearest.
        UsageError: the recipe is wrong, or the name means several.
    """
    if target.endswith(".toml"):
        return read(Path(target))
    host, named = models.host, _named(target, models)
    if is_run(target, models):
        return read(Path(target) / NAME)
    if named is None and Path(target).is_dir():
        raise MissingError(
            f"the folder {target} is no run: it has no {NAME}; to begin one: "
            f"mdiff train RECIPE --data FOLDER --out {target}"
        )
    if named is None:
        raise MissingError(
            f"no recipe {target!r} (a .toml file, a modality, plugin/recipe, or the folder of a "
            f"run){nearest(target, [*host.names(), *models.cards])}"
        )
    plugin, short = named
    recipes = host.offers(plugin, "recipes")
    if short not in recipes:
        raise MissingError(f"plugin {plugin!r} has no recipe {short!r}{nearest(short, recipes)}")
    recipe = read(recipes[short])
    return replace(recipe, name=plugin) if recipe.name == "default" else recipe


def is_run(target: str, models: Registry) -> bool:
    """Whether a target is the folder of a run, and nothing else by that name: `./audio` always is a folder."""
    return (Path(target) / NAME).is_file() and _named(target, models) is None


def _named(target: str, models: Registry) -> tuple[str, str] | None:
    """The plugin and the recipe that a name stands for; None where it stands for nothing that is installed."""
    installed = {record.name for record in models.host.records}
    plugin, slash, short = target.partition("/")
    if slash:
        return (plugin, short) if plugin in installed else None
    if target in installed:
        return target, "default"
    makers = {card.plugin for card in models.cards.values() if card.modality == target}
    if len(makers) == 1:
        return makers.pop(), "default"
    if any(id.split("/")[1] == target for id in models.cards):
        plugin, _, short = models.resolve(target).id.partition("/")
        return plugin, short
    return None


def card_of(recipe: Recipe, models: Registry) -> ModelCard:
    """The card of what a recipe trains: that of its model, or its own, with its [config] laid over.

    The files are those of the model, none for a recipe with a [card]: the caller says which of them hold.

    Raises:
        MissingError, UsageError: as `Registry.resolve`; the recipe's own card is wrong.
    """
    if recipe.model is not None:
        card = models.resolve(recipe.model)
    else:
        card = _own_card(recipe, Checker(recipe.name or "recipe"))
        models.host.record(card.plugin)
    return replace(card, config=laid_over(card.config, recipe.config))


def laid_over(table: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A table with the values of another: tables inside are merged, all else is replaced."""
    merged = dict(table)
    for name, value in over.items():
        inner = merged.get(name)
        if isinstance(inner, Mapping) and isinstance(value, Mapping):
            merged[name] = laid_over(inner, value)
        else:
            merged[name] = value
    return merged


def slug(name: str) -> str:
    """A name in the letters that the id of a model may have."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "_.-") else "-" for c in name.lower())
    return kept.strip("_.-") or "model"


def _own_card(recipe: Recipe, check: Checker) -> ModelCard:
    entry = dict(recipe.card or {})
    plugin = check.typed("[card]", entry, "plugin", str)
    entry.pop("plugin")
    taken = [name for name in ("files", "measured") if name in entry]
    check.that(not taken, "[card]", f"{taken and taken[0]!r} is for models that are trained")
    id = f"{plugin}/{slug(recipe.name or 'recipe')}"
    return registry.card_of(check, id, entry, Path(), where="[card]")


def listed(models: Registry) -> Iterable[tuple[str, Path]]:
    """Every recipe of the installed plugins, as `plugin/recipe`; loads them all."""
    for record, recipes in models.host.each("mdiff_recipes"):
        for name, path in sorted(recipes.items()):
            yield f"{record.name}/{name}", path
