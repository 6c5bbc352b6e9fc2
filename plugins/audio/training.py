"""How the parts of AudioLDM and DiffWave are trained: sounds and captions -> rows -> losses.

A sound of any rate, channels and length becomes windows of mono sound; a part keeps of each window what it needs, as
half-precision or 16-bit numbers, and augments it anew in every step. `PARTS` lists the parts, each with the dataclass
of its settings, the table [task] of a recipe.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdiff.core.denoiser import Denoiser
from mdiff.core.errors import UsageError, nearest
from mdiff.core.hooks import Example, Model, ModelCard, Task, text_encoder
from mdiff.core.names import pick
from mdiff.core.training.draws import Draws
from mdiff.core.training.recipe import settings as read_settings
from mdiff.plugins.audio import io
from mdiff.plugins.audio.audioldm import embed_texts, to_image, to_mel
from mdiff.plugins.audio.nets.mel import (
    BANDS,
    BINS,
    FLOOR,
    HOP,
    RATE,
    log_mel,
    magnitude,
    to_log_mel,
)

log = logging.getLogger("mdiff")

WORDINGS = 8  # kept of a sound
TEXT_BYTES = 256  # kept of a wording: more than the 64 tokens that a text encoder reads
SHORTEST = 0.05  # seconds
SILENCE = 1e-4  # peak, -80 dB
CHUNK = 32  # windows of a long sound that are worked on at once
GAIN = (-1.4, 0.35)  # of log magnitudes: -12 to 3 dB
QUIETEST = math.log(FLOOR)


# --- settings -------------------------------------------------------------------------------------


def _notes(example: Example) -> bool:
    return example.facts.get("kind") == "note"


def _low_notes(example: Example) -> bool:
    """Below D3, where mel bands hardly tell harmonics apart."""
    return _notes(example) and int(example.facts.get("midi", 60)) < 50


FAVOURED: Mapping[str, Callable[[Example], bool]] = {"notes": _notes, "low_notes": _low_notes}
"""What may be seen more often than the rest, told by the facts of its data set."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of every part.

    Attributes:
        seconds: of a window. A shorter sound is followed by silence, a longer one is cut into windows half a window
            apart.
        favour: rows of `FAVOURED` -> how often such a sound is seen where others are seen once.
    """

    seconds: float = 2.56
    favour: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, times in self.favour.items():
            pick("kind of sound to favour", FAVOURED, name)
            if times <= 0:
                raise UsageError(f"task: favour.{name} is {times}, it has to be above 0")

    def weigh(self, example: Example) -> float:
        """How often an example is seen in relation to others."""
        return math.prod(times for name, times in self.favour.items() if FAVOURED[name](example))


@dataclass(frozen=True, kw_only=True)
class UNetSettings(Settings):
    """Of AudioLDM's UNet.

    Attributes:
        heard: share of the conditions that are the embedding of the sound itself, as in the paper. The others are a
            wording's, as when asked: the two towers never meet exactly, and notes are told apart by little.
        drop: share of the conditions that are that of the empty text, for classifier-free guidance.
    """

    heard: float = 0.3
    drop: float = 0.1


@dataclass(frozen=True, kw_only=True)
class AutoencoderSettings(Settings):
    """Of AudioLDM's autoencoder.

    Attributes:
        kl: weighs the KL term, per latent number.
        noise: latents are decoded with noise of up to this share of their deviation, so that the decoder forgives what
            a sampler leaves.
    """

    kl: float = 1e-3
    noise: float = 0.0


@dataclass(frozen=True, kw_only=True)
class DiffWaveSettings(Settings):
    """Of a DiffWave, which learns on whole windows: memory and time grow with them."""

    seconds: float = 1.0


# --- sounds ---------------------------------------------------------------------------------------


def windows(example: Example, rate: int, length: int) -> Tensor:
    """The sound of an example as windows (W, length) at `rate`, mono, within full scale, none of them silent.

    Raises:
        MdiffError: it cannot be read, is too short or silent, or has a NaN.
    """
    wave = io.read(example.path, rate=rate, channels=1)["audio"][0]
    if len(wave) < SHORTEST * rate:
        raise UsageError(
            f"{example.path} holds {len(wave) / rate:.3f} s of sound: give at least {SHORTEST} s"
        )
    peak = float(wave.abs().max())
    if peak < SILENCE:
        raise UsageError(f"{example.path} is silent: its peak in mono is {peak:.1g} of full scale")
    hop = length // 2
    count = 1 + max(0, -(-(len(wave) - length) // hop))
    whole = F.pad(wave / max(peak, 1.0), (0, (count - 1) * hop + length - len(wave)))
    cut = whole.unfold(0, length, hop)
    return cut[cut.abs().amax(1) >= SILENCE]


def wordings(example: Example) -> list[str]:
    """`WORDINGS` captions of an example, repeated where it has fewer; its label where it has none, else no text."""
    texts = example.texts or (example.label or "",)
    return [texts[k % len(texts)] for k in range(WORDINGS)]


def to_pcm(wave: Tensor) -> Tensor:
    """Sound within -1..1 as int16."""
    return (wave * 32768).round().clamp(-32768, 32767).short()


def from_pcm(pcm: Tensor) -> Tensor:
    """The inverse of `to_pcm`, up to its rounding."""
    return pcm.float() / 32768


def bent(wave: Tensor, factor: float) -> Tensor:
    """The sound (B, N) played `factor` times as fast, resampled in the frequency domain: (B, about N / factor)."""
    count = wave.shape[-1]
    length = HOP * round(count / factor / HOP)
    spectrum = torch.fft.rfft(wave)
    spectrum = F.pad(spectrum, (0, max(0, length // 2 + 1 - spectrum.shape[-1])))
    return torch.fft.irfft(spectrum, n=length) * (length / count)


def _length(seconds: float, rate: int, step: int) -> int:
    """A window in samples.

    Raises:
        UsageError: it is no multiple of `step` samples, which the networks take at once.
    """
    length = round(seconds * rate)
    if length < step or length % step:
        right = max(1, round(length / step)) * step / rate
        raise UsageError(
            f"task: seconds is {seconds:g}, it has to be a multiple of {step / rate:g}, such as {right:g}"
        )
    return length


def _gain(draws: Draws) -> Tensor:
    """Another loudness for each sample, to add to log magnitudes: (b, 1, 1)."""
    return draws.uniform(1, 1, low=GAIN[0], high=GAIN[1])


def _crop(draws: Draws, frames: int, whole: int, step: int = 1) -> slice:
    """A stretch of `frames`, or of all there are, that begins at a multiple of `step`, the same for the whole batch."""
    frames = min(frames, whole)
    start = step * draws.one((whole - frames) // step + 1)
    return slice(start, start + frames)


@contextmanager
def _frozen(device: torch.device) -> Iterator[None]:
    """For what is not trained, parts and spectra: no gradient, and full precision."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _each(example: Example, length: int, device: torch.device) -> Iterator[Tensor]:
    """The windows of an example, some at a time, where the parts that look at them are."""
    for some in windows(example, RATE, length).split(CHUNK):
        yield some.to(device)


