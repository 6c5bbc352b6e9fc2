"""The conformance kit: what every plugin must do, as checks with names.

In a plugin's own tests one line does it:

    def test_conformance(): conforms("pointcloud")

and `mdiff plugins --check pointcloud` prints the same checks.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdiff.core import record, registry
from mdiff.core.errors import MdiffError
from mdiff.core.hooks import DataSet, Media, Model, ModelCard, PluginInfo, Request, Task
from mdiff.core.host import KINDS, Host, current

if TYPE_CHECKING:
    from mdiff.core.pipeline import Moment

TEXT = "a small test"
"""What the checks ask models for."""


@dataclass(frozen=True)
class Check:
    """One check: its name, whether it holds, and what it saw."""

    name: str
    passed: bool
    detail: str = ""


class Failure(AssertionError):
    """A check does not hold; the message says what is wrong."""


def conforms(name: str, host: Host | None = None) -> None:
    """Raises an AssertionError that names every check of a plugin that fails."""
    failed = [check for check in check_plugin(name, host) if not check.passed]
    if failed:
        raise AssertionError("; ".join(f"{check.name}: {check.detail}" for check in failed))


def check_plugin(name: str, host: Host | None = None) -> Iterator[Check]:
    """Runs the checks of `CHECKS` on a plugin, one after another; without loading, the others are
    left out.
    """
    subject = _Subject(name, host or current())
    for title, check in CHECKS.items():
        try:
            yield Check(title, True, check(subject))
        except (Exception, SystemExit) as error:  # noqa: BLE001 (a finding, whatever it is)
            kind = "" if isinstance(error, MdiffError | Failure) else f"{type(error).__name__}: "
            yield Check(title, False, " ".join(f"{kind}{error}".split()))
            if title == "loads":
                return


@dataclass
class _Subject:
    """A plugin under examination, and what has been found out about it."""

    name: str
    host: Host
    models: dict[str, tuple[Request, Model]] = field(default_factory=dict)
    samples: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    @cached_property
    def cards(self) -> list[ModelCard]:
        found = registry.load(self.host)
        value = self.host.record(self.name).value
        path = str(registry.find(value))
        for problem in found.problems:
            expect(not problem.startswith(path), problem)
        own = [card for card in found.cards.values() if card.plugin == self.name]
        return own + list(self.host.call(self.name, "mdiff_models") or ())

    @property
    def info(self) -> PluginInfo:
        return self.host.info(self.name)


def expect(holds: bool, message: str) -> None:
    """Raises `Failure` where something does not hold."""
    if not holds:
        raise Failure(message)


def _light(subject: _Subject) -> str:
    """Importing the module imports no torch: lists and help must stay fast."""
    value = subject.host.record(subject.name).value
    code = (
        "import importlib, sys; importlib.import_module(sys.argv[1]); print('torch' in sys.modules)"
    )
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-c", code, value],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    expect(done.returncode == 0 and bool(done.stdout.strip()), f"{value}: {last[0]}")
    heavy = done.stdout.strip().splitlines()[-1] == "True"
    expect(not heavy, f"importing {value} imports torch: import it inside the hooks")
    return value


def _loads(subject: _Subject) -> str:
    found = subject.host.load(subject.name)
    return f"{found.dist} {found.version} in {found.seconds:.2f} s"


def _info(subject: _Subject) -> str:
    expect(bool(subject.info.summary.strip()), "the summary in mdiff_info is empty")
    return subject.info.summary


def _cards(subject: _Subject) -> str:
    for card in subject.cards:
        expect(isinstance(card, ModelCard), f"mdiff_models gives {card!r} instead of a ModelCard")
        right = card.plugin == subject.name and card.id.startswith(f"{subject.name}/")
        expect(right, f"{card.id} should be called {subject.name}/...")
        expect(
            card.modality == subject.info.modality,
            f"{card.id} makes {card.modality!r} and mdiff_info says {subject.info.modality!r}",
        )
    return ", ".join(card.id for card in subject.cards) or "no models"


def _requests(subject: _Subject) -> str:
    from mdiff.core.request import resolve

    for card in subject.cards:
        given = {"text": TEXT} if "text" in card.accepts else {}
        resolve(card, {**given, "device": "cpu"}, subject.host)
    return f"the defaults of {len(subject.cards)} cards make requests"


def small_request(card: ModelCard, host: Host) -> Request:
    """The least to ask of a model: few steps, the shortest duration, float32 on the CPU."""
    from mdiff.core.request import resolve

    given: dict[str, Any] = {"precision": "fp32", "device": "cpu", "seed": 1}
    own = {option.name: option for option in card.options}
    for name, least in (("steps", 2), ("duration", None)):
        bound = own[name].minimum if name in own else None
        if name == "steps" or (name in card.accepts and bound is not None):
            given[name] = max(least or 0, bound or 0)
    given["steps"] = int(given["steps"])
    if "text" in card.accepts:
        given["text"] = TEXT
    return resolve(card, given, host)


def _build(subject: _Subject) -> str:
    from mdiff.core.pipeline import open_model

    for card in subject.cards:
        request = small_request(card, subject.host)
        model = open_model(card, request, subject.host)
        expect(len(model.stages) > 0, f"{card.id} has no stages")
        subject.models[card.id] = (request, model)
    return f"{len(subject.models)} built, weights as their cards say"


def _runs(subject: _Subject) -> str:
    from mdiff.core.pipeline import generate

    for card in subject.cards:
        expect(card.id in subject.models, f"{card.id} is not built")
        request, model = subject.models[card.id]
        sample = generate(model, card, request, host=subject.host)
        again = generate(model, card, request, host=subject.host, on_step=_preview)
        for key, value in sample.items():
            expect(_finite(value), f"{card.id}: {key!r} of its sample is not finite")
            expect(_same(value, again[key]), f"{card.id}: the same request twice gives two outputs")
        subject.samples[card.id] = sample
    return f"{len(subject.cards)} finite, and the same twice"


def _preview(moment: "Moment") -> None:
    look, x0 = moment.stage.preview, moment.state.x0
    if look is not None and x0 is not None:
        _picture(look(x0), f"the preview of stage {moment.stage.name!r}")


def _picture(picture: Any, what: str) -> None:
    from PIL.Image import Image

    expect(isinstance(picture, Image), f"{what} is {type(picture).__name__}, not a Pillow image")
    expect(min(picture.size) > 0, f"{what} has no pixels")


def _seeds(subject: _Subject) -> str:
    import torch

    from mdiff.core.pipeline import generate

    for card in subject.cards:
        expect(card.id in subject.samples, f"{card.id} does not run")
        request, model = subject.models[card.id]
        before = torch.get_rng_state()
        other = generate(model, card, replace(request, seed=2), host=subject.host)
        expect(
            torch.equal(before, torch.get_rng_state()),
            f"{card.id} moves the global random state: draw from the request's seed",
        )
        sample = subject.samples[card.id]
        same = all(_same(value, other[key]) for key, value in sample.items())
        expect(not same, f"{card.id} gives the same output for two seeds")
    return f"{len(subject.cards)} give another output for another seed"


def _media(subject: _Subject) -> str:
    kinds = subject.host.media(subject.name)
    expect(bool(kinds) or not subject.cards, "it has models and nothing writes their samples")
    for card in subject.cards:
        expect(card.id in subject.samples, f"{card.id} does not run")
        request, _ = subject.models[card.id]
        made = record.make(request, card, dist="dist", dist_version="1", threads=1)
        for media in kinds:
            _round_trip(media, subject.samples[card.id], made)
    return ", ".join(media.suffix for media in kinds) or "none"


def _round_trip(media: Media, sample: Mapping[str, Any], made: Mapping[str, Any]) -> None:
    """A file is written under the name it is given and reads back, its record whole or as a
    summary.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"sample{media.suffix}"
        media.write(path, sample, made, made["request"]["options"])
        left = sorted(entry.name for entry in Path(folder).iterdir())
        expect(left == [path.name], f"writing {media.suffix} leaves {left}, not one file")
        if media.thumbnail is not None:
            _picture(media.thumbnail(sample), f"the thumbnail of {media.suffix}")
        back = media.read(path)
        expect(set(sample) <= set(back), f"reading {media.suffix} gives {set(back)}")
        found = media.read_record(path)
        whole = found == made or (found or {}).get("record") == record.digest(made)
        expect(found is None or whole, f"the record in {media.suffix} is not the one written")


