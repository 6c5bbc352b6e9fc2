"""The linear map from latents to coarse data, on any axes: what previews of latent models are made with.

A card's `latent_map` is a table of Z + 1 rows of C numbers: what a unit of each channel of a latent adds to each
channel of the data at its place, and what all of them begin with. It costs nothing next to a decoder, and shows no
more than the means of what a place of a latent stands for.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mdiff.core import data, registry, weights
from mdiff.core.errors import MissingError, UsageError
from mdiff.core.host import Host
from mdiff.core.nn.autoencoder import AutoencoderKL

PART = "autoencoder"
Table = Sequence[Sequence[float]]


class Fit(NamedTuple):
    """A table, and the share of the variance of coarse data that it explains."""

    table: list[list[float]]
    explained: float


def apply(latent: Tensor, table: Table) -> Tensor:
    """A latent (B, Z, *axes) as coarse data (B, C, *axes), float32 on the CPU.

    Raises:
        UsageError: the table is not for so many channels.
    """
    channels = latent.shape[1]
    if len(table) != channels + 1 or len({len(row) for row in table}) != 1:
        raise UsageError(
            f"latent_map should be {channels + 1} rows of one length, one for each channel of a latent and one for "
            f"what is added, not rows of {', '.join(str(len(row)) for row in table) or 'nothing'}"
        )
    rows = torch.tensor(table, dtype=torch.float32)
    return torch.einsum("bz...,zc->bc...", _and_one(latent.float().cpu()), rows)


@torch.no_grad()
def fit(autoencoder: AutoencoderKL, samples: Iterable[Tensor]) -> Fit:
    """Least squares from latents to the means of what their places stand for.

    Args:
        samples: data as the autoencoder takes it, each (B, C, *axes).

    Raises:
        UsageError: fewer places in all than the map has numbers.
    """
    device = next(autoencoder.parameters()).device
    known = wanted = torch.zeros(())
    square = torch.zeros((), dtype=torch.float64)
    for x in samples:
        x = x.to(device).float()
        z = _and_one(autoencoder.encode(x).mean.float())
        means = F.interpolate(x, size=z.shape[2:], mode="area")
        rows, values = (part.movedim(1, -1).flatten(0, -2).double().cpu() for part in (z, means))
        known, wanted = known + rows.T @ rows, wanted + rows.T @ values
        square = square + (values**2).sum()
    if known.ndim == 0 or known[-1, -1] <= len(known):
        raise UsageError("a map of latents needs more data to be fitted to")
    table = torch.linalg.lstsq(known, wanted, driver="gelsd").solution
    rest = square - (table * wanted).sum()
    spread = square - (wanted[-1] ** 2).sum() / known[-1, -1]
    explained = 1 - float(rest / spread) if spread > 0 else 1.0
    return Fit(table=[[round(v, 4) for v in row] for row in table.tolist()], explained=explained)


def of_model(
    model: str,
    folder: Path,
    host: Host,
    *,
    suffixes: Sequence[str],
    read: Callable[[Path, Mapping[str, Any]], Tensor],
    most: int = 500,
) -> Fit:
    """`fit` to a model's module "autoencoder", on up to `most` files spread over a folder.

    Args:
        model: as in `Registry.resolve`; a run that trains nothing but the autoencoder will do.
        read: (file, the card's config) -> what the autoencoder takes, (1, C, *axes).

    Raises:
        UsageError: the model has no such module.
        MissingError, IntegrityError: no such model, weights or folder; weights that are not theirs.
    """
    card = registry.load(host).resolve(model)
    built = host.call(card.plugin, "mdiff_build", card=card, device="cpu", dtype=torch.float32)
    autoencoder = built.modules.get(PART)
    if not isinstance(autoencoder, AutoencoderKL):
        raise UsageError(f"{card.id} has no {PART}: it has no latents to map")
    file = next((file for file in card.files if file.module == PART), None)
    if file is None:
        raise MissingError(f"{card.id} has no weights for its {PART}: train that part first")
    weights.fill(autoencoder, weights.read(card.root / file.name, file), file.name)
    found = data.examples(folder, suffixes)
    step = -(-len(found) // most)
    return fit(autoencoder, (read(example.path, card.config) for example in found[::step]))


def _and_one(z: Tensor) -> Tensor:
    """A channel of ones after the others (B, Z, *axes), for what is added."""
    return torch.cat([z, torch.ones_like(z[:, :1])], 1)
