"""Training of the instrument classifier on the single notes of `audio/mini-sounds`.

    python -m mdiff.plugins.audio.data.classifier --data FOLDER --out FILE

Held-out notes are never trained on; the accuracy on them is printed.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mdiff.core import data
from mdiff.core.hooks import Example
from mdiff.plugins.audio import io
from mdiff.plugins.audio.data.instruments import INSTRUMENTS
from mdiff.plugins.audio.metrics import MELS, RATE, InstrumentNet, mel_power, save_classifier

EPOCHS = 14


def train(
    power: Tensor,
    labels: Tensor,
    names: Sequence[str],
    epochs: int = EPOCHS,
    seed: int = 0,
    batch: int = 64,
) -> InstrumentNet:
    """Fit a classifier to mel power (N, MELS, frames) and labels (N,), indices into `names`."""
    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = InstrumentNet(names).train()
        optimiser = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.01)
        per_epoch = -(-len(power) // batch)
        pace = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, epochs * per_epoch)
        for _ in range(epochs):
            order = torch.randperm(len(power), generator=draw)
            for rows in order.split(batch):
                loss = cross_entropy(net(augment(power[rows], draw)), labels[rows])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                pace.step()
    return net.eval()


def augment(power: Tensor, draw: torch.Generator) -> Tensor:
    """Another gain (+-10 dB), a tilt of the spectrum (+-4 dB), a shift in time (+-60 ms) and a
    noise floor, so that what is told is the instrument and not the recording. (B, MELS, frames)."""
    count = len(power)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand((count, 1), generator=draw) * (high - low) + low

    tilt = torch.linspace(-1.0, 1.0, MELS).unsqueeze(0) * uniform(-0.4, 0.4)
    gain = torch.pow(10.0, uniform(-1.0, 1.0) + tilt)
    noise = torch.pow(10.0, uniform(-7.0, -3.0)) * torch.rand(power.shape[:2], generator=draw)
    shift = int(torch.randint(-3, 4, (), generator=draw))
    return power.roll(shift, dims=2) * gain.unsqueeze(2) + noise.unsqueeze(2)


def spectrograms(examples: Sequence[Example]) -> Tensor:
    """Mel power of sounds of one length, (N, MELS, frames)."""
    waves = (io.read(example.path, rate=RATE, channels=1)["audio"] for example in examples)
    return torch.cat([mel_power(wave) for wave in waves])


@torch.no_grad()
def accuracy(net: InstrumentNet, power: Tensor, labels: Tensor) -> float:
    """The share of spectrograms whose instrument is told right."""
    net.eval()
    heard = torch.cat([net(part).argmax(dim=1) for part in power.split(64)])
    return float((heard == labels).float().mean())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="mdiff.plugins.audio.data.classifier", description=__doc__
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    notes = [
        example
        for example in data.examples(options.data, (".flac",))
        if example.facts.get("kind") == "note"
    ]
    names = list(INSTRUMENTS)
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    for split in ("train", "held_out"):
        some = [example for example in notes if example.split == split]
        labels = torch.tensor([names.index(example.label or "") for example in some])
        parts[split] = (spectrograms(some), labels)
    began = time.monotonic()
    net = train(*parts["train"], names, options.epochs, options.seed)
    seconds = time.monotonic() - began
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_classifier(net, options.out)
    scores = {split: round(accuracy(net, *part), 4) for split, part in parts.items()}
    print(json.dumps({"out": str(options.out), "seconds": round(seconds, 1), "accuracy": scores}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
