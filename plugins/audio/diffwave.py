"""DiffWave as a model: noise -> waveform, given a log-mel, a class, or nothing (Kong et al., 2021).

Its schedule is a table of T betas between whose entries alpha is linear in the index. A shorter
table, such as the paper's six entries for fast sampling, then is nothing but a grid: entry s
belongs at the time where the trained schedule has its alpha, the network is told that (fractional)
index, and DDPM's step between two such times is the shorter table's own (paper, appendix B).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from mdiff.core import samplers
from mdiff.core.denoiser import Denoise, Denoiser
from mdiff.core.errors import UsageError, nearest
from mdiff.core.grids import Grid
from mdiff.core.hooks import Model, ModelCard, Problem, Request, Stage
from mdiff.core.noise import Noise
from mdiff.core.registry import check_config
from mdiff.core.samplers import Memory, Sampler
from mdiff.core.schedules import Schedule, Time
from mdiff.plugins.audio import inputs
from mdiff.plugins.audio.nets.diffwave import DiffWave
from mdiff.plugins.audio.spectrogram import thumbnail


def linear(start: float = 1e-4, end: float = 0.05, steps: int = 50) -> Tensor:
    """T betas, float64: the paper has 1e-4 to 0.05 in 50 (BASE) and 1e-4 to 0.02 in 200 (LARGE)."""
    return torch.linspace(start, end, steps, dtype=torch.float64)


def _alphas(betas: Sequence[float] | Tensor) -> Tensor:
    """alpha_i = sqrt(prod_{j <= i} (1 - beta_j)), float64."""
    table = torch.as_tensor(betas, dtype=torch.float64).cpu()
    if table.ndim != 1 or len(table) == 0 or not bool(((table > 0) & (table < 1)).all()):
        raise UsageError("a table of betas is one row of numbers, each above 0 and below 1")
    return (1 - table).cumprod(0).sqrt()


def schedule(betas: Sequence[float] | Tensor) -> Schedule:
    """The schedule of a table of T betas: entry i at t = (i + 1) / T, alpha linear in between.

    Raises:
        UsageError: a beta is not inside (0, 1).
    """
    alphas = torch.cat([torch.ones(1, dtype=torch.float64), _alphas(betas)])
    steps = len(alphas) - 1
    places = torch.arange(steps + 1, dtype=torch.float64)

    def kernel(t: Tensor) -> tuple[Tensor, Tensor]:
        alpha = _interpolate(t * steps, places, alphas)
        return alpha, ((1 - alpha) * (1 + alpha)).sqrt()

    def inverse(log_snr: Tensor) -> Tensor:
        return _interpolate(-torch.sigmoid(log_snr).sqrt(), -alphas, places) / steps

    return Schedule(
        name=f"diffwave({steps})", kernel=kernel, inverse=inverse, steps=steps, low=1 / steps
    )


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """The piecewise linear function through (xs, ys), xs increasing; constant outside."""
    xs, ys = xs.to(x.device), ys.to(x.device)
    right = torch.searchsorted(xs, x.contiguous()).clamp(1, len(xs) - 1)
    weight = ((x - xs[right - 1]) / (xs[right] - xs[right - 1])).clamp(0, 1)
    return torch.lerp(ys[right - 1], ys[right], weight)


def aligned(betas: Sequence[float] | Tensor) -> Grid:
    """The times at which a schedule has the levels of another, shorter table of betas.

    With DDPM steps it is the paper's fast sampling; t T - 1 are its aligned steps.

    Raises:
        UsageError: not a table of betas; (when used) the table goes beyond the levels that the
            schedule was trained on.
    """
    alphas = _alphas(betas).flip(0)

    def grid(trained: Schedule) -> Tensor:
        ends = torch.tensor([trained.low, trained.high], dtype=torch.float64)
        high, low = trained(ends)[0].tolist()
        # what is equal but for rounding is inside
        if alphas[0] < low - 1e-9 or alphas[-1] > high + 1e-9:
            raise UsageError(
                f"this table of {len(alphas)} betas has alpha from {alphas[0]:.4f} to "
                f"{alphas[-1]:.4f}, and {trained.name} was trained from {low:.4f} to {high:.4f}: "
                "choose betas that stay inside"
            )
        log_snr = 2 * alphas.log() - torch.log1p(-(alphas**2))
        times = trained.time(log_snr).clamp(*ends.tolist())
        return torch.cat([times, times.new_zeros(1)])

    return grid


@dataclass(frozen=True, kw_only=True)
class Clamped:
    """A sampler that keeps x within [-1, 1] after each step, as lmnt's does."""

    inner: Sampler

    @property
    def order(self) -> int:
        """That of the inner sampler."""
        return self.inner.order

    @property
    def evaluations(self) -> int:
        """Those of the inner sampler."""
        return self.inner.evaluations

    def step(
        self,
        denoise: Denoise,
        x: Tensor,
        t: Time[float],
        s: Time[float],
        state: Memory,
        noise: Noise,
    ) -> tuple[Tensor, Memory]:
        """One step of the inner sampler, clamped."""
        x, state = self.inner.step(denoise, x, t, s, state, noise)
        return x.clamp(-1, 1), state


