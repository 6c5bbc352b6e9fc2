"""The audio data set: what is planned and held out, and what becomes of waveforms and files."""

import struct
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mdiff.core import data
from mdiff.core.errors import MissingError
from mdiff.plugins.audio.data import classifier, recipe
from mdiff.plugins.audio.data.captions import WORDINGS, Clip, from_row, plain
from mdiff.plugins.audio.data.instruments import DRUMS, HIGHEST, INSTRUMENTS, LOWEST, PATTERNS
from mdiff.plugins.audio.data.recordings import catalogue, clips
from mdiff.plugins.audio.data.soundfont import (
    PEAK,
    RATE,
    SAMPLES,
    SECONDS,
    SoundFont,
    finish,
    loudest,
    resample,
    score,
)
from mdiff.plugins.audio.metrics import load_classifier

PLAN = recipe.plan()
NOTES = [clip for clip in PLAN if clip.kind == "note"]


def test_the_plan_is_the_same_every_time_and_another_seed_holds_out_others() -> None:
    assert recipe.plan() == PLAN
    assert recipe.held_out() == recipe.held_out()
    assert recipe.held_out(1) != recipe.held_out(2)


def test_the_plan_is_of_a_size_to_train_on_and_repeats_nothing() -> None:
    assert 5_000 < len(PLAN) < 12_000
    assert len(set(PLAN)) == len(PLAN)


def test_a_held_out_pair_is_held_out_at_every_velocity_and_no_pair_is_in_both_splits() -> None:
    pairs = {
        split: {(c.instrument, c.midi) for c in NOTES if c.split == split}
        for split in ("train", "held_out")
    }
    assert pairs["held_out"] == recipe.held_out()
    assert not pairs["train"] & pairs["held_out"]
    assert {c.split for c in PLAN if c.kind != "note"} == {"train"}


@pytest.mark.parametrize("seed", [0, 1, recipe.SEED])
def test_the_split_leaves_every_instrument_and_note_well_seen(seed: int) -> None:
    held = recipe.held_out(seed)
    assert len(held) >= 120
    every = Counter(midi for each in INSTRUMENTS.values() for midi in each.notes)
    gone = Counter(midi for _, midi in held)
    assert all(gone[midi] <= 0.4 * every[midi] for midi in every)
    for name, instrument in INSTRUMENTS.items():
        own = {midi for other, midi in held if other == name}
        assert 0.05 < len(own) / len(instrument.notes) < 0.2
        assert instrument.low not in own
        assert instrument.high not in own
        assert not own & {midi + 1 for midi in own}, "two neighbours"


def test_instruments_stay_within_the_scale_and_are_distinct() -> None:
    assert len({each.program for each in INSTRUMENTS.values()}) == len(INSTRUMENTS)
    for each in INSTRUMENTS.values():
        assert LOWEST <= each.low < each.high <= HIGHEST
        assert len(each.notes) >= 25


def test_chords_and_arpeggios_stay_in_the_range_of_their_instrument() -> None:
    for clip in PLAN:
        if clip.kind in ("chord", "arpeggio"):
            top = max(key.key for key in score(clip, seed=0)[0])
            instrument = INSTRUMENTS[clip.instrument]
            assert instrument.low <= (clip.midi or 0) < top <= instrument.high


def test_scores_begin_soon_and_end_within_the_clip() -> None:
    for clip in PLAN[::5]:
        keys, _, _ = score(clip, seed=3)
        assert 0 <= min(key.start for key in keys) <= 0.07
        assert all(0 < key.velocity < 128 and key.start < key.end for key in keys)
        assert max(key.start for key in keys) < SECONDS
    assert {c.instrument for c in PLAN if c.kind == "drums" and not c.name} == set(DRUMS)
    assert {c.name for c in PLAN if c.name} == set(PATTERNS)


def test_an_arpeggio_visits_the_chord_in_its_direction() -> None:
    def keys(direction: str) -> list[int]:
        clip = Clip(
            kind="arpeggio",
            instrument="harp",
            midi=48,
            quality="minor",
            direction=direction,
            tempo=120,
        )
        return [key.key for key in score(clip, seed=0)[0]]

    assert keys("ascending") == [48, 51, 55, 60]
    assert keys("descending") == [60, 55, 51, 48]


