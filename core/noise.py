"""Noise: one stream of standard normal numbers per sample.

Sample k draws from its own generator, seeded by its own seed, on the CPU and in float32. So it sees
the same numbers alone, in any batch, on any device and in any precision. The global random state is
neither read nor moved.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mdiff.core.errors import UsageError


@dataclass(frozen=True, kw_only=True, eq=False)
class Noise:
    """A batch of B streams; each draw is (B, *shape) and moves every stream on."""

    shape: tuple[int, ...]
    generators: tuple[torch.Generator, ...]

    def draw(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The next (B, *shape) normal numbers; float32 on the CPU unless told otherwise."""
        device = torch.device(device or "cpu")
        # pinned memory is copied to an accelerator without waiting for it
        batch = torch.empty((len(self.generators), *self.shape), pin_memory=device.type == "cuda")
        for i, generator in enumerate(self.generators):
            torch.randn(self.shape, generator=generator, out=batch[i])
        return batch.to(device, dtype, non_blocking=True)

    def state(self) -> dict[str, Tensor]:
        """Where the streams are: "generators" (B, bytes) uint8 and "shape" (axes,) int64."""
        return {
            "generators": torch.stack([g.get_state() for g in self.generators]),
            "shape": torch.tensor(self.shape, dtype=torch.int64),
        }

    @staticmethod
    def restore(state: Mapping[str, Tensor]) -> "Noise":
        """Streams that go on from where `state` was taken."""
        # a copy of each row: set_state misreads a view that does not start its storage
        generators = tuple(
            torch.Generator().set_state(row.cpu().clone()) for row in state["generators"]
        )
        return Noise(shape=tuple(state["shape"].tolist()), generators=generators)


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


def _fold(seed: int) -> int:
    """64 bits as the 32 that the generator reads; seeds below 2^32 stay what they are.

    Seeds that differ in one half only never meet: the odd factor permutes the upper half.
    """
    low, high = seed & 0xFFFFFFFF, seed >> 32
    return low ^ (high * 0x9E3779B1 & 0xFFFFFFFF)
