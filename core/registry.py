"""The registry: model cards read from registry.toml files, and the model that a name means.

A registry.toml is data that sits in a plugin's package, or in a package above it (the built-in
plugins share the one at the root), so listing models imports no plugin. A folder with a
registry.toml of its own is a model too.
"""

import importlib.util
import math
import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from mdiff.core.errors import MissingError, UsageError, nearest
from mdiff.core.hooks import File, ModelCard, Option, Request
from mdiff.core.host import Host

NAME = "registry.toml"
ACCEPTABLE = ("text", "negative", "class_name", "duration", "input", "mask", "operator")
"""Request fields that a model may or may not listen to; the others mean something to every model.
"""
DEFAULTABLE = ("steps", "sampler", "grid", "guidance", "duration", "precision", "strength")
BOUNDABLE = ("steps", "guidance", "duration")
"""Request fields that an option of the same name bounds."""

TYPES: Mapping[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
}
"""The Python types that a value of an option may have."""

_KINDS = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false"}
_REQUEST = {f.name for f in fields(Request)}
_ID = re.compile(r"[a-z0-9][a-z0-9_.-]*/[a-z0-9][a-z0-9_.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TABLES = ("config", "defaults", "measured")
_TEXTS = ("system", "summary", "licence", "source")
APART = ("encoders", "evaluators")
"""Tables of networks that ship beside models and run in no request: text encoders, and judges that metrics ask."""


@dataclass(frozen=True, kw_only=True)
class Registry:
    """The models at hand. `problems` holds a line for each registry.toml that could not be used.

    `apart` are the cards of networks that are no models, by table and id: `APART`.
    """

    host: Host
    cards: Mapping[str, ModelCard] = field(default_factory=dict)
    apart: Mapping[str, Mapping[str, ModelCard]] = field(default_factory=dict)
    defaults: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    def resolve(self, name: str) -> ModelCard:
        """The card that a name means: an id, a modality, a short name that only one model has, or a
        folder.

        Raises:
            UsageError: the short name is that of several models, or the folder's registry.toml is
                wrong.
            MissingError: there is no such model; the message names the nearest, or why its plugin
                is not usable.
        """
        if name in self.cards:
            return self.cards[name]
        if name in self.defaults:
            return self.cards[self.defaults[name]]
        short = [id for id in self.cards if id.split("/")[1] == name]
        if len(short) > 1:
            raise UsageError(
                f"{name!r} is the name of {' and '.join(short)}: give one of them in full"
            )
        if short:
            return self.cards[short[0]]
        if (Path(name) / NAME).is_file():
            return read_folder(Path(name), self.host)
        if Path(name).is_dir() and name not in self.host.names():
            raise MissingError(
                f"the folder {name} is no model: it has no {NAME}; that of a training has one from its first "
                "checkpoint on"
            )
        return self._from_plugin(name)

    def _from_plugin(self, name: str) -> ModelCard:
        """A card that only a loaded plugin knows of, else the reason why there is none."""
        plugin = name.split("/")[0]
        if any(record.name == plugin for record in self.host.records):
            for card in self.host.call(plugin, "mdiff_models") or ():
                if card.id == name:
                    return card
        known = (*self.cards, *self.defaults, *(id.split("/")[1] for id in self.cards))
        raise MissingError(
            f"no model {name!r}{nearest(name, known)} (`mdiff models` lists what is installed)"
        )


def load(host: Host) -> Registry:
    """Reads the registry.toml of every plugin of a host. Imports none of them."""
    owners: dict[Path, list[str]] = {}
    for record in host.records:
        path = find(record.value)
        if path is not None:
            owners.setdefault(path, []).append(record.name)
    cards: dict[str, ModelCard] = {}
    apart: dict[str, dict[str, ModelCard]] = {kind: {} for kind in APART}
    defaults: dict[str, str] = {}
    problems: list[str] = []
    usable = set(host.names())
    for path, plugins in owners.items():
        try:
            found, chosen, beside = read(path, plugins)
        except UsageError as error:
            problems.append(str(error))
            continue
        cards |= {id: card for id, card in found.items() if card.plugin in usable}
        for kind, entries in beside.items():
            apart[kind] |= {id: card for id, card in entries.items() if card.plugin in usable}
        defaults |= {name: id for name, id in chosen.items() if found[id].plugin in usable}
    return Registry(
        host=host, cards=cards, apart=apart, defaults=defaults, problems=tuple(problems)
    )


def find(module: str) -> Path | None:
    """The registry.toml in the package of a module or in the nearest package above it, importing
    nothing.
    """
    top, *rest = module.split(":")[0].split(".")
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # a module that was put into sys.modules by hand has no spec
        return None
    for location in (spec and spec.submodule_search_locations) or ():
        for depth in range(len(rest), -1, -1):
            path = Path(location, *rest[:depth], NAME)
            if path.is_file():
                return path
    return None


def read_folder(folder: Path, host: Host) -> ModelCard:
    """The model of a folder that holds a registry.toml.

    Raises:
        UsageError: the file is wrong, or it has several models and no default.
        MissingError: the plugin that builds the model is not installed.
    """
    cards, defaults, _ = read(folder / NAME, None)
    if len(cards) > 1 and len(defaults) != 1:
        raise UsageError(
            f"{folder} holds {', '.join(cards)}: name one under [defaults] in its {NAME}"
        )
    if not cards:
        raise UsageError(f"{folder / NAME} has no model")
    card = cards[next(iter(defaults.values()))] if len(cards) > 1 else next(iter(cards.values()))
    host.record(card.plugin)
    return card


def read(
    path: Path, plugins: Collection[str] | None
) -> tuple[dict[str, ModelCard], dict[str, str], dict[str, dict[str, ModelCard]]]:
    """What a registry.toml holds, checked strictly: cards of models, defaults, and cards of what is `APART` by table.

    Args:
        plugins: the plugins that may have models in it, None for any.

    Raises:
        UsageError: what is wrong, and where.
    """
    try:
        table = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}") from error
    check = Checker(str(path))
    check.keys("", table, ("defaults", "models", *APART))

    def cards_of(kind: str) -> dict[str, ModelCard]:
        entries = check.typed("", table, kind, dict, {})
        return {
            id: card_of(check, id, entry, path.parent, plugins) for id, entry in entries.items()
        }

    cards, apart = cards_of("models"), {kind: cards_of(kind) for kind in APART}
    defaults = check.typed("", table, "defaults", dict, {})
    for name, id in defaults.items():
        check.that(id in cards, "defaults", f"{name} = {id!r} is not a model of this file")
        ours = {cards[id].plugin, cards[id].modality}
        # Only the plugin called `audio` may say what `mdiff run audio` means.
        owner = plugins is None or name in plugins
        check.that(
            name in ours and owner,
            "defaults",
            f"{name!r} is not a plugin of this file with that model",
        )
    return cards, defaults, apart


