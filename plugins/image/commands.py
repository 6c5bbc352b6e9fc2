"""The plugin's own commands: `mdiff image COMMAND`."""

import json
from pathlib import Path

import click

from mdiff.core.errors import UsageError


@click.command("latent-rgb")
@click.argument("model", metavar="MODEL|PATH")
@click.option(
    "--data", type=click.Path(path_type=Path), required=True, help="A folder of pictures."
)
@click.option("--count", type=click.IntRange(1), default=500, show_default=True, help="Pictures.")
def latent_rgb(model: str, data: Path, count: int) -> None:
    """Print the line of a card's [config] that gives a latent model previews.

    It is the linear map from latents to colours that fits the pictures of a folder best.
    """
    from mdiff.core import pipeline, registry, request
    from mdiff.core.host import current
    from mdiff.core.nn.autoencoder import AutoencoderKL
    from mdiff.plugins.image.latent_rgb import fit_to_folder

    models = registry.load(current())
    card = models.resolve(model)
    given = {"text": "a picture"} if "text" in card.accepts else {}
    asked = request.resolve(card, {**given, "precision": "fp32"}, models.host)
    autoencoder = pipeline.open_model(card, asked, models.host).modules.get("autoencoder")
    if not isinstance(autoencoder, AutoencoderKL):
        raise UsageError(f"{card.id} has no autoencoder: what it denoises are pictures already")
    found = fit_to_folder(autoencoder, card.config, data, count)
    click.echo(f"latent_rgb = {json.dumps(found.table)}")
    click.echo(f"it explains {found.explained:.1%} of the colours' variance", err=True)