def _rows(**columns: Tensor) -> Iterator[dict[str, Tensor]]:
    """Row by row what is held in columns (W, ...)."""
    kept = {name: column.cpu() for name, column in columns.items()}
    for k in range(len(next(iter(kept.values())))):
        yield {name: column[k] for name, column in kept.items()}


# --- AudioLDM -------------------------------------------------------------------------------------


def _frames_step(model: Model) -> int:
    """Samples of one column of the UNet's deepest level: four frames a latent column, halved once per level."""
    unet: Any = model.modules["unet"]
    return 4 * HOP * unet.factor


def unet(card: ModelCard, model: Model, settings: UNetSettings) -> Task:
    """The latent UNet of AudioLDM (Liu et al., 2023, section 3.2): latents of sounds given their joint embedding.

    Latents are what `autoencoder` says, times the config's `latent_scale`, which brings them to unit deviation. It
    belongs to the autoencoder: the first step says so where it does not fit.
    """
    autoencoder: Any = model.modules["autoencoder"]
    joint: Any = model.modules["joint"]
    encoder = text_encoder(card.config["text_encoder"])
    scale = card.config["latent_scale"]
    length = _length(settings.seconds, RATE, _frames_step(model))
    device = _device(joint)

    def read(example: Example) -> Iterator[dict[str, Tensor]]:
        texts = wordings(example)
        different = list(dict.fromkeys(texts))
        with _frozen(device):
            found = embed_texts(joint, encoder, different).half()
        said = found[[different.index(text) for text in texts]]
        for wave in _each(example, length, device):
            with _frozen(device):
                mel = log_mel(wave)
                latent = autoencoder.encode(to_image(mel)).mean.half()
                heard = joint.embed_audio(mel).half()
            yield from _rows(latent=latent, heard=heard, said=said.expand(len(wave), -1, -1))

    @cache
    def null() -> Tensor:
        with _frozen(device):
            return embed_texts(joint, encoder, [""])

    def batch(rows: Mapping[str, Tensor], draws: Draws) -> tuple[Tensor, Mapping[str, Tensor]]:
        x0 = rows["latent"].float() * scale
        if draws.step == 0:
            _check_scale(x0, scale)
        choice = draws.integers(WORDINGS, 1, 1).expand(-1, -1, rows["said"].shape[-1])
        said = rows["said"].gather(1, choice)[:, 0]
        cond = torch.where(draws.chance(settings.heard)[:, None], rows["heard"], said).float()
        cond = torch.where(draws.chance(settings.drop)[:, None], null().to(cond), cond)
        return x0, {"vector": cond}

    return Task(
        module=model.modules["unet"],
        read=read,
        made_by={"seconds": settings.seconds},
        denoiser=_denoiser(model),
        batch=batch,
        weigh=settings.weigh,
        needs=("autoencoder", "joint"),
    )


