"""Averages of the weights over the steps of a run, and averages of any width made of them afterwards.

With theta_i the weights after step i, a profile gives (1 - w_i) * average + w_i * theta_i. A plain decay d has
w = 1 - d. The power function of Karras et al., 2024 (arXiv:2312.02696, section 3), whose weight of theta(tau) at time t
is proportional to tau^gamma, has w = 1 - (1 - 1/i)^(gamma + 1); its width is given as sigma_rel, the standard deviation
of that weight as a share of t. From snapshots of two widths or more, `synthesise` makes the average of another width at
another time.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mdiff.core import record, weights
from mdiff.core.errors import IntegrityError, MissingError, UsageError
from mdiff.core.names import pick
from mdiff.core.training.checkpoints import placed

WIDEST = 12**-0.5
"""sigma_rel of gamma = 0, the mean of all steps."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """How much the weights after a step count.

    Attributes:
        weight: number of the step, from 1 -> the share of the new weights, 0 to 1.
        sigma_rel: the width of a power function, None for a plain decay.
    """

    name: str
    weight: Callable[[int], float]
    sigma_rel: float | None = None


def profiles(decays: Sequence[float], powers: Sequence[float]) -> dict[str, Profile]:
    """Profiles by name, "0.999" or "power-0.10": plain decays and power functions of these sigma_rel.

    Raises:
        UsageError: a decay is not in [0, 1), a sigma_rel not in (0, 0.288].
    """
    for decay in decays:
        if not 0 <= decay < 1:
            raise UsageError(f"the decay of an average is in [0, 1), as 0.999 is: {decay}")
    plain = [Profile(name=f"{d:g}", weight=partial(_plain, d)) for d in decays]
    power = [
        Profile(name=power_name(s), weight=partial(_power, gamma_of(s)), sigma_rel=s)
        for s in powers
    ]
    return {profile.name: profile for profile in [*plain, *power]}


def power_name(sigma_rel: float) -> str:
    """The name of a power function: "power-0.10"."""
    short = f"{sigma_rel:.2f}"
    return f"power-{short if float(short) == sigma_rel else f'{sigma_rel:g}'}"


def _plain(decay: float, step: int) -> float:
    """1 - d, more while the run is young, so that early weights are forgotten: d is at most n / (9 + n).

    Source: the moving average of Song et al., 2021 (score_sde), whose counter begins at 1 less.
    """
    return 1 - min(decay, step / (9 + step))


def _power(gamma: float, step: int) -> float:
    """1 - (1 - 1/t)^(gamma + 1), which is 1 at the first step: the weights at the start count nothing."""
    return -math.expm1((gamma + 1) * math.log1p(-1 / step)) if step > 1 else 1.0


def sigma_rel_of(gamma: float) -> float:
    """The width of a power function (Karras et al., 2024, equation 123)."""
    return (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5)


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the power function of a width: the root of (g + 2)^2 (g + 3) sigma_rel^2 = g + 1.

    Raises:
        UsageError: no exponent of 0 or more has that width.
    """
    if not 0 < sigma_rel <= WIDEST:
        raise UsageError(
            f"sigma_rel of an average is in (0, {WIDEST:.3f}], as 0.05 is: {sigma_rel}"
        )
    s = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - s, 12.0 - s])
    return max(0.0, float(roots.real[np.abs(roots.imag) < 1e-6 * s].max()))


