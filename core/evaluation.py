"""How good a model is: metrics of plugins, run over what a model makes and over real files beside it.

    measured = measure(metrics, samples, media, host)       each file is read once, for all metrics
    figures = score(metrics, measured, real, train)         figures, intervals, what real data gets

A metric looks at every sample once and keeps a row of numbers; all that follows is arithmetic on rows, so an interval
costs no second look. A figure stands next to its 95 % interval and next to what real data gets from the same metric:
real files judged like samples, or one half of them against the other where sets are compared.

Intervals. Where a score looks at the rows alone, a bootstrap: 1000 sets drawn from them with replacement. Where it
compares sets, a row that is there twice would be a flaw of its own (two samples alike), so halves are drawn without
replacement; their spread is that of the whole, and it is laid around the figure. Two models compared on the same
examples are resampled alike: the interval is that of the difference.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import mdiff
from mdiff.core import data, pipeline, record, request
from mdiff.core.errors import MdiffError, MissingError, UsageError, nearest
from mdiff.core.hooks import Example, Media, Metric, ModelCard, Request
from mdiff.core.host import Host
from mdiff.core.registry import Registry

NAME = "evaluation.json"
RESAMPLES, RESAMPLED_SETS = 1000, 100
KEPT = 8
"""Rows with no more numbers than this are written into `evaluation.json`, for whoever wants to know which samples."""

Rows = NDArray[np.float64]
OnProgress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and of how much."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A file to be judged and the example that it answers; `request` is None for a file that is just there."""

    path: Path
    example: Example
    request: Request | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Rows of one metric (N, D), and the number of the sample that each came from (N,)."""

    rows: Rows
    of: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What a metric says.

    Attributes:
        value: None where there is no figure, as for too few samples.
        low, high: the 95 % interval.
        samples: rows that it was computed of.
        real: what real data gets, of `real_samples` files.
        alike: what as few samples get against as few files, where `real` is one half of the files against the other:
            figures of sets that differ in size do not compare.
        warning: why it is not to be relied on; empty otherwise.
    """

    metric: str
    value: float | None
    low: float | None
    high: float | None
    samples: int
    real: float | None
    real_samples: int
    alike: float | None
    better: str
    summary: str
    warning: str = ""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much more the first gets than the second, with the 95 % interval of that."""

    metric: str
    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One model, or one folder of files, and its figures by metric."""

    name: str
    figures: Mapping[str, Figure]
    fields: Mapping[str, Any]
    samples: Sequence[Mapping[str, Any]]
    resampled: Mapping[str, Rows] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All that `evaluate` found out; `left_out` says of each metric that was not run why."""

    judged: tuple[Judged, ...]
    differences: tuple[Difference, ...]
    left_out: Mapping[str, str]
    data: str
    split: str
    seed: int
    examples: int

    def to_json(self, *, samples: bool = True) -> dict[str, Any]:
        """JSON values, with or without the rows of each sample."""
        return {
            "schema": 1,
            "mdiff": mdiff.__version__,
            "data": self.data,
            "split": self.split,
            "seed": self.seed,
            "examples": self.examples,
            "models": [
                {
                    "name": judged.name,
                    "fields": dict(judged.fields),
                    "figures": [asdict(figure) for figure in judged.figures.values()],
                    **({"samples": list(judged.samples)} if samples else {}),
                }
                for judged in self.judged
            ],
            "differences": [asdict(difference) for difference in self.differences],
            "left_out": dict(self.left_out),
        }


def evaluate(
    models: Sequence[str],
    registry: Registry,
    folder: Path,
    out: Path,
    *,
    made: Path | None = None,
    metrics: Sequence[str] = (),
    split: str = "held_out",
    count: int | None = None,
    seed: int = 0,
    fields: Mapping[str, Any] | None = None,
    on_progress: OnProgress = lambda what, done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Evaluates one model, or two on the same examples and seeds, and writes `evaluation.json` into `out`.

    For each example of the split a model makes one sample, asked for by the example's plain caption where it takes a
    text and by its class where it takes one, the k-th with the seed `seed` + k. What lies in `out` already is not made
    again.

    Args:
        models: one or two models; with `made`, what models would make (a modality will do).
        folder: the data set.
        made: a folder of files that are judged instead of what a model makes, read like a data set.
        metrics: `plugin/name`, or the name alone; none for all that apply.
        count: examples to take; they are shuffled once and for all, so more of them include the fewer.
        fields: of the requests: steps, guidance, options, ...
        say: told what was left out.

    Raises:
        UsageError: no example in the split, an unknown metric, or one that applies to no example.
        MissingError, IntegrityError, PluginError: as those that are asked.
    """
    host = registry.host
    plugin = _plugin(models[0], registry) if made is not None else None
    plugin = plugin or registry.resolve(models[0]).plugin
    media = host.media(plugin)
    kinds = [m.suffix for m in media]
    found = data.examples(folder, kinds)
    whole = [example for example in found if example.split == split]
    if not whole:
        splits = sorted({example.split for example in found})
        raise UsageError(
            f"{folder} has no example of the split {split!r}; its splits: {', '.join(splits)}"
        )
    chosen = [whole[k] for k in np.random.default_rng(0).permutation(len(whole))[:count]]
    answered = chosen if made is None else data.examples(made, kinds)[:count]
    asked, left_out = _applicable(*choose(host, plugin, metrics), answered, strict=bool(metrics))
    for name, reason in left_out.items():
        say(f"left out: {name}: {reason}")
    subjects = (
        [(str(made), _files(answered))]
        if made is not None
        else [
            (model, make(model, chosen, registry, out, seed, fields, on_progress))
            for model in models
        ]
    )
    see = partial(measure, media=media, host=host, on_progress=on_progress)
    seen = [see(asked, samples, what=f"files of {name}") for name, samples in subjects]

    keep = partial(see, keep=out / "rows", say=say)
    alone = {name: metric for name, metric in asked.items() if metric.reference is None}
    sets = {name: metric for name, metric in asked.items() if metric.reference is not None}
    trained = {name: metric for name, metric in sets.items() if metric.reference == "train"}
    real = keep(alone, _files(chosen), what="real files")
    real |= keep(sets, _files(whole), what="real files")
    train = keep(trained, _files([e for e in found if e.split == "train"]), what="training files")
    on_progress("figures", 0, len(asked) * len(subjects))
    judged = [
        judge(name, asked, samples, rows, real, train, seed, fields or {})
        for (name, samples), rows in zip(subjects, seen, strict=True)
    ]
    result = Evaluation(
        judged=tuple(judged),
        differences=tuple(differences(*judged)) if len(judged) == 2 else (),
        left_out=left_out,
        data=str(folder),
        split=split,
        seed=seed,
        examples=len(answered),
    )
    with record.atomic_write(out / NAME) as path:
        path.write_text(json.dumps(result.to_json(), indent=1) + "\n", encoding="utf-8")
    return result


