"""How things move: where a thing is in each frame, and what people call that.

Lengths are parts of the edge of a frame, and y grows downwards. A speed is said only where it is not the middle one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

FRAMES = 16
MARGIN = 0.02
"""What is left free beside a thing, which never leaves the frame."""


@dataclass(frozen=True, kw_only=True)
class Motion:
    """A way to move: its kind, and a direction where it has one (of `COMPASS`, or of turning)."""

    kind: str
    direction: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.direction}".strip()


@dataclass(frozen=True, kw_only=True)
class Pose:
    """A thing in a frame: its centre, its longer side, and how far it is turned clockwise, in degrees."""

    x: float
    y: float
    size: float
    angle: float = 0.0


COMPASS: Mapping[str, tuple[float, float]] = {
    name: (x / math.hypot(x, y), y / math.hypot(x, y))
    for name, x, y in (
        ("right", 1, 0),
        ("down-right", 1, 1),
        ("down", 0, 1),
        ("down-left", -1, 1),
        ("left", -1, 0),
        ("up-left", -1, -1),
        ("up", 0, -1),
        ("up-right", 1, -1),
    )
}
"""Directions as unit vectors, each an eighth of a turn from the one before, clockwise."""

CLIPS: Mapping[Motion, int] = {
    **{Motion(kind="moving", direction=name): 1 if "-" in name else 2 for name in COMPASS},
    **{Motion(kind="bouncing", direction=name): 1 for name in ("left", "right", "")},
    Motion(kind="growing"): 1,
    Motion(kind="shrinking"): 1,
    Motion(kind="turning", direction="clockwise"): 1,
    Motion(kind="turning", direction="counterclockwise"): 1,
    Motion(kind="still"): 1,
}
"""Every motion, and how many clips of it each thing has."""

CROSSING = Motion(kind="crossing")
"""Two things that pass each other."""


# --- where it is ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a speed means for each kind: the way that is covered, hops, how many times larger, degrees."""

    words: tuple[str, ...]
    way: float
    hops: int
    growth: float
    turn: float


SPEEDS: Mapping[str, Speed] = {
    "slow": Speed(words=("slowly", "at a slow pace"), way=0.16, hops=2, growth=1.6, turn=90),
    "medium": Speed(words=("",), way=0.32, hops=3, growth=2.4, turn=180),
    "fast": Speed(words=("quickly", "fast"), way=0.48, hops=4, growth=4.0, turn=360),
}
HEIGHT = 0.3
"""Of a hop."""
LARGEST = 0.78
"""The size that what grows gets to."""

Extent = tuple[float, float]
"""Width and height of a thing whose longer side is 1."""


def poses(motion: Motion, speed: Speed, extent: Extent, rng: Random) -> list[Pose]:
    """The thing in each frame, at a place and of a size that are drawn so that it stays within the frame."""
    size = rng.uniform(0.42, 0.48)
    path = _PATHS[motion.kind](motion, speed, size)
    reach = 0.5 * math.hypot(*extent) if motion.kind == "turning" else None
    halves = [[(reach or side / 2) * pose.size + MARGIN for pose in path] for side in extent]
    places = []
    for along, half in zip(([p.x for p in path], [p.y for p in path]), halves, strict=True):
        least = max(h - at for at, h in zip(along, half, strict=True))
        most = min(1 - h - at for at, h in zip(along, half, strict=True))
        middle = (least + most) / 2
        places.append(rng.uniform(least, most) if least < most else middle)
    x, y = places
    return [Pose(x=p.x + x, y=p.y + y, size=p.size, angle=p.angle) for p in path]


def crossing(size: float, rightwards: bool, rng: Random) -> tuple[list[Pose], list[Pose]]:
    """Two things, one above the other, of which the first goes to the right or to the left, the other against it."""
    way = SPEEDS["fast"].way
    rows = [0.27, 0.73] if rng.random() < 0.5 else [0.73, 0.27]
    signs = [1, -1] if rightwards else [-1, 1]
    one, other = (
        [Pose(x=0.5 + sign * way * (t - 0.5), y=row, size=size) for t in _TIMES]
        for sign, row in zip(signs, rows, strict=True)
    )
    return one, other


_TIMES = [k / (FRAMES - 1) for k in range(FRAMES)]


def _moving(motion: Motion, speed: Speed, size: float) -> list[Pose]:
    x, y = COMPASS[motion.direction]
    return [Pose(x=x * speed.way * t, y=y * speed.way * t, size=size) for t in _TIMES]


def _bouncing(motion: Motion, speed: Speed, size: float) -> list[Pose]:
    x = COMPASS[motion.direction][0] * speed.way if motion.direction else 0.0
    path = []
    for t in _TIMES:
        part = t * speed.hops % 1
        path.append(Pose(x=x * t, y=-HEIGHT * 4 * part * (1 - part), size=size))
    return path


