"""What chance decides in a step of training, the same however the batch is split.

A step has a batch of `total` samples, and one process of several, or one micro-batch of several, has the samples
`mine` of it. Each draw is made for the whole batch from the step's own generator and only those are kept, so a sample
sees the same data, times and noise whether it is trained alone, in one process or in eight.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


def derived(seed: int, *path: int | str) -> int:
    """A seed for one purpose: equal (seed, path) give equal ones, others independent ones."""
    text = " ".join(map(str, (seed, *path)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *path: int | str) -> torch.Generator:
    """A CPU generator for one purpose, with the seed that is `derived`."""
    return torch.Generator().manual_seed(derived(seed, *path))


@dataclass(frozen=True)
class Draws:
    """The random numbers of one step, for some of its samples.

    Attributes:
        step: the number of the step, from 0.
        total: samples in the whole batch.
        mine: which of them are asked for.
        generator: that of the step; another of the same step draws the same again.
        device: where the numbers go.
    """

    step: int
    total: int
    mine: slice
    generator: torch.Generator
    device: torch.device

    @staticmethod
    def of(
        seed: int,
        step: int,
        total: int,
        mine: slice | None = None,
        device: torch.device | str = "cpu",
    ) -> "Draws":
        """The draws of a step of a run with this seed."""
        own = slice(0, total) if mine is None else mine
        return Draws(step, total, own, generator(seed, "step", step), torch.device(device))

    def __len__(self) -> int:
        return len(range(self.total)[self.mine])

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers (b, *shape), float32."""
        return self._own(torch.randn(self.total, *shape, generator=self.generator))

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform numbers (b, *shape), float32."""
        numbers = torch.rand(self.total, *shape, generator=self.generator)
        return self._own(low + (high - low) * numbers)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Whole numbers (b, *shape), 0 to high - 1, int64."""
        return self._own(torch.randint(high, (self.total, *shape), generator=self.generator))

    def chance(self, share: float) -> Tensor:
        """(b,) bool: True for this share of samples."""
        return self.uniform() < share

    def one(self, high: int) -> int:
        """A whole number 0 to high - 1 for the whole batch, e.g. where a crop begins."""
        return int(torch.randint(high, (), generator=self.generator))

    def _own(self, numbers: Tensor) -> Tensor:
        return numbers[self.mine].to(self.device, non_blocking=True)