def _plugin(modality: str, registry: Registry) -> str | None:
    """A plugin of a modality, whether or not there is a model of it."""
    answers = registry.host.each("mdiff_info")
    return next((found.name for found, info in answers if info.modality == modality), None)


def _files(examples: Sequence[Example]) -> list[Sample]:
    """Examples as answers to themselves."""
    return [Sample(path=example.path, example=example) for example in examples]


def _applicable(
    metrics: Mapping[str, Metric],
    left_out: Mapping[str, str],
    examples: Sequence[Example],
    *,
    strict: bool,
) -> tuple[dict[str, Metric], dict[str, str]]:
    """The metrics that can be asked of some example, and the others with the reason; `strict` where they were named."""
    fit = {name: m for name, m in metrics.items() if any(m.applies(e) for e in examples)}
    others = {name: metric for name, metric in metrics.items() if name not in fit}
    for name, metric in others.items():
        if strict:
            raise UsageError(f"{name} ({metric.summary}) applies to none of the examples")
    left_out = {**left_out, **dict.fromkeys(others, "applies to none of the examples")}
    if not fit:
        raise UsageError(
            "no metric is left: " + "; ".join(f"{name}: {why}" for name, why in left_out.items())
        )
    return fit, left_out


def choose(
    host: Host, plugin: str, names: Sequence[str] = ()
) -> tuple[dict[str, Metric], dict[str, str]]:
    """Metrics by full name, and those that cannot be had here with the reason.

    Args:
        plugin: that of the model: without `names` all metrics of its modality are taken.
        names: `plugin/name`, or the name alone.

    Raises:
        UsageError: there is no such metric. MissingError: one that was named needs something that is not there.
    """
    modality = host.info(plugin).modality
    makers = {
        f"{found.name}/{short}": maker
        for found, offered in host.each("mdiff_metrics")
        if host.info(found.name).modality == modality
        for short, maker in offered.items()
    }
    metrics: dict[str, Metric] = {}
    left_out: dict[str, str] = {}
    wanted = [_full(name, plugin, makers, host) for name in names] or list(makers)
    for name in wanted:
        maker = makers.get(name) or host.offer("metrics", name)
        try:
            with host.blame(name.split("/")[0], f"the metric {name}"):
                metrics[name] = maker()
        except MissingError as error:
            if names:
                raise
            left_out[name] = str(error)
    if not makers and not names:
        raise UsageError(f"no plugin has a metric for {modality}")
    return metrics, left_out


