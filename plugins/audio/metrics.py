"""Is it the sound that was asked for, and does it sound right? The metrics of `mdiff eval`.

The note and the chord are read off the posterior of Basic Pitch (Bittner et al. 2022, arXiv:2203.09893), speech by
pocketsphinx, its quality by DNSMOS (Reddy et al. 2022, arXiv:2110.01763): networks inside installed distributions, run
as they are; of those packages only pocketsphinx is imported. The instrument is told by a small network of our own over
log-mel frames, `InstrumentNet`, which `mdiff.plugins.audio.data.classifier` trains and which ships, by its entry
under [evaluators] in registry.toml.

A metric is asked of the examples whose facts it needs: `kind`, `midi`, `quality`, `instrument`, `transcript`.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module, metadata
from itertools import pairwise
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
import torchaudio
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from mdiff.core import distances, registry, weights
from mdiff.core.errors import MissingError
from mdiff.core.hooks import Example, Metric
from mdiff.plugins.audio import io

RATE = 16_000

# Basic Pitch: samples at 22,050 Hz in one window, and the MIDI number of its lowest bin (A0).
PITCH_RATE, PITCH_WINDOW, LOWEST_NOTE = 22_050, 43_844, 21
NOTE_OUTPUT = "StatefulPartitionedCall:1"  # (windows, frames, 88): how likely each note sounds

CLASSIFIER = "audio/instrument-classifier"
MELS, FLOOR = 64, 1e-6
_FFT, _HOP = 1024, 320


def found_note(posterior: NDArray[np.float32], threshold: float = 0.3) -> int | None:
    """The MIDI number of the strongest note, or None where none is heard.

    `posterior` is (frames, 88), each entry the probability that a note sounds in a frame; a note's
    strength is the sum of its entries that reach the threshold.
    """
    strength = np.where(posterior >= threshold, posterior, 0.0).sum(axis=0)
    return int(strength.argmax()) + LOWEST_NOTE if strength.max() > 0 else None


@final
class NoteReader:
    """Basic Pitch's network: `posterior(wave)` gives (frames, 88), about 86 frames a second.

    Raises MissingError where `basic-pitch` or onnxruntime is not installed.
    """

    def __init__(self) -> None:
        self._session = _session(
            _inside("basic-pitch", "nmp.onnx", "pip install --no-deps basic-pitch")
        )
        self._input: str = self._session.get_inputs()[0].name

    def posterior(self, wave: NDArray[np.float32], rate: int = RATE) -> NDArray[np.float32]:
        """Note probabilities of a mono waveform within -1..1, at any sampling rate."""
        x = torchaudio.functional.resample(
            torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32)), rate, PITCH_RATE
        ).numpy()
        x = np.pad(x, (0, -len(x) % PITCH_WINDOW)).reshape(-1, PITCH_WINDOW, 1)
        (notes,) = self._session.run([NOTE_OUTPUT], {self._input: x})
        flat: NDArray[np.float32] = notes.reshape(-1, notes.shape[-1])
        return flat


def _session(path: Path) -> Any:
    """A network of onnxruntime; raises MissingError where that is not installed."""
    onnxruntime = _module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _module(name: str) -> Any:
    """An optional module; raises MissingError where it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingError(f"this metric needs {name}; get it with: pip install {name}") from error


def _inside(dist: str, end: str, command: str) -> Path:
    """The file of an installed distribution whose path has that end; raises MissingError where there is none."""
    try:
        files = metadata.files(dist) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if str(file).endswith(end):
            return Path(str(file.locate()))
    raise MissingError(f"this metric needs the network inside {dist}; get it with: {command}")


def mel_power(waves: Tensor) -> Tensor:
    """Mel power spectrogram of mono waveforms at `RATE`: (B, samples) -> (B, MELS, frames)."""
    mel = torchaudio.transforms.MelSpectrogram(
        sample_rate=RATE, n_fft=_FFT, hop_length=_HOP, n_mels=MELS, f_min=30.0
    )
    power: Tensor = mel(waves)
    return power


