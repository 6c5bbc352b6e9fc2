"""The recipe of the shipped text-to-audio model: four networks, trained one after another.

    python -m mdiff.plugins.audio.train autoencoder --data DIR --out RUN --minutes 20
    python -m mdiff.plugins.audio.train vocoder     --data DIR --out RUN --minutes 20
    python -m mdiff.plugins.audio.train joint       --data DIR --out RUN --minutes 15
    python -m mdiff.plugins.audio.train unet        --data DIR --out RUN --minutes 60 --optimizer muon
    python -m mdiff.plugins.audio.train export      --out RUN --to DIR

`--data` is what `python -m mdiff.plugins.audio.data.recipe` built; held-out clips are never read here. A network that
the run does not hold is the shipped one; `--init` starts training from the shipped weights instead of random ones.
"""

import argparse
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.format import open_memmap
from safetensors.torch import save_file
from torch import Tensor, nn

from mdiff.core import host, registry, schedules, weights
from mdiff.core.hooks import text_encoder
from mdiff.core.nn.autoencoder import AutoencoderKL
from mdiff.core.nn.unet import UNet
from mdiff.core.record import atomic_write
from mdiff.core.training import OPTIMIZERS, Budget, averaged, begin, train
from mdiff.plugins.audio.audioldm import to_image, to_mel
from mdiff.plugins.audio.data.captions import Clip, plain, varied
from mdiff.plugins.audio.data.store import load as load_clips
from mdiff.plugins.audio.data.store import to_float
from mdiff.plugins.audio.nets.joint import JointEmbedding
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
from mdiff.plugins.audio.nets.vocoder import MelInverter

MODEL = "audio/audioldm-mini"  # its card in registry.toml says which networks
KL_WEIGHT = 1e-3
DROP = 0.1
CAPTIONS = 8  # wordings kept per clip


Net = TypeVar("Net", bound=nn.Module)


def config() -> Mapping[str, Any]:
    return registry.load(host.current()).resolve(MODEL).config


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(**config()["autoencoder"])


def vocoder() -> MelInverter:
    return MelInverter(**config()["vocoder"])


def joint() -> JointEmbedding:
    width = text_encoder(config()["text_encoder"]).width
    return JointEmbedding(tokens=width, **config()["joint"])


def unet() -> UNet:
    return UNet(**config()["unet"])


@dataclass(frozen=True)
class Clips:
    """The training clips of a data folder, with what is computed from them cached beside them."""

    folder: Path
    favour: str = "notes"  # what the UNet sees more of: `notes` or `low`

    @cached_property
    def loaded(self) -> tuple[list[Clip], np.ndarray]:
        return load_clips(self.folder)

    @property
    def all(self) -> list[Clip]:
        return self.loaded[0]

    @property
    def waves(self) -> np.ndarray:
        return self.loaded[1]

    @cached_property
    def rows(self) -> np.ndarray:
        """Row numbers of the training split."""
        return np.array([i for i, clip in enumerate(self.all) if clip.split == "train"])

    @cached_property
    def mels(self) -> np.ndarray:
        """Log-mels (N, 64, T) in half precision."""

        def fill(rows: slice) -> Tensor:
            return log_mel(torch.from_numpy(to_float(self.waves[rows])))

        frames = self.waves.shape[1] // HOP
        return cached(self.folder / "mels.npy", (len(self.waves), BANDS, frames), fill)

    @cached_property
    def notes(self) -> np.ndarray:
        """Those of `rows` that are single notes."""
        return np.array([i for i in self.rows if self.all[i].kind == "note"])

    @cached_property
    def low(self) -> np.ndarray:
        """Those of `notes` below D3, whose harmonics mel bands hardly tell apart."""
        return np.array([i for i in self.notes if (self.all[i].midi or 0) < 50])

    def draw(
        self,
        generator: torch.Generator,
        count: int,
        favoured: Sequence[int] | np.ndarray = (),
        share: float = 0.0,
    ) -> np.ndarray:
        """Row numbers of a batch: this share of it among the favoured rows, the others among all."""
        few = round(share * count) if len(favoured) else 0
        parts = [(np.asarray(favoured), few), (self.rows, count - few)]
        drawn = [
            rows[torch.randint(len(rows), (n,), generator=generator)] for rows, n in parts if n
        ]
        return np.concatenate(drawn)


