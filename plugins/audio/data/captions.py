"""From what a clip is to what a person would write to ask for it.

A `Clip` holds the attributes of one sound. `plain` gives its one canonical caption, `varied` one of
many natural wordings, drawn from a `random.Random`. No wording says anything untrue of its clip.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from random import Random

from mdiff.plugins.audio.data.instruments import DRUMS, INSTRUMENTS, PATTERNS, Instrument
from mdiff.plugins.audio.data.sounds import SOUNDS

KINDS = ("note", "chord", "arpeggio", "drums", "strum", "effect")
PLAIN_SHARE = 0.4  # of the captions that `varied` gives
WORDINGS = 8  # of a clip of the data set

_SHARPS = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
_FLATS = {"C#": "Db", "D#": "Eb", "F#": "Gb", "G#": "Ab", "A#": "Bb"}
_NOTE = re.compile(r"\s*([A-Ga-g])\s*(#|b|sharp|flat)?\s*(\d)\s*$")
_STEP = {"": 0, "#": 1, "sharp": 1, "b": -1, "flat": -1}
_NAMED = re.compile(
    r"(?<![\w#])(?:[A-Ga-g][#b]?\d|[A-Ga-g][ -]?(?:sharp|flat)[ -]?\d|(?:[A-G][#b]|[B-G]) \d)(?!\w|[.,]\d)"
)
"""Notes within a text; not "a 3 second beep", nor "A 3 second beep"."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """The attributes of one clip. Those that do not apply to its kind keep their defaults.

    `midi` is the note, or the root of a chord; `velocity` runs from 1 to 127; `direction` is
    "ascending" or "descending" of an arpeggio and "up" or "down" of a strum; `tempo` is in beats a
    minute; `name` is a drum pattern, or the plain caption of an effect; `take` tells apart clips
    that are otherwise the same.
    """

    kind: str
    instrument: str = ""
    midi: int | None = None
    velocity: int = 80
    quality: str = ""
    direction: str = ""
    tempo: int | None = None
    name: str = ""
    take: int = 0
    split: str = "train"
    source: str = ""
    licence: str = ""

    @property
    def note(self) -> str:
        """The note with its octave ("F#3"), or "" where the clip has none."""
        return "" if self.midi is None else note_name(self.midi)


def to_row(clip: Clip) -> dict[str, object]:
    """A JSON-ready mapping of the attributes, with the note's name beside them."""
    return asdict(clip) | {"note": clip.note}


def from_row(row: Mapping[str, object]) -> Clip:
    """The clip of a row written by `to_row`; what else the row holds is left aside."""
    names = {field.name for field in fields(Clip)}
    return Clip(**{key: value for key, value in row.items() if key in names})  # type: ignore[arg-type]


def note_name(midi: int) -> str:
    """The name of a MIDI note with a sharp where it has one: 60 is "C4"."""
    return f"{_SHARPS[midi % 12]}{midi // 12 - 1}"


def spellings(midi: int) -> tuple[str, ...]:
    """All the ways in which the note is written, the canonical one first."""
    octave = midi // 12 - 1
    close = (letter for letter in _letters(midi) if " " not in letter)  # "C#4", but "C sharp 4"
    apart = (f"{letter} {octave}" for letter in _letters(midi))
    return (*(f"{letter}{octave}" for letter in close), *apart)


def parse_note(text: str) -> int:
    """The MIDI number of any spelling of a note; raises ValueError for any other text."""
    match = _NOTE.match(text)
    if match is None:
        raise ValueError(f"{text!r} is no note; write one as C4, F#3, B flat 3 or Bb3")
    letter, accidental, octave = match.groups()
    return _SHARPS.index(letter.upper()) + _STEP[accidental or ""] + 12 * (int(octave) + 1)


def named_note(text: str) -> int | None:
    """The MIDI number of the one note that a text names, or None: where there is none, or more than one."""
    found = {parse_note(name.replace("-", " ")) for name in _NAMED.findall(text)}
    return found.pop() if len(found) == 1 else None


def plain(clip: Clip) -> str:
    """The canonical caption: "a flute playing C4", "a snare drum hit", "a cow mooing"."""
    return _article(_PLAIN[clip.kind](clip))


def varied(clip: Clip, rng: Random) -> str:
    """A natural wording of the clip; the plain one with probability `PLAIN_SHARE`."""
    if rng.random() < PLAIN_SHARE:
        return plain(clip)
    text = _article(_VARIED[clip.kind](clip, rng))
    return text.lower() if rng.random() < 0.1 else text


