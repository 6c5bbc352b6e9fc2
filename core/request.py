"""Requests: what a person asks for, made complete and checked against a model's card, without
torch.

`FIELDS` holds the fields of a request with their bounds, in the same form as a model's own options.
A card's option that is named like a field bounds that field more tightly; its `defaults` stand
where the caller says nothing.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from mdiff.core import record
from mdiff.core.errors import IntegrityError, MissingError, UsageError, nearest
from mdiff.core.hooks import ModelCard, Option, Request
from mdiff.core.host import Host
from mdiff.core.registry import ACCEPTABLE, problem

MAX_WORDS = 1000
MAX_SEEDS = 100_000
TOP_SEED = 2**32 - 1
"""Torch's generator takes 32 bits of a seed and would drop the others without a word."""

FIELDS: Mapping[str, Option] = {
    option.name: option
    for option in (
        Option(name="text", type="str", help="what to make"),
        Option(name="negative", type="str", help="what to keep away from"),
        Option(name="class_name", type="str", help="a class that the model knows"),
        Option(name="duration", type="float", minimum=0.01, help="seconds"),
        Option(name="seed", type="int", default=0, minimum=0, maximum=TOP_SEED),
        Option(name="steps", type="int", default=20, minimum=1, maximum=10_000),
        Option(name="sampler", type="str", default="dpmpp_2m"),
        Option(name="grid", type="str", default="linear"),
        Option(name="guidance", type="float", default=1.0, minimum=0, maximum=100),
        Option(name="precision", type="str", default="auto", choices=("auto", "fp32", "bf16")),
        Option(name="device", type="str", default="auto", help="auto, cpu, cuda, cuda:1"),
        Option(name="input", type="str", help="a file to start from"),
        Option(name="strength", type="float", minimum=0.001, maximum=1, help="how much is new"),
        Option(name="mask", type="str", help="a file: what is bright is made anew"),
        Option(name="operator", type="str", help="what the input is of the sample: upscale 4"),
        Option(name="invert", type="int", minimum=1, maximum=100, help="evaluations a step"),
        Option(name="to_seed", type="int", minimum=0, maximum=TOP_SEED),
        Option(name="to_text", type="str", help="the other end of an interpolation"),
        Option(name="position", type="float", minimum=0, maximum=1, help="on the way there"),
    )
}
"""Every field of a request but the model and its options."""

NEEDS: Mapping[str, tuple[str, ...]] = {
    "strength": ("input",),
    "mask": ("input",),
    "operator": ("input",),
    "invert": ("input",),
    "to_text": ("text",),
    "position": ("to_seed", "to_text"),
}
"""Fields that mean nothing without one of those on the right."""

APART = (
    ("operator", "mask"),
    ("operator", "invert"),
    ("mask", "invert"),
)
"""Fields of which a request has one or the other."""

FILES = ("input", "mask")
"""Fields that name a file."""

STRENGTH = 0.75
"""Of an input that is no more than a start, where neither the caller nor the card says."""

BF16_FLAGS = frozenset({"amx_bf16", "avx512_bf16", "bf16"})
"""Processor flags that mean bf16 arithmetic in hardware; `bf16` is the name on ARM."""

_WORDS = {"true": True, "yes": True, "on": True, "1": True}
_WORDS |= {"false": False, "no": False, "off": False, "0": False}


