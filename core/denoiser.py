r"""The denoiser: (x_t, t) -> E[x_0 | x_t], whatever the network behind it was trained to say.

What a network F says is affine in x_0 for every kind of prediction, so one line turns each into the
other:

    x0 = skip x_t + out F        F = (x0 - skip x_t) / out

A kind of prediction is its pair (skip, out) as a function of the time, and a row of `PREDICTS`; the
form in which a network wants the time is a function of it, and a row of `TIMES`; what x_t is
multiplied with before the network sees it is another, and a row of `SCALES`.
"""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mdiff.core.errors import UsageError
from mdiff.core.names import pick
from mdiff.core.schedules import Schedule, Time, V, blend, from_name, pad


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a denoiser says of x_t.

    Attributes:
        x0: E[x_0 | x_t], (B, C, *axes).
        variance_fraction: where the network learned the variance of the reverse step, its place
            between the posterior's (0) and beta's (1) on a log scale, of x0's shape (Nichol and
            Dhariwal, 2021, eq. 15).
        x0_noise: the x0 with which the noise in x_t goes, where guidance says that it is not x0:
            only samplers that ask for it take it (`cfgpp`).
    """

    x0: Tensor
    variance_fraction: Tensor | None = None
    x0_noise: Tensor | None = None


class Denoise(Protocol):
    """What samplers and guidance see; `Denoiser` and `Guided` are two."""

    @property
    def schedule(self) -> Schedule: ...
    @property
    def predicts(self) -> str:
        """The kind of prediction of the network, a row of `PREDICTS`."""

    @property
    def device(self) -> torch.device:
        """Where samples have to be."""

    def bind(self, **cond: Any) -> "Denoise":
        """The same denoiser with these conditions, added to or in place of those it has."""

    def __call__(self, x: Tensor, t: Time[float] | Time[Tensor] | float | Tensor) -> Prediction:
        """E[x_0 | x_t = x]. Shapes: x (B, C, *axes); t one number, or one per sample (B,)."""


# --- what networks say ----------------------------------------------------------------------------


def _eps(t: Time[V]) -> tuple[V, V]:
    return 1 / t.alpha, -t.sigma / t.alpha


def _v(t: Time[V]) -> tuple[V, V]:
    # v = alpha eps - sigma x0 (Salimans and Ho, 2022); the norm is 1 when variance is preserved
    norm = t.alpha**2 + t.sigma**2
    return t.alpha / norm, -t.sigma / norm


def _x0(t: Time[V]) -> tuple[V, V]:
    return 0 * t.alpha, 0 * t.alpha + 1


def _score(t: Time[V]) -> tuple[V, V]:
    # the gradient of log p(x_t), -eps / sigma (Song et al., 2021)
    return 1 / t.alpha, t.sigma**2 / t.alpha


def _flow(t: Time[V]) -> tuple[V, V]:
    # eps - x0, the velocity of a straight line from data to noise (Liu et al., 2023)
    whole = t.alpha + t.sigma
    return 1 / whole, -t.sigma / whole


Kind = Callable[[Time[Any]], tuple[Any, Any]]
"""time -> (skip, out)"""


def edm(sigma_data: float = 0.5) -> Kind:
    """What EDM's networks say, for data of that deviation (Karras et al., 2022, table 1).

    A row of `PREDICTS` for 0.5; for other data add one: PREDICTS["edm of 1"] = edm(1.0). Such a
    network sees x_t by the scale of the same name, and is told "log_sigma/4".
    """

    def kind(t: Time[V]) -> tuple[V, V]:
        # c_skip / alpha and c_out at the noise level sigma / alpha, without dividing by alpha
        variance = (t.alpha * sigma_data) ** 2 + t.sigma**2
        return t.alpha * sigma_data**2 / variance, t.sigma * sigma_data / variance**0.5

    return kind


PREDICTS: dict[str, Kind] = {
    "eps": _eps,
    "v": _v,
    "x0": _x0,
    "score": _score,
    "flow": _flow,
    "edm": edm(),
}


def to_x0(predicts: str, output: Tensor, x: Tensor, t: Time[float] | Time[Tensor]) -> Tensor:
    """The x0 that a network means by `output` at x_t = x.

    Raises:
        UsageError: it means none, because x_t has no signal there.
    """
    try:
        skip, out = PREDICTS[predicts](t)
    except ZeroDivisionError:
        raise _no_signal(predicts, t.value) from None
    # where a look costs nothing; elsewhere the x0 is not finite, which the loop reports
    if isinstance(skip, Tensor) and skip.device.type == "cpu" and bool(skip.isinf().any()):
        raise _no_signal(predicts, t.value)
    return blend(skip, x, out, output)


def _no_signal(predicts: str, t: Any) -> UsageError:
    return UsageError(
        f"{predicts} says nothing of x0 at t = {t}, where there is no signal (alpha 0): it takes a "
        "network that predicts v, x0 or the flow, or a schedule or grid that begins below"
    )


def from_x0(predicts: str, x0: Tensor, x: Tensor, t: Time[float] | Time[Tensor]) -> Tensor:
    """What a network would have said, had it meant x0: the inverse of `to_x0`.

    Raises:
        UsageError: x_t is clean, or without signal, and any answer would mean this x0.
    """
    try:
        skip, out = PREDICTS[predicts](t)
        return blend(1 / out, x0, -skip / out, x)
    except ZeroDivisionError:
        raise UsageError(
            f"what says {predicts} at t = {t.value} cannot be told from x0: alpha {t.alpha:.4g}, "
            f"sigma {t.sigma:.4g}"
        ) from None


# --- the time that networks are told --------------------------------------------------------------


TIMES: dict[str, Callable[[Time[Any], Schedule], Any]] = {
    "t": lambda t, schedule: t.value,
    # 0 ... T - 1: exact integers at the entries of a table, fractions between them
    "index": lambda t, schedule: schedule.index(t.value),
    # the nearest entry, as diffusers tells networks between entries
    "index_rounded": lambda t, schedule: _rounded(schedule.index(t.value)),
    # the same as if the table had a thousand entries (Improved DDPM)
    "index_scaled": lambda t, schedule: schedule.index(t.value) * (1000 / schedule.entries),
    # sigma of the papers in which alpha is 1
    "sigma": lambda t, schedule: t.sigma / t.alpha,
    # ln(sigma) / 4 of the same (Karras et al., 2022)
    "log_sigma/4": lambda t, schedule: -t.log_snr / 8,
    # the sigma of the straight line alpha = 1 - sigma with the same signal-to-noise ratio
    "flow": lambda t, schedule: t.sigma / (t.alpha + t.sigma),
}


def _rounded(index: V) -> V:
    return index.round() if isinstance(index, Tensor) else float(round(index))


def time_on(schedule: Schedule, form: str = "t") -> Callable[[Time[Any], Schedule], Any]:
    """The form of the time on another schedule, where it has the same signal-to-noise ratio.

    For a network that was trained with that one: with SCALES["unit"], what preserves variance runs
    where alpha is 1 (Karras et al., 2022, table 1, VP and iDDPM).
    """
    told = pick("form of the time", TIMES, form)

    def elsewhere(t: Time[Any], _: Schedule) -> Any:
        there = schedule.time(torch.as_tensor(t.log_snr, dtype=torch.float64))
        return told(schedule.at(there if isinstance(t.log_snr, Tensor) else there.item()), schedule)

    return elsewhere


# --- the scale on which networks see x_t ----------------------------------------------------------


def _spread(sigma_data: float) -> Callable[[Time[Any]], Any]:
    # to unit variance, for data of that deviation
    return lambda t: ((t.alpha * sigma_data) ** 2 + t.sigma**2) ** -0.5


SCALES: dict[str, Callable[[Time[Any]], Any] | None] = {
    "none": None,
    # c_in of VP and iDDPM: 1 where variance is preserved (Karras et al., 2022, table 1)
    "unit": _spread(1.0),
    # c_in of EDM
    "edm": _spread(0.5),
}


# --- denoisers ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A network as a denoiser.

    The network is called as net(x, t, **cond), with t (B,) float32 (float64 for such x) and x in
    the type of its own parameters; x0 comes back in the type of x, so a bfloat16 network leaves the
    sampler in float32.

    Attributes:
        net: the network, any callable on any number of axes.
        schedule: the one it was trained with.
        predicts: what it says, a row of `PREDICTS`.
        time: the form in which it takes the time, a row of `TIMES` or a function like those.
        scale: what x is multiplied with for it, a row of `SCALES` or a function like those.
        learned_variance: it gives 2 C channels, of which the last C place the variance, -1 to 1.
        cond: conditions by keyword, tensors with the batch first. b rows serve a batch of n b,
            repeated n times in order: one row is for everybody, and guidance may stack batches.

    Raises:
        UsageError: unknown `predicts`, `time` or `scale`, or an index asked of a schedule without a
            table; when called, an output or a condition whose size does not fit x, or a time at
            which x has no signal and the prediction says nothing of x0.
    """

    net: Callable[..., Tensor]
    schedule: Schedule
    _: KW_ONLY
    predicts: str = "eps"
    time: str | Callable[[Time[Any], Schedule], Any] = "t"
    scale: str | Callable[[Time[Any]], Any] = "none"
    learned_variance: bool = False
    cond: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pick("prediction", PREDICTS, self.predicts)
        if self._scale is not None:
            self._scale(Time(1.0, 1.0, 1.0, 0.0))
        self._tell(Time(1.0, 1.0, 1.0, 0.0), self.schedule)

    @property
    def device(self) -> torch.device:
        """That of the network's parameters; the CPU if it has none."""
        return self._example(torch.empty(0)).device

    def bind(self, **cond: Any) -> "Denoiser":
        """The same denoiser with these conditions, added to or in place of those it has."""
        return replace(self, cond={**self.cond, **cond})

    def __call__(self, x: Tensor, t: Time[float] | Time[Tensor] | float | Tensor) -> Prediction:
        """E[x_0 | x_t = x]. Shapes: x (B, C, *axes); t one number, or one per sample (B,)."""
        rows = x.shape[0]
        at = t if isinstance(t, Time) else self.schedule.at(t)
        if isinstance(at.value, Tensor):
            at = Time(*(tile("t", entry, rows) for entry in at))
        cond = {name: tile(name, value, rows) for name, value in self.cond.items()}
        seen = x if self._scale is None else x * _padded(self._scale(at), x)
        dtype = self._example(x).dtype
        # to ask costs a tenth of what a conversion to the same type costs
        seen = seen if seen.dtype == dtype else seen.to(dtype)
        output = self.net(seen, _row(self._tell(at, self.schedule), x), **cond)
        output = output if output.dtype == x.dtype else output.to(x.dtype)
        fraction = None
        if self.learned_variance:
            output, place = output.chunk(2, dim=1)
            fraction = (place + 1) / 2
        if output.shape != x.shape:
            raise UsageError(
                f"the network gave {tuple(output.shape)} for x {tuple(x.shape)}: it should be the "
                "same shape, or twice the channels with learned_variance"
            )
        return Prediction(x0=to_x0(self.predicts, output, x, at), variance_fraction=fraction)

    @cached_property
    def _tell(self) -> Callable[[Time[Any], Schedule], Any]:
        """The form of the time."""
        return (
            pick("form of the time", TIMES, self.time) if isinstance(self.time, str) else self.time
        )

    @cached_property
    def _scale(self) -> Callable[[Time[Any]], Any] | None:
        """What x is multiplied with."""
        return pick("scale", SCALES, self.scale) if isinstance(self.scale, str) else self.scale

    def _example(self, default: Tensor) -> Tensor:
        """A parameter of the network, for its device and dtype; `default` if it has none."""
        parameters = self.net.parameters() if isinstance(self.net, nn.Module) else iter(())
        return next((p for p in parameters if p.is_floating_point()), default)