def _full(name: str, plugin: str, makers: Mapping[str, Any], host: Host) -> str:
    """`plugin/name` of a name: the plugin's own before another's."""
    known = [full for full in makers if full == name or full.split("/")[1] == name]
    if "/" in name and not known:
        host.offer("metrics", name)
        return name
    if not known:
        raise UsageError(
            f"there is no metric {name!r}{nearest(name, [n.split('/')[1] for n in makers])}"
        )
    return f"{plugin}/{name}" if f"{plugin}/{name}" in known else known[0]


def make(
    model: str,
    examples: Sequence[Example],
    registry: Registry,
    out: Path,
    seed: int = 0,
    fields: Mapping[str, Any] | None = None,
    on_progress: OnProgress = lambda what, done, total: None,
) -> list[Sample]:
    """What a model makes of examples, the k-th with the seed `seed` + k; what is in `out` already is not made again.

    Raises:
        UsageError: an example has no caption, or no class, and the model needs one.
        MdiffError: as `pipeline.run`.
    """
    card = registry.resolve(model)
    name = model if card.root == Path(model) else card.id
    requests = [
        request.resolve(
            card, {**(fields or {}), **_ask(card, e), "seed": seed + k}, registry.host, model=name
        )
        for k, e in enumerate(examples)
    ]
    jobs = pipeline.plan(requests, registry, out)
    what = f"samples of {model}"
    on_progress(what, 0, len(jobs))
    samples = []
    for k, output in enumerate(pipeline.run(jobs, registry.host, resume=True, keep=True)):
        samples.append(Sample(path=output.path, example=examples[k], request=output.request))
        on_progress(what, k + 1, len(jobs))
    return samples


def _ask(card: ModelCard, example: Example) -> dict[str, Any]:
    """The fields that ask a model for what an example is."""
    given: dict[str, Any] = {}
    if "text" in card.accepts:
        if not example.texts:
            raise UsageError(
                f"{card.id} needs a text and {example.path.name} has no caption: write one in a .txt"
            )
        given["text"] = example.texts[0]
    if "class_name" in card.accepts and example.label is not None:
        given["class_name"] = example.label
    return given


