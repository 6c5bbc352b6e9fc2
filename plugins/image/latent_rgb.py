"""Latents as colours, without a decoder: the linear map that previews are made with.

A card's `latent_rgb` is a table of Z + 1 rows: what a unit of each channel of a latent adds to red, green and blue in
[-1, 1], and what all of them begin with. Nothing but means of small squares can be seen through it.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from mdiff.core.data import examples
from mdiff.core.errors import UsageError
from mdiff.core.nn.autoencoder import AutoencoderKL
from mdiff.plugins.image import io
from mdiff.plugins.image.ddpm import to_picture

Table = Sequence[Sequence[float]]


class Fit(NamedTuple):
    """A table for `picture`, and the share of the pixels' variance that it explains."""

    table: list[list[float]]
    explained: float


def picture(latent: Tensor, table: Table, factor: int) -> Image:
    """A latent (1, Z, H, W) by a table, at `factor` times its height and width.

    Raises:
        UsageError: the table is not for so many channels.
    """
    rows = torch.tensor(table, dtype=torch.float32)
    if rows.shape != (latent.shape[1] + 1, 3):
        raise UsageError(
            f"latent_rgb should be {latent.shape[1] + 1} rows of 3 numbers, one row for each channel of a latent "
            f"and one for what is added; it is {tuple(rows.shape)}"
        )
    colours = torch.einsum("bzhw,zc->bchw", latent.float().cpu(), rows[:-1])
    colours = colours + rows[-1].reshape(1, 3, 1, 1)
    return io.to_pillow(to_picture(F.interpolate(colours, scale_factor=factor, mode="bilinear")))


@torch.no_grad()
def fit(autoencoder: AutoencoderKL, pictures: Iterable[Tensor]) -> Fit:
    """Least squares from latents to the means of the squares of pixels that they stand for.

    Args:
        pictures: each (C, H, W) in [0, 1], H and W multiples of the autoencoder's factor.

    Raises:
        UsageError: fewer places in the pictures than the map has numbers.
    """
    device = next(autoencoder.parameters()).device
    moments: Tensor | None = None
    for image in pictures:
        x = (2 * image[None] - 1).to(device)
        z = autoencoder.encode(x).mean.float()
        squares = F.avg_pool2d(x, autoencoder.factor).expand(-1, 3, -1, -1)
        # one column a place: the latent, 1, and the colour; all that least squares needs is their products
        columns = torch.cat([z, torch.ones_like(z[:, :1]), squares], 1)[0].flatten(1).double().cpu()
        moments = columns @ columns.T + (0 if moments is None else moments)
    if moments is None or moments[-4, -4] <= len(moments):
        raise UsageError("a map from latents to colours needs more pictures to be fitted to")
    known, colours = moments[:-3, :-3], moments[:-3, -3:]
    table = torch.linalg.lstsq(known, colours, driver="gelsd").solution
    count, square = known[-1, -1], moments.diagonal()[-3:].sum()
    spread = square - (colours[-1] ** 2).sum() / count
    rest = square - (table * colours).sum()
    explained = 1 - float(rest / spread) if spread > 0 else 1.0
    return Fit(table=[[round(v, 4) for v in row] for row in table.tolist()], explained=explained)


def fit_to_folder(
    autoencoder: AutoencoderKL, config: Mapping[str, Any], folder: Path, most: int = 500
) -> Fit:
    """`fit` to up to `most` pictures of a folder, spread over it, each as a card's config has them."""
    found = examples(folder, list(io.KINDS))
    some = found[:: -(-len(found) // most)]
    size, channels = config["size"], config["autoencoder"]["in_channels"]
    read = (io.read(example.path, channels)["image"] for example in some)
    return fit(autoencoder, (io.fitted(image, size) for image in read))
