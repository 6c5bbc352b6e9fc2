"""The audio data set: what is planned and held out, and what becomes of waveforms and files."""

import json
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mdiff.core.errors import MissingError
from mdiff.plugins.audio.data import recipe
from mdiff.plugins.audio.data.captions import Clip, to_row
from mdiff.plugins.audio.data.instruments import DRUMS, HIGHEST, INSTRUMENTS, LOWEST, PATTERNS
from mdiff.plugins.audio.data.recordings import catalogue, clips
from mdiff.plugins.audio.data.soundfont import (
    PEAK,
    RATE,
    SAMPLES,
    SECONDS,
    finish,
    loudest,
    resample,
    score,
)
from mdiff.plugins.audio.data.store import load, to_float

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
    np.testing.assert_allclose(to_float(pcm), wave, atol=1 / 32767)


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


def test_a_data_set_is_read_back_and_a_missing_one_names_the_recipe(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"python -m mdiff\.plugins\.audio\.data\.recipe"):
        load(tmp_path)
    np.save(tmp_path / "waves.npy", np.zeros((2, SAMPLES), dtype=np.int16))
    rows = [json.dumps({"row": row, **to_row(clip)}) for row, clip in enumerate(PLAN[:2])]
    (tmp_path / "index.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    read, waves = load(tmp_path)
    assert read == PLAN[:2]
    assert waves.shape == (2, SAMPLES)
    (tmp_path / "index.jsonl").write_text(rows[0] + "\n", encoding="utf-8")
    with pytest.raises(MissingError, match="2 waveforms but 1 clips"):
        load(tmp_path)


def test_a_package_that_cannot_be_fetched_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingError, match="apt-get download fluid-soundfont-gm"):
        recipe.locate(tmp_path / "sources")
