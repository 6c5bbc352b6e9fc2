"""The plugin's own commands: `mdiff audio COMMAND`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mdiff.plugins.audio import io

if TYPE_CHECKING:
    from torch import Tensor


def heard(path: Path, config: Mapping[str, Any]) -> "Tensor":
    """A sound file as the autoencoder of a card takes it: its log-mel (1, 1, T, 64), T a multiple of 4."""
    import torch.nn.functional as F

    from mdiff.plugins.audio.audioldm import to_image
    from mdiff.plugins.audio.nets.mel import HOP, RATE, WINDOW, log_mel

    wave = io.read(path, RATE, 1)["audio"]
    length = max(wave.shape[1], WINDOW)
    return to_image(log_mel(F.pad(wave, (0, -length % (4 * HOP) + length - wave.shape[1]))))


@click.command("latent-map")
@click.argument("model", metavar="MODEL|PATH")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="A folder of sounds.")
@click.option("--count", type=click.IntRange(1), default=500, show_default=True, help="Sounds.")
def latent_map(model: str, data: Path, count: int) -> None:
    """Print the line of a card's [config] that gives a latent model previews.

    It is the linear map from latents to a coarse log-mel that fits the sounds of a folder best.
    """
    from mdiff.core.host import current
    from mdiff.core.latent_map import of_model

    found = of_model(model, data, current(), suffixes=list(io.KINDS), read=heard, most=count)
    click.echo(f"latent_map = {json.dumps(found.table)}")
    click.echo(f"it explains {found.explained:.1%} of the variance of levels", err=True)