def build(card: ModelCard, device: str, dtype: torch.dtype) -> Model:
    """The model of a card, with random weights: the one of `stage`, whose module is "diffwave"."""
    check_config(card, ("network", "betas", "rate", "classes", "fast", "clamp"))
    net = DiffWave(**network(card.config)).to(device, dtype)
    return Model(modules={"diffwave": net}, stages=(stage(net, card.config),))


def network(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the network: those of the `config`, and the number of the classes it names."""
    names = config.get("classes")
    return {**config["network"], **({"classes": len(names)} if names else {})}


def stage(net: DiffWave, config: Mapping[str, Any]) -> Stage:
    """The stage that a DiffWave is: by itself, or behind one that leaves "mel" (M, F) in the carry.

    `config` gives `network` (arguments of `DiffWave`), `betas` (of `linear`), the `rate` in Hz, and
    the names of the `classes` where there are any. With a `fast` table of betas the option `fast`
    takes its steps instead of the request's; `clamp` keeps x within [-1, 1] after each step.
    """
    denoiser = Denoiser(net, schedule(linear(**config["betas"])), predicts="eps", time="index")
    rate = config["rate"]

    def prepare(request: Request, carry: dict[str, Any]) -> Problem:
        samples, cond = FORMS[net.takes](request, carry, net.hop, config)
        sampler = samplers.from_name(request.sampler) if config.get("clamp") else None
        return Problem(
            shape=(1, samples),
            given=inputs.given(request, carry, samples, rate),
            cond={name: value.to(denoiser.device) for name, value in cond.items()},
            sampler=Clamped(inner=sampler) if sampler else None,
            grid=aligned(config["fast"]) if request.options.get("fast") else None,
        )

    def finish(
        request: Request, problem: Problem, x: Tensor | None, carry: dict[str, Any]
    ) -> dict[str, Any]:
        assert x is not None  # a stage with a denoiser is given its sample
        audio = x[0].float().cpu()
        if request.duration is not None:
            audio = audio[:, : _samples(request, rate)]
        return {"sample": {"audio": audio, "rate": rate}}

    def draw(x0: Tensor) -> Image:
        return thumbnail({"audio": x0[0], "rate": rate})

    return Stage(name="waveform", prepare=prepare, denoiser=denoiser, finish=finish, preview=draw)


Form = Callable[[Request, Mapping[str, Any], int, Mapping[str, Any]], tuple[int, dict[str, Tensor]]]
"""(request, carry, hop, config) -> the number of samples to make, and the network's conditions."""


def _from_mel(
    request: Request, carry: Mapping[str, Any], hop: int, config: Mapping[str, Any]
) -> tuple[int, dict[str, Tensor]]:
    if "mel" not in carry:
        raise UsageError(
            f"{request.model} turns a log-mel into sound: it stands behind a stage that leaves one"
        )
    mel = carry["mel"]
    return mel.shape[-1] * hop, {"mel": mel[None]}


def _from_class(
    request: Request, carry: Mapping[str, Any], hop: int, config: Mapping[str, Any]
) -> tuple[int, dict[str, Tensor]]:
    names = list(config["classes"])
    if request.class_name is None:
        raise UsageError(f"{request.model} needs a class: --class {names[0]}")
    if request.class_name not in names:
        raise UsageError(f"no class {request.class_name!r}{nearest(request.class_name, names)}")
    label = torch.tensor([names.index(request.class_name)])
    return _samples(request, config["rate"]), {"label": label}


def _from_nothing(
    request: Request, carry: Mapping[str, Any], hop: int, config: Mapping[str, Any]
) -> tuple[int, dict[str, Tensor]]:
    return _samples(request, config["rate"]), {}


FORMS: Mapping[str | None, Form] = {"mel": _from_mel, "label": _from_class, None: _from_nothing}
"""What a DiffWave is conditioned on -> where that comes from."""


def _samples(request: Request, rate: int) -> int:
    if request.duration is None:
        raise UsageError(f"{request.model} needs a duration: --duration 1")
    return max(1, round(request.duration * rate))