def _inputs(subject: _Subject) -> str:
    """What a model makes is an input that it takes: at full strength it is not seen, below it is."""
    from mdiff.core.pipeline import generate, medium

    cards = [card for card in subject.cards if "input" in card.accepts]
    for card in cards:
        expect(card.id in subject.samples, f"{card.id} does not run")
        request, model = subject.models[card.id]
        sample = subject.samples[card.id]
        made = record.make(request, card, dist="dist", dist_version="1", threads=1)
        with tempfile.TemporaryDirectory() as folder:
            media = medium(card, subject.host)
            path = Path(folder) / f"input{media.suffix}"
            media.write(path, sample, made, request.options)
            for strength, alike in ((1.0, True), (0.5, False)):
                asked = replace(request, seed=2, input=str(path), strength=strength)
                found = generate(model, card, asked, host=subject.host)
                plain = generate(model, card, replace(request, seed=2), host=subject.host)
                same = all(_same(value, plain[key]) for key, value in found.items())
                expect(same == alike, f"{card.id}: an input at strength {strength} {_SEEN[alike]}")
    return f"{len(cards)} take what they make" if cards else "none"


_SEEN = {True: "gives something else than no input", False: "changes nothing"}


def _encoders(subject: _Subject) -> str:
    names = list(subject.host.offers(subject.name, "text_encoders"))
    for name in names:
        encoder = subject.host.text_encoder(f"{subject.name}/{name}")
        states = encoder.encode([TEXT, "two"])
        pooled, tokens = tuple(states.pooled.shape), tuple(states.tokens.shape)
        expect(pooled == (2, encoder.pooled_width), f"{name}: pooled is {pooled}")
        expect(tokens[::2] == (2, encoder.width), f"{name}: tokens are {tokens}")
        expect(tuple(states.mask.shape) == tokens[:2], f"{name}: mask is {states.mask.shape}")
    return ", ".join(names) or "none"