def _check_scale(x0: Tensor, scale: float) -> None:
    deviation = float(x0.std())
    if not 0.5 < deviation < 2:
        log.warning(
            "latents of this autoencoder have a deviation of %.2f where 1 is meant: for an "
            "autoencoder of your own, start again with --set config.latent_scale=%.4g",
            deviation,
            scale / max(deviation, 1e-6),
        )


def _denoiser(model: Model) -> Denoiser:
    """The one stage that samples."""
    (denoiser,) = (s.denoiser for s in model.stages if isinstance(s.denoiser, Denoiser))
    return denoiser


def autoencoder(card: ModelCard, model: Model, settings: AutoencoderSettings) -> Task:
    """The autoencoder of log-mels: absolute error, more of it where bands are narrow, and a KL term."""
    net: Any = model.modules["autoencoder"]
    length = _length(settings.seconds, RATE, _frames_step(model))
    weight = 1 + 3 * torch.exp(-torch.arange(BANDS) / 12)  # as in the vocoder
    weight = weight / weight.mean()

    def read(example: Example) -> Iterator[dict[str, Tensor]]:
        for wave in _each(example, length, torch.device("cpu")):
            yield from _rows(mel=log_mel(wave).half())

    def loss(rows: Mapping[str, Tensor], draws: Draws) -> Tensor:
        mel = (rows["mel"].float() + _gain(draws)).clamp(min=QUIETEST)
        x = to_image(mel[..., _crop(draws, 64, mel.shape[-1], step=4)])
        posterior = net.encode(x)
        shape = posterior.mean.shape[1:]
        z = posterior.sample(draws.normal(*shape))
        if settings.noise:
            spread = z.detach().std() * draws.uniform(1, 1, 1, high=settings.noise)
            z = z + spread * draws.normal(*shape)
        found = net.decode(z).float()
        miss = (weight.to(x) * (found - x).abs()).flatten(1).mean(1)
        return miss + settings.kl * posterior.kl() / posterior.mean[0].numel()

    return Task(
        module=net,
        read=read,
        made_by={"seconds": settings.seconds},
        loss=loss,
        weigh=settings.weigh,
    )


