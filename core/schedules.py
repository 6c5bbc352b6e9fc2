r"""The forward process: q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I), t in [0, 1].

A schedule is the pair of functions t -> (alpha_t, sigma_t). Three laws hold for every one of them:
the signal-to-noise ratio alpha^2 / sigma^2 strictly decreases in t; t = 0 is clean data (alpha 1,
sigma 0); whatever a schedule can do follows from the pair and from the inverse of log-SNR(t) =
log(alpha^2 / sigma^2). At t = 1 there may be no signal left at all (alpha 0): what predicts x0, v
or the flow works there, eps says nothing.

A table of T betas (Ho et al., 2020) is a schedule whose entry i (0-based) sits at t = (i + 1) / T:
exact at its entries, and between them log alpha is linear, or what `BETWEEN` names.

All arithmetic is float64; results take the dtype of what was given.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, NamedTuple, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from mdiff.core.errors import UsageError
from mdiff.core.names import make, pick

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
            clean data, above `high` there is too little signal for them.
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
        t = self.inverse(log_snr.double().clamp(min=-700.0)).clamp(0.0, 1.0)
        ends = (log_snr == -math.inf).to(t.dtype)
        return torch.where(log_snr.isinf(), ends, t).to(log_snr.dtype)

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
        return _snap(t * (self.steps or self.entries)) - 1

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


def subvp(beta_min: float = 0.1, beta_max: float = 20.0) -> Schedule:
    """The sub-VP SDE: alpha of `vp_linear`, and sigma = 1 - alpha^2 (Song et al., 2021, eq. 38)."""
    base = vp_linear(beta_min, beta_max)

    def kernel(t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = base.kernel(t)
        return alpha, sigma**2

    def inverse(log_snr: Tensor) -> Tensor:
        # sigma / alpha = 1 / alpha - alpha = -2 sinh(log alpha), and base takes its own log-SNR
        log_alpha = -torch.asinh(torch.exp(-log_snr / 2) / 2)
        return base.inverse(_log_snr_of(log_alpha))

    return Schedule(name=f"subvp({beta_min}, {beta_max})", kernel=kernel, inverse=inverse)


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


def sigmoid(
    start: float = -3.0, end: float = 3.0, tau: float = 1.0, high: float | None = None
) -> Schedule:
    """alpha^2 falls from 1 to 0 as a sigmoid of (start + (end - start) t) / tau (Jabri et al., 2022).

    Chen, 2023, has the same with start 0 or -3 and tau from 0.3 to 1.1. There is no signal at t =
    1, see `cosine`; `high` is where log-SNR is `FAINT` if None.
    """
    first, last = (torch.tensor(u / tau, dtype=torch.float64).sigmoid() for u in (start, end))

    def log_alpha(t: Tensor) -> Tensor:
        u = torch.sigmoid((start + (end - start) * t) / tau)
        return ((last - u) / (last - first)).clamp(min=0).log() / 2

    def inverse(log_alpha: Tensor) -> Tensor:
        # 1 - alpha^2 by expm1: near clean data alpha^2 itself rounds to 1
        u = first - (last - first) * torch.expm1(2 * log_alpha)
        return (torch.logit(u) * tau - start) / (end - start)

    return _until(high, _preserving(log_alpha, inverse, name=f"sigmoid({start}, {end}, {tau})"))


def laplace(mu: float = 0.0, b: float = 0.5, high: float | None = None) -> Schedule:
    """log-SNR is distributed as Laplace(mu, b) over uniform t (Hang et al., 2024).

    There is no signal at t = 1, see `cosine`; `high` is where log-SNR is `FAINT` if None.
    """

    def log_alpha(t: Tensor) -> Tensor:
        # the quantile function of the Laplace distribution, at 1 - t
        log_snr = torch.where(t < 0.5, mu - b * (2 * t).log(), mu + b * (2 - 2 * t).log())
        return F.logsigmoid(log_snr) / 2

    def inverse(log_alpha: Tensor) -> Tensor:
        z = (_log_snr_of(log_alpha) - mu) / b
        return torch.where(z > 0, torch.exp(-z) / 2, 1 - torch.exp(z) / 2)

    return _until(high, _preserving(log_alpha, inverse, name=f"laplace({mu}, {b})"))


FAINT = -10.2
"""The log-SNR below which networks that predict eps have nothing to go by (Lu et al., 2022, clip
its half at -5.1)."""


def _until(high: float | None, schedule: Schedule) -> Schedule:
    """The schedule with that `high`; None for where its log-SNR is `FAINT`."""
    if high is None:
        high = schedule.time(torch.tensor(FAINT, dtype=torch.float64)).item()
    return replace(schedule, high=high)


def _log_snr_of(log_alpha: Tensor) -> Tensor:
    """log-SNR where alpha^2 + sigma^2 = 1."""
    return 2 * log_alpha - torch.log(-torch.expm1(2 * log_alpha))


# --- tables of betas ------------------------------------------------------------------------------


BETWEEN: dict[str, tuple[Map, Map]] = {
    "log_alpha": (torch.neg, torch.neg),
    "log_sigma": (lambda log: -_log_snr_of(log) / 2, lambda u: F.logsigmoid(-2 * u) / 2),
    "sigma": (lambda log: torch.expm1(-2 * log).sqrt(), lambda u: -torch.log1p(u**2) / 2),
}
"""What is linear between the entries of a table: a function of log alpha that grows with t, and its
inverse. DPM-Solver (Lu et al., 2022) has the first; sigma means sigma / alpha, and k-diffusion has
its logarithm linear, diffusers that or sigma itself."""


def betas(
    table: Sequence[float] | Tensor, name: str = "betas", between: str = "log_alpha"
) -> Schedule:
    """Any table of T betas: alpha_i^2 = prod_{j <= i} (1 - beta_j) (Ho et al., 2020).

    Args:
        between: what is linear between entries, a row of `BETWEEN`; before the first log alpha is.

    Raises:
        UsageError: a beta is not inside (0, 1), or an unknown `between`.
    """
    table = torch.as_tensor(table, dtype=torch.float64).cpu()
    if table.ndim != 1 or len(table) == 0 or not bool(((table > 0) & (table < 1)).all()):
        raise UsageError(
            "a table of betas is one row of numbers, each above 0 and below 1; zero_terminal makes "
            "one that ends without signal"
        )
    forward, back = pick("interpolation", BETWEEN, between)
    steps = len(table)
    logs = torch.log1p(-table).cumsum(0) / 2
    first, heights = logs[0].item(), forward(logs)
    # entry i is at place i + 1, clean data at place 0
    places = torch.arange(1, steps + 1, dtype=torch.float64)

    def log_alpha(t: Tensor) -> Tensor:
        place = _snap(t * steps)
        return torch.where(place <= 1, place * first, back(_interpolate(place, places, heights)))

    def inverse(log_alpha: Tensor) -> Tensor:
        place = _interpolate(forward(log_alpha), heights, places)
        return torch.where(log_alpha > first, log_alpha / first, place) / steps

    return _preserving(log_alpha, inverse, name=f"{name}({steps})", steps=steps, low=1 / steps)


def linear(
    beta_start: float = 1e-4, beta_end: float = 0.02, steps: int = 1000, between: str = "log_alpha"
) -> Schedule:
    """The table of DDPM: betas linear from start to end (Ho et al., 2020)."""
    table = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
    return betas(table, "linear", between)


def scaled_linear(
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    steps: int = 1000,
    between: str = "log_alpha",
) -> Schedule:
    """The table of latent diffusion: square roots of the betas linear (Rombach et al., 2022)."""
    roots = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64)
    return betas(roots**2, "scaled_linear", between)


def sigmoid_betas(beta_start: float = 1e-4, beta_end: float = 0.02, steps: int = 1000) -> Schedule:
    """The table of GeoDiff: betas a sigmoid over -6 to 6, from start to end (Xu et al., 2022)."""
    u = torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid()
    return betas(beta_start + (beta_end - beta_start) * u, "sigmoid_betas")


def cosine_betas(steps: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> Schedule:
    """The table of Improved DDPM: the betas of the cosine, each clipped at max_beta.

    Source: Nichol and Dhariwal, 2021, section 3.2.
    """
    u = torch.arange(steps + 1, dtype=torch.float64) / steps
    return _clipped(torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2, max_beta, "cosine_betas")


def laplace_betas(steps: int = 1000, max_beta: float = 0.999) -> Schedule:
    """The table named "laplace" in diffusers: alpha is the fourth root of a Laplace sigmoid.

    alpha^4 = sigmoid(lambda), lambda the quantile function of Laplace(0, 1/2) at 1 - t, with 1e-6
    against its infinities. It is not the schedule of the paper, which `laplace` is. Source:
    diffusers 0.42, betas_for_alpha_bar; after Hang et al., 2024.
    """
    offset = 0.5 - torch.arange(steps + 1, dtype=torch.float64) / steps
    size = -0.5 * torch.log(1 - 2 * offset.abs() + 1e-6)
    log_snr = torch.where(offset < 0, -size, size)
    return _clipped(torch.sigmoid(log_snr).sqrt(), max_beta, "laplace_betas")


def _clipped(alpha_squared: Tensor, max_beta: float, name: str) -> Schedule:
    """The table of the betas that lead through alpha^2 at 0, 1, ..., T, each clipped."""
    return betas((1 - alpha_squared[1:] / alpha_squared[:-1]).clamp(max=max_beta), name)


def diffwave(beta_end: float = 0.05, steps: int = 50) -> Schedule:
    """The table of DiffWave: betas linear from 1e-4, to 0.05 in 50 or 0.02 in 200 (Kong et al., 2021)."""
    return betas(torch.linspace(1e-4, beta_end, steps, dtype=torch.float64), "diffwave")


def diffwave_fast(last: float = 0.5) -> Schedule:
    """The six betas of DiffWave's fast sampling; the large model ends at 0.7 (Kong et al., 2021).

    A network of `diffwave` is told where its own table has the same alpha.
    """
    return betas([1e-4, 1e-3, 1e-2, 0.05, 0.2, last], "diffwave_fast")


def zero_terminal(schedule: Schedule | str = "scaled_linear", **params: Any) -> Schedule:
    """Another schedule's alpha, shifted and scaled to end at 0 (Lin et al., 2023, alg. 1).

    alpha at `low`, the first entry of a table, keeps its value, and before it nothing changes. A
    network has to be trained for this, and to predict v or x0.

    Args:
        schedule: one that preserves variance, or the name of one, made with `params`.

    Raises:
        UsageError: sigma^2 of that schedule is not 1 - alpha^2.
    """
    base = _preserved("zero_terminal", schedule, params)
    low, high = base.at(base.low), base.at(base.high)
    factor = low.alpha / (low.alpha - high.alpha)

    def log_alpha(t: Tensor) -> Tensor:
        alpha, _ = base.kernel(t)
        return torch.where(t < base.low, alpha, (alpha - high.alpha).clamp(min=0) * factor).log()

    def inverse(log_alpha: Tensor) -> Tensor:
        log = torch.log(log_alpha.exp() / factor + high.alpha)
        log = torch.where(log_alpha > math.log(low.alpha), log_alpha, log)
        return base.inverse(_log_snr_of(log))

    return _preserving(
        log_alpha,
        inverse,
        name=f"zero_terminal({base.name})",
        steps=base.steps,
        low=base.low,
        high=base.high,
    )


def _snap(position: V) -> V:
    """Rounds what is an integer but for rounding errors, those of a float32 t included."""
    if isinstance(position, Tensor):
        whole = position.round()
        # added, not put in its place: the slope there is that of the position (the sum is exact)
        return (
            position + torch.where((position - whole).abs() < 1e-4, whole - position, 0.0).detach()
        )
    return round(position) if abs(position - round(position)) < 1e-4 else position


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Piecewise linear through the points (xs, ys), exact at them; xs increases."""
    xs, ys = xs.to(x.device), ys.to(x.device)
    if len(xs) == 1:
        return ys[0].expand_as(x)
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


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> Schedule:
    """sigma = sigma_max t: the time of EDM, scaled to end at 1 (Karras et al., 2022, table 1)."""
    return Schedule(
        name=f"edm({sigma_min}, {sigma_max})",
        kernel=lambda t: (torch.ones_like(t), sigma_max * t),
        inverse=lambda log_snr: torch.exp(-log_snr / 2) / sigma_max,
        low=sigma_min / sigma_max,
    )