@final
class InstrumentNet(nn.Module):
    """Mel power (B, MELS, frames) -> logits (B, names); 0.2 million parameters."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        widths = (1, 24, 48, 96, 128)
        self.trunk = nn.Sequential(
            *(
                layer
                for inner, outer in pairwise(widths)
                for layer in (
                    nn.Conv2d(inner, outer, 5 if inner == 1 else 3, 2, 2 if inner == 1 else 1),
                    nn.BatchNorm2d(outer),
                    nn.ReLU(),
                )
            )
        )
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(2 * widths[-1], len(self.names)))

    def forward(self, power: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(power))
        return logits

    def features(self, power: Tensor) -> Tensor:
        """What the names are told from: (B, MELS, frames) -> (B, 256)."""
        x = 0.2 * torch.log(power + FLOOR).unsqueeze(1)
        x = self.trunk(x).mean(dim=2)  # over frequency, which the receptive field has read by now
        return torch.cat([x.mean(dim=2), x.amax(dim=2)], dim=1)

    @torch.no_grad()
    def hear(self, wave: NDArray[np.float32]) -> str:
        """The name of the instrument in a mono waveform at `RATE`."""
        self.eval()
        x = torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32)).unsqueeze(0)
        return self.names[int(self(mel_power(x)).argmax())]


def save_classifier(net: InstrumentNet, path: Path) -> None:
    """Weights and names in one safetensors file."""
    state = {key: value.contiguous() for key, value in net.state_dict().items()}
    save_file(state, str(path), metadata={"names": json.dumps(net.names)})


def load_classifier(path: Path) -> InstrumentNet:
    """The network that `save_classifier` wrote; raises MissingError where there is no such file."""
    if not path.is_file():
        raise MissingError(
            f"no instrument classifier at {path}; train one with: "
            f"python -m mdiff.plugins.audio.data.classifier --data DATA --out {path}"
        )
    return _classifier_of(path.read_bytes(), path.name)


def _classifier_of(content: bytes, name: str) -> InstrumentNet:
    tensors = weights.parse(content, name)
    net = InstrumentNet(json.loads(weights.metadata(content)["names"]))
    weights.fill(net, tensors, name)
    return net.eval()


TRIADS: Mapping[str, tuple[int, ...]] = {"major": (0, 4, 7), "minor": (0, 3, 7)}
NO_NOTE = -1


def found_chord(posterior: NDArray[np.float32], threshold: float = 0.3) -> tuple[int, str] | None:
    """Root (0 is C) and quality of the triad whose notes sound most, or None where no note is heard.

    `posterior` is (frames, 88), as for `found_note`. The notes of one name count together, and by the root of their
    strength: a triad with all its notes goes before one of which a note sounds very long.
    """
    strength = np.where(posterior >= threshold, posterior, 0.0).sum(axis=0)
    chroma = np.zeros(12)
    np.add.at(chroma, (np.arange(len(strength)) + LOWEST_NOTE) % 12, strength)
    if not chroma.any():
        return None
    chroma = np.sqrt(chroma / chroma.max())
    scores = {
        (root, quality): chroma[(root + np.array(steps)) % 12].sum()
        for root in range(12)
        for quality, steps in TRIADS.items()
    }
    return max(scores, key=lambda triad: scores[triad])


def wave(sample: Mapping[str, Any], rate: int = RATE) -> NDArray[np.float32]:
    """A sample as a mono waveform (samples,) at a rate."""
    audio = io.resampled(io.mixed(sample["audio"].float(), 1), int(sample["rate"]), rate)
    found: NDArray[np.float32] = audio[0].numpy()
    return found


def word_errors(said: Sequence[str], heard: Sequence[str]) -> int:
    """The fewest words to put in, take out or change that turn what was heard into what was said."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(said, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != other))
    return row[-1]


def words(text: str) -> list[str]:
    """The words of a text, without case and marks."""
    return re.findall(r"[a-z0-9']+", text.lower().replace("\u2019", "'"))


def _same(rows: NDArray[Any], _: NDArray[Any]) -> float:
    """The share of rows whose halves are equal: what was asked for and what was heard."""
    half = rows.shape[1] // 2
    return float((rows[:, :half] == rows[:, half:]).all(axis=1).mean())