def network(module: str, kind: str, id: str) -> ModelCard:
    """The card of a network that ships with a module's package, of a table of `APART`.

    Raises:
        MissingError: there is none.
    """
    path = find(module)
    known = read(path, None)[2][kind] if path is not None else {}
    if id not in known:
        raise MissingError(f"{path or module} has no {id!r} under [{kind}]{nearest(id, known)}")
    return known[id]


@dataclass(frozen=True)
class Checker:
    """Checks of a table that say where in which file something is wrong."""

    file: str

    def that(self, holds: bool, where: str, message: str) -> None:
        if not holds:
            raise UsageError(f"{self.file}: {f'{where}: ' if where else ''}{message}")

    def keys(self, where: str, table: Mapping[str, Any], known: Collection[str]) -> None:
        for name in table:
            self.that(name in known, where, f"unknown key {name!r}{nearest(name, known)}")

    def typed(
        self, where: str, table: Mapping[str, Any], name: str, kind: type, default: Any = None
    ) -> Any:
        value = table.get(name, default)
        self.that(value is not None, where, f"{name!r} is missing")
        right = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
        self.that(right, where, f"{name!r} should be a {_WORDS[kind]}, it is {value!r}")
        return value


def check_config(card: ModelCard, known: Collection[str]) -> None:
    """Raises a UsageError for a key of a card's config that its system does not know; the nearest is named."""
    Checker(card.id).keys("config", card.config, known)


_WORDS = {dict: "table", list: "list", str: "text", int: "whole number"}


