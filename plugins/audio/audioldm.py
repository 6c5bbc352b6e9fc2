"""AudioLDM: text -> joint embedding -> latent -> log-mel -> waveform (Liu et al., 2023).

Three stages: the latent UNet, conditioned on the joint embedding by its FiLM vector; the autoencoder's decoder, after
which the candidates are ranked by their similarity to the text and, where it names a note, by that; the vocoder.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn

from mdiff.core import latent_map, schedules, tasks
from mdiff.core.denoiser import Denoiser
from mdiff.core.hooks import (
    Given,
    Model,
    ModelCard,
    Problem,
    Request,
    Stage,
    TextEncoder,
    text_encoder,
)
from mdiff.core.nn.autoencoder import AutoencoderKL
from mdiff.core.nn.unet import UNet
from mdiff.core.registry import check_config
from mdiff.plugins.audio import inputs, pitch, spectrogram
from mdiff.plugins.audio.data.captions import named_note
from mdiff.plugins.audio.nets.joint import JointEmbedding
from mdiff.plugins.audio.nets.mel import BANDS, HOP, RATE, log_mel
from mdiff.plugins.audio.nets.vocoder import MelInverter, griffin_lim

NOTE_WEIGHT = 2.0
"""Of how much the note asked for stands out, beside the similarity of a candidate: of 40 low notes of training 23 are
right with 2, 20 with 0.5, 22 with 8, and 17 without; 25 have a right one among six."""


def to_image(mel: Tensor) -> Tensor:
    """Log-mel (B, 64, T) -> what the autoencoder sees: (B, 1, T, 64), about zero mean and unit variance."""
    return (mel.transpose(1, 2)[:, None] + 5.0) / 4.0


def to_mel(image: Tensor) -> Tensor:
    """The inverse of `to_image`: (B, 1, T, 64) -> (B, 64, T)."""
    return (image[:, 0] * 4.0 - 5.0).transpose(1, 2)


def samples(request: Request) -> int:
    """The length of a request in samples: its duration, which the card's defaults always give."""
    return round((request.duration or 0.0) * RATE)


def embed_texts(joint: JointEmbedding, encoder: TextEncoder, texts: Sequence[str]) -> Tensor:
    """The joint embeddings of texts (B, width), unit vectors."""
    states = encoder.encode(texts)
    device = joint.log_scale.device
    return joint.embed_text(states.tokens.to(device).float(), states.mask.to(device))


def no_problem(request: Request, carry: dict[str, Any]) -> Problem:
    """What a plain network asks of the sampler."""
    return Problem(shape=())