def resolve(card: ModelCard, given: Mapping[str, Any], host: Host, *, model: str = "") -> Request:
    """The complete request for a model; a field that is None or absent is left to the card.

    Args:
        given: fields of `Request`, `options` among them. Options may be texts ("0.5"): they are
            read by type. With `sha256` of an earlier request its files must be the same still.
        model: what goes into the request instead of the card's id: the path of a folder.

    Raises:
        UsageError: a field or an option that there is not, that the model does not take, or out of
            its range.
        MissingError: no such device, or no such file.
        IntegrityError: a file is not that of `sha256`.
    """
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in FIELDS and name not in ("options", "sha256"):
            raise UsageError(f"a request has no {name!r}{nearest(name, [*FIELDS, 'options'])}")
        if name in ACCEPTABLE and name not in card.accepts:
            takes = ", ".join(card.accepts) or "none of them"
            raise UsageError(
                f"{card.id} does not take {_flag(name)}; of such fields it takes: {takes}"
            )
    _check_together(given)
    given = _defaults(card, given) | given
    own = {option.name: option for option in card.options}
    values: dict[str, Any] = {}
    for name, field in FIELDS.items():
        option = own.get(name, field)
        default = card.defaults.get(name, option.default) if name not in NEEDS else None
        if name in ACCEPTABLE and name not in card.accepts:
            default = None
        values[name] = _checked(option, given.get(name, default), _flag(name))
    for name in ("text", "negative", "to_text"):
        if values[name] is not None:
            values[name] = check_text(values[name], _flag(name))
    if "text" in card.accepts and values["text"] is None and values["input"] is None:
        raise UsageError(f'{card.id} needs a text: --text "..."')
    if values["to_text"] is not None and len(weighted(values["text"])) > 1:
        raise UsageError("--to-text begins at one text: leave out the others that --text weighs")
    for kind in ("sampler", "grid"):
        component(f"{kind}s", values[kind], host)
    values["device"] = device(values["device"])
    values["precision"] = precision(values["precision"], values["device"])
    return Request(
        model=model or card.id,
        options=_options(card, given.get("options", {})),
        sha256=_hashes(values, given.get("sha256", {})),
        **values,
    )


def _check_together(given: Mapping[str, Any]) -> None:
    """Raises for fields that mean nothing without others, or exclude each other."""
    for name, others in NEEDS.items():
        if name in given and not any(other in given for other in others):
            wanted = " or ".join(map(_flag, others))
            raise UsageError(f"{_flag(name)} means nothing by itself: give {wanted} too")
    for one, other in APART:
        if one in given and other in given:
            raise UsageError(f"{_flag(one)} and {_flag(other)} exclude each other: leave one out")


