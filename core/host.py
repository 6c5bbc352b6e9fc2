"""The plugin host: which plugins are installed, what state each is in, and calls into one at a
time.

Discovery reads entry-point metadata and imports nothing. A plugin is loaded when it is asked for by
name. Whatever it does wrong is written into its `Record`, and the others go on working.

Environment: MDIFF_PLUGINS="a,b" allows only those (empty: none), MDIFF_BLOCK_PLUGINS="a" blocks;
both take names of plugins and of distributions. MDIFF_STRICT_PLUGINS=1 lets a plugin's own
exception through, traceback and all.
"""

import importlib
import logging
import os
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, Literal, final

import pluggy

from mdiff.core.errors import MdiffError, MissingError, PluginError, nearest
from mdiff.core.hooks import API, GROUP, Components, Event, Media, PluginInfo, Specs, TextEncoder

log = logging.getLogger("mdiff")

PARTS = tuple(field.name for field in fields(Components))
KINDS = (*PARTS, "datasets", "metrics", "text_encoders")
"""What plugins offer by name, as `plugin/name`: `PARTS` come from mdiff_components, each other from
its own hook. Recipes are offered too, but they are files and no components.
"""

Status = Literal["found", "loaded", "failed", "clash", "blocked", "incompatible"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One installed plugin.

    Attributes:
        value: its module.
        dist, version: the distribution it came in.
        error: why it cannot be used, in one line.
        seconds: what loading it took.
    """

    name: str
    value: str
    dist: str
    version: str = ""
    status: Status = "found"
    error: str = ""
    seconds: float = 0.0


def installed() -> list[Record]:
    """The plugins of this Python, from the metadata of its distributions: nothing is imported."""
    return [
        Record(name=e.name, value=e.value, dist=e.dist.name, version=e.dist.version)
        for e in entry_points(group=GROUP)
        if e.dist is not None
    ]


def discover() -> "Host":
    """A host of the installed plugins, as the environment allows them."""
    allowed, blocked = os.environ.get("MDIFF_PLUGINS"), os.environ.get("MDIFF_BLOCK_PLUGINS", "")
    return Host(
        installed(),
        only=None if allowed is None else _words(allowed),
        block=_words(blocked),
        strict=os.environ.get("MDIFF_STRICT_PLUGINS") == "1",
    )


def current() -> "Host":
    """The host in use: that of the innermost `use`, else this Python's, discovered once."""
    return _current.get() or _discovered()


@contextmanager
def use(host: "Host") -> Iterator["Host"]:
    """Makes a host the current one inside a `with`."""
    token = _current.set(host)
    try:
        yield host
    finally:
        _current.reset(token)


@final
class Host:
    """Plugins by name. `records` is the state of each, blocked and clashing ones included."""

    def __init__(
        self,
        records: Iterable[Record],
        *,
        only: Iterable[str] | None = None,
        block: Iterable[str] = (),
        strict: bool = False,
    ) -> None:
        self._given = tuple(records)
        self._only = only
        self._block = frozenset(block)
        self.records = _sift(self._given, only, self._block)
        self.strict = strict
        self._modules: dict[str, ModuleType] = {}
        self._infos: dict[str, PluginInfo] = {}
        self._encoders: dict[str, TextEncoder] = {}
        self._manager = pluggy.PluginManager("mdiff")
        self._manager.add_hookspecs(Specs)

    def blocking(self, names: Iterable[str]) -> "Host":
        """A fresh host that blocks these plugins too."""
        block = self._block.union(names)
        return Host(self._given, only=self._only, block=block, strict=self.strict)

    def names(self) -> list[str]:
        """The plugins that are usable as far as is known without loading them."""
        return [r.name for r in self.records if r.status in ("found", "loaded")]

    def record(self, name: str) -> Record:
        """The record of a plugin.

        Raises:
            MissingError: no such plugin is installed.
        """
        for record in self.records:
            if record.name == name:
                return record
        raise MissingError(
            f"no plugin {name!r} is installed: `pip install` the package that brings it"
            f"{nearest(name, self.names())}"
        )

    def load(self, name: str) -> Record:
        """Loads a plugin, once.

        Raises:
            MissingError: it is not installed, blocked, incompatible, or its name is taken twice.
            PluginError: it failed to load, now or earlier.
        """
        record = self.record(name)
        if record.status == "found":
            record = self._load(record)
        if record.status == "loaded":
            return record
        kind = PluginError if record.status == "failed" else MissingError
        raise kind(line(record))

    def load_all(self) -> None:
        """Loads every usable plugin; what fails is in `records`."""
        for name in self.names():
            self._try(name)

    def info(self, name: str) -> PluginInfo:
        """What a plugin says of itself. Raises as `load`."""
        self.load(name)
        return self._infos[name]

    def call(self, name: str, hook: str, **arguments: Any) -> Any:
        """One plugin's answer to a hook, None where it has no answer.

        Raises:
            MissingError, PluginError: as `load`.
            PluginError: the hook failed. Errors of our own tree come through as they are.
        """
        self.load(name)
        with self.blame(name, hook):
            return self._ask(name, hook, arguments)

    @contextmanager
    def blame(self, name: str, where: str) -> Iterator[None]:
        """Turns what a plugin's code raises into a `PluginError` that names the plugin and where
        it was; errors of our own tree say enough and come through as they are.
        """
        try:
            yield
        except MdiffError:
            raise
        except (Exception, SystemExit) as error:
            if self.strict:
                raise
            record = self.record(name)
            raise PluginError(
                f"plugin {name!r} ({record.dist} {record.version}) failed in {where}: "
                f"{_cause(error)}"
            ) from error

    def each(self, hook: str, **arguments: Any) -> Iterator[tuple[Record, Any]]:
        """Every plugin's answer to a hook, loading them all; one that fails is reported and left
        out.
        """
        for name in self.names():
            if self._try(name):
                try:
                    answer = self.call(name, hook, **arguments)
                except MdiffError as error:
                    log.warning("%s", error)
                    continue
                if answer is not None:
                    yield self.record(name), answer

    def tell(self, event: Event) -> None:
        """Tells an event to the plugins that are loaded."""
        for name in tuple(self._modules):
            try:
                self.call(name, "mdiff_event", event=event)
            except MdiffError as error:
                log.warning("%s", error)

    def offers(self, plugin: str, kind: str) -> Mapping[str, Any]:
        """What a plugin offers of one of `KINDS`, by short name. Raises as `call`."""
        if kind in PARTS:
            return getattr(self.call(plugin, "mdiff_components") or Components(), kind)
        return self.call(plugin, f"mdiff_{kind}") or {}

    def offer(self, kind: str, name: str) -> Any:
        """What stands behind `plugin/name`, loading that plugin only.

        Raises:
            MissingError: the plugin has no such thing.
        """
        plugin, _, short = name.partition("/")
        offers = self.offers(plugin, kind)
        if short not in offers:
            what = kind.replace("_", " ").removesuffix("s")
            raise MissingError(f"plugin {plugin!r} has no {what} {short!r}{nearest(short, offers)}")
        return offers[short]

    def text_encoder(self, name: str) -> TextEncoder:
        """The text encoder `plugin/name`, built once."""
        if name not in self._encoders:
            build = self.offer("text_encoders", name)
            with self.blame(name.split("/")[0], f"building the text encoder {name}"):
                self._encoders[name] = build()
        return self._encoders[name]

    def media(self, plugin: str) -> list[Media]:
        """The kinds of file for a plugin's samples: its own, else those of its modality from other
        plugins.
        """
        own = list(self.call(plugin, "mdiff_media") or ())
        if own:
            return own
        modality = self.info(plugin).modality
        answers = self.each("mdiff_media")
        return [m for r, media in answers if self.info(r.name).modality == modality for m in media]

    def _try(self, name: str) -> bool:
        try:
            self.load(name)
        except MdiffError as error:
            log.warning("%s", error)
            return False
        return True

    def _ask(self, name: str, hook: str, arguments: Mapping[str, Any]) -> Any:
        others = [module for other, module in self._modules.items() if other != name]
        answers = self._manager.subset_hook_caller(hook, others)(**arguments)
        return answers[0] if answers else None

    def _load(self, record: Record) -> Record:
        start = time.perf_counter()
        status: Status = "loaded"
        error = ""
        try:
            self._register(record)
        except (Exception, SystemExit) as problem:
            if self._manager.has_plugin(record.name):
                self._manager.unregister(name=record.name)
            self._modules.pop(record.name, None)
            if self.strict and not isinstance(problem, MdiffError):
                raise
            status = "incompatible" if isinstance(problem, MissingError) else "failed"
            error = str(problem) if isinstance(problem, MdiffError) else _cause(problem)
        done = replace(record, status=status, error=error, seconds=time.perf_counter() - start)
        self.records[self.records.index(record)] = done
        return done

    def _register(self, record: Record) -> None:
        """Import, register, check hooks, check version: in that order, and all or nothing."""
        module = importlib.import_module(record.value)
        self._manager.register(module, record.name)
        self._modules[record.name] = module
        callers = self._manager.get_hookcallers(module) or []
        unknown = sorted(c.name for c in callers if not c.has_spec())
        if unknown:
            known = [name for name in vars(Specs) if name.startswith("mdiff_")]
            raise PluginError(f"there is no hook {unknown[0]!r}{nearest(unknown[0], known)}")
        self._manager.check_pending()
        info = self._ask(record.name, "mdiff_info", {})
        if not isinstance(info, PluginInfo):
            raise PluginError(f"mdiff_info gave {info!r} instead of a PluginInfo")
        if info.name != record.name:
            raise PluginError(
                f"mdiff_info says {info.name!r}, the entry point {record.name!r}: they must agree"
            )
        if info.api[0] != API[0] or info.api[1] > API[1]:
            theirs, ours = (".".join(map(str, api)) for api in (info.api, API))
            raise MissingError(
                f"written for version {theirs} of the hooks and this mdiff has {ours}: "
                f"`pip install -U mdiffusion {record.dist}`"
            )
        self._infos[record.name] = info


def line(record: Record) -> str:
    """One line about a plugin that cannot be used: its name, where it came from, why, and the way
    out.
    """
    mend = f"; `pip uninstall {record.dist}` removes it" if record.status == "failed" else ""
    where = f"{record.dist} {record.version}".strip()
    return f"plugin {record.name!r} ({where}) is {_VERBS[record.status]}: {record.error}{mend}"


_VERBS = {
    "failed": "broken",
    "clash": "ambiguous",
    "blocked": "blocked",
    "incompatible": "incompatible",
}


def _sift(
    records: Iterable[Record], only: Iterable[str] | None, block: Collection[str]
) -> list[Record]:
    """Collapses what is there twice, marks what is blocked, then what clashes among the rest."""
    allowed = None if only is None else set(only)

    def barred(record: Record) -> str:
        if record.name in block or record.dist in block:
            return "by MDIFF_BLOCK_PLUGINS or --no-plugin"
        inside = allowed is None or record.name in allowed or record.dist in allowed
        return "" if inside else "it is not in MDIFF_PLUGINS"

    # An editable install and a wheel of one distribution are one plugin, the first on the path.
    unique: dict[tuple[str, str, str], Record] = {}
    for record in records:
        unique.setdefault((record.name, record.value, record.dist), record)
    sifted = []
    for record in unique.values():
        error = barred(record)
        sifted.append(replace(record, status="blocked", error=error) if error else record)
    counts = Counter(r.name for r in sifted if r.status == "found")
    for i, record in enumerate(sifted):
        if record.status == "found" and counts[record.name] > 1:
            dists = sorted(
                r.dist for r in sifted if r.name == record.name and r.status != "blocked"
            )
            error = (
                f"{' and '.join(dists)} each bring a plugin of this name; uninstall one, or set "
                f"MDIFF_BLOCK_PLUGINS={dists[-1]}"
            )
            sifted[i] = replace(record, status="clash", error=error)
    # A blocked namesake must not hide the plugin that is allowed.
    return sorted(sifted, key=lambda r: (r.name, r.status == "blocked"))


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _cause(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


_current: ContextVar[Host | None] = ContextVar("mdiff_host", default=None)
_discovered = cache(discover)