def cached(
    path: Path, shape: Sequence[int], fill: Callable[[slice], Tensor], batch: int = 64
) -> np.ndarray:
    """The half-precision array of a file, filled batch by batch of rows if it is not there yet."""
    if not path.exists():
        with atomic_write(path) as temporary:
            array = open_memmap(temporary, "w+", np.float16, tuple(shape))
            for start in range(0, shape[0], batch):
                rows = slice(start, min(start + batch, shape[0]))
                with torch.no_grad():
                    array[rows] = fill(rows).half().numpy()
            array.flush()
    return np.load(path, mmap_mode="r")


def pick(array: np.ndarray, rows: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack([array[i] for i in rows])).float()


def uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def train_vocoder(clips: Clips, out: Path, budget: Budget) -> None:
    net = vocoder()
    decoded = decoded_mels(clips, out)
    frames = 128
    # low notes live in few bins, between which mel bands tell least
    hertz = torch.linspace(0, RATE / 2, BINS).reshape(-1, 1)
    weight = 0.5 + 4 * torch.exp(-hertz / 800)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = clips.draw(generator, 12, clips.low, 0.5)
        start = int(torch.randint(clips.mels.shape[-1] - frames + 1, (1,), generator=generator))
        wave = pick(clips.waves[:, start * HOP : (start + frames) * HOP], rows) / 32768
        if step % 2:  # what the autoencoder makes of the mels, as when it is used
            target = magnitude(wave)
            mel = pick(decoded[..., start : start + frames], rows)
        else:  # every pitch between the semitones, or low notes are learnt by heart
            target = magnitude(bent(wave, float(uniform(generator, 0.92, 1.08))))
            mel = to_log_mel(target)
        gain = uniform(generator, -1.4, 0.35, len(rows), 1, 1)
        mel, target = mel + gain, target * gain.exp()
        # the ends of a crop are reflections, which the whole clip does not have
        inner = slice(4, -4)
        found = net(mel).float()[..., inner]
        target = target.clamp(min=FLOOR)[..., inner]
        near = (weight * (found - target.log()).abs()).mean()
        # peaks carry the pitch: the second term weighs errors by the square root of the magnitude
        peaks = (weight * ((found / 2).exp() - target.sqrt()).abs()).mean()
        return near + 20 * peaks

    train(net, loss, out / "vocoder", budget)


