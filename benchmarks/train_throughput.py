"""Samples a second of training: our loop against the plainest one that diffusers' users write, and against the network.

    python benchmarks/train_throughput.py [--steps 12] [--batch 16]

One latent text-to-image UNet, one set of pictures and captions. The peer makes nothing ahead: each step encodes its
pictures and captions, adds noise, regresses it in float32, clips, steps AdamW and reads the loss; once more with all of
that cached. Ours trains the same network through `mdiff.core.training.loop` on cached latents in bf16 autocast (float32
where the processor does not compute in bf16), with its average, its log and its draws: in diffusers' class, so that the
loop alone differs, and in our own with the same weights, which is what `mdiff train` trains. The floor is forward and
backward of each network alone, in the same precision. Rounds of these alternate in one process; the figures are medians
over rounds.
"""

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from mdiff.core import Denoiser, losses, request, schedules, times
from mdiff.core.hooks import text_encoder
from mdiff.core.losses import Outcome
from mdiff.core.nn import layouts
from mdiff.core.nn.unet import UNet
from mdiff.core.training import loop
from mdiff.core.training.draws import Draws
from mdiff.core.training.log import Log
from mdiff.core.training.recipe import Batch, Budget, Recipe, Save
from mdiff.core.training.recipe import Log as LogSettings

PICTURES, SIZE, LATENT, TOKENS, WIDTH = 256, 128, 4, 24, 384
CAPTION = "a red apple on a white plate, drawn flat"


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=SIZE // 8,
        in_channels=LATENT,
        out_channels=LATENT,
        block_out_channels=(96, 192, 288),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=6,
        cross_attention_dim=WIDTH,
        norm_num_groups=16,
    )


def own_unet() -> UNet:
    """The same network in our class, with the same weights."""
    net = UNet(
        axes=2,
        in_channels=LATENT,
        out_channels=LATENT,
        channels=96,
        multipliers=[1, 2, 3],
        blocks=1,
        attention=[0, 1],
        heads=6,
        transformer=True,
        context=WIDTH,
        groups=16,
    )
    layouts.load(net, unet().state_dict(), "diffusers")
    return net


@torch.no_grad()
def difference() -> float:
    """How far the outputs of both classes are apart in float32, at most, against their deviation."""
    x, t, texts = torch.randn(2, LATENT, 16, 16), torch.tensor([3, 900]), torch.randn(2, 9, WIDTH)
    theirs = unet()(x, t, texts).sample
    return float((own_unet()(x, t, context=texts) - theirs).abs().max() / theirs.std())


def autoencoder() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(32, 64, 96, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT,
        norm_num_groups=16,
    ).requires_grad_(False)


class Net(nn.Module):
    """diffusers' network by the calling convention of our denoiser."""

    def __init__(self, inner: UNet2DConditionModel) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, t: Tensor, *, context: Tensor) -> Tensor:
        return self.inner(x, t, context).sample


def peer(pictures: Tensor, texts: Tensor, batch: int, steps: int, cached: Tensor | None) -> float:
    """Seconds of a step of the plain loop; with `cached` latents it encodes neither pictures nor captions."""
    net, vae, scheduler = unet(), autoencoder(), DDPMScheduler(1000)
    encoder = text_encoder("text/mini")
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    begin = 0.0
    for step in range(steps + 2):
        if step == 2:
            begin = time.perf_counter()
        rows = torch.randint(len(pictures), (batch,))
        with torch.no_grad():
            latents = (
                vae.encode(pictures[rows]).latent_dist.sample() if cached is None else cached[rows]
            )
            states = texts[rows]
            if cached is None:
                said_of = encoder.encode([CAPTION] * batch).tokens.float()
                states[:, : said_of.shape[1]] = said_of
        noise = torch.randn_like(latents)
        at = torch.randint(1000, (batch,))
        said = net(scheduler.add_noise(latents, noise, at), at, states).sample
        loss = F.mse_loss(said, noise)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
    return (time.perf_counter() - begin) / steps