def measure(
    metrics: Mapping[str, Metric],
    samples: Sequence[Sample],
    media: Sequence[Media],
    host: Host,
    *,
    what: str = "files",
    keep: Path | None = None,
    on_progress: OnProgress = lambda what, done, total: None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Measured]:
    """The rows of each metric. All metrics see a file before the next one is read.

    Args:
        keep: a folder in which rows are kept, for files that do not change: they are not measured again.
        say: told of each file that cannot be read, which is then left out; None to raise.

    Raises:
        MdiffError: a file that cannot be read, a metric that fails or gives a number that is not finite.
    """
    kept = (
        {name: _Kept(keep, name, metric, samples, host) for name, metric in metrics.items()}
        if keep
        else {}
    )
    rows: dict[str, dict[int, Rows]] = {name: dict(one.load()) for name, one in kept.items()}
    todo = {name: metric for name, metric in metrics.items() if not rows.setdefault(name, {})}
    readers = {m.suffix: m.read for m in media}
    count = len(samples) if todo else 0
    for k, sample in enumerate(samples[:count]):
        on_progress(what, k, count)
        due = {name: metric for name, metric in todo.items() if metric.applies(sample.example)}
        if not due:
            continue
        try:
            content = readers[sample.path.suffix.lower()](sample.path)
        except MdiffError as error:
            if say is None:
                raise
            say(f"left out: {error}")
            continue
        for name, metric in due.items():
            with host.blame(name.split("/")[0], f"the metric {name}, of {sample.path.name}"):
                row = np.asarray(metric.measure(content, sample.example), dtype=np.float64).ravel()
            if not np.isfinite(row).all():
                raise MdiffError(
                    f"the metric {name} gave a number that is not finite for {sample.path}"
                )
            rows[name][k] = row
    if count:
        on_progress(what, count, count)
    for name in todo.keys() & kept.keys():
        kept[name].save(rows[name])
    return {
        name: Measured(rows=np.stack(list(of.values())) if of else np.zeros((0, 1)), of=tuple(of))
        for name, of in rows.items()
    }


class _Kept:
    """Rows of one metric on the disk. Other files, another metric or another version of its plugin: another key."""

    def __init__(
        self, folder: Path, name: str, metric: Metric, samples: Sequence[Sample], host: Host
    ) -> None:
        facts = [
            [stat.st_size, stat.st_mtime_ns, {**asdict(s.example), "path": str(s.path)}]
            for s in samples
            if s.path.is_file() and (stat := s.path.stat())
        ]
        version = host.record(name.split("/")[0]).version
        key = hashlib.sha256(
            record.canonical([name, metric.summary, version, facts]).encode()
        ).hexdigest()
        self.path = folder / f"{name.replace('/', '-')}-{key[:12]}.npy"

    def load(self) -> dict[int, Rows]:
        try:
            table = np.load(self.path, allow_pickle=False)
        except (OSError, ValueError):
            return {}
        return {int(row[0]): row[1:] for row in table}

    def save(self, rows: Mapping[int, Rows]) -> None:
        if rows:
            with record.atomic_write(self.path) as path:
                np.save(path, np.stack([np.append(float(k), row) for k, row in rows.items()]))


def judge(
    name: str,
    metrics: Mapping[str, Metric],
    samples: Sequence[Sample],
    measured: Mapping[str, Measured],
    real: Mapping[str, Measured],
    train: Mapping[str, Measured],
    seed: int,
    fields: Mapping[str, Any],
) -> Judged:
    """The figures of one model: `real` are the rows of held-out files, `train` those of training files."""
    figures: dict[str, Figure] = {}
    resampled: dict[str, Rows] = {}
    for metric_name, metric in metrics.items():
        rows = measured[metric_name].rows
        theirs = real[metric_name].rows
        reference = {
            None: rows[:0],
            "held_out": theirs,
            "train": train.get(metric_name, real[metric_name]).rows,
        }
        against = reference[metric.reference]
        resampled[metric_name], value, warning = np.zeros(0), None, ""
        if len(rows) < metric.least or (metric.reference and len(against) < metric.least):
            have = min(len(rows), len(against)) if metric.reference else len(rows)
            warning = f"needs {metric.least} samples and has {have}"
        else:
            value = _number(metric.score(rows, against))
            warning = "" if value is not None else "not a finite number"
            resampled[metric_name] = resample(metric, rows, against, value, seed)
        low, high = interval(resampled[metric_name])
        beside, alike = _beside(metric, rows, theirs, against)
        figures[metric_name] = Figure(
            metric=metric_name,
            value=value,
            low=low,
            high=high,
            samples=len(rows),
            real=beside,
            real_samples=len(theirs),
            alike=alike,
            better=metric.better,
            summary=metric.summary,
            warning=warning,
        )
    return Judged(
        name=name,
        figures=figures,
        fields=dict(fields),
        samples=_details(samples, measured),
        resampled=resampled,
    )


