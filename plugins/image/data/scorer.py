"""Training of the scorer, which tells how well a picture and a caption fit.

    python -m mdiff.plugins.image.data.scorer --data JUDGE --unseen EMOJI --out FILE

It learns from `image/emoji-judge`, which no generator sees, and is judged on what is held out of `image/emoji`, of
which it sees nothing: other drawings of things that it knows. A network and a training of its own, too.
Features are made once and kept in the folder --cache, as is, and changed a little, so that what is told is the thing
and not its place, size and sharpness.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mdiff.core import data, record, request, weights
from mdiff.core.hooks import Example, text_encoder
from mdiff.core.nn import efficientnet
from mdiff.core.training.draws import generator
from mdiff.plugins.image import io
from mdiff.plugins.image.metrics import ENCODER, Scorer, found_among

VIEWS, WORDINGS = 3, 4
"""Sets of features of the training pictures, the first of them as they are; captions of each."""
BATCH, RATE, DECAY = 768, 1e-3, 0.2


def train(
    views: Tensor, texts: Tensor, names: Tensor, steps: int, seed: int = 0, batch: int = BATCH
) -> Scorer:
    """Fits a scorer by the symmetric contrastive loss (Radford et al. 2021, arXiv:2103.00020).

    Args:
        views: features of N pictures (V, N, 1280).
        texts: pooled vectors of W wordings of each (N, W, D).
        names: (N, W): equal numbers for equal wordings, which are not held against each other.
    """
    draw = generator(seed, "scorer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Scorer().train()
        optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=DECAY)
        pace = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
        for _ in range(steps):
            rows = torch.randperm(views.shape[1], generator=draw)[:batch]
            view = torch.randint(len(views), rows.shape, generator=draw)
            wording = torch.randint(texts.shape[1], rows.shape, generator=draw)
            seen, said = net.image(views[view, rows]), net.text(texts[rows, wording])
            logits = net.sharpness.exp().clamp(max=100) * seen @ said.T
            name = names[rows, wording]
            same = (name[:, None] == name[None]) & ~torch.eye(len(rows), dtype=torch.bool)
            logits = logits.masked_fill(same, -1e4)
            target = torch.arange(len(rows))
            loss = F.cross_entropy(logits, target, label_smoothing=0.05)
            loss = (loss + F.cross_entropy(logits.T, target, label_smoothing=0.05)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            pace.step()
    return net.eval()


@torch.no_grad()
def found(net: Scorer, features: Tensor, texts: Tensor) -> float:
    """The share of pictures (N, 1280) whose caption (N, D) is found among 100 of them."""
    rows = torch.cat([net.image(features), net.text(texts)], dim=1).numpy()
    return found_among(rows, rows)


def changed(image: Tensor, draw: torch.Generator) -> Tensor:
    """A picture (C, H, W) a little larger or smaller, elsewhere, less sharp, in another light; white around it."""
    scale, x, y, blur, gain, shift = (2 * torch.rand(6, generator=draw) - 1).tolist()
    size = image.shape[1:]
    small = [max(24, int(n * (0.7 + 0.3 * blur))) for n in size]
    image = F.interpolate(image[None], small, mode="bilinear", antialias=True)
    zoom = 1.03 + 0.12 * scale
    move = torch.tensor([[[zoom, 0, 0.12 * x], [0, zoom, 0.12 * y]]])
    where = F.affine_grid(move, [1, image.shape[1], *size], align_corners=False)
    moved = 1 - F.grid_sample(1 - image, where, align_corners=False)
    return ((moved[0] - 0.5) * (1 + 0.15 * gain) + 0.5 + 0.06 * shift).clamp(0, 1)


def features(examples: Sequence[Example], view: int, cache: Path, batch: int = 16) -> Tensor:
    """Features (N, 1280) of pictures as they are (view 0) or changed, kept in a folder of their own."""
    record.make_folder(cache)
    path = cache / f"features-{len(examples)}-{view}.npy"
    if not path.is_file():
        made = [part for part in _batches(examples, view, batch)]
        with record.atomic_write(path) as temporary:
            np.save(temporary, torch.cat(made).numpy())
    return torch.from_numpy(np.load(path, allow_pickle=False))


def _batches(examples: Sequence[Example], view: int, batch: int) -> Iterator[Tensor]:
    for start in range(0, len(examples), batch):
        images = [io.read(e.path)["image"][:3] for e in examples[start : start + batch]]
        if view:
            images = [
                changed(im, generator(view, "view", start + k)) for k, im in enumerate(images)
            ]
        yield efficientnet.features(images).float()


def wordings(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Pooled vectors (N, W, D) of the first wordings, as many as all have, and their numbers (N, W)."""
    encode = text_encoder(ENCODER).encode
    count = min(WORDINGS, *(len(e.texts) for e in examples))
    numbers: dict[str, int] = {}
    names = torch.tensor(
        [[numbers.setdefault(t, len(numbers)) for t in e.texts[:count]] for e in examples]
    )
    each = list(numbers)
    pooled = torch.cat([encode(each[k : k + 64]).pooled.float() for k in range(0, len(each), 64)])
    return pooled[names], names


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mdiff.plugins.image.data.scorer", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the data set image/emoji-judge")
    parser.add_argument("--unseen", type=Path, required=True, help="the data set image/emoji")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="where features are kept")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    suffixes = [m.suffix for m in io.MEDIA]
    known = data.examples(options.data, suffixes)
    other = [e for e in data.examples(options.unseen, suffixes) if e.split == "held_out"]
    # Whether the last digits are right is nothing to a scorer that sees pictures changed.
    half = request.precision("auto", "cpu") == "bf16"
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        views = torch.stack([features(known, k, options.cache / "known") for k in range(VIEWS)])
        learnt = wordings(known)
    unseen = features(other, 0, options.cache / "unseen")
    began = time.monotonic()
    net = train(views, *learnt, options.steps, options.seed)
    seconds = time.monotonic() - began
    state = {name: tensor.half() for name, tensor in net.state_dict().items()}
    with record.atomic_write(options.out) as path:
        weights.write(path, state)
    net.load_state_dict(state)
    shares = {
        "unseen": found(net, unseen, wordings(other)[0][:, 0]),
        "known": found(net, views[0, : len(unseen)], learnt[0][: len(unseen), 0]),
    }
    told = {name: round(share, 4) for name, share in shares.items()}
    print(
        json.dumps({"out": str(options.out), "seconds": round(seconds, 1), "found_among_100": told})
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