def _midi(example: Example) -> int | None:
    """The note of an example; facts out of a .csv are texts."""
    value = example.facts.get("midi")
    return None if value in (None, "") else round(float(value))


def _kind(*kinds: str) -> Callable[[Example], bool]:
    return lambda example: example.facts.get("kind") in kinds and _midi(example) is not None


def note() -> Metric:
    """The share of single notes that are the note asked for. Source: Bittner et al. 2022, arXiv:2203.09893."""
    reader = NoteReader()

    def measure(sample: Mapping[str, Any], example: Example) -> NDArray[Any]:
        heard = found_note(reader.posterior(wave(sample)))
        return np.array([_midi(example), NO_NOTE if heard is None else heard])

    return Metric(
        summary="share of single notes that are the note asked for, heard by Basic Pitch; 0 to 1",
        better="higher",
        measure=measure,
        score=_same,
        applies=_kind("note"),
    )


def chord() -> Metric:
    """The share of chords with the root and the quality asked for. Source: Bittner et al. 2022, arXiv:2203.09893."""
    reader, qualities = NoteReader(), list(TRIADS)

    def measure(sample: Mapping[str, Any], example: Example) -> NDArray[Any]:
        root, quality = found_chord(reader.posterior(wave(sample))) or (NO_NOTE, qualities[0])
        asked = (_midi(example) or 0) % 12, qualities.index(example.facts["quality"])
        return np.array([*asked, root, qualities.index(quality)])

    triad = _kind("chord", "arpeggio", "strum")
    return Metric(
        summary="share of chords with the root and quality asked for, Basic Pitch and triads; 0 to 1",
        better="higher",
        measure=measure,
        score=_same,
        applies=lambda example: triad(example) and example.facts.get("quality") in TRIADS,
    )


def instrument() -> Metric:
    """The share of single notes that are played on the instrument asked for."""
    net = _classifier()

    def measure(sample: Mapping[str, Any], example: Example) -> NDArray[Any]:
        asked, heard = example.facts["instrument"], net.hear(wave(sample))
        return np.array([net.names.index(asked), net.names.index(heard)])

    return Metric(
        summary=f"share of single notes on the instrument asked for, InstrumentNet of {len(net.names)}; 0 to 1",
        better="higher",
        measure=measure,
        score=_same,
        applies=lambda e: e.facts.get("kind") == "note" and e.facts.get("instrument") in net.names,
    )


@cache
def _classifier() -> InstrumentNet:
    card = registry.network("mdiff.plugins.audio", "evaluators", CLASSIFIER)
    (file,) = card.files
    return _classifier_of(weights.verified(card.root / file.name, file), file.name)


def fad() -> Metric:
    """Fréchet distance on InstrumentNet features, which is not comparable with that on other features.
    Source: Kilgour et al. 2019, arXiv:1812.08466.
    """
    net = _classifier()

    @torch.no_grad()
    def measure(sample: Mapping[str, Any], example: Example) -> NDArray[Any]:
        power = mel_power(torch.from_numpy(wave(sample)).unsqueeze(0))
        found: NDArray[Any] = net.features(power)[0].numpy()
        return found

    return Metric(
        summary="Frechet distance on InstrumentNet features, to held-out sounds; 0 and up",
        better="lower",
        measure=measure,
        score=distances.frechet,
        reference="held_out",
        least=50,
    )


def word_error_rate() -> Metric:
    """Word errors a word of the transcript, by pocketsphinx's open vocabulary of American English."""
    sphinx = _module("pocketsphinx")
    decoder = sphinx.Decoder(samprate=float(RATE), loglevel="FATAL")

    def measure(sample: Mapping[str, Any], example: Example) -> NDArray[Any]:
        pcm = np.round(np.clip(wave(sample), -1, 1) * 32767).astype("<i2").tobytes()
        decoder.start_utt()
        decoder.process_raw(pcm, no_search=False, full_utt=True)
        decoder.end_utt()
        heard = decoder.hyp()
        said = words(example.facts["transcript"])
        return np.array([word_errors(said, words(heard.hypstr if heard else "")), len(said)])

    return Metric(
        summary="word errors a word, heard by pocketsphinx's open vocabulary; 0 and up, real speech is not 0",
        better="lower",
        measure=measure,
        score=lambda rows, _: float(rows[:, 0].sum() / rows[:, 1].sum()),
        applies=lambda example: bool(words(str(example.facts.get("transcript") or ""))),
    )