class Averages:
    """Averages of a module's weights by several profiles, in float32; what is not floating is copied.

    It holds on to the memory of the module's parameters and buffers, so it is made when the module is in its place.
    """

    def __init__(self, module: nn.Module, profiles: Mapping[str, Profile]) -> None:
        self._profiles = dict(profiles)
        state = module.state_dict()
        self._averages = {
            name: {key: value.detach().to(_kept(value), copy=True) for key, value in state.items()}
            for name in profiles
        }
        floating = [key for key, value in state.items() if value.is_floating_point()]
        others = [key for key in state if not state[key].is_floating_point()]
        self._live = [state[key] for key in floating]
        self._moved = {n: [own[key] for key in floating] for n, own in self._averages.items()}
        self._sources = [state[key] for key in others] * len(profiles)
        self._copies = [own[key] for own in self._averages.values() for key in others]

    @property
    def names(self) -> list[str]:
        """The names of the profiles, in their order."""
        return list(self._profiles)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights as they are after step number `step`, from 1."""
        live = [
            value.float() for value in self._live
        ]  # of float32 these are the tensors themselves
        for name, profile in self._profiles.items():
            torch._foreach_lerp_(self._moved[name], live, profile.weight(step))
        if self._copies:
            torch._foreach_copy_(self._copies, self._sources)

    def state(self, name: str) -> dict[str, Tensor]:
        """The average of a profile by the names of the module's `state_dict`: the tensors themselves, no copies."""
        return dict(pick("average", self._averages, name))

    @torch.no_grad()
    def load(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Goes on from the average that `state` gave.

        Raises:
            IntegrityError: names or shapes are not those of the module.
        """
        own = self.state(name)
        wrong = sorted(own.keys() ^ tensors.keys())
        wrong += [key for key in own if key in tensors and own[key].shape != tensors[key].shape]
        if wrong:
            raise IntegrityError(
                f"average {name!r} does not fit the module: {', '.join(wrong[:3])}"
            )
        for key, value in own.items():
            value.copy_(placed(tensors[key], value))


def _kept(value: Tensor) -> torch.dtype:
    return torch.float32 if value.is_floating_point() else value.dtype


# --- snapshots, and averages made of them afterwards -------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A file that holds an average by a power function as it was after a step."""

    path: Path
    step: int
    sigma_rel: float


_FILE = re.compile(r"(?P<step>\d{8,})-power-(?P<sigma>0\.\d+)\.safetensors")


def write_snapshot(folder: Path, step: int, name: str, state: Mapping[str, Tensor]) -> Path:
    """Writes the average `name` after a step, in half precision where its numbers fit that.

    Raises:
        MdiffError: the system refused.
    """
    path = folder / f"{step:08d}-{name}.safetensors"
    with record.atomic_write(path) as temporary:
        weights.write(temporary, {key: _halved(value) for key, value in state.items()})
    return path


def _halved(value: Tensor) -> Tensor:
    half = value.half() if value.is_floating_point() else value
    return half if bool(torch.isfinite(half).all()) else value


def read_snapshots(folder: Path) -> list[Snapshot]:
    """The snapshots of power functions in a folder, by step and width.

    Raises:
        MissingError: there is none.
    """
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [(path, match) for path in files if (match := _FILE.fullmatch(path.name))]
    if not found:
        raise MissingError(
            f"{folder} has no snapshots: they are kept by a run with --set average.powers=[0.05,0.1] "
            "and --set average.snapshots=STEPS"
        )
    return [
        Snapshot(path=path, step=int(match["step"]), sigma_rel=float(match["sigma"]))
        for path, match in found
    ]


def synthesise(snapshots: Sequence[Snapshot], sigma_rel: float, at: int) -> dict[str, Tensor]:
    """The average of another width after step `at`, in float32: the sum of snapshots whose profile is closest to it.

    Files are read one at a time. Between two snapshots the result knows what the later one does.

    Raises:
        UsageError: no snapshot reaches that far, or the width is none.
        IntegrityError: files are damaged or of different modules.

    Source: Karras et al., 2024, section 3.2 and algorithm 3.
    """
    used = [s for s in snapshots if s.step > 0]  # before the first step there is no profile
    last = max((s.step for s in used), default=0)
    if not 0 < at <= last:
        raise UsageError(
            f"no snapshot says what the weights were at step {at}: 1 to {last} are known"
        )
    shares = coefficients([(s.sigma_rel, s.step) for s in used], sigma_rel, at)
    total: dict[str, Tensor] = {}
    other: dict[str, Tensor] = {}  # what is not floating: as it was at the snapshot nearest to `at`
    nearest = min(used, key=lambda s: abs(s.step - at))
    for snapshot, share in zip(used, shares.tolist(), strict=True):
        tensors = _read(snapshot.path)
        floating = {k: v for k, v in tensors.items() if v.is_floating_point()}
        if not total:
            total = {k: torch.zeros_like(v, dtype=torch.float64) for k, v in floating.items()}
        _same(total, floating, snapshot.path)
        for key, value in floating.items():
            total[key].add_(value.double(), alpha=share)
        if snapshot is nearest:
            other = {k: v for k, v in tensors.items() if k not in floating}
    return {key: value.float() for key, value in total.items()} | other


def coefficients(
    known: Sequence[tuple[float, float]], sigma_rel: float, at: float
) -> NDArray[np.float64]:
    """How much of each known average, (sigma_rel, step) of its profile, makes up the wanted one; they sum to 1."""
    gammas = np.array([gamma_of(s) for s, _ in known])
    times = np.array([t for _, t in known], dtype=np.float64)
    gram = _inner(gammas[:, None], times[:, None], gammas, times)
    wanted = _inner(gammas, times, np.float64(gamma_of(sigma_rel)), np.float64(at))
    # scaled to unit norms; near-copies among the profiles must not blow up
    norms = np.sqrt(np.diag(gram))
    solved = np.linalg.lstsq(gram / np.outer(norms, norms), wanted / norms, rcond=1e-13)[0] / norms
    return np.asarray(solved / solved.sum())


def _inner(
    gamma_a: NDArray[np.float64],
    t_a: NDArray[np.float64],
    gamma_b: NDArray[np.float64] | np.float64,
    t_b: NDArray[np.float64] | np.float64,
) -> NDArray[np.float64]:
    """Integral over tau of the product of two profiles (gamma + 1) / t * (tau / t)^gamma, each zero after its t."""
    later = np.maximum(t_a, t_b)
    ratio = np.minimum(t_a, t_b) / later
    power = np.where(t_a < t_b, gamma_b, gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * ratio**power / ((gamma_a + gamma_b + 1) * later)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return weights.parse(path.read_bytes(), str(path))
    except OSError as error:
        raise MissingError(f"{path} cannot be read ({error.strerror})") from error


def _same(total: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path) -> None:
    wrong = _shapes(total) ^ _shapes(found)
    if wrong:
        names = sorted({key for key, _ in wrong})
        raise IntegrityError(f"{path} is a snapshot of another module: {', '.join(names[:3])}")


def _shapes(tensors: Mapping[str, Tensor]) -> set[tuple[str, torch.Size]]:
    return {(key, value.shape) for key, value in tensors.items()}