def bent(wave: Tensor, factor: float) -> Tensor:
    """The sound (B, N) played `factor` times as fast, resampled in the frequency domain: (B, about N / factor)."""
    count = wave.shape[-1]
    length = HOP * round(count / factor / HOP)
    spectrum = torch.fft.rfft(wave)
    spectrum = F.pad(spectrum, (0, max(0, length // 2 + 1 - spectrum.shape[-1])))
    return torch.fft.irfft(spectrum, n=length) * (length / count)


def train_autoencoder(clips: Clips, out: Path, budget: Budget) -> None:
    net = autoencoder()
    mels = clips.mels
    weight = 1 + 3 * torch.exp(-torch.arange(BANDS) / 12)  # as in the vocoder

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = clips.draw(generator, 16, clips.low, 0.25)
        gain = uniform(generator, -1.4, 0.35, len(rows), 1, 1)
        mel = (pick(mels, rows) + gain).clamp(min=math.log(FLOOR))
        start = 4 * int(torch.randint((mel.shape[-1] - 64) // 4 + 1, (1,), generator=generator))
        x = to_image(mel[..., start : start + 64])
        posterior = net.encode(x)
        noise = torch.randn(posterior.mean.shape, generator=generator)
        found = net.decode(posterior.sample(noise)).float()
        miss = (weight * (found - x).abs()).mean() / weight.mean()
        return miss + KL_WEIGHT * posterior.kl() / posterior.mean[0].numel()

    train(net, loss, out / "autoencoder", budget)


def wordings(clip: Clip, row: int) -> list[str]:
    """The canonical caption and CAPTIONS - 1 others, the same at every call."""
    rng = random.Random(row)
    return [plain(clip), *(varied(clip, rng) for _ in range(CAPTIONS - 1))]


def train_joint(clips: Clips, out: Path, budget: Budget) -> None:
    encoder = text_encoder(config()["text_encoder"])
    net = joint()
    mels = clips.mels

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = clips.draw(generator, 192)
        choice = torch.randint(CAPTIONS, (len(rows),), generator=generator).tolist()
        texts = [wordings(clips.all[i], int(i))[k] for i, k in zip(rows, choice, strict=True)]
        with torch.no_grad():
            states = encoder.encode(texts)
        mel = pick(mels, rows) + uniform(generator, -1.4, 0.35, len(rows), 1, 1)
        mel = mel.roll(int(torch.randint(-8, 9, (1,), generator=generator)), dims=-1)
        audio = net.embed_audio(mel.clamp(min=math.log(FLOOR))).float()
        text = net.embed_text(states.tokens.float(), states.mask).float()
        logits = net.log_scale.exp().clamp(max=100) * audio @ text.T
        # clips with the same caption are not each other's negatives
        same = torch.tensor([[a == b for b in texts] for a in texts])
        logits = logits.masked_fill(same & ~torch.eye(len(texts), dtype=torch.bool), -1e4)
        labels = torch.arange(len(texts))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    train(net, loss, out / "joint", budget)


def train_unet(clips: Clips, out: Path, budget: Budget) -> None:
    latents, audio, texts, scale = prepare_latents(clips, out)
    encoder = text_encoder(config()["text_encoder"])
    towers = load(joint(), out / "joint")
    with torch.no_grad():
        states = encoder.encode([""])
        null = towers.embed_text(states.tokens.float(), states.mask)
    net = unet()
    schedule = schedules.scaled_linear(**config()["schedule"])
    steps = config()["schedule"]["steps"]
    favoured = {"notes": clips.notes, "low": clips.low}[clips.favour]

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = clips.draw(generator, 32, favoured, 0.4)
        x0 = pick(latents, rows) * scale
        # 30 % of the conditions are the sound's embedding, as in the paper; the others a caption's,
        # as when asked: the two towers never meet exactly, and notes are told apart by little
        k = torch.randint(CAPTIONS, (len(rows),), generator=generator).numpy()
        cond = torch.from_numpy(np.stack([texts[i, j] for i, j in zip(rows, k, strict=True)]))
        heard = uniform(generator, 0, 1, len(rows), 1) < 0.3
        cond = torch.where(heard, pick(audio, rows), cond.float())
        drop = uniform(generator, 0, 1, len(rows), 1) < DROP
        cond = torch.where(drop, null, cond)
        # one index from each of B equal parts of the schedule: less variance than B free draws
        part = (torch.arange(len(rows)) + uniform(generator, 0, 1, len(rows))) / len(rows)
        index = (part * steps).long().clamp(max=steps - 1)
        alpha, sigma = schedule((index.double() + 1) / steps)
        alpha, sigma = (a.float().reshape(-1, 1, 1, 1) for a in (alpha, sigma))
        eps = torch.randn(x0.shape, generator=generator)
        v = alpha * eps - sigma * x0
        found = net(alpha * x0 + sigma * eps, index.float(), vector=cond).float()
        return F.mse_loss(found, v)

    train(net, loss, out / "unet", budget)


def decoded_mels(clips: Clips, out: Path) -> np.ndarray:
    """What the autoencoder makes of the log-mels (N, 64, T)."""
    net = load(autoencoder(), out / "autoencoder")

    def decode(rows: slice) -> Tensor:
        image = to_image(torch.from_numpy(clips.mels[rows].astype(np.float32)))
        return to_mel(net.decode(net.encode(image).mean))

    return cached(out / "decoded.npy", clips.mels.shape, decode, batch=16)


def prepare_latents(clips: Clips, out: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Latents (N, 4, T/4, 16), audio embeddings (N, 512), caption embeddings (N, CAPTIONS, 512), latent scale."""
    encoder = text_encoder(config()["text_encoder"])
    net = load(autoencoder(), out / "autoencoder")
    towers = load(joint(), out / "joint")
    mels = clips.mels
    count, bands, frames = mels.shape

    def encode(rows: slice) -> Tensor:
        return net.encode(to_image(torch.from_numpy(mels[rows].astype(np.float32)))).mean

    def hear(rows: slice) -> Tensor:
        return towers.embed_audio(torch.from_numpy(mels[rows].astype(np.float32)))

    def read(rows: slice) -> Tensor:
        texts = [t for i in range(rows.start, rows.stop) for t in wordings(clips.all[i], i)]
        states = encoder.encode(texts)
        return towers.embed_text(states.tokens.float(), states.mask).unflatten(0, (-1, CAPTIONS))

    shape = (count, config()["autoencoder"]["latent"], frames // 4, bands // 4)
    latents = cached(out / "latents.npy", shape, encode)
    audio = cached(out / "audio_embeddings.npy", (count, 512), hear)
    texts = cached(out / "text_embeddings.npy", (count, CAPTIONS, 512), read)
    scale = 1 / float(np.asarray(latents[clips.rows[::7]], np.float32).std())
    return latents, audio, texts, scale


def shipped(name: str) -> dict[str, Tensor]:
    """The weights of a network of the shipped model."""
    card = registry.load(host.current()).resolve(MODEL)
    (file,) = (file for file in card.files if file.module == name)
    return weights.read(card.root / file.name, file)


def load(net: Net, run: Path) -> Net:
    """The network of a run, frozen; the shipped one where the run has none."""
    trained = (run / "checkpoint.safetensors").exists()
    net.load_state_dict(averaged(run) if trained else shipped(run.name))
    return net.eval().requires_grad_(False)


def export(clips: Clips, out: Path, to: Path) -> None:
    """Writes the averaged networks in half precision, and prints what changes in the model's card."""
    print(f"latent_scale = {prepare_latents(clips, out)[3]:.4f}")
    for name in RECIPES:
        path = to / f"audioldm-mini-{name}.safetensors"
        tensors = {k: v.half().contiguous() for k, v in averaged(out / name).items()}
        with atomic_write(path) as temporary:
            save_file(tensors, temporary)
        data = path.read_bytes()
        print(f'\n[[models."{MODEL}".files]]\nname = "plugins/audio/weights/{path.name}"')
        print(f'sha256 = "{sha256(data).hexdigest()}"\nsize = {len(data)}\nmodule = "{name}"')


RECIPES: dict[str, tuple[Callable[[], nn.Module], Callable[[Clips, Path, Budget], None]]] = {
    "autoencoder": (autoencoder, train_autoencoder),
    "vocoder": (vocoder, train_vocoder),
    "joint": (joint, train_joint),
    "unet": (unet, train_unet),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", choices=[*RECIPES, "export"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--to", type=Path, default=Path("."))
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--init", action="store_true", help="start from the shipped weights")
    parser.add_argument("--freeze", nargs="*", default=(), help="leave what is named so: encoder")
    parser.add_argument("--favour", choices=["notes", "low"], default="notes")
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="adamw")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)  # initial weights
    clips = Clips(options.data, options.favour)
    if options.network == "export":
        export(clips, options.out, options.to)
        return
    budget = Budget(
        minutes=options.minutes,
        rate=options.rate,
        warmup=options.warmup,
        freeze=tuple(options.freeze),
        optimizer=options.optimizer,
    )
    build, recipe = RECIPES[options.network]
    if options.init:
        begin(options.out / options.network, build(), shipped(options.network))
    recipe(clips, options.out, budget)


if __name__ == "__main__":
    main()