def wordings(clip: Clip, row: int) -> list[str]:
    """The canonical caption and `WORDINGS` - 1 others, which the clip's place in the data set decides."""
    rng = Random(row)
    return [plain(clip), *(varied(clip, rng) for _ in range(WORDINGS - 1))]


def _letters(midi: int) -> tuple[str, ...]:
    """Spellings of a pitch class: "C#", "C sharp", "Db", "D flat"."""
    sharp = _SHARPS[midi % 12]
    flat = _FLATS.get(sharp)
    if flat is None:
        return (sharp,)
    return (sharp, f"{sharp[0]} sharp", flat, f"{flat[0]} flat")


def _article(text: str) -> str:
    """Fill in every `@` with "a" or "an" as the next word sounds, and tidy the spaces."""
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"@ (?=[aeioAEIO]\w|e-|up|[AEF](?:\b|[#b\d]))", "an ", text)
    return text.replace("@ ", "a ").replace(" ,", ",").rstrip(", ")


def _with(adjective: str, phrase: str) -> str:
    """The noun phrase with an adjective put in: "@ flute" -> "@ soft flute"."""
    if not adjective:
        return phrase
    head, _, rest = phrase.partition(" ")
    return f"@ {adjective} {rest}" if head in ("@", "a", "an") else f"{adjective} {phrase}"


def _bare(phrase: str) -> str:
    head, _, rest = phrase.partition(" ")
    return rest if head in ("@", "a", "an") else phrase


_LOUD = (
    (60, ("soft", "gentle", "quiet"), ("softly", "gently", "quietly")),
    (104, ("",), ("",)),
    (128, ("loud", "strong", "powerful"), ("loudly", "strongly", "forcefully")),
)
_HEIGHT = ((50, ("low", "deep")), (69, ("",)), (128, ("high",)))


def _loudness(clip: Clip, rng: Random) -> tuple[str, str]:
    """An adjective and an adverb true of the clip's velocity, often none."""
    _, adjectives, adverbs = next(row for row in _LOUD if clip.velocity < row[0])
    k = rng.randrange(len(adjectives))
    return (adjectives[k], adverbs[k]) if rng.random() < 0.6 else ("", "")


def _height(midi: int, rng: Random) -> str:
    words = next(row[1] for row in _HEIGHT if midi < row[0])
    return rng.choice(words)


def _instrument(clip: Clip, rng: Random) -> str:
    """A noun phrase for the clip's instrument; its own name half of the time."""
    instrument = INSTRUMENTS[clip.instrument]
    own = f"@ {instrument.name}" if instrument.subject.startswith("@") else instrument.phrase
    return own if rng.random() < 0.5 else rng.choice(instrument.words)


def _plain_note(clip: Clip) -> str:
    instrument = INSTRUMENTS[clip.instrument]
    return f"{instrument.phrase} {instrument.verb} {clip.note}"


_NOTE_FORMS = (
    "{a} {verb} {note}",
    "{soft_a} {verb} {note}",
    "{a} {verb} the note {note}",
    "{a} {softly} {verb} {note}",
    "{a} {verb} {note} {softly}",
    "{soft} {bare}, note {note}",
    "{soft} {bare}, {note}",
    "{bare} {note}",
    "{note} on the {bare}",
    "{note} on {a}",
    "@ {soft} {note} on the {bare}",
    "{note} played {softly} on {a}",
    "@ {soft} {bare} note, {note}",
    "the note {note} on {a}",
    "someone {softly} plays {a}, {note}",
    "somebody plays {note} on {a}",
    "somebody {softly} plays the {bare}, {note}",
    "someone playing {note} on the {bare}",
    "the sound of {a} {verb} {note}",
    "@ single {note} from {a}",
    "one {soft} note on the {bare}, {note}",
    "play {note} on the {bare}",
    "{a}, {note}, {soft}",
    "@ {soft} {high} note on the {bare}, {note}",
    "@ {soft} {high} {bare} note, {note}",
)
_NOTELESS_FORMS = (
    "{soft_a}",
    "@ {soft} {high} note on {a}",
    "@ {soft} {high} {bare} note",
    "someone {softly} plays {a}",
    "the sound of {a}",
    "@ {soft} {high} note on the {bare}",
)
_VERB_FORMS: dict[str, tuple[str, ...]] = {
    "playing": (),
    "singing": (
        "{soft_a} singing {note}",
        "{a} singing the note {note} {softly}",
        "people singing {note}",
        "the sound of {a} {softly} singing {note}",
    ),
    "whistling": (
        "someone whistling {note}",
        "somebody {softly} whistles {note}",
        "whistling {note}",
        "@ person whistling the note {note}",
    ),
}


