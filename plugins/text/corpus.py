"""The training texts of the text encoder, and the texts kept out of it.

Texts need no human labels (the teacher labels any string), so the corpus is WordNet and the emoji
vocabulary, plus any number of compositions, fragments and captions drawn here. Five percent of the
keywords and of the glosses are held out by a digest of the string itself, so that no list has to be
kept and no order matters.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mdiff.plugins.text.sources import Synset, emoji_keywords, emoji_names, wordnet


def _listed(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


INSTRUMENTS = _listed("""
    piano, grand piano, bright piano, electric piano, honky-tonk piano, harpsichord, clavinet,
    celesta, glockenspiel, music box, vibraphone, marimba, xylophone, tubular bells, dulcimer,
    drawbar organ, church organ, reed organ, accordion, harmonica, bandoneon, nylon guitar,
    acoustic guitar, steel guitar, jazz guitar, clean electric guitar, muted guitar,
    overdriven guitar, distorted guitar, acoustic bass, fingered bass, picked bass, fretless bass,
    slap bass, synth bass, violin, viola, cello, double bass, tremolo strings, pizzicato strings,
    harp, timpani, string ensemble, synth strings, choir, voice oohs, orchestra hit, trumpet,
    trombone, tuba, muted trumpet, french horn, brass section, synth brass, soprano sax, alto sax,
    tenor sax, baritone sax, oboe, english horn, bassoon, clarinet, piccolo, flute, recorder,
    pan flute, bottle, shakuhachi, whistle, ocarina, square lead, sawtooth lead, calliope,
    warm pad, choir pad, sitar, banjo, shamisen, koto, kalimba, bagpipe, fiddle, shanai,
    steel drums, woodblock, taiko drum, tom, synth drum, reverse cymbal, kick drum, snare drum,
    hi-hat, cymbal, drum loop, hand clap, cowbell, tambourine, bongo, conga, maracas, guitar,
    drums
""")
SOUNDS = _listed("""
    dog barking, cat meowing, bird singing, rooster, cow mooing, horse galloping, footsteps,
    door slamming, door creaking, rain, thunder, wind, waves, river, fire crackling, explosion,
    gunshot, glass breaking, bell ringing, alarm clock, siren, car horn, car engine,
    train passing, train whistle, helicopter, airplane, motorbike, ship horn, cash register,
    typing, phone ringing, applause, laughter, crowd cheering, baby crying, man speaking,
    woman speaking, child speaking, whisper, scream, snoring, clock ticking, water dripping,
    bubbles, saw, hammer, drill, construction site, vinyl hiss, static noise, sine tone, chirp,
    beep, ambient drone, beat, drum pattern, glitch, bass drop, electric hum, squeak, splash,
    whoosh, pop
""")
LETTERS = ("c", "d", "e", "f", "g", "a", "b")
CHORDS = _listed("""
    major, minor, diminished, augmented, seventh, maj7, min7, sus4, maj, min
""")
FIGURES = _listed("""
    arpeggio, chord, scale, melody, note, trill, single note, rising arpeggio
""")
LOUDNESS = _listed("""
    soft, loud, quiet, very soft, very loud, medium, short, long, bright, dark
""")
STYLES = _listed("""
    3D, flat, gradient, line drawing, outline, cartoon, pixel art, sketch, clip art, icon, emoji,
    sticker, photo, painting, watercolour, high contrast, black and white, glossy, in colour,
    noto, fluent, simple, detailed
""")
COLOURS = _listed("""
    red, green, blue, yellow, orange, purple, pink, brown, black, white, grey, gray, golden,
    silver, dark blue, light blue, dark green, light green, beige, turquoise, colourful, blond,
    pale, dark
""")
SIZES = (
    "small",
    "big",
    "tiny",
    "huge",
    "large",
    "little",
    "tall",
    "round",
    "old",
    "young",
    "two",
    "three",
    "many",
)
MOTIONS = _listed("""
    bouncing, moving, sliding, flying, spinning, rotating, growing, shrinking, shaking, falling,
    rising, jumping, rolling, walking, running, blinking, fading in, fading out, swinging,
    zooming, standing still, turning, waving, drifting, pulsing
""")
WHERE = _listed("""
    to the left, to the right, up, down, upwards, downwards, in a circle, slowly, quickly,
    back and forth, diagonally, clockwise, counterclockwise, from left to right,
    from right to left, away, in place, once, twice
