"""Longer clips than the network makes at once: how much of a jump is left where blocks meet, by method.

    python benchmarks/video_extension.py [MODEL] [--frames 64] [--count 4] [--text "..."]... [--scales 0,2] [--json]

The claim: reconstruction guidance (w_r = 2) leaves less of one than replacement (w_r = 0). Clips of the same texts and
seeds are made with each scale and differ in nothing else. Two figures, each a mean square over pixels at the places
where a block begins over the same inside blocks; real clips, and a model that knew the whole past, have 1 of both:

    jump   the difference of neighbouring frames
    turn   the second difference, of three in a row: what moves goes on as it did

An interval is of 95 %, from clips drawn again with replacement.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdiff.core import blocks, pipeline, registry
from mdiff.core import host as hosts
from mdiff.core.request import resolve

TEXTS = ("a red apple bouncing to the left", "a cat moving to the right", "a ball growing")


def borders(frames: int, size: int, overlap: int) -> list[int]:
    """The first frames of what each block but the first adds to a clip."""
    starts = blocks.plan([False] * frames, size, overlap)
    return [before + size for before in starts[:-1]]


def seam(video: Tensor, places: Sequence[int], order: int) -> tuple[float, float]:
    """Mean squares of the differences of an order between frames: where one spans a border, and elsewhere.

    Args:
        video: (C, T, H, W).
        places: frames that come after a border.
        order: 1 for neighbours, 2 for three in a row.
    """
    squares = video.diff(n=order, dim=1).square().mean((0, 2, 3))
    across = torch.zeros(len(squares), dtype=torch.bool)
    for place in places:
        across[max(0, place - order) : place] = True
    return float(squares[across].mean()), float(squares[~across].mean())


def ratio(pairs: Sequence[tuple[float, float]]) -> float:
    """All that is across borders over all that is inside blocks, over clips."""
    return sum(one for one, _ in pairs) / max(sum(other for _, other in pairs), 1e-12)


def interval(pairs: Sequence[tuple[float, float]], draws: int = 2000) -> tuple[float, float]:
    """Of 95 %, over clips."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(pairs), (draws, len(pairs)), generator=generator).tolist()
    found = torch.tensor([ratio([pairs[k] for k in row]) for row in picks])
    low, high = found.quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def made(target: str, texts: Sequence[str], count: int, fields: dict[str, Any]) -> list[Tensor]:
    """A clip of each text and seed, (C, T, H, W)."""
    models = registry.load(hosts.current())
    card = models.resolve(target)
    requests = [
        resolve(card, {"text": text, "seed": seed, **fields}, models.host, model=target)
        for text in texts
        for seed in range(count)
    ]
    model = pipeline.open_model(card, requests[0], models.host)
    return [
        pipeline.generate(model, card, request, host=models.host)["video"] for request in requests
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Jumps where blocks of a long clip meet, by method."
    )
    parser.add_argument("model", nargs="?", default="video")
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--count", type=int, default=4, help="seeds of each text")
    parser.add_argument("--text", action="append", help="several times for several")
    parser.add_argument("--scales", default="0,2", help="w_r; 0 is replacement")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--sampler")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    card = registry.load(hosts.current()).resolve(asked.model)
    size = int(card.config["frames"])
    overlap = next((o.default for o in card.options if o.name == "overlap"), None) or size // 2
    places = borders(asked.frames, size, int(overlap))
    if not places:
        parser.error(f"{card.id} makes {size} frames at once: ask for more")
    target = asked.model if Path(asked.model).is_dir() else card.id
    given = {name: getattr(asked, name) for name in ("steps", "sampler", "guidance")}
    for scale in map(float, asked.scales.split(",")):
        fields = {**given, "options": {"frames": asked.frames, "reconstruction": scale}}
        start = time.monotonic()
        clips = made(target, asked.text or TEXTS, asked.count, fields)
        said: dict[str, Any] = {"reconstruction": scale, "clips": len(clips)}
        said["seconds"] = round((time.monotonic() - start) / len(clips), 1)
        for order, name in enumerate(("jump", "turn"), 1):
            pairs = [seam(clip, places, order) for clip in clips]
            said[name], said[f"{name}_interval"] = ratio(pairs), interval(pairs)
        if asked.json:
            print(json.dumps(said))
            continue
        figures = "   ".join(
            f"{name} {said[name]:.2f} ({said[f'{name}_interval'][0]:.2f} to {said[f'{name}_interval'][1]:.2f})"
            for name in ("jump", "turn")
        )
        kind = "replacement" if scale == 0 else "reconstruction"
        print(f"{kind} {scale:g}   {figures}   {said['seconds']} s a clip, {len(clips)} clips")


if __name__ == "__main__":
    main()