# --- straight lines: alpha + sigma = 1 ------------------------------------------------------------


def flow(shift: float = 1.0, low: float = 1e-3) -> Schedule:
    """Rectified flow: sigma = s t / (1 + (s - 1) t), s the shift, and alpha = 1 - sigma.

    Source: Liu et al., 2023; the shift: Esser et al., 2024, eq. 23. At t = 1 there is only noise.
    """

    def kernel(t: Tensor) -> tuple[Tensor, Tensor]:
        whole = 1 + (shift - 1) * t
        return (1 - t) / whole, shift * t / whole

    def inverse(log_snr: Tensor) -> Tensor:
        # sigma / alpha = s t / (1 - t)
        return torch.sigmoid(-log_snr / 2 - math.log(shift))

    return Schedule(name=f"flow({shift})", kernel=kernel, inverse=inverse, low=low)


def shifted(schedule: Schedule | str = "cosine", factor: float = 2.0, **params: Any) -> Schedule:
    """Another schedule with 2 log(factor) taken off its log-SNR (Hoogeboom et al., 2023, section 3.1).

    For data of which many numbers say the same, so that noise hides it later: pictures with `factor` times as many
    pixels on an edge, clips of a thing that moves. A network has to be trained for this.

    Args:
        schedule: one that preserves variance, or the name of one, made with `params`.

    Raises:
        UsageError: sigma^2 of that schedule is not 1 - alpha^2, or the factor is not above 0.
    """
    if not 0 < factor < math.inf:
        raise UsageError(f"shifted takes a factor above 0, not {factor}")
    base = _preserved("shifted", schedule, params)

    def kernel(t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = base.kernel(t)
        whole = (1 + (factor**2 - 1) * sigma**2).sqrt()
        return alpha / whole, factor * sigma / whole

    return replace(
        base,
        name=f"shifted({base.name}, {factor})",
        kernel=kernel,
        inverse=lambda log_snr: base.inverse(log_snr + 2 * math.log(factor)),
    )


def _preserved(name: str, schedule: Schedule | str, params: dict[str, Any]) -> Schedule:
    """The schedule that another is made of, which preserves variance."""
    base = from_name(schedule, **params) if isinstance(schedule, str) else schedule
    ends = (base.at(base.low), base.at(base.high))
    if not all(math.isclose(t.alpha**2 + t.sigma**2, 1) for t in ends):
        raise UsageError(f"{name} takes a schedule that preserves variance, not {base.name}")
    return base


NAMES: dict[str, Callable[..., Schedule]] = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "cosine_betas": cosine_betas,
    "sigmoid_betas": sigmoid_betas,
    "laplace_betas": laplace_betas,
    "diffwave": diffwave,
    "diffwave_fast": diffwave_fast,
    "betas": betas,
    "vp_linear": vp_linear,
    "subvp": subvp,
    "cosine": cosine,
    "sigmoid": sigmoid,
    "laplace": laplace,
    "zero_terminal": zero_terminal,
    "shifted": shifted,
    "ve": ve,
    "edm": edm,
    "flow": flow,
}


def from_name(name: str, /, **params: Any) -> Schedule:
    """The schedule of that name, e.g. from_name("scaled_linear", beta_end=0.02).

    Raises:
        UsageError: unknown name (the nearest is named), or parameters that it does not take.
    """
    return make("schedule", NAMES, name, **params)
