r"""The denoiser: (x_t, t) -> E[x_0 | x_t], whatever the network behind it was trained to say.

What a network F says is affine in x_0 for every kind of prediction, so one line turns each into the
other:

    x0 = skip x_t + out F        F = (x0 - skip x_t) / out

A kind of prediction is its pair (skip, out) as a function of the time, and a row of `PREDICTS`; the
form in which a network wants the time is a function of it, and a row of `TIMES`.
"""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mdiff.core.errors import UsageError
from mdiff.core.names import pick
from mdiff.core.schedules import Schedule, Time, V, blend


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


PREDICTS: dict[str, Callable[[Time[Any]], tuple[Any, Any]]] = {"eps": _eps, "v": _v, "x0": _x0}


def to_x0(predicts: str, output: Tensor, x: Tensor, t: Time[float] | Time[Tensor]) -> Tensor:
    """The x0 that a network means by `output` at x_t = x."""
    skip, out = PREDICTS[predicts](t)
    return blend(skip, x, out, output)


def from_x0(predicts: str, x0: Tensor, x: Tensor, t: Time[float] | Time[Tensor]) -> Tensor:
    """What a network would have said, had it meant x0: the inverse of `to_x0`."""
    skip, out = PREDICTS[predicts](t)
    return blend(1 / out, x0, -skip / out, x)


# --- the time that networks are told --------------------------------------------------------------


TIMES: dict[str, Callable[[Time[Any], Schedule], Any]] = {
    "t": lambda t, schedule: t.value,
    # 0 ... T - 1: exact integers at the entries of a table, fractions between them
    "index": lambda t, schedule: schedule.index(t.value),
    # the same as if the table had a thousand entries (Improved DDPM)
    "index_scaled": lambda t, schedule: schedule.index(t.value) * (1000 / schedule.entries),
    # sigma of the papers in which alpha is 1
    "sigma": lambda t, schedule: t.sigma / t.alpha,
    # ln(sigma) / 4 of the same (Karras et al., 2022)
    "log_sigma/4": lambda t, schedule: -t.log_snr / 8,
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
        learned_variance: it gives 2 C channels, of which the last C place the variance, -1 to 1.
        cond: conditions by keyword, tensors with the batch first. b rows serve a batch of n b,
            repeated n times in order: one row is for everybody, and guidance may stack batches.

    Raises:
        UsageError: unknown `predicts` or `time`, or an index asked of a schedule without a table;
            when called, an output or a condition whose size does not fit x.
    """

    net: Callable[..., Tensor]
    schedule: Schedule
    _: KW_ONLY
    predicts: str = "eps"
    time: str | Callable[[Time[Any], Schedule], Any] = "t"
    learned_variance: bool = False
    cond: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pick("prediction", PREDICTS, self.predicts)
        self._tell(Time(1.0, 1.0, 1.0, 0.0))

    @property
    def device(self) -> torch.device:
        """That of the network's parameters; the CPU if it has none."""
        return self._example(torch.empty(0)).device

    def bind(self, **cond: Any) -> "Denoiser":
        """The same denoiser with these conditions, added to or in place of those it has."""
        return replace(self, cond={**self.cond, **cond})

    def __call__(self, x: Tensor, t: Time[float] | Time[Tensor] | float | Tensor) -> Prediction:
        """E[x_0 | x_t = x]. Shapes: x (B, C, *axes); t one number, or one per sample (B,)."""
        rows, at = len(x), self.schedule.at(t)
        if isinstance(at.value, Tensor):
            at = Time(*(tile("t", entry, rows) for entry in at))
        cond = {name: tile(name, value, rows) for name, value in self.cond.items()}
        output = self.net(x.to(self._example(x).dtype), _row(self._tell(at), x), **cond).to(x.dtype)
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

    def _tell(self, at: Time[Any]) -> Any:
        """The time in the network's form."""
        form = self.time
        form = pick("form of the time", TIMES, form) if isinstance(form, str) else form
        return form(at, self.schedule)

    def _example(self, default: Tensor) -> Tensor:
        """A parameter of the network, for its device and dtype; `default` if it has none."""
        parameters = self.net.parameters() if isinstance(self.net, nn.Module) else iter(())
        return next((p for p in parameters if p.is_floating_point()), default)


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
        return self.rule(self.inner, x, self.schedule.at(t))


def _row(value: float | Tensor, x: Tensor) -> Tensor:
    """A time for each row of x, on its device, (B,), in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if isinstance(value, Tensor):
        return value.to(x.device, dtype).expand(len(x))
    return torch.full((len(x),), value, dtype=dtype, device=x.device)


def tile(name: str, value: Any, rows: int) -> Any:
    """A condition for a batch of `rows`; what is not a tensor with a batch axis stays as it is."""
    if not isinstance(value, Tensor) or value.ndim == 0 or len(value) == rows:
        return value
    if len(value) == 1:
        return value.expand(rows, *value.shape[1:])
    if rows % len(value):
        raise UsageError(
            f"condition {name!r} has {len(value)} rows, which do not fit a batch of {rows}"
        )
    return value.repeat(rows // len(value), *(1 for _ in value.shape[1:]))