def _varied_note(clip: Clip, rng: Random) -> str:
    if clip.midi is None:
        raise ValueError("a note clip without a note")
    verb = INSTRUMENTS[clip.instrument].verb
    named = rng.random() < 0.9
    own = _VERB_FORMS[verb]
    forms = (own if own and rng.random() < 0.4 else _NOTE_FORMS) if named else _NOTELESS_FORMS
    phrase = _instrument(clip, rng)
    soft, softly = _loudness(clip, rng)
    note = rng.choice(spellings(clip.midi)) if rng.random() < 0.6 else clip.note
    return rng.choice(_speakable(forms, verb)).format(
        a=phrase,
        soft_a=_with(soft, phrase),
        bare=_bare(phrase),
        verb=verb,
        note=note,
        soft=soft,
        softly=softly,
        high=_height(clip.midi, rng),
    )


_UNFIT: dict[str, tuple[str, ...]] = {
    "playing": (),
    "singing": ("play",),  # nobody plays a choir
    "whistling": ("play", "{verb}"),  # and no whistle whistles
}


def _speakable(forms: tuple[str, ...], verb: str) -> tuple[str, ...]:
    return tuple(form for form in forms if not any(word in form for word in _UNFIT[verb]))


def _chord_name(clip: Clip, letter: str) -> str:
    return f"{letter} {clip.quality}"


def _root(clip: Clip) -> str:
    if clip.midi is None:
        raise ValueError(f"a {clip.kind} clip without a root")
    return _letters(clip.midi)[0]


def _varied_root(clip: Clip, rng: Random) -> str:
    root = _root(clip)
    return rng.choice(_letters(clip.midi or 0)) if rng.random() < 0.6 else root


def _subject(instrument: Instrument) -> str:
    return f"{instrument.phrase} {instrument.verb}"


def _plain_chord(clip: Clip) -> str:
    return f"{_subject(INSTRUMENTS[clip.instrument])} @ {_chord_name(clip, _root(clip))} chord"


def _plain_arpeggio(clip: Clip) -> str:
    chord = _chord_name(clip, _root(clip))
    return f"{_subject(INSTRUMENTS[clip.instrument])} @ {chord} arpeggio, {clip.direction}"


_CHORD_FORMS = (
    "{a} {verb} {chord}",
    "{soft_a} {verb} @ {chord} chord",
    "{chord} chord on {a}",
    "@ {soft} {chord} chord on the {bare}",
    "@ {chord} chord played {softly} on {a}",
    "{soft} {bare}, {chord} chord",
    "{bare} chord, {chord}",
    "someone {softly} plays @ {chord} chord on {a}",
    "somebody plays {chord} on the {bare}",
    "play @ {chord} chord on the {bare}",
    "the sound of @ {chord} chord on {a}",
    "@ {soft} {mood} chord on the {bare}",
)
_MOOD = {"major": ("major", "happy", "bright"), "minor": ("minor", "sad", "dark")}


def _varied_chord(clip: Clip, rng: Random) -> str:
    phrase = _instrument(clip, rng)
    soft, softly = _loudness(clip, rng)
    verb = INSTRUMENTS[clip.instrument].verb
    return rng.choice(_speakable(_CHORD_FORMS, verb)).format(
        a=phrase,
        verb=verb,
        soft_a=_with(soft, phrase),
        bare=_bare(phrase),
        soft=soft,
        softly=softly,
        chord=_chord_name(clip, _varied_root(clip, rng)),
        mood=rng.choice(_MOOD[clip.quality]),
    )


_ARPEGGIO_FORMS = (
    "{a} playing @ {way} {chord} arpeggio",
    "{a} playing @ {chord} arpeggio {going}",
    "@ {chord} arpeggio on {a}, {going}",
    "@ {way} {chord} arpeggio on the {bare}",
    "{bare} arpeggio, {chord}, {going}",
    "{bare}, {way} {chord} arpeggio",
    "someone plays @ broken {chord} chord on {a}, {going}",
    "the notes of {chord} one by one on {a}, {going}",
    "@ {way} {pace} {chord} arpeggio on {a}",
    "@ {pace} {bare} arpeggio in {chord}, {going}",
    "@ {bare} going {way2} @ {chord} chord",
)
_WAY = {
    "ascending": (("ascending", "rising", "upward"), ("ascending", "going up", "upwards"), "up"),
    "descending": (
        ("descending", "falling", "downward"),
        ("descending", "going down", "downwards"),
        "down",
    ),
}


def _varied_arpeggio(clip: Clip, rng: Random) -> str:
    phrase = _instrument(clip, rng)
    way, going, way2 = _WAY[clip.direction]
    return rng.choice(_ARPEGGIO_FORMS).format(
        a=phrase,
        bare=_bare(phrase),
        way=rng.choice(way),
        going=rng.choice(going),
        way2=way2,
        pace=_pace(clip, rng),
        chord=_chord_name(clip, _varied_root(clip, rng)),
    )