""")
PLACES = _listed("""
    on the left of, on the right of, above, below, next to, in front of, behind, under, on top of,
    inside, near, beside, with
""")
FACES = _listed("""
    happy face, sad face, angry face, surprised face, girl, boy, man, woman, child, old man,
    person, robot, monster, avatar
""")
PARTS = _listed("""
    long hair, short hair, curly hair, blue eyes, closed eyes, a beard, a moustache, glasses,
    sunglasses, a hat, a smile, an open mouth, freckles, earrings, a red shirt, a blue jacket,
    wide eyes, raised eyebrows, a big nose, no hair, a scarf
""")
SCENES = _listed("""
    beach, forest, city, street, kitchen, desert, snow, night sky, garden, sea, mountain, field,
    room, space, sunset, park, cloudy sky
""")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What distillation and its evaluation read."""

    names: dict[str, str]  # emoji -> name
    keywords: dict[str, tuple[str, ...]]  # emoji -> look-up words
    synsets: list[Synset]

    def held_keywords(self) -> list[str]:
        """Sorted held-out look-up words; a word that is itself some emoji's name is never one."""
        names = set(self.names.values())
        words = {word for emoji in self.names for word in self.keywords.get(emoji, ())}
        return sorted(word for word in words - names if held_out(word))

    def held_synsets(self) -> list[Synset]:
        """Synsets whose gloss is held out."""
        return [synset for synset in self.synsets if held_out(synset.gloss)]

    def kept_out(self) -> set[str]:
        """Every string that must not be a training text."""
        return {*self.held_keywords(), *(synset.gloss.lower() for synset in self.held_synsets())}

    def texts(self, compositions: int, captions: int, seed: int = 0) -> list[str]:
        """Distinct training texts, lower case, without any held-out string."""
        rng = random.Random(seed)
        kept_out = self.kept_out()
        lemmas = [lemma for synset in self.synsets for lemma in synset.lemmas]
        emoji = [
            *self.names.values(),
            *(word for words in self.keywords.values() for word in words),
        ]
        open_glosses = [synset.gloss for synset in self.synsets if not held_out(synset.gloss)]
        # A composition's parts are whole strings as well: held-out ones are kept out of them too.
        parts = [word for word in (*lemmas, *8 * emoji) if word not in kept_out]
        objects = [word for word in emoji if word not in kept_out]
        texts = [
            "",
            *lemmas,
            *emoji,
            *open_glosses,
            *(example for synset in self.synsets for example in synset.examples),
            *(part.strip() for gloss in open_glosses for part in gloss.split(";")),
            *(word for gloss in open_glosses for word in gloss.lower().split() if word.isalpha()),
            *(fragment(rng, rng.choice(open_glosses)) for _ in range(compositions)),
            *(compose(rng, parts) for _ in range(compositions)),
            *(caption(rng, objects) for _ in range(captions)),
            *(note for letter in LETTERS for note in _notes_of(letter)),
        ]
        lowered = dict.fromkeys(text.lower() for text in texts)
        return [text for text in lowered if text not in kept_out]


def read(sources: Path) -> Corpus:
    """The corpus of the packages in ``sources``; packages that are absent are fetched there."""
    return Corpus(
        names=emoji_names(sources), keywords=emoji_keywords(sources), synsets=wordnet(sources)
    )


def held_out(text: str) -> bool:
    """Whether this string is one of the five percent that training never sees."""
    return int.from_bytes(hashlib.sha256(text.lower().encode()).digest()[:4], "big") % 20 == 0


def compose(rng: random.Random, parts: Sequence[str]) -> str:
    """Two or three concepts in one phrase."""
    a, b, c = rng.choice(parts), rng.choice(parts), rng.choice(parts)
    forms = (
        f"a {a} with a {b}",
        f"{a} and {b}",
        f"{a} {b}",
        f"{a}, {b}, {c}",
        f"{a}, {b}",
        f"{a} of {b}",
        f"a photo of a {a}",
        f"the sound of {a}",
        f"{a} in the {b}",
        f"{b} on a {a}",
        f"{a} {b} {c}",
        f"the {a}",
    )
    return rng.choice(forms)


def fragment(rng: random.Random, text: str) -> str:
    """Two to seven neighbouring words of a text."""
    words = text.split()
    start = rng.randrange(max(1, len(words) - 1))
    return " ".join(words[start : start + rng.randint(2, 7)])


