"""The listeners: which note a posterior shows, an instrument classifier that learns, the report."""

import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from mdiff.core.errors import MissingError
from mdiff.plugins.audio import metrics
from mdiff.plugins.audio.data.captions import Clip
from mdiff.plugins.audio.data.classifier import accuracy, train
from mdiff.plugins.audio.data.evaluate import asked, evaluate, table
from mdiff.plugins.audio.data.recipe import held_out
from mdiff.plugins.audio.metrics import (
    LOWEST_NOTE,
    RATE,
    Heard,
    InstrumentNet,
    found_note,
    load_classifier,
    mel_power,
    report,
    save_classifier,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def posterior(**notes: tuple[float, int]) -> np.ndarray:
    """Frames x 88 with notes `m<midi>=(probability, frames)`."""
    out = np.full((100, 88), 0.05, dtype=np.float32)
    for name, (probability, frames) in notes.items():
        out[:frames, int(name[1:]) - LOWEST_NOTE] = probability
    return out


def test_the_note_that_sounds_longest_and_surest_is_found() -> None:
    assert found_note(posterior(m60=(0.8, 60), m72=(0.9, 30))) == 60
    assert found_note(posterior(m21=(0.9, 10))) == 21
    assert found_note(posterior(m108=(0.9, 10))) == 108


def test_faint_activations_add_up_to_nothing() -> None:
    assert found_note(posterior()) is None
    assert found_note(posterior(m60=(0.25, 100), m72=(0.5, 3))) == 72
    assert found_note(posterior(m60=(0.25, 100)), threshold=0.2) == 60


def test_listeners_that_are_not_installed_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", absent)
    with pytest.raises(MissingError, match="pip install --no-deps basic-pitch"):
        metrics._pitch_network()

    def unimportable(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(metrics, "import_module", unimportable)
    with pytest.raises(MissingError, match="pip install onnxruntime"):
        metrics.NoteReader()


def sounds(kind: str, count: int, seed: int) -> torch.Tensor:
    """A quarter of a second of tones at random pitches: pure ones, or ones with many harmonics."""
    draw = torch.Generator().manual_seed(seed)
    pitch = 200 + 300 * torch.rand((count, 1), generator=draw)
    time = torch.arange(RATE // 4).unsqueeze(0) / RATE
    harmonics = {"pure": (1,), "rich": (1, 2, 3, 4, 5, 6, 7, 8)}[kind]
    parts = [torch.sin(2 * torch.pi * k * pitch * time) / k for k in harmonics]
    return 0.3 * torch.stack(parts).sum(dim=0)


def test_a_classifier_learns_two_plain_classes_and_is_saved_and_loaded(tmp_path: Path) -> None:
    def examples(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        waves = torch.cat([sounds("pure", 24, seed), sounds("rich", 24, seed + 1)])
        return mel_power(waves), torch.arange(2).repeat_interleave(24)

    before = torch.get_rng_state()
    net = train(*examples(0), ["pure", "rich"], epochs=12, batch=16)
    assert torch.equal(before, torch.get_rng_state())
    assert accuracy(net, *examples(10)) > 0.9

    save_classifier(net, tmp_path / "net.safetensors")
    loaded = load_classifier(tmp_path / "net.safetensors")
    assert loaded.names == ("pure", "rich")
    for kind in loaded.names:
        told = [loaded.hear(wave.numpy()) for wave in sounds(kind, 8, 99)]
        assert told == [net.hear(wave.numpy()) for wave in sounds(kind, 8, 99)]
        assert told.count(kind) >= 7


def test_training_repeats_itself() -> None:
    power, labels = mel_power(sounds("rich", 8, 0)), torch.arange(2).repeat(4)
    once, again = (train(power, labels, ["a", "b"], epochs=1, seed=3, batch=4) for _ in range(2))
    assert all(
        torch.equal(a, b) for a, b in zip(once.parameters(), again.parameters(), strict=True)
    )


def test_a_missing_classifier_names_its_training(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"python -m mdiff\.plugins\.audio\.data\.classifier"):
        load_classifier(tmp_path / "none.safetensors")


def test_the_classifier_stays_small() -> None:
    net = InstrumentNet([str(k) for k in range(40)])
    assert sum(each.numel() for each in net.parameters()) < 500_000


def heard(midi: int, got: int | None, instrument: str = "flute", told: str = "flute") -> Heard:
    return Heard(instrument=instrument, midi=midi, heard_instrument=told, heard_midi=got)


def test_the_report_counts_notes_octaves_and_confusions() -> None:
    result = report(
        [
            heard(60, 60),
            heard(60, 72),
            heard(60, None, told="ocarina"),
            heard(62, 62, told="ocarina"),
        ]
    )
    assert result.clips == 4
    assert result.note_accuracy == 0.5
    assert result.octave_errors == 0.25
    assert result.instrument_accuracy == 0.5
    assert result.both == 0.25
    assert result.confusions == (("flute", "ocarina", 2),)
    assert result.missed_notes == (("flute", 60, 72), ("flute", 60, None))
    assert json.loads(result.to_json())["note_accuracy"] == 0.5
    assert "ocarina" in table(result)
    with pytest.raises(ValueError, match="no clips"):
        report([])


class FakeReader:
    """Stands in for Basic Pitch: hears middle C in everything."""

    def posterior(self, wave: np.ndarray, rate: int = RATE) -> np.ndarray:
        return posterior(m60=(0.9, 50))


class FakeNet:
    """Stands in for the classifier: silence is a harp, all else a flute."""

    def hear(self, wave: np.ndarray) -> str:
        return "flute" if np.abs(wave).max() > 0 else "harp"


def test_clips_are_judged_against_what_was_asked() -> None:
    clips = [
        (
            Clip(kind="note", instrument=name, midi=midi),
            np.full(RATE, level, dtype=np.float32),
        )
        for name, midi, level in (("flute", 60, 0.5), ("flute", 61, 0.5), ("harp", 60, 0.0))
    ]
    result = evaluate(clips, FakeReader(), FakeNet())  # type: ignore[arg-type]
    assert (result.note_accuracy, result.instrument_accuracy) == (pytest.approx(2 / 3), 1.0)
    assert result.missed_notes == (("flute", 61, 60),)


def test_what_is_asked_for_is_every_held_out_pair_once() -> None:
    clips = asked()
    assert {(clip.instrument, clip.midi) for clip in clips} == held_out()
    assert len(clips) == len(held_out())


def test_a_clip_without_a_note_is_refused() -> None:
    clip = Clip(kind="effect", name="@ cow mooing")
    with pytest.raises(ValueError, match="no note was asked"):
        evaluate([(clip, np.zeros(RATE, dtype=np.float32))], FakeReader(), FakeNet())  # type: ignore[arg-type]
