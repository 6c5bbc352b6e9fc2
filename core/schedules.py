r"""The forward process: q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I), t in [0, 1].

A schedule is the pair of functions t -> (alpha_t, sigma_t). Three laws hold for every one of them:
the signal-to-noise ratio alpha^2 / sigma^2 strictly decreases in t; t = 0 is clean data (alpha 1,
sigma 0); whatever a schedule can do follows from the pair and from the inverse of log-SNR(t) =
log(alpha^2 / sigma^2).

A table of T betas (Ho et al., 2020) is a schedule whose entry i (0-based) sits at t = (i + 1) / T:
log alpha is linear between entries and exact at them.

All arithmetic is float64; results take the dtype of what was given.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from mdiff.core.errors import UsageError
from mdiff.core.names import make

V = TypeVar("V", float, Tensor)
Map = Callable[[Tensor], Tensor]
Kernel = Callable[[Tensor], tuple[Tensor, Tensor]]


class Time(NamedTuple, Generic[V]):
    """A time and the schedule there: Python floats for a whole batch, or one entry per sample (B,).

    Attributes:
        value: t itself, in [0, 1].
        alpha, sigma: the levels of signal and of noise.
        log_snr: log(alpha^2 / sigma^2); infinite where sigma or alpha is 0.
    """

    value: V
    alpha: V
    sigma: V
    log_snr: V


@dataclass(frozen=True, kw_only=True, eq=False)
class Schedule:
    """alpha and sigma as functions of t.

    Attributes:
        name: what it is, for people.
        kernel: t -> (alpha, sigma), float64 in and out, any shape.
        inverse: log-SNR -> t, float64.
        steps: T of a table, None of a continuous schedule.
        low, high: the times between which networks are evaluated; below `low` lies the last step to
            clean data, above `high` signal is lost in rounding.
    """

    name: str
    kernel: Kernel = field(repr=False)
    inverse: Map = field(repr=False)
    steps: int | None = None
    low: float = 1e-3
    high: float = 1.0

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at t, in t's shape and dtype."""
        alpha, sigma = self.kernel(t.double())
        return alpha.to(t.dtype), sigma.to(t.dtype)

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2) at t, in t's shape and dtype; infinite at t = 0."""
        return _log_snr(*self.kernel(t.double())).to(t.dtype)

    def time(self, log_snr: Tensor) -> Tensor:
        """The t at which the schedule has this log-SNR; 0 or 1 where it never has."""
        # below -700 nothing but rounding is left of the signal, and inverses meet infinities
        t = self.inverse(log_snr.double().clamp(min=-700.0))
        return t.clamp(0.0, 1.0).to(log_snr.dtype)

    @property
    def entries(self) -> int:
        """T of a table.

        Raises:
            UsageError: the schedule is continuous.
        """
        if self.steps is None:
            raise UsageError(
                f"{self.name} is continuous and has no indices: give the schedule as a table of "
                "betas, or choose a grid and a form of the time that count no entries"
            )
        return self.steps

    def index(self, t: V) -> V:
        """The place of t in the table, t T - 1: exact integers at its entries. Raises as that."""
        return _snap(t * self.entries) - 1

    @overload
    def at(self, t: Tensor | Time[Tensor]) -> Time[Tensor]: ...
    @overload
    def at(self, t: float | Time[float]) -> Time[float]: ...
    def at(self, t: Any) -> Any:
        """The schedule at t: floats for a float, float64 tensors for a tensor; a `Time` stays."""
        if isinstance(t, Time):
            return t
        value = torch.as_tensor(t, dtype=torch.float64)
        alpha, sigma = self.kernel(value)
        time = Time(value, alpha, sigma, _log_snr(alpha, sigma))
        return time if isinstance(t, Tensor) else Time(*(entry.item() for entry in time))

    def diffuse(self, x0: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """x_t = alpha_t x0 + sigma_t z. Shapes: x0 and z (B, C, *axes), t () or (B,)."""
        alpha, sigma = self(t.double())
        return blend(alpha, x0, sigma, z)


def _log_snr(alpha: Tensor, sigma: Tensor) -> Tensor:
    return 2 * (alpha.log() - sigma.log())


def pad(coefficient: Tensor, x: Tensor) -> Tensor:
    """One number per sample, (B,) or (), as (B, 1, ..., 1) in x's dtype, to multiply x with."""
    shape = coefficient.shape + (1,) * (x.ndim - coefficient.ndim)
    return coefficient.reshape(shape).to(x.dtype)


def blend(a: float | Tensor, x: Tensor, b: float | Tensor, y: Tensor) -> Tensor:
    """a x + b y, with a and b one number for all, or one per sample (B,)."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        a, b = (pad(torch.as_tensor(c, device=x.device), x) for c in (a, b))
        return (x * a).add_(y * b)
    # in place on what was just made: a second new tensor of that size is what would cost
    return (x * a).add_(y, alpha=b)


# --- variance preserving: alpha^2 + sigma^2 = 1, so log alpha says it all -------------------------


def _preserving(log_alpha: Map, inverse: Map, **fields: Any) -> Schedule:
    """The schedule with sigma^2 = 1 - alpha^2, from log alpha(t) and its inverse."""

    def kernel(t: Tensor) -> tuple[Tensor, Tensor]:
        log = log_alpha(t).clamp(max=0.0)
        # expm1 keeps sigma exact where alpha is almost 1
        return log.exp(), torch.expm1(2 * log).abs().sqrt()

    # alpha^2 = sigmoid(log-SNR)
    return Schedule(
        kernel=kernel, inverse=lambda log_snr: inverse(F.logsigmoid(log_snr) / 2), **fields
    )


def vp_linear(beta_min: float = 0.1, beta_max: float = 20.0) -> Schedule:
    """The VP SDE: alpha = exp(-1/2 int beta), with beta linear in t (Song et al., 2021, eq. 33)."""
    slope = beta_max - beta_min

    def inverse(log_alpha: Tensor) -> Tensor:
        # the positive root of slope t^2 + 2 beta_min t + 4 log alpha = 0, without cancellation
        return -4 * log_alpha / (beta_min + (beta_min**2 - 4 * slope * log_alpha).sqrt())

    return _preserving(
        lambda t: -t * (slope * t + 2 * beta_min) / 4,
        inverse,
        name=f"vp_linear({beta_min}, {beta_max})",
    )


def cosine(s: float = 0.008, high: float = 0.9946) -> Schedule:
    """alpha = cos u(t) / cos u(0), u(t) = (t + s) / (1 + s) pi / 2 (Nichol and Dhariwal, 2021).

    At t = 1 there is no signal at all: `high` (the value of DPM-Solver, Lu et al., 2022) keeps
    networks that predict eps away from there; one that predicts v or x0 may have 1.0.
    """
    scale = math.pi / 2 / (1 + s)
    log_first = math.log(math.cos(s * scale))

    def inverse(log_alpha: Tensor) -> Tensor:
        return torch.acos((log_alpha + log_first).exp()) / scale - s

    return _preserving(
        lambda t: torch.cos((t + s) * scale).log() - log_first,
        inverse,
        name=f"cosine({s})",
        high=high,
    )


def betas(table: Sequence[float] | Tensor, name: str = "betas") -> Schedule:
    """Any table of T betas: alpha_i^2 = prod_{j <= i} (1 - beta_j) (Ho et al., 2020).

    Raises:
        UsageError: a beta is not inside (0, 1).
    """
    table = torch.as_tensor(table, dtype=torch.float64).cpu()
    if table.ndim != 1 or len(table) == 0 or not bool(((table > 0) & (table < 1)).all()):
        raise UsageError("a table of betas is one row of numbers, each above 0 and below 1")
    steps = len(table)
    # entry 0 is clean data, entry i + 1 is beta i
    logs = F.pad(torch.log1p(-table).cumsum(0) / 2, (1, 0))
    places = torch.arange(steps + 1, dtype=torch.float64)
    return _preserving(
        lambda t: _interpolate(_snap(t * steps), places, logs),
        lambda log_alpha: _interpolate(-log_alpha, -logs, places) / steps,
        name=f"{name}({steps})",
        steps=steps,
        low=1 / steps,
    )


def linear(beta_start: float = 1e-4, beta_end: float = 0.02, steps: int = 1000) -> Schedule:
    """The table of DDPM (Ho et al., 2020): betas linear from start to end."""
    return betas(torch.linspace(beta_start, beta_end, steps, dtype=torch.float64), "linear")


def scaled_linear(
    beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = 1000
) -> Schedule:
    """The table of latent diffusion (Rombach et al., 2022): square roots of the betas linear."""
    roots = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64)
    return betas(roots**2, "scaled_linear")


def cosine_betas(steps: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> Schedule:
    """The table of Improved DDPM: the betas of the cosine, each clipped at max_beta.

    Source: Nichol and Dhariwal, 2021, section 3.2.
    """
    u = torch.arange(steps + 1, dtype=torch.float64) / steps
    alpha_squared = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    return betas((1 - alpha_squared[1:] / alpha_squared[:-1]).clamp(max=max_beta), "cosine_betas")


def _snap(position: V) -> V:
    """Rounds what is an integer but for rounding errors, those of a float32 t included."""
    if isinstance(position, Tensor):
        whole = position.round()
        return torch.where((position - whole).abs() < 1e-4, whole, position)
    return round(position) if abs(position - round(position)) < 1e-4 else position


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Piecewise linear through the points (xs, ys), exact at them; xs increases."""
    xs, ys = xs.to(x.device), ys.to(x.device)
    right = torch.searchsorted(xs, x.contiguous()).clamp(1, len(xs) - 1)
    left = right - 1
    weight = ((x - xs[left]) / (xs[right] - xs[left])).clamp(0, 1)
    return torch.lerp(ys[left], ys[right], weight)


# --- variance exploding: alpha = 1 ----------------------------------------------------------------


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0, low: float = 1e-5) -> Schedule:
    """The VE SDE: sigma = sigma_min (sigma_max / sigma_min)^t (Song et al., 2021, eq. 31).

    Below t = `low`, where the paper stops, sigma goes straight to 0.
    """
    ratio = math.log(sigma_max / sigma_min)
    sigma_low = sigma_min * math.exp(ratio * low)

    def kernel(t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = torch.where(t < low, sigma_low * t / low, sigma_min * torch.exp(ratio * t))
        return torch.ones_like(t), sigma

    def inverse(log_snr: Tensor) -> Tensor:
        sigma = torch.exp(-log_snr / 2)
        above = (-log_snr / 2 - math.log(sigma_min)) / ratio
        return torch.where(sigma < sigma_low, low * sigma / sigma_low, above)

    return Schedule(name=f"ve({sigma_min}, {sigma_max})", kernel=kernel, inverse=inverse, low=low)


NAMES: dict[str, Callable[..., Schedule]] = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "cosine_betas": cosine_betas,
    "betas": betas,
    "vp_linear": vp_linear,
    "cosine": cosine,
    "ve": ve,
}


def from_name(name: str, **params: Any) -> Schedule:
    """The schedule of that name, e.g. from_name("scaled_linear", beta_end=0.02).

    Raises:
        UsageError: unknown name (the nearest is named), or parameters that it does not take.
    """
    return make("schedule", NAMES, name, **params)
