"""Is it the sound that was asked for? Which note a clip plays, and on which instrument.

The note is read off the posterior of Basic Pitch (Bittner et al. 2022, arXiv:2203.09893), whose
network is taken from the installed `basic-pitch` distribution as a file and run by onnxruntime; the
package itself is not imported. The instrument is told by a small convolutional network over log-mel
frames, `InstrumentNet`, trained by `mdiff.plugins.audio.data.classifier`.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from itertools import pairwise
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
import torchaudio
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mdiff.core.errors import MissingError

RATE = 16_000

# Basic Pitch: samples at 22,050 Hz in one window, and the MIDI number of its lowest bin (A0).
PITCH_RATE, PITCH_WINDOW, LOWEST_NOTE = 22_050, 43_844, 21
NOTE_OUTPUT = "StatefulPartitionedCall:1"  # (windows, frames, 88): how likely each note sounds

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
        try:
            onnxruntime = import_module("onnxruntime")
        except ImportError as error:
            raise MissingError(
                "checking notes needs onnxruntime; get it with: pip install onnxruntime"
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session: Any = onnxruntime.InferenceSession(
            str(_pitch_network()), options, providers=["CPUExecutionProvider"]
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


def _pitch_network() -> Path:
    try:
        files = metadata.files("basic-pitch") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "nmp.onnx":
            return Path(str(file.locate()))
    raise MissingError(
        "checking notes needs the network inside basic-pitch; "
        "get it with: pip install --no-deps basic-pitch"
    )


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
        x = 0.2 * torch.log(power + FLOOR).unsqueeze(1)
        x = self.trunk(x).mean(dim=2)  # over frequency, which the receptive field has read by now
        logits: Tensor = self.head(torch.cat([x.mean(dim=2), x.amax(dim=2)], dim=1))
        return logits

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
    with safe_open(str(path), framework="pt") as file:
        net = InstrumentNet(json.loads(file.metadata()["names"]))
    net.load_state_dict(load_file(str(path)))
    return net.eval()


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What was asked for and what was heard; `heard_midi` None means no note at all."""

    instrument: str
    midi: int
    heard_instrument: str
    heard_midi: int | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """Shares of the clips that are as asked; shares lie within 0..1.

    `octave_errors` is the share with the right pitch class in the wrong octave. A confusion is
    (asked instrument, heard instrument, clips), the most frequent first; a missed note is
    (instrument, asked MIDI, heard MIDI or None).
    """

    clips: int
    note_accuracy: float
    octave_errors: float
    instrument_accuracy: float
    both: float
    confusions: tuple[tuple[str, str, int], ...]
    missed_notes: tuple[tuple[str, int, int | None], ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def report(heard: Iterable[Heard]) -> Report:
    """Sum the answers up; raises ValueError where there are none."""
    rows = list(heard)
    if not rows:
        raise ValueError("no clips to report on")
    note = [row.heard_midi == row.midi for row in rows]
    instrument = [row.heard_instrument == row.instrument for row in rows]
    octave = [
        row.heard_midi is not None
        and row.heard_midi != row.midi
        and (row.heard_midi - row.midi) % 12 == 0
        for row in rows
    ]
    confusions = Counter(
        (row.instrument, row.heard_instrument)
        for row, right in zip(rows, instrument, strict=True)
        if not right
    )
    return Report(
        clips=len(rows),
        note_accuracy=sum(note) / len(rows),
        octave_errors=sum(octave) / len(rows),
        instrument_accuracy=sum(instrument) / len(rows),
        both=sum(a and b for a, b in zip(note, instrument, strict=True)) / len(rows),
        confusions=tuple((asked, got, n) for (asked, got), n in confusions.most_common()),
        missed_notes=tuple(
            (row.instrument, row.midi, row.heard_midi)
            for row, right in zip(rows, note, strict=True)
            if not right
        ),
    )
