"""The wordings of a picture: the plain one that a user would type first, then seven others."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from mdiff.plugins.image.data.concepts import Concept


@dataclass(frozen=True, kw_only=True)
class Style:
    """A way of drawing: the word that asks for it, and frames that say it of a phrase."""

    word: str
    frames: tuple[str, ...]


STYLES: tuple[Style, ...] = (
    Style(
        word="3D",
        frames=(
            "a 3D render of {}",
            "{} in 3D",
            "a 3D icon of {}",
            "a 3D model of {}",
            "a rendered 3D picture of {}",
        ),
    ),
    Style(
        word="flat",
        frames=(
            "a flat drawing of {}",
            "{} in a flat style",
            "a flat icon of {}",
            "a flat illustration of {}",
            "{} drawn flat",
        ),
    ),
    Style(
        word="black and white",
        frames=(
            "a black and white drawing of {}",
            "{} in black and white",
            "a black and white icon of {}",
            "a black ink drawing of {}",
            "{}, drawn in black and white",
        ),
    ),
    Style(
        word="cartoon",
        frames=(
            "a cartoon of {}",
            "{} in a cartoon style",
            "a cartoon drawing of {}",
            "{} drawn as a cartoon",
            "a cartoon picture of {}",
        ),
    ),
    Style(
        word="sticker",
        frames=(
            "a sticker of {}",
            "{} as a sticker",
            "a sticker that shows {}",
            "{} in the style of a sticker",
            "a simple sticker of {}",
        ),
    ),
    Style(
        word="clip art",
        frames=(
            "clip art of {}",
            "{} as clip art",
            "a piece of clip art of {}",
            "{} in the style of clip art",
            "a clip art picture of {}",
        ),
    ),
)
WORDINGS = 8
UNSTYLED = ("{}", "an icon of {}", "a picture of {}", "an emoji of {}", "a drawing of {}")


def plain(concept: Concept, style: Style) -> str:
    """The wording that stands first: "a red apple, 3D"."""
    return f"{concept.phrase}, {style.word}"


def wordings(concept: Concept, style: Style) -> tuple[str, ...]:
    """The plain wording, then others; each stands once.

    In turn: two frames of the style, none, the style first without an article, the name with look-up words, a synonym,
    and a description that does not say the name. Where one is not known, another frame stands in.
    """
    rng = random.Random(f"{concept.code} {style.word}")
    frames = [frame.format(concept.phrase) for frame in rng.sample(style.frames, len(style.frames))]
    words = rng.sample(concept.keywords[:6], min(2, len(concept.keywords)))
    texts = [
        plain(concept, style),
        *frames[:2],
        rng.choice(UNSTYLED).format(concept.phrase),
        f"{style.word} {concept.name}",
        ", ".join((concept.phrase, *words, style.word)),
        _styled(rng, concept.synonyms, style) or frames[2],
        _styled(rng, [concept.gloss] if concept.gloss else _looked_up(concept), style) or frames[3],
        *frames,
    ]
    return tuple(dict.fromkeys(texts))[:WORDINGS]


def _styled(rng: random.Random, phrases: Sequence[str], style: Style) -> str:
    """One of the phrases with the style behind it, "" where there is none."""
    return f"{rng.choice(phrases)}, {style.word}" if phrases else ""


def _looked_up(concept: Concept) -> list[str]:
    """The rarest look-up words, as one types them into a search."""
    return [" ".join(concept.keywords[:3])] if len(concept.keywords) >= 3 else []