def _growing(motion: Motion, speed: Speed, size: float) -> list[Pose]:
    largest = min(LARGEST, size * math.sqrt(speed.growth))
    grown = [largest * speed.growth ** (t - 1) for t in _TIMES]
    return [Pose(x=0, y=0, size=s) for s in (grown if motion.kind == "growing" else grown[::-1])]


def _turning(motion: Motion, speed: Speed, size: float) -> list[Pose]:
    sign = 1 if motion.direction == "clockwise" else -1
    return [Pose(x=0, y=0, size=size, angle=sign * speed.turn * t) for t in _TIMES]


def _still(motion: Motion, speed: Speed, size: float) -> list[Pose]:
    return [Pose(x=0, y=0, size=size) for _ in _TIMES]


_PATHS: Mapping[str, Callable[[Motion, Speed, float], list[Pose]]] = {
    "moving": _moving,
    "bouncing": _bouncing,
    "growing": _growing,
    "shrinking": _growing,
    "turning": _turning,
    "still": _still,
}


# --- what it is called ----------------------------------------------------------------------------

WORDINGS = 6
_VERBS: Mapping[str, tuple[str, ...]] = {
    "moving": ("moving", "going", "sliding", "gliding", "travelling"),
    "bouncing": ("bouncing", "hopping", "jumping"),
    "growing": ("growing", "getting bigger", "getting larger", "expanding"),
    "shrinking": ("shrinking", "getting smaller", "becoming smaller"),
    "turning": ("turning", "spinning", "rotating"),
    "still": ("standing still", "not moving", "staying still", "at rest"),
}
_WHERE: Mapping[str, tuple[str, ...]] = {
    "left": ("to the left", "leftwards", "from right to left", "towards the left"),
    "right": ("to the right", "rightwards", "from left to right", "towards the right"),
    "up": ("up", "upwards", "to the top", "straight up"),
    "down": ("down", "downwards", "to the bottom", "straight down"),
    "up-left": ("up and to the left", "diagonally up to the left", "towards the upper left"),
    "up-right": ("up and to the right", "diagonally up to the right", "towards the upper right"),
    "down-left": ("down and to the left", "diagonally down to the left", "towards the lower left"),
    "down-right": (
        "down and to the right",
        "diagonally down to the right",
        "towards the lower right",
    ),
    "clockwise": ("clockwise",),
    "counterclockwise": ("counterclockwise", "anticlockwise"),
}
_IN_PLACE = ("up and down", "in place", "on the spot")
_NOWHERE = ("",)


def wordings(
    phrases: Sequence[str], motion: Motion, speed: str, style: str, ground: str, rng: Random
) -> tuple[str, ...]:
    """The plain wording, then others: with the ground, in other words, with the style."""
    in_place = _IN_PLACE if motion.kind == "bouncing" else _NOWHERE
    where = _WHERE[motion.direction] if motion.direction else in_place
    verbs, pace = _VERBS[motion.kind], _NOWHERE if motion.kind == "still" else SPEEDS[speed].words

    def other(words: Sequence[str]) -> str:
        return rng.choice(words[1:] or words)

    plain = _said(phrases[0], verbs[0], pace[0], where[0])
    texts = [
        plain,
        f"{plain} on a {ground} background",
        _said(phrases[0], other(verbs), pace[0], rng.choice(where)),
        _said(rng.choice(phrases), verbs[0], "", other(where), other(pace)),
        f"{plain}, {style}",
        _said(other(phrases), rng.choice(verbs), rng.choice(pace), other(where)),
        *(
            _said(phrase, verb, pace[0], place)
            for phrase in phrases
            for verb in verbs
            for place in where
        ),
    ]
    return tuple(dict.fromkeys(texts))[:WORDINGS]


def crossing_wordings(
    one: str, other: str, rightwards: bool, above: bool, style: str, ground: str
) -> tuple[str, ...]:
    """Those of two things: phrases, whether the first goes to the right, whether it is above the other."""
    there, back = (
        _WHERE[name] for name in (("right", "left") if rightwards else ("left", "right"))
    )
    plain = f"{one} moving {there[0]} and {other} moving {back[0]}"
    return (
        plain,
        f"{plain} on a {ground} background",
        f"{one} and {other} passing each other",
        f"{one} moving {there[1]} {'above' if above else 'below'} {other} moving {back[1]}",
        f"{plain}, {style}",
        f"{other} going {back[0]} and {one} going {there[0]}",
    )


def _said(*words: str) -> str:
    return " ".join(word for word in words if word)