def resample(metric: Metric, rows: Rows, reference: Rows, value: float | None, seed: int) -> Rows:
    """Scores of resampled rows, NaN left in: with replacement, or halves without it where sets are compared."""
    draw = np.random.default_rng(seed)
    if len(rows) < 2 or value is None:
        return np.zeros(0)
    if metric.reference is None:
        picks = (draw.integers(len(rows), size=len(rows)) for _ in range(RESAMPLES))
        return np.array([metric.score(rows[pick], reference) for pick in picks])
    half = len(rows) // 2
    if half < 2:
        return np.zeros(0)
    picks = (draw.permutation(len(rows))[:half] for _ in range(RESAMPLED_SETS))
    scores = np.array([metric.score(rows[pick], reference) for pick in picks])
    # The spread of halves without replacement is sqrt((N - half) / half) of the whole's: 1 for an even N.
    spread = (scores - scores.mean()) * math.sqrt(half / (len(rows) - half))
    return np.maximum(value + spread, 0.0 if scores.min() >= 0 else -np.inf)


def interval(scores: Rows) -> tuple[float | None, float | None]:
    """The 95 % interval of resampled scores."""
    if not len(scores) or not np.isfinite(scores).all():
        return None, None
    low, high = np.quantile(scores, (0.025, 0.975))
    return float(low), float(high)


def differences(first: Judged, second: Judged) -> Iterator[Difference]:
    """What the first gets more than the second, for each metric that both have a figure of."""
    for name, one in first.figures.items():
        other = second.figures[name]
        if one.value is None or other.value is None or one.samples != other.samples:
            continue
        # The same samples were drawn of both, as they were drawn with the same seed.
        low, high = interval(first.resampled[name] - second.resampled[name])
        if low is not None and high is not None:
            yield Difference(metric=name, value=one.value - other.value, low=low, high=high)


def _beside(
    metric: Metric, rows: Rows, theirs: Rows, against: Rows
) -> tuple[float | None, float | None]:
    """What real data gets: as samples would, against training files, or one half against the other; and what as few
    samples get against that half.
    """
    few = max(1, metric.least // 2)
    if metric.reference != "held_out":
        enough = len(theirs) >= few and (metric.reference is None or len(against) >= few)
        return _number(metric.score(theirs, against)) if enough else None, None
    order = np.random.default_rng(0).permutation(len(theirs))
    one, other = theirs[order[::2]], theirs[order[1::2]]
    if min(len(one), len(other)) < few:
        return None, None
    # Samples are in shuffled order, so the first of them are any.
    alike = _number(metric.score(rows[: len(one)], other)) if len(rows) >= len(one) else None
    return _number(metric.score(one, other)), alike


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _details(samples: Sequence[Sample], measured: Mapping[str, Measured]) -> list[dict[str, Any]]:
    """Each sample with what it was asked for and its short rows."""
    details: list[dict[str, Any]] = [
        {
            "file": sample.path.name,
            "example": sample.example.path.name,
            "text": next(iter(sample.example.texts), None),
            "label": sample.example.label,
            "rows": {},
        }
        for sample in samples
    ]
    for name, found in measured.items():
        if found.rows.shape[1] <= KEPT:
            for k, row in zip(found.of, found.rows, strict=True):
                details[k]["rows"][name] = [round(float(x), 6) for x in row]
    return details


def table(result: Evaluation) -> list[tuple[str, ...]]:
    """The figures as rows of text, the first of them headings."""
    compared = len(result.judged) == 2
    apart = {difference.metric: difference for difference in result.differences}
    first = result.judged[0]
    head = (
        "metric",
        "good is",
        "value",
        "95 % interval",
        *(("other", "difference") if compared else ()),
    )
    lines = [(*head, "real", "samples", "")]
    for name, figure in first.figures.items():
        cells = [name, figure.better, _told(figure.value), _span(figure.low, figure.high)]
        if compared:
            gap = apart.get(name)
            cells.append(_told(result.judged[1].figures[name].value))
            cells.append(f"{gap.value:+.3g} ({_span(gap.low, gap.high)})" if gap else "-")
        halves = "" if figure.alike is None else f" (halves; here {_told(figure.alike)})"
        cells += [_told(figure.real) + halves, str(figure.samples)]
        lines.append((*cells, figure.warning or figure.summary))
    return lines


def _told(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _span(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{low:.4g} to {high:.4g}"
