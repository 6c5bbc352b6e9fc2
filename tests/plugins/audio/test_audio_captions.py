"""Captions: spellings parse back, the generator alone draws the wording, none of it is untrue."""

import json
import re
from random import Random

import pytest

from mdiff.plugins.audio.data.captions import (
    KINDS,
    PLAIN_SHARE,
    WORDINGS,
    Clip,
    from_row,
    named_note,
    note_name,
    parse_note,
    plain,
    spellings,
    to_row,
    varied,
    wordings,
)
from mdiff.plugins.audio.data.instruments import HIGHEST, INSTRUMENTS, LOWEST
from mdiff.plugins.audio.data.recipe import plan
from mdiff.plugins.audio.data.sounds import SOUNDS

RECORDED = [
    *(Clip(kind="effect", name=name) for name in SOUNDS),
    *(
        Clip(kind="strum", instrument="guitar", midi=57, quality=quality, direction=direction)
        for quality in ("major", "minor", "half-diminished")
        for direction in ("", "up", "down")
    ),
]
CLIPS = [*plan()[::7], *RECORDED]


@pytest.mark.parametrize("midi", range(LOWEST, HIGHEST + 1))
def test_every_spelling_of_a_note_parses_back(midi: int) -> None:
    assert spellings(midi)[0] == note_name(midi)
    assert {parse_note(text) for text in spellings(midi)} == {midi}


@pytest.mark.parametrize(
    ("text", "midi"), [("C4", 60), ("c4", 60), ("F#3", 54), ("Gb3", 54), ("B flat 3", 58)]
)
def test_notes_as_musicians_count_them(text: str, midi: int) -> None:
    assert parse_note(text) == midi


def test_the_note_that_a_wording_names() -> None:
    rng = Random(0)
    for clip in CLIPS:
        note = clip.midi if clip.kind == "note" else None
        assert named_note(plain(clip)) == note, plain(clip)
        assert {named_note(varied(clip, rng)) for _ in range(4)} <= {note, None}


@pytest.mark.parametrize(
    ("text", "midi"),
    [
        ("someone softly plays the Oboe, c sharp 5", 73),
        ("a low B-flat 2 on the tuba", 46),
        ("A4 on a violin, again A 4", 69),
        ("a piano, C4 and then C4", 60),
        ("a piano playing C4, then E4", None),
        ("A 3 second beep", None),
        ("a 3 second beep", None),
        ("an mp3 of MP3 noise, version 2.1", None),
        ("C4.5", None),
        ("a strum of the guitar, C major", None),
        ("", None),
    ],
)
def test_the_note_that_a_text_names(text: str, midi: int | None) -> None:
    assert named_note(text) == midi


@pytest.mark.parametrize("text", ["", "H4", "C", "flute", "C44"])
def test_what_is_no_note_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="write one as C4"):
        parse_note(text)


@pytest.mark.parametrize(
    ("clip", "caption"),
    [
        (Clip(kind="note", instrument="flute", midi=60), "a flute playing C4"),
        (Clip(kind="note", instrument="accordion", midi=61), "an accordion playing C#4"),
        (Clip(kind="note", instrument="whistle", midi=72), "a person whistling C5"),
        (Clip(kind="note", instrument="steel drums", midi=60), "steel drums playing C4"),
        (
            Clip(kind="chord", instrument="church organ", midi=48, quality="minor"),
            "a church organ playing a C minor chord",
        ),
        (
            Clip(kind="chord", instrument="harp", midi=57, quality="minor"),
            "a harp playing an A minor chord",
        ),
        (
            Clip(
                kind="arpeggio", instrument="harp", midi=55, quality="major", direction="ascending"
            ),
            "a harp playing a G major arpeggio, ascending",
        ),
        (Clip(kind="drums", instrument="snare drum"), "a snare drum hit"),
        (Clip(kind="drums", instrument="open hi-hat"), "an open hi-hat hit"),
        (Clip(kind="drums", name="rock", tempo=100), "a rock drum beat at 100 bpm"),
        (
            Clip(kind="strum", instrument="guitar", midi=57, quality="minor", direction="up"),
            "a guitar strumming an A minor chord, upstroke",
        ),
        (Clip(kind="effect", name="@ cow mooing"), "a cow mooing"),
    ],
)
def test_canonical_captions(clip: Clip, caption: str) -> None:
    assert plain(clip) == caption


def test_the_clips_cover_every_kind() -> None:
    assert {clip.kind for clip in CLIPS} == set(KINDS)


def test_wording_is_drawn_by_the_generator_alone() -> None:
    def words(seed: int) -> list[str]:
        rng = Random(seed)
        return [varied(clip, rng) for clip in CLIPS]

    assert words(1) == words(1)
    assert words(1) != words(2)


def test_the_place_of_a_clip_decides_its_wordings_and_the_plain_one_is_first() -> None:
    for row, clip in enumerate(CLIPS[::50]):
        texts = wordings(clip, row)
        assert texts == wordings(clip, row) != wordings(clip, row + 1)
        assert len(texts) == WORDINGS
        assert texts[0] == plain(clip)


def test_about_the_stated_share_of_captions_is_canonical() -> None:
    rng = Random(0)
    notes = [clip for clip in CLIPS if clip.kind == "note"]
    share = sum(varied(clip, rng) == plain(clip) for clip in notes * 4) / (4 * len(notes))
    assert abs(share - PLAIN_SHARE) < 0.05


def test_captions_are_clean_text() -> None:
    rng = Random(0)
    broken = re.compile(r"[@{}]|  | ,|[, ]$|^,|\ba an? |\ban an |\ba [aeio]\w")
    for clip in CLIPS * 3:
        for text in (plain(clip), varied(clip, rng)):
            assert text
            assert not broken.search(text), text


NOTE = re.compile(r"\b([A-Ga-g])(#| sharp|b| flat)? ?(\d)(?![\d ]*(?:bpm|beats))")


def test_a_note_in_a_wording_is_the_clips_own_and_one_instrument_has_many_wordings() -> None:
    rng = Random(0)
    notes = [clip for clip in CLIPS if clip.kind == "note"]
    named = 0
    for clip in notes * 3:
        text = varied(clip, rng)
        for match in NOTE.finditer(text):
            assert parse_note(match.group()) == clip.midi, text
            named += 1
    assert named > 2 * len(notes)
    flute = Clip(kind="note", instrument="flute", midi=70, velocity=45)
    assert len({varied(flute, rng) for _ in range(400)}) > 60


def test_loudness_and_height_words_agree_with_the_clip() -> None:
    rng = Random(0)
    soft, loud = re.compile("soft|gentle|gently|quiet"), re.compile("loud|strong|powerful|force")
    for name in INSTRUMENTS:
        for _ in range(20):
            quiet = varied(Clip(kind="note", instrument=name, midi=72, velocity=45), rng)
            strong = varied(Clip(kind="note", instrument=name, midi=48, velocity=115), rng)
            assert not loud.search(quiet), quiet
            assert not soft.search(strong), strong
            assert " low " not in quiet, quiet
            assert " high " not in strong, strong


def test_clips_pass_through_json() -> None:
    for clip in CLIPS[::20]:
        row = json.loads(json.dumps(to_row(clip)))
        assert row["note"] == clip.note
        assert from_row(row) == clip
