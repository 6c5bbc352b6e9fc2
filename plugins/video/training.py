"""How the networks of video models are trained: the task, and its settings, a recipe's table [task].

Clips and stills are learnt together (Ho et al., 2022, section 3.1): stills come after the frames of a clip, each with
conditions of its own, and no attention crosses from one to another.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mdiff.core.conditions import spread
from mdiff.core.denoiser import from_config
from mdiff.core.errors import UsageError, nearest
from mdiff.core.hooks import Example, Model, ModelCard, Task
from mdiff.core.training import recipe
from mdiff.core.training.draws import Draws
from mdiff.plugins.video import io, vdm

Rows = Mapping[str, Tensor]

STILL = "still_"
"""What the names of rows begin with that are of stills."""


@dataclass(frozen=True, kw_only=True)
class VDMSettings:
    """Of the network.

    Attributes:
        wordings: texts kept of each clip, of which one is drawn each time.
        drop: share of clips, and of stills, whose text the network is not told.
        flip: half of the clips are mirrored; not where texts tell left from right.
        windows: how many pieces of a long clip are kept at most.
        stills: joined to each clip.
        named: the stills are those that the data set gives a clip, a list of pairs [file, text] called `stills` beside
            it; otherwise frames of the clip itself.
    """

    wordings: int = 4
    drop: float = 0.1
    flip: bool = False
    windows: int = 4
    stills: int = 4
    named: bool = False

    def __post_init__(self) -> None:
        recipe.within(
            self,
            wordings=(1, math.inf),
            drop=(0, 1),
            windows=(1, math.inf),
            stills=(1 if self.named else 0, math.inf),
        )


def vdm_task(card: ModelCard, model: Model, part: str, settings: VDMSettings) -> Task:
    """Clips at the rate and size of the card, in as many frames, and what its network takes of their texts."""
    config = card.config
    net = model.modules[part]
    assert isinstance(net, vdm.Network)
    size, frames, fps = config["size"], config["frames"], config["fps"]
    listen = vdm.listener(config)
    joined, rest = settings.stills, vdm.nothing(net, listen)

    def heard(texts: list[str]) -> dict[str, Tensor]:
        return {name: value.half().cpu() for name, value in listen(texts).items()}

    def read(example: Example) -> Iterator[dict[str, Tensor]]:
        whole = None if settings.windows > 1 else frames
        clip = io.read(example.path, frames=whole, fps=fps, size=size)["video"]
        count = min(settings.windows, clip.shape[1] // frames)
        if count == 0:
            raise UsageError(
                f"{example.path} has {clip.shape[1]} frames at {float(fps):g} a second, not {frames}"
            )
        beside = heard(spread(example.texts or ("",), settings.wordings))
        if settings.named:
            beside |= stills(example)
        for k in range(count):
            first = round(k * (clip.shape[1] - frames) / max(1, count - 1))
            yield {"video": pixels(clip[:, first : first + frames]), **beside}

    @cache
    def of_still(text: str) -> dict[str, Tensor]:
        return heard([text])

    def stills(example: Example) -> dict[str, Tensor]:
        """Those that the data set gives a clip: (K, C, H, W), and their texts (K, ...)."""
        named = example.facts.get("stills") or ()
        if not named:
            raise UsageError(f"the data set names no stills for {example.path.name}")
        chosen = [named[k % len(named)] for k in range(joined)]
        paths = [example.path.parent / file for file, _ in chosen]
        found = [io.read(path, frames=1, size=size, still=True)["video"][:, 0] for path in paths]
        each = [of_still(text) for _, text in chosen]
        texts = {name: torch.cat([said[name] for said in each]) for name in rest}
        return {
            f"{STILL}video": pixels(torch.stack(found)),
            **{f"{STILL}{name}": value for name, value in texts.items()},
        }

    def batch(rows: Rows, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        x0 = vdm.to_signed(rows["video"])
        flip = draws.chance(0.5).reshape(-1, 1, 1, 1, 1)
        if settings.flip:
            x0 = torch.where(flip, x0.flip(-1), x0)
        drop = draws.uniform(1 + joined) < settings.drop
        each = torch.arange(len(x0), device=x0.device)
        which = draws.integers(settings.wordings)
        cond = {name: rows[name][each, which].float() for name in rest}
        if not joined:
            return x0, {name: _where(drop[:, 0], rest[name], cond[name]) for name in rest}
        place = draws.integers(frames, joined)
        if settings.named:
            extra = vdm.to_signed(rows[f"{STILL}video"]).transpose(1, 2)
            theirs = {name: rows[f"{STILL}{name}"].float() for name in rest}
        else:
            extra = x0.transpose(1, 2)[each.unsqueeze(1), place].transpose(1, 2)
            theirs = {
                name: cond[name].unsqueeze(1).expand(-1, joined, *cond[name].shape[1:])
                for name in rest
            }
        told = {
            name: _where(
                drop, rest[name], torch.cat([cond[name].unsqueeze(1), theirs[name]], dim=1)
            )
            for name in rest
        }
        clips = torch.tensor([0] * frames + list(range(1, joined + 1)), device=x0.device)
        return torch.cat([x0, extra], dim=2), {**told, "clips": clips.expand(len(x0), -1)}

    return Task(
        module=net,
        read=read,
        made_by={
            "wordings": settings.wordings,
            "windows": settings.windows,
            "stills": joined if settings.named else 0,
        },
        denoiser=from_config(net, config),
        batch=batch,
    )


def pixels(video: Tensor) -> Tensor:
    """Values in [0, 1] as rows hold them, uint8."""
    return (video * 255).round().byte()


def _where(drop: Tensor, nothing: Tensor, told: Tensor) -> Tensor:
    """Conditions (*drop's, ...), or nothing (1, ...) where they are dropped."""
    drop = drop.reshape(*drop.shape, *[1] * (told.ndim - drop.ndim))
    return torch.where(drop, nothing.to(told), told)


# --- the table ------------------------------------------------------------------------------------

TASKS: Mapping[str, Mapping[str, tuple[type, Callable[[ModelCard, Model, str, Any], Task]]]] = {
    "Video Diffusion Models": {name: (VDMSettings, vdm_task) for name in vdm.NETWORKS},
}
"""By system and part: its settings, and what makes the task of them."""


def task(card: ModelCard, model: Model, part: str, settings: Mapping[str, Any]) -> Task:
    """How a part of a model is trained.

    Raises:
        UsageError: the system has no such part to train, or a setting is wrong.
    """
    parts = TASKS[card.system]
    if part not in parts or part not in model.modules:
        raise UsageError(
            f"this {card.system} trains no part {part!r}{nearest(part, model.modules)}"
        )
    kind, make = parts[part]
    return make(card, model, part, recipe.settings(kind, settings))
