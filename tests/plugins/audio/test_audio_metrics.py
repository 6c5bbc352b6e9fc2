"""What listeners hear: notes, chords, instruments, loudness, clipping, words; and what is said when they are absent."""

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from mdiff.core import host
from mdiff.core.errors import MissingError
from mdiff.core.hooks import Example, Metric
from mdiff.plugins.audio import metrics
from mdiff.plugins.audio.data.classifier import accuracy, train
from mdiff.plugins.audio.metrics import (
    LOWEST_NOTE,
    METRICS,
    RATE,
    InstrumentNet,
    found_chord,
    found_note,
    load_classifier,
    mel_power,
    save_classifier,
    word_errors,
    words,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def example(**facts: object) -> Example:
    return Example(path=Path("a.wav"), facts=facts)


def tone(
    *midi: int, seconds: float = 2.0, rate: int = RATE, level: float = 0.3
) -> dict[str, object]:
    """Decaying notes with a few overtones, one after another in no time: a chord."""
    time = torch.arange(int(seconds * rate)) / rate
    audio = torch.zeros_like(time)
    for number in midi:
        pitch = 440 * 2 ** ((number - 69) / 12)
        for k in (1, 2, 3, 4):
            audio += torch.sin(2 * torch.pi * k * pitch * time) / k**2 * torch.exp(-time)
    return {"audio": level * audio[None] / len(midi), "rate": rate}


def posterior(**notes: tuple[float, int]) -> np.ndarray:
    """Frames x 88 with notes `m<midi>=(probability, frames)`."""
    out = np.full((100, 88), 0.05, dtype=np.float32)
    for name, (probability, frames) in notes.items():
        out[:frames, int(name[1:]) - LOWEST_NOTE] = probability
    return out


def score(
    metric: Metric, *pairs: tuple[dict[str, object], Example], against: object = None
) -> float:
    rows = np.stack([metric.measure(sample, one) for sample, one in pairs])
    return metric.score(rows, rows if against is None else np.asarray(against))


# --- notes and chords -------------------------------------------------------------------------------------------------


def test_the_note_that_sounds_longest_and_surest_is_found() -> None:
    assert found_note(posterior(m60=(0.8, 60), m72=(0.9, 30))) == 60
    assert found_note(posterior(m21=(0.9, 10))) == 21
    assert found_note(posterior(m108=(0.9, 10))) == 108


def test_faint_activations_add_up_to_nothing() -> None:
    assert found_note(posterior()) is None and found_chord(posterior()) is None
    assert found_note(posterior(m60=(0.25, 100), m72=(0.5, 3))) == 72
    assert found_note(posterior(m60=(0.25, 100)), threshold=0.2) == 60


@pytest.mark.parametrize(("quality", "third"), [("major", 4), ("minor", 3)])
@pytest.mark.parametrize("root", range(12))
def test_a_triad_is_found_in_any_inversion(root: int, quality: str, third: int) -> None:
    notes = [60 + (root + step) % 12 for step in (0, third, 7)]
    heard = {f"m{note}": (0.7, 40 + 10 * k) for k, note in enumerate(notes)}
    assert found_chord(posterior(**heard)) == (root, quality)
    assert found_chord(posterior(**heard, m96=(0.5, 4))) == (root, quality)


def test_a_note_of_known_waves() -> None:
    metric = METRICS["note"]()
    asked = example(kind="note", midi=69)
    assert metric.measure(tone(69), asked).tolist() == [69, 69]
    assert metric.measure(tone(69, rate=44_100), asked).tolist() == [69, 69]
    assert metric.measure(tone(57), asked).tolist() == [69, 57]
    silent = {"audio": torch.zeros(1, RATE), "rate": RATE}
    assert metric.measure(silent, asked).tolist() == [69, metrics.NO_NOTE]
    right, wrong = (tone(69), asked), (tone(60), asked)
    assert score(metric, right, right, wrong, (silent, asked)) == 0.5
    assert metric.applies(asked) and metric.applies(example(kind="note", midi="69"))
    assert not metric.applies(example(kind="chord", midi=69))
    assert not metric.applies(example(kind="note")) and not metric.applies(example())


def test_a_chord_of_known_waves() -> None:
    metric = METRICS["chord"]()
    asked = example(kind="chord", midi=57, quality="minor")
    assert score(metric, (tone(57, 60, 64), asked)) == 1.0
    assert score(metric, (tone(57, 61, 64), asked)) == 0.0
    assert metric.applies(asked) and metric.applies(example(kind="strum", midi=57, quality="major"))
    assert not metric.applies(example(kind="strum", midi=57, quality="sus4"))
    assert not metric.applies(example(kind="note", midi=57, quality="major"))


# --- instruments ------------------------------------------------------------------------------------------------------


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


def test_the_shipped_classifier_tells_what_was_asked_from_what_is_heard() -> None:
    metric = METRICS["instrument"]()
    names = metrics._classifier().names
    assert len(names) == 39 and "flute" in names
    asked = example(kind="note", midi=69, instrument="flute")
    (want, heard) = metric.measure(tone(69), asked)
    assert names[int(want)] == "flute" and 0 <= heard < len(names)
    assert metric.score(np.array([[1, 1], [2, 3]]), np.zeros((0, 2))) == 0.5
    assert metric.applies(asked)
    assert not metric.applies(example(kind="note", instrument="hurdy-gurdy"))
    assert not metric.applies(example(kind="chord", instrument="flute"))


def test_the_distance_to_real_sounds_falls_with_likeness() -> None:
    metric = METRICS["fad"]()
    assert "InstrumentNet" in metric.summary and metric.reference == "held_out"

    def rows(kind: str, seed: int) -> np.ndarray:
        return np.stack(
            [
                metric.measure({"audio": wave[None], "rate": RATE}, example())
                for wave in sounds(kind, 50, seed)
            ]
        )

    pure, again, rich = rows("pure", 0), rows("pure", 1), rows("rich", 2)
    assert pure.shape == (50, 256)
    assert metric.score(pure, pure) == pytest.approx(0, abs=1e-6)
    assert metric.score(pure, again) < 0.5 * metric.score(pure, rich)


# --- loudness and clipping --------------------------------------------------------------------------------------------


def test_the_loudness_of_a_known_tone() -> None:
    """A sine at 997 Hz and full scale in one channel has -3.01 LUFS (BS.1770)."""
    metric = METRICS["loudness"]()
    time = torch.arange(48_000 * 3) / 48_000
    sine = torch.sin(2 * torch.pi * 997 * time)[None]
    row = metric.measure({"audio": sine, "rate": 48_000}, example())
    assert row[0] == pytest.approx(-3.01, abs=0.1)
    quiet = metric.measure({"audio": sine * 0.1, "rate": 48_000}, example())
    assert row[0] - quiet[0] == pytest.approx(20, abs=0.05)
    assert metric.score(np.array([quiet]), np.array([row])) == pytest.approx(20, abs=0.05)
    for audio in (torch.zeros(1, RATE), torch.zeros(1, 10), torch.zeros(7, RATE)):
        assert metric.measure({"audio": audio, "rate": RATE}, example()).tolist() == [
            metrics.SILENT
        ]


def test_clipping_is_samples_in_a_row_at_full_scale() -> None:
    metric = METRICS["clipping"]()

    def of(*values: float) -> float:
        return float(metric.measure({"audio": torch.tensor([values]), "rate": RATE}, example())[0])

    assert of(0.1, 1.0, 0.1, -1.0) == 0.0
    assert of(0.5, 1.0, 1.0, 0.5) == 0.5
    assert of(-1.0, -1.0, -1.0, 0.0) == 0.75
    assert metric.score(np.array([[0.5], [0.0]]), np.zeros((0, 1))) == 0.25


# --- speech -----------------------------------------------------------------------------------------------------------


def test_word_errors_are_the_fewest_edits() -> None:
    assert word_errors(["a", "b", "c"], ["a", "b", "c"]) == 0
    assert word_errors(["a", "b", "c"], ["a", "c"]) == 1
    assert word_errors(["a", "b", "c"], ["x", "a", "b", "y"]) == 2
    assert word_errors([], ["a"]) == 1 and word_errors(["a", "b"], []) == 2
    assert words("It\u2019s a Test, twice: A-B!") == ["it's", "a", "test", "twice", "a", "b"]


def test_speech_is_measured_by_its_listeners() -> None:
    metric = METRICS["word_error_rate"]()
    silent = {"audio": torch.zeros(1, RATE), "rate": RATE}
    said = example(transcript="Good evening, all!")
    assert metric.measure(silent, said).tolist()[1] == 3
    assert metric.score(np.array([[1, 4], [0, 1]]), np.zeros((0, 2))) == 0.2
    assert (
        metric.applies(said)
        and not metric.applies(example(transcript=""))
        and not metric.applies(example())
    )


def test_the_quality_of_speech_falls_with_noise() -> None:
    """Something like a voice: bursts of a harmonic tone between pauses, clean and in noise."""
    metric = METRICS["dnsmos"]()
    time = torch.arange(int(RATE * 4.6)) / RATE  # twice that is one window
    voice = sum(torch.sin(2 * torch.pi * 140 * k * time) / k for k in range(1, 20))
    voice = 0.1 * voice * (torch.sin(2 * torch.pi * 1.5 * time) > 0)
    noise = 0.1 * torch.randn(len(time), generator=torch.Generator().manual_seed(0))
    rows = [
        metric.measure({"audio": audio[None], "rate": RATE}, example(kind="speech"))
        for audio in (voice, voice + noise)
    ]
    assert all(row.shape == (3,) and (row > 0.9).all() and (row < 5).all() for row in rows)
    assert rows[0][1] > rows[1][1] + 0.5  # the background
    assert metric.score(np.array([[1, 2, 3.0], [1, 2, 4.0]]), np.zeros((0, 3))) == 3.5
    assert metric.applies(example(transcript="x")) and not metric.applies(example(kind="note"))


# --- what is not there ------------------------------------------------------------------------------------------------


def test_listeners_that_are_not_installed_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    with monkeypatch.context() as patch:
        patch.setattr(metadata, "files", absent)
        for name, command in {
            "note": "pip install --no-deps basic-pitch",
            "chord": "pip install --no-deps basic-pitch",
            "dnsmos": "pip install --no-deps speechmos",
        }.items():
            with pytest.raises(MissingError, match=command):
                METRICS[name]()

    def unimportable(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(metrics, "import_module", unimportable)
    monkeypatch.setattr(metrics, "_inside", lambda *where: Path("network.onnx"))
    with pytest.raises(MissingError, match="pip install onnxruntime"):
        METRICS["note"]()
    with pytest.raises(MissingError, match="pip install pocketsphinx"):
        METRICS["word_error_rate"]()


def test_the_plugin_offers_them() -> None:
    found = host.current().offers("audio", "metrics")
    assert list(found) == [
        "note",
        "chord",
        "instrument",
        "fad",
        "word_error_rate",
        "dnsmos",
        "loudness",
        "clipping",
    ]
    assert all(maker.__doc__ for maker in found.values())