def ours(net: nn.Module, latents: Tensor, texts: Tensor, batch: int, steps: int) -> float:
    """Seconds of a step of our loop."""
    denoiser = Denoiser(net, schedules.linear(), predicts="eps", time="index")
    eps, evenly = losses.eps(), times.entries()
    begin = 0.0

    def loss(draws: Draws) -> Outcome:
        nonlocal begin
        if draws.step == 2:
            begin = time.perf_counter()
        rows = draws.integers(len(latents))
        t = evenly(denoiser.schedule, draws.total, draws.generator).t
        each = eps(
            denoiser.bind(context=texts[rows]), latents[rows], t, draws.normal(*latents.shape[1:])
        )
        return Outcome(mean=each.mean(), each=each.detach(), t=t)

    recipe = Recipe(
        model="image/any",
        part="unet",
        batch=Batch(size=batch),
        budget=Budget(steps=steps + 2),
        save=Save(minutes=0.0),
        log=LogSettings(steps=10),
    )
    ended = 0.0

    def stop(step: int, average: object) -> None:
        nonlocal ended
        ended = time.perf_counter()

    recipe = replace(recipe, preview=replace(recipe.preview, every=steps + 2))
    with tempfile.TemporaryDirectory() as folder:
        log = Log(Path(folder), quiet=True)
        loop.train(
            net, loss, Path(folder), recipe, log=log, schedule=denoiser.schedule, on_preview=stop
        )
    return (ended - begin) / steps


def floor(net: nn.Module, latents: Tensor, texts: Tensor, batch: int, steps: int) -> float:
    """Seconds of forward and backward alone, in the precision that ours takes."""
    x, at = latents[:batch], torch.arange(batch)
    half = request.precision("auto", "cpu") == "bf16"
    begin = 0.0
    for step in range(steps + 2):
        if step == 2:
            begin = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            said = net(x, at, context=texts[:batch])
        said.float().square().mean().backward()
        net.zero_grad(set_to_none=True)
    return (time.perf_counter() - begin) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.manual_seed(2)
    pictures = torch.rand(PICTURES, 3, SIZE, SIZE) * 2 - 1
    texts = torch.randn(PICTURES, TOKENS, WIDTH)
    with torch.no_grad():
        vae = autoencoder()
        latents = torch.cat([vae.encode(p).latent_dist.mean for p in pictures.split(16)])
    batch, steps = options.batch, options.steps
    runs: dict[str, Callable[[], float]] = {
        "plain loop": lambda: peer(pictures, texts, batch, steps, None),
        "plain loop, cached latents": lambda: peer(pictures, texts, batch, steps, latents),
        "our loop, their network": lambda: ours(Net(unet()), latents, texts, batch, steps),
        "their network alone": lambda: floor(Net(unet()), latents, texts, batch, steps),
        "our loop and network": lambda: ours(own_unet(), latents, texts, batch, steps),
        "our network alone": lambda: floor(own_unet(), latents, texts, batch, steps),
    }
    print(f"outputs of both classes differ by {difference():.1e}", flush=True)
    seen: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            seen[name].append(run())
    size = sum(p.numel() for p in unet().parameters()) / 1e6
    precision, threads = request.precision("auto", "cpu"), torch.get_num_threads()
    print(f"{size:.1f} M parameters, batch {batch}, ours in {precision}, {threads} threads")
    middle = {name: statistics.median(values) for name, values in seen.items()}
    for name, seconds in middle.items():
        print(f"{name:28} {batch / seconds:7.2f} samples/s")
    for one, other in (
        ("our loop, their network", "plain loop"),
        ("our loop, their network", "plain loop, cached latents"),
        ("our loop, their network", "their network alone"),
        ("our loop and network", "plain loop"),
        ("our loop and network", "plain loop, cached latents"),
        ("our loop and network", "our network alone"),
    ):
        print(f"{one} / {other}: {middle[other] / middle[one]:.2f}")


if __name__ == "__main__":
    main()