def _defaults(card: ModelCard, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a task brings with it where the caller says nothing."""
    made: dict[str, Any] = {}
    if "input" in given:
        start = not {"mask", "operator", "invert"} & given.keys()
        made["strength"] = card.defaults.get("strength", STRENGTH) if start else 1.0
    if "invert" in given:
        # the way back is the way there, which takes a sampler that draws nothing
        made["sampler"] = "ddim"
    if "to_seed" in given or "to_text" in given:
        made["position"] = 0.5
    return made


def _hashes(values: Mapping[str, Any], before: Mapping[str, str]) -> dict[str, str]:
    """The hashes of the files that a request names, which are those of `before` where there are any."""
    found = {name: record.sha256(values[name]) for name in FILES if values[name] is not None}
    for name, hash in found.items():
        if before.get(name, hash) != hash:
            raise IntegrityError(
                f"{values[name]} is not the file that the record names as its {name}: put that "
                f"one back, or give {_flag(name)} anew"
            )
    return found


def weighted(text: str) -> list[tuple[str, float]]:
    """The texts in a text and their weights: "an apple :1.5 | a pear :-0.5".

    Only where bars part it and at least one of the parts ends in a weight; a part without one has
    weight 1. Any other text is one text as it stands.
    """
    found = [_WEIGHT.fullmatch(part.strip()) for part in text.split("|")]
    parts = [(match[1].strip(), match[2]) for match in found if match]
    whole = len(parts) == len(found) > 1 and all(said for said, _ in parts)
    if not whole or all(weight is None for _, weight in parts):
        return [(text, 1.0)]
    return [(said, 1.0 if weight is None else float(weight)) for said, weight in parts]


_WEIGHT = re.compile(r"(.*?)(?:\s:([-+]?\d+(?:\.\d+)?))?", re.DOTALL)


def sweep(fields: Mapping[str, Any], count: int | None) -> list[dict[str, Any]]:
    """The lines of an interpolation in `count` even positions, its ends among them; none where the
    fields ask for no interpolation, or for one position of it.
    """
    ends = fields.get("to_seed") is not None or fields.get("to_text") is not None
    if not ends or fields.get("position") is not None or count in (None, 1):
        return []
    assert count is not None
    return [{"position": k / (count - 1)} for k in range(count)]


def check_text(text: str, where: str = "the text") -> str:
    """The text without the space around it.

    Raises:
        UsageError: it is empty, longer than `MAX_WORDS` words, or not Unicode.
    """
    text = text.strip()
    words = len(text.split())
    if not words:
        raise UsageError(f"{where} is empty: say what to make in a few words")
    if words > MAX_WORDS or len(text) > 20 * MAX_WORDS:
        raise UsageError(
            f"{where} has {words} words and {len(text)} characters; "
            f"at most {MAX_WORDS} words and {20 * MAX_WORDS} characters are read"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{where} is not Unicode text: {error.reason}") from error
    return text


def parse_seeds(text: str) -> list[int]:
    """Seeds from "7" or "1,2,5-10".

    Raises:
        UsageError: not that form, out of range, or more than `MAX_SEEDS`.
    """
    seeds: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not (low.isdecimal() and (high.isdecimal() if dash else True)):
            raise UsageError(f"seed {part!r} should be a whole number or a range: 7 or 1,2,5-10")
        first, last = int(low), int(high or low)
        if last > TOP_SEED or last < first:
            raise UsageError(f"seed {part!r} should rise and stay below 2**32")
        if len(seeds) + last - first >= MAX_SEEDS:
            raise UsageError(f"seeds {text!r} are more than {MAX_SEEDS}: give fewer at a time")
        seeds.extend(range(first, last + 1))
    return list(dict.fromkeys(seeds))


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The fields of each request of a file: one text a line, or JSON objects a line where it ends
    in .jsonl.

    Raises:
        MissingError: no such file. UsageError: a line is wrong (its number is named), or there is
            none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise MissingError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error.reason}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UsageError(f"{path} has no lines")
    if path.suffix != ".jsonl":
        return [{"text": line} for _, line in numbered]
    return [_json_line(path, number, line) for number, line in numbered]


def component(kind: str, name: str, host: Host) -> Any:
    """What makes a component: one of the core's by its name, a plugin's as `plugin/name`.

    Args:
        kind: the name of a module of the core with a table `NAMES`: samplers, grids, schedules.

    Raises:
        UsageError: there is none of that name.
    """
    if "/" in name:
        return host.offer(kind, name)
    module = import_module(f"mdiff.core.{kind}")
    if kind == "grids" and module.RESPACED.fullmatch(name):
        return module.find(name)
    names = module.NAMES
    if name not in names:
        raise UsageError(f"there is no {kind.removesuffix('s')} {name!r}{nearest(name, names)}")
    return names[name]


def device(name: str) -> str:
    """The device that a name means: "auto" is the first GPU where there is one.

    Raises:
        MissingError: there is no such device.
    """
    if name == "cpu":
        return name
    from torch import cuda

    count = cuda.device_count() if cuda.is_available() else 0
    if name == "auto":
        return "cuda" if count else "cpu"
    here = ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if name not in here:
        raise MissingError(f"there is no device {name!r} here; there is: {', '.join(here)}")
    return name


def precision(name: str, device: str) -> str:
    """The precision that a name means on a device: "auto" is bf16 where the hardware computes in
    it.
    """
    if name != "auto":
        return name
    if device == "cpu":
        return "bf16" if BF16_FLAGS & cpu_flags() else "fp32"
    from torch import cuda

    return "bf16" if cuda.is_bf16_supported(including_emulation=False) else "fp32"


@cache
def cpu_flags() -> frozenset[str]:
    """What the processor can do, as Linux tells it; empty elsewhere."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                name, _, flags = line.partition(":")
                if name.strip() in ("flags", "Features"):
                    return frozenset(flags.split())
    except OSError:
        pass
    return frozenset()


def expand(
    card: ModelCard,
    lines: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    host: Host,
    *,
    model: str = "",
    **fields: Any,
) -> list[Request]:
    """A request for each line and seed; a line goes before `fields`, also option by option.

    Raises as `resolve`.
    """
    requests = []
    for number, line in enumerate(lines, 1):
        try:
            own = line.get("options", {})
            if isinstance(own, Mapping):
                own = {**fields.get("options", {}), **own}
            one = resolve(card, {**fields, **line, "options": own}, host, model=model)
        except UsageError as error:
            raise UsageError(
                f"prompt {number}: {error}" if len(lines) > 1 else str(error)
            ) from error
        requests += [replace(one, seed=seed) for seed in ([one.seed] if "seed" in line else seeds)]
    # A line that is there twice would be the same output twice.
    return list({record.key(request): request for request in requests}.values())


def varied(
    lines: Sequence[Mapping[str, Any]], values: Mapping[str, str], card: ModelCard
) -> list[dict[str, Any]]:
    """Each line with every combination of values, the last of them changing fastest.

    Args:
        values: by field or option of the model, parted by commas: {"guidance": "1,2.5,4"}.

    Raises:
        UsageError: no such field or option, or one that is given in another way.
    """
    own = {option.name: option for option in card.options}
    known = {**own, **FIELDS}
    for name in values:
        if name in ELSEWHERE:
            raise UsageError(f"--vary does not know {name!r}: give several as {ELSEWHERE[name]}")
        if name not in known:
            raise UsageError(f"--vary knows no {name!r}{nearest(name, known)}")
    made = [dict(line) for line in lines]
    for name, texts in values.items():
        read = [_read(known[name], part.strip()) for part in texts.split(",")]
        made = [_with(line, name, value) for line in made for value in read]
    return made


ELSEWHERE = {
    "seed": "--seed 1-4",
    **dict.fromkeys(("text", "negative", "to_text"), "--prompts FILE"),
}
"""Fields of which --vary gives no values, and what does."""


def _with(line: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    if name in FIELDS:
        return {**line, name: value}
    return {**line, "options": {**line.get("options", {}), name: value}}


def random_seed() -> int:
    """A fresh seed, short enough to type, from the system's entropy."""
    return int.from_bytes(os.urandom(4))


def _json_line(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{path} line {number} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} line {number} should be an object of request fields")
    return value


def _options(card: ModelCard, given: Mapping[str, Any]) -> dict[str, Any]:
    own = {option.name: option for option in card.options if option.name not in FIELDS}
    if not isinstance(given, Mapping):
        raise UsageError(f"options should be a table of names and values, it is {given!r}")
    for name in given:
        if name in FIELDS:
            raise UsageError(f"{name!r} is not an option of the model: give {_flag(name)}")
        if name not in own:
            raise UsageError(f"{card.id} has no option {name!r}{nearest(name, own)}")
    return {
        name: _checked(option, _read(option, given.get(name, option.default)), f"option {name}")
        for name, option in own.items()
    }


def _read(option: Option, value: Any) -> Any:
    """An option's value from its text; a text that does not fit is left for the check to name."""
    if not isinstance(value, str) or option.type == "str":
        return value
    if option.type == "bool":
        return _WORDS.get(value.lower(), value)
    try:
        return int(value) if option.type == "int" else float(value)
    except ValueError:
        return value


def _checked(option: Option, value: Any, where: str) -> Any:
    if value is None:
        return None
    wrong = problem(option, value)
    if wrong:
        raise UsageError(f"{where} {wrong}")
    # 5 and 5.0 seconds are the same request and must have the same key.
    return float(value) if option.type == "float" else value


def _flag(name: str) -> str:
    return {"class_name": "--class"}.get(name, f"--{name.replace('_', '-')}")
