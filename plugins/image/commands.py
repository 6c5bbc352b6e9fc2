"""The plugin's own commands: `mdiff image COMMAND`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mdiff.plugins.image import io

if TYPE_CHECKING:
    from torch import Tensor


def seen(path: Path, config: Mapping[str, Any]) -> "Tensor":
    """A picture file as the autoencoder of a card takes it: (1, C, size, size) in [-1, 1]."""
    image = io.read(path, config["autoencoder"]["in_channels"])["image"]
    return 2 * io.fitted(image, config["size"])[None] - 1


@click.command("latent-map")
@click.argument("model", metavar="MODEL|PATH")
@click.option(
    "--data", type=click.Path(path_type=Path), required=True, help="A folder of pictures."
)
@click.option("--count", type=click.IntRange(1), default=500, show_default=True, help="Pictures.")
def latent_map(model: str, data: Path, count: int) -> None:
    """Print the line of a card's [config] that gives a latent model previews.

    It is the linear map from latents to colours that fits the pictures of a folder best.
    """
    from mdiff.core.host import current
    from mdiff.core.latent_map import of_model

    found = of_model(model, data, current(), suffixes=list(io.KINDS), read=seen, most=count)
    click.echo(f"latent_map = {json.dumps(found.table)}")
    click.echo(f"it explains {found.explained:.1%} of the variance of colours", err=True)