def note(rng: random.Random) -> str:
    """A note name with or without an octave, such as c4, f#3, bb3, e."""
    octave = str(rng.randint(1, 7)) if rng.random() < 0.8 else ""
    return rng.choice(LETTERS) + rng.choice(("", "", "#", "b")) + octave


def caption(rng: random.Random, objects: Sequence[str]) -> str:
    """A prompt of the kind that people give to sound, picture and motion models."""
    return rng.choice(_CAPTIONS)(rng, objects)


def _notes_of(letter: str) -> list[str]:
    return [f"{letter}{sign}{octave}" for sign in ("", "#", "b") for octave in ("", *range(9))]


def _music(rng: random.Random, _: Sequence[str]) -> str:
    player, key, figure = rng.choice(INSTRUMENTS), note(rng), rng.choice(FIGURES)
    manner, chord = rng.choice(LOUDNESS), rng.choice(CHORDS)
    forms = (
        f"{player} playing {key}",
        f"a {manner} {player} playing the note {key}",
        f"{player}, {key}, {manner}",
        f"a {player} plays a {key} {chord} chord",
        f"{key} {chord} {figure} on {player}",
        f"{manner} {player}",
        f"{player} {figure} in {key} {chord}",
        f"{player} {key}",
        f"the sound of a {player}",
        f"{player} {figure} from {key} to {note(rng)}",
        f"{key} {chord}",
        f"notes {key} {note(rng)} {note(rng)}",
    )
    return rng.choice(forms)


def _sound(rng: random.Random, objects: Sequence[str]) -> str:
    sound, manner = rng.choice(SOUNDS), rng.choice(LOUDNESS)
    forms = (
        f"{sound}",
        f"the sound of {sound}",
        f"a {manner} {sound}",
        f"{sound} and {rng.choice(SOUNDS)}",
        f"{sound} in the {rng.choice(SCENES)}",
        f"the sound of a {rng.choice(objects)}",
        f"{sound}, {manner}",
        f"{rng.choice(COLOURS)} noise",
        f"a {rng.choice(objects)} and {sound}",
    )
    return rng.choice(forms)


def _picture(rng: random.Random, objects: Sequence[str]) -> str:
    thing, other = rng.choice(objects), rng.choice(objects)
    style, colour, size = rng.choice(STYLES), rng.choice(COLOURS), rng.choice(SIZES)
    forms = (
        f"{style} of a {thing}",
        f"a {thing}, {style}",
        f"a {colour} {thing}",
        f"a {colour} {thing}, {style}",
        f"a {style} {thing}",
        f"a {size} {thing}",
        f"{style} picture of {thing}",
        f"{thing} in {style} style",
        f"a {size} {colour} {thing}, {style}",
        f"a {thing} on a {colour} background",
        f"{thing} {other}",
        f"a {thing} {rng.choice(PLACES)} a {other}",
        f"a {thing} in the {rng.choice(SCENES)}, {style}",
        f"an emoji of {thing}, {other}",
        f"{thing}, {other}, {rng.choice(objects)}, {style}",
    )
    return rng.choice(forms)


def _face(rng: random.Random, _: Sequence[str]) -> str:
    first, second = rng.sample(PARTS, 2)
    forms = (
        f"a {rng.choice(FACES)} with {first}",
        f"a {rng.choice(FACES)} with {first} and {second}",
        f"{rng.choice(FACES)}, {first}, {second}, {rng.choice(STYLES)}",
        f"{first} and {second}",
    )
    return rng.choice(forms)


def _motion(rng: random.Random, objects: Sequence[str]) -> str:
    thing, motion, where = rng.choice(objects), rng.choice(MOTIONS), rng.choice(WHERE)
    forms = (
        f"a {thing} {motion} {where}",
        f"{thing} {motion}",
        f"a {rng.choice(COLOURS)} {thing} {motion} {where}",
        f"{motion} {where}",
        f"{thing} {motion} {where}, {rng.choice(STYLES)}",
        f"a {thing} {motion} {where} in the {rng.choice(SCENES)}",
        f"animated {thing}, {motion}",
    )
    return rng.choice(forms)


_CAPTIONS: tuple[Callable[[random.Random, Sequence[str]], str], ...] = (
    _music,
    _sound,
    _picture,
    _picture,
    _face,
    _motion,
)