def card_of(
    check: Checker,
    id: str,
    entry: Any,
    root: Path,
    plugins: Collection[str] | None = None,
    where: str = "",
) -> ModelCard:
    """The card of an entry, checked strictly; messages say `where` it stands.

    Raises:
        UsageError: what is wrong, and where.
    """
    where = where or f"model {id!r}"
    check.that(
        _ID.fullmatch(id) is not None, where, "the id should be 'plugin/model' in lower case"
    )
    plugin = id.split("/")[0]
    if plugins is not None:
        check.that(
            plugin in plugins, where, f"its plugin should be one of: {', '.join(sorted(plugins))}"
        )
    check.that(isinstance(entry, dict), where, "should be a table")
    known = (*_TEXTS, "modality", "accepts", *_TABLES, "options", "files")
    check.keys(where, entry, known)
    tables = {name: check.typed(where, entry, name, dict, {}) for name in _TABLES}
    check.keys(f"{where} defaults", tables["defaults"], DEFAULTABLE)
    accepts = check.typed(where, entry, "accepts", list, [])
    for name in accepts:
        check.that(isinstance(name, str), f"{where} accepts", f"{name!r} should be text")
        check.keys(f"{where} accepts", {name: None}, ACCEPTABLE)
    return ModelCard(
        id=id,
        plugin=plugin,
        modality=check.typed(where, entry, "modality", str, plugin),
        accepts=tuple(accepts),
        options=_options(check, where, entry),
        files=_files(check, where, entry),
        root=root,
        **{name: check.typed(where, entry, name, str) for name in _TEXTS},
        **tables,
    )


def _rows(
    check: Checker, where: str, entry: Mapping[str, Any], name: str, known: Collection[str]
) -> list[tuple[str, dict[str, Any]]]:
    """The tables of a list, each with the words for where it is."""
    rows = check.typed(where, entry, name, list, [])
    places = [(f"{where} {name}[{i}]", row) for i, row in enumerate(rows)]
    for place, row in places:
        check.that(isinstance(row, dict), place, "should be a table")
        check.keys(place, row, known)
    return places


def _options(check: Checker, where: str, entry: Mapping[str, Any]) -> tuple[Option, ...]:
    options = []
    for place, row in _rows(check, where, entry, "options", [f.name for f in fields(Option)]):
        name = check.typed(place, row, "name", str)
        kind = check.typed(place, row, "type", str)
        check.keys(place, {kind: None}, TYPES)
        check.that(name.isidentifier(), place, f"{name!r} is not a plain name")
        taken = name in _REQUEST and name not in BOUNDABLE
        check.that(not taken, place, f"{name!r} is a field of every request")
        choices = check.typed(place, row, "choices", list, [])
        check.that(name in BOUNDABLE or "default" in row, place, "'default' is missing")
        option = Option(**{**row, "choices": tuple(choices)})
        wrong = problem(option, option.default) if "default" in row else ""
        check.that(not wrong, place, f"the default {wrong}")
        options.append(option)
    check.that(len({o.name for o in options}) == len(options), where, "an option is there twice")
    return tuple(options)


def problem(option: Option, value: Any) -> str:
    """What is wrong with a value of an option, as the end of a sentence; empty where nothing is."""
    number = option.type in ("int", "float")
    right = isinstance(value, TYPES[option.type]) and not (number and isinstance(value, bool))
    if not right:
        return f"should be {_KINDS[option.type]}, it is {value!r}"
    if number and not math.isfinite(value):
        return f"should be finite, it is {value!r}"
    if option.choices and value not in option.choices:
        return f"should be one of {', '.join(map(str, option.choices))}; it is {value!r}"
    if option.minimum is not None and value < option.minimum:
        return f"should be at least {option.minimum:g}, it is {value!r}"
    if option.maximum is not None and value > option.maximum:
        return f"should be at most {option.maximum:g}, it is {value!r}"
    return ""


def _files(check: Checker, where: str, entry: Mapping[str, Any]) -> tuple[File, ...]:
    files = []
    for place, row in _rows(check, where, entry, "files", [f.name for f in fields(File)]):
        for key in ("name", "sha256", "module"):
            check.typed(place, row, key, str)
        file = File(**{**row, "size": check.typed(place, row, "size", int)})
        inside = file.name == str(PurePosixPath(file.name)) and not (
            {"..", "/", ""} & set(PurePosixPath(file.name).parts) or set(file.name) & set("\\:")
        )
        check.that(inside, place, f"{file.name!r} should be a path inside the folder of this file")
        right = file.name.endswith(".safetensors")
        check.that(right, place, f"{file.name!r} should be a .safetensors file")
        right = _SHA256.fullmatch(file.sha256) is not None
        check.that(right, place, f"'sha256' should be 64 hexadecimal digits, it is {file.sha256!r}")
        check.that(file.size > 0, place, f"'size' should be positive, it is {file.size}")
        files.append(file)
    modules = {f.module for f in files}
    check.that(len(modules) == len(files), where, "two files fill the same module")
    return tuple(files)