MOS_SECONDS = 9.01
MOS_FITS = {  # of signal, background and whole: from what the network says to the scale 1 to 5
    "signal": (-0.08397278, 1.22083953, 0.0052439),
    "background": (-0.13166888, 1.60915514, -0.39604546),
    "overall": (-0.06766283, 1.11546468, 0.04602535),
}


def dnsmos() -> Metric:
    """DNSMOS P.835: the quality of speech as listeners would rate it. Source: Reddy et al. 2022, arXiv:2110.01763."""
    path = _inside(
        "speechmos",
        "speechmos/dnsmos_models/sig_bak_ovr.onnx",
        "pip install --no-deps speechmos",
    )
    session = _session(path)
    size = int(MOS_SECONDS * RATE)

    def measure(sample: Mapping[str, Any], example: Example) -> NDArray[Any]:
        """Signal, background, overall; means over windows a second apart, a short sound is repeated."""
        x = wave(sample)
        while len(x) < size:
            x = np.concatenate([x, x])
        starts = range(
            0, int(len(x) // RATE - MOS_SECONDS) * RATE + 1, RATE
        )  # of whole seconds alone, as published
        windows = [x[k : k + size] for k in starts]
        raw = np.array([session.run(None, {"input_1": w[None]})[0][0] for w in windows])
        fitted = [np.polyval(fit, raw[:, k]) for k, fit in enumerate(MOS_FITS.values())]
        return np.mean(fitted, axis=1)

    return Metric(
        summary="DNSMOS P.835 overall quality of speech; 1 to 5",
        better="higher",
        measure=measure,
        score=lambda rows, _: float(rows[:, 2].mean()),
        applies=lambda e: e.facts.get("kind") == "speech" or bool(e.facts.get("transcript")),
    )


SILENT = -70.0
"""LUFS: what is quieter does not count, as in the gate of the measurement."""


def loudness() -> Metric:
    """How far the mean loudness is from that of real sounds, in loudness units. Source: ITU-R BS.1770-4, 2015."""

    def measure(sample: Mapping[str, Any], example: Example) -> NDArray[Any]:
        audio, rate = sample["audio"].float(), int(sample["rate"])
        audio = audio if len(audio) <= 5 else io.mixed(audio, 1)
        # The measure wants one block of 0.4 s at least.
        audio = nn.functional.pad(audio, (0, max(0, int(0.4 * rate) + 1 - audio.shape[1])))
        # torchaudio cuts off what its filters lift beyond full scale, so loud sounds are measured 12 dB lower.
        scale = 0.25 if float(audio.abs().max()) > 0.25 else 1.0
        value = float(torchaudio.functional.loudness(scale * audio, rate)) - 20 * math.log10(scale)
        return np.array([max(SILENT, value) if np.isfinite(value) else SILENT])

    return Metric(
        summary="mean integrated loudness less that of held-out sounds, without sign; LU",
        better="lower",
        measure=measure,
        score=lambda rows, reference: float(abs(rows.mean() - reference.mean())),
        reference="held_out",
    )


def clipping() -> Metric:
    """The share of samples that lie in a row at full scale, which a waveform does only where it was cut off."""

    def measure(sample: Mapping[str, Any], example: Example) -> NDArray[Any]:
        full = (sample["audio"].abs() >= 0.999).numpy()
        beside = np.zeros_like(full)
        beside[:, 1:] |= full[:, :-1]
        beside[:, :-1] |= full[:, 1:]
        return np.array([(full & beside).mean()])

    return Metric(
        summary="share of samples in a row at full scale; 0 to 1",
        better="lower",
        measure=measure,
        score=lambda rows, _: float(rows.mean()),
    )


METRICS: Mapping[str, Callable[[], Metric]] = {
    maker.__name__: maker
    for maker in (note, chord, instrument, fad, word_error_rate, dnsmos, loudness, clipping)
}