def _parts(subject: _Subject) -> str:
    offers = {kind: subject.host.offers(subject.name, kind) for kind in KINDS}
    for kind, table in offers.items():
        for name, value in table.items():
            right = isinstance(name, str) and "/" not in name
            expect(right, f"{kind}: {name!r} should be a short name without a slash")
            if kind == "datasets":
                expect(isinstance(value, DataSet), f"{kind}: {name!r} is {value!r}, not a DataSet")
            else:
                expect(callable(value), f"{kind}: {name!r} is not callable")
    return ", ".join(f"{len(table)} {kind}" for kind, table in offers.items() if table) or "none"


def _recipes(subject: _Subject) -> str:
    """Recipes read, and what they train is there: so much can be said without data."""
    import torch

    from mdiff.core import losses, times
    from mdiff.core.training import recipe as recipes

    host, models = subject.host, registry.load(subject.host)
    paths = subject.host.offers(subject.name, "recipes")
    for name, path in paths.items():
        where = f"recipe {name!r}"
        recipe = recipes.read(path)
        card = recipes.card_of(recipe, models)
        expect(card.plugin == subject.name, f"{where} trains {card.id}, of another plugin")
        for table, make in ((recipe.loss, losses.from_name), (recipe.times, times.from_name)):
            if table is not None:
                make(table.name, **table.parameters)
        model = host.call(card.plugin, "mdiff_build", card=card, device="cpu", dtype=torch.float32)
        for part in (recipe.part, *recipe.parts):
            known = ", ".join(model.modules)
            expect(part in model.modules, f"{where}: {card.id} has no {part!r}; it has: {known}")
        task = host.call(
            card.plugin,
            "mdiff_train",
            card=card,
            model=model,
            part=recipe.part,
            settings=recipe.task,
        )
        expect(isinstance(task, Task), f"{where}: mdiff_train gives {task!r} instead of a Task")
        right = task.loss is not None or (task.denoiser is not None and task.batch is not None)
        expect(right, f"{where}: its task has neither a loss nor a denoiser with batches")
    return ", ".join(paths) or "none"


def _finite(value: Any) -> bool:
    import torch

    return not isinstance(value, torch.Tensor) or bool(value.isfinite().all())


def _same(one: Any, other: Any) -> bool:
    import torch

    tensors = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
    return torch.equal(one, other) if tensors else bool(one == other)


CHECKS: Mapping[str, Callable[[_Subject], str]] = {
    "light": _light,
    "loads": _loads,
    "info": _info,
    "cards": _cards,
    "requests": _requests,
    "parts": _parts,
    "build": _build,
    "recipes": _recipes,
    "runs": _runs,
    "seeds": _seeds,
    "media": _media,
    "inputs": _inputs,
    "encoders": _encoders,
}
"""Each check by its name: it returns what it saw or raises."""