def vocoder(card: ModelCard, model: Model, settings: Settings) -> Task:
    """The mel inverter: log magnitudes from log-mels, in turn of the sound itself and of what the autoencoder makes.

    Every other step the sound is played a little faster or slower, so that every pitch between the semitones is heard,
    or low notes are learnt by heart; in the others the mel is the autoencoder's, as when the model is used.
    """
    net: Any = model.modules["vocoder"]
    first: Any = model.modules["autoencoder"]
    length = _length(settings.seconds, RATE, _frames_step(model))
    device = _device(first)
    # low notes live in few bins, between which mel bands tell least
    weight = 0.5 + 4 * torch.exp(-torch.linspace(0, RATE / 2, BINS).reshape(-1, 1) / 800)

    def read(example: Example) -> Iterator[dict[str, Tensor]]:
        for wave in _each(example, length, device):
            with _frozen(device):
                decoded = to_mel(first.decode(first.encode(to_image(log_mel(wave))).mean))
            yield from _rows(wave=to_pcm(wave), decoded=decoded.half())

    def loss(rows: Mapping[str, Tensor], draws: Draws) -> Tensor:
        crop = _crop(draws, 128, length // HOP)
        wave = from_pcm(rows["wave"][:, crop.start * HOP : crop.stop * HOP])
        # drawn in both kinds of step, so that what is drawn next is the same
        factor = 0.92 + 0.16 * draws.one(1_000_000) / 1_000_000
        with _frozen(wave.device):
            if draws.step % 2:
                target = magnitude(wave)
                mel = rows["decoded"][..., crop].float()
            else:
                target = magnitude(bent(wave, factor))
                mel = to_log_mel(target)
        gain = _gain(draws)
        mel, target = mel + gain, target * gain.exp()
        # the ends of a crop are reflections, which the whole sound does not have
        inner = slice(4, -4)
        found = net(mel).float()[..., inner]
        target = target.clamp(min=FLOOR)[..., inner]
        near = (found - target.log()).abs()
        # peaks carry the pitch: the second term weighs errors by the square root of the magnitude
        peaks = ((found / 2).exp() - target.sqrt()).abs()
        return (weight.to(near) * (near + 20 * peaks)).flatten(1).mean(1)

    return Task(
        module=net,
        read=read,
        made_by={"seconds": settings.seconds},
        loss=loss,
        weigh=settings.weigh,
        needs=("autoencoder",),
    )


def joint(card: ModelCard, model: Model, settings: Settings) -> Task:
    """The joint embedding, by contrast: of all captions of a batch a sound is to find its own, and the reverse.

    Sounds with the same caption are not each other's negatives. A sample's loss needs the whole batch (Radford et al.,
    2021: CLIP; Wu et al., 2023: CLAP).
    """
    net: Any = model.modules["joint"]
    encoder = text_encoder(card.config["text_encoder"])
    length = _length(settings.seconds, RATE, HOP)

    def read(example: Example) -> Iterator[dict[str, Tensor]]:
        texts = torch.stack([_to_bytes(text) for text in wordings(example)])
        for wave in _each(example, length, torch.device("cpu")):
            yield from _rows(mel=log_mel(wave).half(), texts=texts.expand(len(wave), -1, -1))

    def loss(rows: Mapping[str, Tensor], draws: Draws) -> Tensor:
        if len(draws) != draws.total:
            raise UsageError(
                "the joint embedding contrasts a batch as a whole: train it in one process, with "
                "--set batch.micro=0"
            )
        choice = draws.integers(WORDINGS)
        texts = [_to_text(rows["texts"][i, k]) for i, k in enumerate(choice.tolist())]
        with _frozen(choice.device):
            states = encoder.encode(texts)
        mel = (rows["mel"].float() + _gain(draws)).roll(draws.one(17) - 8, dims=-1)
        audio = net.embed_audio(mel.clamp(min=QUIETEST)).float()
        text = net.embed_text(states.tokens.to(mel), states.mask.to(mel.device)).float()
        logits = net.log_scale.exp().clamp(max=100) * audio @ text.T
        same = torch.tensor([[a == b for b in texts] for a in texts], device=mel.device)
        own = torch.eye(len(texts), dtype=torch.bool, device=mel.device)
        logits = logits.masked_fill(same & ~own, -1e4)
        labels = torch.arange(len(texts), device=mel.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    return Task(
        module=net,
        read=read,
        made_by={"seconds": settings.seconds},
        loss=loss,
        weigh=settings.weigh,
    )


def _to_bytes(text: str) -> Tensor:
    """A text as numbers (TEXT_BYTES,) uint8, zeros behind it: what rows can hold."""
    data = text.encode()[:TEXT_BYTES]
    return torch.tensor([*data, *bytes(TEXT_BYTES - len(data))], dtype=torch.uint8)


def _to_text(numbers: Tensor) -> str:
    return bytes(numbers.tolist()).rstrip(b"\0").decode(errors="ignore")


# --- DiffWave -------------------------------------------------------------------------------------


def diffwave(card: ModelCard, model: Model, settings: DiffWaveSettings) -> Task:
    """DiffWave on waveforms (Kong et al., 2021): of nothing, of the class that a label names, or of its own log-mel.

    Raises:
        UsageError: it takes a log-mel that is not the plugin's own.
    """
    net: Any = model.modules["diffwave"]
    rate = card.config["rate"]
    takes = net.takes
    classes = list(card.config.get("classes", ()))
    length = _length(settings.seconds, rate, net.hop if takes == "mel" else 1)
    if takes == "mel" and (rate, net.hop, card.config["network"]["mels"]) != (RATE, HOP, BANDS):
        raise UsageError(
            f"a DiffWave learns on log-mels of {BANDS} bands, with strides whose product is {HOP}, "
            f"at {RATE} Hz"
        )

    def read(example: Example) -> Iterator[dict[str, Tensor]]:
        columns: dict[str, Tensor] = {}
        if takes == "label":
            if example.label not in classes:
                raise UsageError(
                    f"{example.path}: its class {example.label!r} is none of the model's"
                    f"{nearest(example.label or '', classes)}"
                )
            columns["label"] = torch.tensor(classes.index(example.label))
        for wave in windows(example, rate, length):
            yield {"wave": to_pcm(wave), **columns}

    def batch(rows: Mapping[str, Tensor], draws: Draws) -> tuple[Tensor, Mapping[str, Tensor]]:
        wave = from_pcm(rows["wave"])
        given: Mapping[str | None, Callable[[], Mapping[str, Tensor]]] = {
            None: dict,
            "label": lambda: {"label": rows["label"]},
            "mel": lambda: {"mel": log_mel(wave)},
        }
        with _frozen(wave.device):
            return wave[:, None], given[takes]()

    return Task(
        module=net,
        read=read,
        made_by={"seconds": settings.seconds},
        denoiser=_denoiser(model),
        batch=batch,
        weigh=settings.weigh,
    )


# --- parts ----------------------------------------------------------------------------------------

Part = tuple[type[Settings], Callable[[ModelCard, Model, Any], Task]]

PARTS: Mapping[str, Mapping[str, Part]] = {
    "AudioLDM": {
        "unet": (UNetSettings, unet),
        "autoencoder": (AutoencoderSettings, autoencoder),
        "vocoder": (Settings, vocoder),
        "joint": (Settings, joint),
    },
    "DiffWave": {"diffwave": (DiffWaveSettings, diffwave)},
}
"""System -> part -> its settings, and what makes its task."""


def task(card: ModelCard, model: Model, part: str, settings: Mapping[str, Any]) -> Task:
    """How a part of a model is trained.

    Raises:
        UsageError: there is no such part, or a setting is wrong.
    """
    kind, make = pick(f"part of {card.system}", PARTS[card.system], part)
    return make(card, model, read_settings(kind, settings))