KEYS = ("schedule", "predicts", "time", "learned_variance")
"""Of a `config`: what `from_config` reads."""


def from_config(net: Callable[..., Tensor], config: Mapping[str, Any]) -> Denoiser:
    """The denoiser that a model's `config` describes.

    Its schedule is the name of one of the core's with its parameters; `predicts`, and where it differs from "index"
    and false, `time` and `learned_variance`, are the fields of `Denoiser`.
    """
    params = dict(config["schedule"])
    return Denoiser(
        net,
        from_name(params.pop("name"), **params),
        predicts=config["predicts"],
        time=config.get("time", "index"),
        learned_variance=config.get("learned_variance", False),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Guided:
    """A denoiser made from another by a rule (denoiser, x, t) -> Prediction."""

    inner: Denoise
    rule: Callable[[Denoise, Tensor, Time[Any]], Prediction]

    @property
    def schedule(self) -> Schedule:
        """That of the inner denoiser."""
        return self.inner.schedule

    @property
    def predicts(self) -> str:
        """That of the inner denoiser."""
        return self.inner.predicts

    @property
    def device(self) -> torch.device:
        """That of the inner denoiser."""
        return self.inner.device

    def bind(self, **cond: Any) -> "Guided":
        """The rule over the inner denoiser with these conditions."""
        return replace(self, inner=self.inner.bind(**cond))

    def __call__(self, x: Tensor, t: Time[float] | Time[Tensor] | float | Tensor) -> Prediction:
        """What the rule makes of x at t."""
        return self.rule(self.inner, x, t if isinstance(t, Time) else self.schedule.at(t))


def _padded(value: float | Tensor, x: Tensor) -> float | Tensor:
    """One number for all of x, or one per sample with the axes of x."""
    return pad(value.to(x.device), x) if isinstance(value, Tensor) else value


def _row(value: float | Tensor, x: Tensor) -> Tensor:
    """A time for each row of x, on its device, (B,), in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if isinstance(value, Tensor):
        return value.to(x.device, dtype).expand(x.shape[0])
    return x.new_full((x.shape[0],), value, dtype=dtype)


def tile(name: str, value: Any, rows: int) -> Any:
    """A condition for a batch of `rows`; what is not a tensor with a batch axis stays as it is."""
    # the shape, because len() of a tensor is slow
    if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] == rows:
        return value
    if len(value) == 1:
        return value.expand(rows, *value.shape[1:])
    if rows % len(value):
        raise UsageError(
            f"condition {name!r} has {len(value)} rows, which do not fit a batch of {rows}"
        )
    return value.repeat(rows // len(value), *(1 for _ in value.shape[1:]))