def build(card: ModelCard, device: str, dtype: torch.dtype) -> Model:
    """The model of a card, with random weights.

    `config` gives the arguments of each network, and, where there are to be previews, `latent_map` as
    `mdiff audio latent-map` prints it.
    """
    config = card.config
    networks = ("text_encoder", "unet", "autoencoder", "joint", "vocoder")
    check_config(card, (*networks, "predicts", "schedule", "latent_scale", "latent_map"))
    encoder = text_encoder(config["text_encoder"])
    unet = UNet(**config["unet"]).to(device, dtype)
    autoencoder = AutoencoderKL(**config["autoencoder"]).to(device)
    joint = JointEmbedding(tokens=encoder.width, **config["joint"]).to(device)
    vocoder = MelInverter(**config["vocoder"]).to(device)
    modules: Mapping[str, nn.Module] = {
        "unet": unet,
        "autoencoder": autoencoder,
        "joint": joint,
        "vocoder": vocoder,
    }
    schedule = schedules.scaled_linear(**config["schedule"])
    denoiser = Denoiser(unet, schedule, predicts=config["predicts"], time="index")
    # one latent row is four frames, and the UNet halves rows once per level
    frames_step = 4 * unet.factor

    def embed(text: str | None) -> Tensor:
        """The joint embedding of a text (1, width); that of the empty text where there is none."""
        return embed_texts(joint, encoder, [text or ""])

    channels = config["unet"]["in_channels"]

    def prepare(request: Request, carry: dict[str, Any]) -> Problem:
        frames = -(-samples(request) // HOP)
        frames = -(-frames // frames_step) * frames_step
        copies = int(request.options["candidates"])
        cond, uncond = embed(request.text), embed(request.negative)
        carry["text"], carry["heard"] = cond, heard(request, carry, frames)
        return Problem(
            shape=(channels, frames // 4, 16),
            given=tasks.encoded(carry["heard"], encode, decode),
            cond={"vector": cond.expand(copies, -1)},
            uncond={"vector": uncond.expand(copies, -1)},
            copies=copies,
        )

    def heard(request: Request, carry: Mapping[str, Any], frames: int) -> Given | None:
        """What the input says of what the autoencoder sees, (1, frames, 64)."""

        def fit(sample: Mapping[str, Any], shape: tuple[int, ...]) -> Tensor:
            return to_image(log_mel(inputs.wave(sample, shape[1] * HOP, RATE))).to(device)

        asked, units = -(-samples(request) // HOP), (RATE / HOP, 0.0)
        shape = (1, asked, BANDS)
        found = tasks.given(request, carry, shape, fit, forms=inputs.FORMS, units=units)
        if found is None or found.start is None:
            return found
        # what is made beyond the end, for the UNet halves the axis of time, and then cut off
        rest = (0, 0, 0, frames - asked)
        return Given(
            start=F.pad(found.start, rest, mode="replicate"),
            keep=None if found.keep is None else F.pad(found.keep, rest),
        )

    def encode(image: Tensor) -> Tensor:
        return autoencoder.encode(image).mean * config["latent_scale"]

    def decode(latent: Tensor) -> Tensor:
        return autoencoder.decode(latent / config["latent_scale"])

    def keep_latent(
        request: Request, problem: Problem, x: Tensor | None, carry: dict[str, Any]
    ) -> dict[str, Any]:
        assert x is not None  # a stage with a denoiser is given its sample
        return {"latent": x.float() / config["latent_scale"]}

    def draw(x0: Tensor) -> Image:
        coarse = latent_map.apply(x0[:1] / config["latent_scale"], config["latent_map"])
        return spectrogram.drawn(to_mel(coarse)[0], x0.shape[2] * 4 * HOP / RATE)

    def to_mels(
        request: Request, problem: Problem, x: Tensor | None, carry: dict[str, Any]
    ) -> dict[str, Any]:
        mels = to_mel(tasks.restored(carry["heard"], autoencoder.decode(carry["latent"])))
        rank = joint.embed_audio(mels) @ carry["text"][0]
        note = named_note(request.text or "")
        if note is not None and len(mels) > 1:
            rough = griffin_lim(vocoder(mels), iterations=0)
            rank = rank + NOTE_WEIGHT * pitch.standing_out(rough, RATE, note)
        return {"mel": mels[rank.argmax()]}

    def vocode(
        request: Request, problem: Problem, x: Tensor | None, carry: dict[str, Any]
    ) -> dict[str, Any]:
        wave = griffin_lim(vocoder(carry["mel"][None]))[:, : samples(request)]
        own = inputs.given(request, carry, wave.shape[1], RATE)
        wave = inputs.woven(own, wave, RATE)
        return {"sample": {"audio": wave.cpu(), "rate": RATE}}

    return Model(
        modules=dict(modules),
        stages=(
            Stage(
                name="latent",
                prepare=prepare,
                denoiser=denoiser,
                finish=keep_latent,
                preview=draw if "latent_map" in config else None,
            ),
            Stage(name="mel", prepare=no_problem, denoiser=None, finish=to_mels),
            Stage(name="waveform", prepare=no_problem, denoiser=None, finish=vocode),
        ),
    )