def tone(hertz: float, seconds: float, rate: int = RATE, level: float = 0.5) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    return (level * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


@pytest.mark.parametrize("seconds", [0.5, SECONDS, 4.0])
def test_finished_clips_have_one_length_no_overload_and_end_in_silence(seconds: float) -> None:
    wave = finish(tone(440, seconds, level=3.0))
    assert wave.shape == (SAMPLES,)
    assert wave.dtype == np.float32
    assert np.abs(wave).max() <= PEAK + 1e-6
    assert wave[-1] == 0
    pcm = recipe.to_pcm(wave)
    np.testing.assert_allclose(pcm / 32767, wave, atol=1 / 32767)


def test_resampling_keeps_what_fits_and_folds_nothing_back() -> None:
    kept = resample(tone(1000, 1.0, 48_000), 48_000)
    assert len(kept) == RATE
    assert abs(loudest(kept) - 0.5 / np.sqrt(2)) < 0.01
    folded = resample(tone(11_000, 1.0, 48_000), 48_000)
    assert np.sqrt(np.mean(np.square(folded[800:-800]))) < 0.5e-3


def wav(samples: np.ndarray, rate: int) -> bytes:
    data = (samples * 32767).astype("<i2").tobytes()
    form = struct.pack("<HHIIHH", 1, 1, rate, 2 * rate, 2, 16)
    body = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", len(data))
    return b"RIFF" + struct.pack("<I", len(body) + len(data)) + body + data


def test_a_sound_catalogue_is_read_and_share_alike_sounds_are_left_out(tmp_path: Path) -> None:
    entries = [
        ('"Cow". License: Creative Commons Zero 1.0.', tone(200, 0.5, 8000)),
        ('"Horse". License: Creative Commons Attribution-ShareAlike 3.0', tone(300, 0.5, 8000)),
        ('"Wind". License: Creative Commons Attribution 3.0 Unported.', tone(400, 4.0, 8000)),
        ('"Sheep". License: unknown.', tone(500, 0.5, 8000)),
    ]
    table, bodies = b"", b""
    for text, samples in entries:
        body = bytes([len(text) + 1]) + text.encode() + b"\0" + wav(samples, 8000)
        offset = 8 * len(entries) + len(bodies)
        table += struct.pack("<II", offset | 0x8000_0000, len(body))
        bodies += body
    path = tmp_path / "sounds.cat"
    path.write_bytes(table + bodies)

    read = list(catalogue(path))
    assert [text for text, _, _ in read] == [text for text, _ in entries]
    assert [rate for _, _, rate in read] == [8000] * 4
    np.testing.assert_allclose(read[0][1], entries[0][1], atol=1e-4)

    effects = [
        (clip, wave())
        for clip, wave in clips(path, tmp_path / "none", tmp_path / "none")
        if clip.source == "openttd-opensfx"
    ]
    assert Counter((clip.name, clip.licence) for clip, _ in effects) == {
        ("@ cow mooing", "CC0-1.0"): 3,
        ("wind", "CC-BY-3.0"): 3,
    }
    for _, wave in effects:
        assert wave.shape == (SAMPLES,)
        assert 0.05 < loudest(wave) < 0.4
        assert np.abs(wave).max() <= PEAK


def test_the_licence_page_counts_every_clip() -> None:
    page = recipe.licences(PLAN)
    assert f"| fluid-soundfont-gm | MIT | {len(PLAN)} |" in page


def test_what_is_built_is_read_back_and_trains_the_classifier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = [PLAN[0], PLAN[1], next(clip for clip in NOTES if clip.split == "held_out")]
    built.append(
        Clip(kind="effect", name="@ cow mooing", source="openttd-opensfx", licence="CC0-1.0")
    )
    waves = [finish(tone(220 * (k + 1), 1.0)) for k in range(4)]
    jobs = [(clip, lambda k=k: waves[k]) for k, clip in enumerate(built)]
    monkeypatch.setattr(recipe, "jobs", lambda fetch: jobs)
    recipe.build(tmp_path, lambda spec: tmp_path)

    read = data.examples(tmp_path, (".flac",))
    assert [example.path.name for example in read][::3] == [
        "00000-a-grand-piano-playing-c2.flac",
        "00003-a-cow-mooing.flac",
    ]
    assert [from_row({**example.facts, "split": example.split}) for example in read] == built
    assert [example.split for example in read] == ["train", "train", "held_out", "train"]
    assert [example.label for example in read] == [*["grand piano"] * 3, None]
    for row, (example, wave) in enumerate(zip(read, waves, strict=True)):
        assert example.texts == tuple(recipe.wordings(built[row], row))
        assert example.texts[0] == plain(built[row])
        assert len(example.texts) == WORDINGS
        pcm, rate = soundfile.read(example.path, dtype="int16")
        assert rate == RATE
        assert np.array_equal(pcm, recipe.to_pcm(wave))
    assert "| openttd-opensfx | CC0-1.0 | 1 |" in (tmp_path / "LICENSES.md").read_text()

    path = tmp_path / "classifier.safetensors"
    assert classifier.main(["--data", str(tmp_path), "--out", str(path), "--epochs", "1"]) == 0
    assert load_classifier(path).names == tuple(INSTRUMENTS)


def test_a_package_that_holds_something_else_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="apt:fluid-soundfont-gm holds no FluidR3_GM.sf2"):
        recipe.locate(lambda spec: tmp_path)


def test_every_source_is_fetched_once_and_listed(tmp_path: Path) -> None:
    for _, path in recipe.SOURCES.values():
        (tmp_path / path).mkdir(parents=True)
    asked: list[str] = []

    def fetch(spec: str) -> Path:
        asked.append(spec)
        return tmp_path

    assert set(recipe.locate(fetch)) == set(recipe.SOURCES)
    assert (*asked, recipe.SYNTHESISER) == recipe.DATA_SET.packages


def test_a_synthesiser_that_does_not_load_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tinysoundfont.py").write_text("import there_is_no_such_module")
    monkeypatch.delitem(sys.modules, "tinysoundfont", raising=False)
    before = list(sys.path)
    with pytest.raises(MissingError, match="there_is_no_such_module"):
        SoundFont(tmp_path / "a.sf2", tmp_path)
    assert sys.path == before