def _pace(clip: Clip, rng: Random) -> str:
    """A word true of the tempo, "" in the middle."""
    tempo = clip.tempo or 120
    words = ("slow",) if tempo < 92 else ("fast", "quick") if tempo > 148 else ("",)
    return rng.choice(words)


def _plain_drums(clip: Clip) -> str:
    if clip.name:
        return f"{PATTERNS[clip.name].phrase} at {clip.tempo} bpm"
    return DRUMS[clip.instrument].phrase


_SOUND_FORMS = ("{soft_a}", "{soft_a}", "{a}", "the sound of {a}", "{bare}")
_HIT_FORMS = (
    "someone {softly} hits @ {name}",
    "one hit on the {name}",
    "@ {soft} {name}",
    "{soft} {name}, one hit",
    "@ {name} hit once",
)
_BEAT_FORMS = (
    "{a}",
    "{a} at {tempo} bpm",
    "{a}, {tempo} beats per minute",
    "{pace_a}",
    "{pace} drums, {name}",
    "@ drum kit playing {name}",
    "@ drummer playing @ {pace} {name} rhythm",
    "@ {pace} {name} groove on drums",
    "{name} drum loop at {tempo} bpm",
)


def _varied_drums(clip: Clip, rng: Random) -> str:
    if clip.name:
        pattern = PATTERNS[clip.name]
        phrase = rng.choice((pattern.phrase, *pattern.words))
        pace = _pace(clip, rng)
        return rng.choice(_BEAT_FORMS).format(
            a=phrase, pace_a=_with(pace, phrase), pace=pace, name=clip.name, tempo=clip.tempo
        )
    drum = DRUMS[clip.instrument]
    # A wording with a person in it is a sentence already: the forms are for noun phrases.
    phrase = rng.choice((drum.phrase, *drum.words))
    if not phrase.startswith(("@ ", "a ", "an ")):
        return phrase
    soft, softly = _loudness(clip, rng)
    hit = drum.phrase.endswith(" hit") and rng.random() < 0.5
    return rng.choice(_HIT_FORMS if hit else _SOUND_FORMS).format(
        a=phrase,
        soft_a=_with(soft, phrase),
        bare=_bare(phrase),
        soft=soft,
        softly=softly,
        name=drum.name,
    )


_STROKE = {
    "": ("",),
    "up": (", upstroke", ", upwards", " with an upstroke"),
    "down": (", downstroke", ", downwards", " with a downstroke"),
}


def _plain_strum(clip: Clip) -> str:
    chord = _chord_name(clip, _root(clip))
    return f"@ guitar strumming @ {chord} chord{_STROKE[clip.direction][0]}"


_STRUM_FORMS = (
    "someone strums a guitar, {chord}{stroke}",
    "someone strums @ {chord} chord on a guitar{stroke}",
    "@ guitar strum, {chord}{stroke}",
    "an acoustic guitar strumming {chord}{stroke}",
    "@ strummed guitar chord, {chord}{stroke}",
    "{chord} strummed on a guitar{stroke}",
    "@ {chord} chord on an acoustic guitar{stroke}",
    "somebody strumming the guitar{stroke}",
    "strum @ {chord} chord{stroke}",
)


def _varied_strum(clip: Clip, rng: Random) -> str:
    return rng.choice(_STRUM_FORMS).format(
        chord=_chord_name(clip, _varied_root(clip, rng)), stroke=rng.choice(_STROKE[clip.direction])
    )


def _plain_effect(clip: Clip) -> str:
    return clip.name


_EFFECT_FORMS = ("{a}", "{a}", "{bare}", "the sound of {a}", "{a} nearby", "sound effect: {bare}")


def _varied_effect(clip: Clip, rng: Random) -> str:
    sound = SOUNDS[clip.name]
    phrase = rng.choice((sound.phrase, *sound.words))
    if phrase.startswith(("someone ", "something ", "people ")):
        return phrase
    return rng.choice(_EFFECT_FORMS).format(a=phrase, bare=_bare(phrase))


_PLAIN = {
    "note": _plain_note,
    "chord": _plain_chord,
    "arpeggio": _plain_arpeggio,
    "drums": _plain_drums,
    "strum": _plain_strum,
    "effect": _plain_effect,
}
_VARIED = {
    "note": _varied_note,
    "chord": _varied_chord,
    "arpeggio": _varied_arpeggio,
    "drums": _varied_drums,
    "strum": _varied_strum,
    "effect": _varied_effect,
}
