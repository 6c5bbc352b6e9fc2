r"""Noise: one stream of standard normal numbers per sample, and if wanted one Brownian path.

Sample k draws from its own generator, seeded by its own seed, on the CPU and in float32. So it sees
the same numbers alone, in any batch, on any device and in any precision. The global random state is
neither read nor moved.

A sampler of a stochastic differential equation asks for the noise `between` two times. That of
`from_seeds` is fresh in each step. That of `brownian` is the increment of one path W per sample
between the two signal-to-noise ratios M = alpha^2 / sigma^2. For a network that keeps saying the
same x0 the reverse process has the exact solution

    x_s / alpha_s = x0 + (M_t / M_s) (x_t / alpha_t - x0) + (W(M_s) - W(M_t)) / M_s,

in which steps compose: however many are taken, the same path leads to the same sample.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mdiff.core.errors import UsageError
from mdiff.core.schedules import Time


@dataclass(frozen=True, kw_only=True, eq=False)
class Noise:
    """A batch of B streams; each draw is (B, *shape) and moves every stream on.

    Attributes:
        shape: that of one sample, (C, *axes).
        generators: one per sample.
        paths: one per sample, or none.
    """

    shape: tuple[int, ...]
    generators: tuple[torch.Generator, ...]
    paths: tuple["Path", ...] = ()
    _state: list[dict[str, Tensor]] = field(default_factory=list, init=False, repr=False)

    def draw(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The next (B, *shape) normal numbers; float32 on the CPU unless told otherwise."""
        batch, device = self._empty(device)
        self._state.clear()
        for row, generator in zip(batch, self.generators, strict=True):
            torch.randn(self.shape, generator=generator, out=row)
        return batch.to(device, dtype, non_blocking=True)

    def between(
        self,
        t: Time[float],
        s: Time[float],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The noise of the reverse process from t to s, over its deviation: (B, *shape) normal
        numbers, fresh ones or those of the paths.
        """
        if not self.paths:
            return self.draw(device, dtype)
        batch, device = self._empty(device)
        for row, path in zip(batch, self.paths, strict=True):
            row.copy_(path.between(t.log_snr, s.log_snr))
        return batch.to(device, dtype, non_blocking=True)

    def state(self) -> dict[str, Tensor]:
        """Where the streams are: "generators" (B, bytes) uint8, "shape" (axes,) int64, and if there
        are paths their "seeds" (B,) int64. The same tensors until something is drawn.
        """
        if not self._state:
            # the bits of a seed as a signed number
            seeds = [path.seed - (path.seed >> 63 << 64) for path in self.paths]
            made = {
                "generators": torch.stack([g.get_state() for g in self.generators]),
                "shape": torch.tensor(self.shape, dtype=torch.int64),
                **({"seeds": torch.tensor(seeds, dtype=torch.int64)} if seeds else {}),
            }
            self._state.append(made)
        return dict(self._state[0])

    @staticmethod
    def restore(state: Mapping[str, Tensor]) -> "Noise":
        """Streams that go on from where `state` was taken."""
        # a copy of each row: set_state misreads a view that does not start its storage
        generators = tuple(
            torch.Generator().set_state(row.cpu().clone()) for row in state["generators"]
        )
        shape = tuple(state["shape"].tolist())
        seeds = [seed % 2**64 for seed in state["seeds"].tolist()] if "seeds" in state else []
        paths = tuple(Path(seed=seed, shape=shape) for seed in seeds)
        return Noise(shape=shape, generators=generators, paths=paths)

    def _empty(self, device: torch.device | str | None) -> tuple[Tensor, torch.device]:
        """Room for a batch on the CPU, and the device that it is meant for."""
        device = torch.device(device or "cpu")
        # pinned memory is copied to an accelerator without waiting for it
        pinned = device.type == "cuda"
        return torch.empty((len(self.generators), *self.shape), pin_memory=pinned), device


@dataclass(frozen=True, kw_only=True, eq=False)
class Path:
    """A Brownian path W(M), M > 0, of which only the seed is kept: a virtual Brownian tree.

    Each octave 2^k <= M < 2^(k + 1) is a tree of its own, halved until a query is met to within
    1e-8 of the octave (Li et al., 2020, alg. 3, in torchsde), so no end and no scale is special.

    Attributes:
        seed: 64 bits.
        shape: that of W.
    """

    seed: int
    shape: tuple[int, ...]
    _trees: dict[int, Any] = field(default_factory=dict, init=False, repr=False)

    def between(self, low: float, high: float) -> Tensor:
        """The increment between two log-SNRs, over the root of M's: normal numbers of `shape`.

        Of a low end at which no signal is left, all but 2^-30 of the variance is met.
        """
        top = math.exp(high)
        bottom = max(math.exp(low), top * 2**-30)
        (first, start), (last, end) = (_octave(value) for value in (bottom, top))
        total = torch.zeros(self.shape)
        for octave in range(first, last + 1):
            a = start if octave == first else 0.0
            b = end if octave == last else 1.0
            if a < b:
                size = math.ldexp(1.0, octave) / (top - bottom)
                total.add_(self._tree(octave)(a, b), alpha=math.sqrt(size))
        return total

    def _tree(self, octave: int) -> Any:
        """The path through an octave, scaled to [0, 1] and started at 0."""
        if octave not in self._trees:
            from torchsde import BrownianInterval  # training has no use for it

            # a sampler passes an octave once: to keep two bounds the memory
            for old in list(self._trees)[:-1]:
                del self._trees[old]
            self._trees[octave] = BrownianInterval(
                t0=0.0,
                t1=1.0,
                size=self.shape,
                dtype=torch.float32,
                entropy=self.seed << 12 | octave + 2048,
                tol=1e-8,
                halfway_tree=True,
            )
        return self._trees[octave]


def from_seeds(seeds: Sequence[int], shape: Sequence[int]) -> Noise:
    """One stream per seed; `shape` is that of one sample, (C, *axes).

    Raises:
        UsageError: no seed, or one that does not fit into 64 bits.
    """
    if not seeds:
        raise UsageError("noise needs at least one seed, one per sample")
    for seed in seeds:
        if not 0 <= seed < 2**64:
            raise UsageError(f"seed {seed} is not between 0 and 2^64 - 1")
    generators = tuple(torch.Generator().manual_seed(_fold(seed)) for seed in seeds)
    return Noise(shape=tuple(shape), generators=generators)


def brownian(seeds: Sequence[int], shape: Sequence[int]) -> Noise:
    """One stream and one Brownian path per seed: stochastic samplers agree across step counts.

    Raises:
        UsageError: no seed, or one that does not fit into 64 bits.
    """
    streams = from_seeds(seeds, shape)
    paths = tuple(Path(seed=seed, shape=streams.shape) for seed in seeds)
    return Noise(shape=streams.shape, generators=streams.generators, paths=paths)


def _octave(value: float) -> tuple[int, float]:
    """(k, f) of value = (1 + f) 2^k, 0 <= f < 1."""
    mantissa, exponent = math.frexp(value)
    return exponent - 1, 2 * mantissa - 1


def _fold(seed: int) -> int:
    """64 bits as the 32 that the generator reads; seeds below 2^32 stay what they are.

    Seeds that differ in one half only never meet: the odd factor permutes the upper half.
    """
    low, high = seed & 0xFFFFFFFF, seed >> 32
    return low ^ (high * 0x9E3779B1 & 0xFFFFFFFF)
