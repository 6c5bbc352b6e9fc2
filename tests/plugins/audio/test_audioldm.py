"""AudioLDM's stages on random weights: lengths, candidates and their ranking, conditions, refusals."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mdiff.core import host as hosts
from mdiff.core.errors import UsageError
from mdiff.core.hooks import Model, ModelCard, Request
from mdiff.core.pipeline import generate
from mdiff.plugins.audio import inputs, io, mdiff_build, pitch
from mdiff.plugins.audio.audioldm import build, to_image, to_mel
from mdiff.plugins.audio.nets.joint import JointEmbedding

UNET = {"axes": 2, "in_channels": 2, "out_channels": 2, "channels": 16, "multipliers": [1, 2]}
UNET |= {"blocks": 1, "attention": [1], "head_width": 16, "transformer": True, "groups": 8}
CONFIG: dict[str, Any] = {
    "text_encoder": "text/mini",
    "predicts": "v",
    "latent_scale": 2.0,
    "schedule": {"beta_start": 0.0015, "beta_end": 0.0195, "steps": 1000},
    "unet": UNET | {"vector": 32},
    "autoencoder": {
        "axes": 2,
        "in_channels": 1,
        "latent": 2,
        "channels": 8,
        "groups": 4,
        "blocks": 1,
    },
    "joint": {"width": 32},
    "vocoder": {"channels": 16, "hidden": 16, "blocks": 1},
}


@pytest.fixture(scope="module")
def card() -> ModelCard:
    return ModelCard(
        id="audio/tiny",
        plugin="audio",
        modality="audio",
        system="AudioLDM",
        summary="",
        licence="",
        source="",
        root=Path(),
        config=CONFIG,
        accepts=("text", "negative", "duration"),
    )


@pytest.fixture(scope="module")
def model(card: ModelCard) -> Model:
    torch.manual_seed(0)
    model = build(card, "cpu", torch.float32)
    for module in model.modules.values():
        module.eval().requires_grad_(False)
    for parameter in model.modules["unet"].parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


REQUEST = Request(
    model="audio/tiny",
    text="a flute playing C4",
    duration=0.5,
    steps=2,
    guidance=2.0,
    options={"candidates": 2},
)


def run(model: Model, card: ModelCard, **changes: Any) -> torch.Tensor:
    sample = generate(model, card, replace(REQUEST, **changes), host=hosts.current())
    assert sample["rate"] == 16_000
    return sample["audio"]


def test_length_is_what_was_asked(model: Model, card: ModelCard) -> None:
    for duration in (0.16, 0.5, 1.0):
        assert run(model, card, duration=duration).shape == (1, round(duration * 16_000))


def test_seed_text_and_negative_matter(model: Model, card: ModelCard) -> None:
    base = run(model, card)
    assert torch.equal(base, run(model, card))
    for change in ({"seed": 1}, {"text": "a drum hit"}, {"negative": "noise"}, {"guidance": 1.0}):
        assert not torch.equal(base, run(model, card, **change)), change


def test_a_key_that_no_config_has_names_the_nearest(card: ModelCard) -> None:
    wrong = {"AudioLDM": ("vocader", "vocoder"), "DiffWave": ("beta", "betas")}
    for system, (key, right) in wrong.items():
        other = replace(card, system=system, config={key: {}})
        with pytest.raises(
            UsageError, match=f"config: unknown key '{key}'; did you mean '{right}'"
        ):
            mdiff_build(other, "cpu", torch.float32)


def ranked(model: Model, text: str) -> tuple[Tensor, Tensor, Tensor]:
    """The mel that is kept of four candidates, all of them, and how like the text each is."""
    latent, mel, _ = model.stages
    request = replace(REQUEST, text=text, options={"candidates": 4})
    carry: dict[str, Any] = {}
    problem = latent.prepare(request, carry)
    assert problem.copies == 4 and problem.shape == (2, 14, 16)
    x = torch.randn(4, *problem.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        carry |= latent.finish(request, problem, x, carry)
        carry |= mel.finish(request, mel.prepare(request, carry), None, carry)
        joint, autoencoder = model.modules["joint"], model.modules["autoencoder"]
        assert isinstance(joint, JointEmbedding)
        mels = to_mel(autoencoder.decode(x / 2.0))
        return carry["mel"], mels, joint.embed_audio(mels) @ carry["text"][0]


def test_best_candidate_is_kept(model: Model) -> None:
    kept, mels, likeness = ranked(model, "a flute")
    torch.testing.assert_close(kept, mels[likeness.argmax()])


def test_the_note_that_a_text_names_counts(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    for best in range(4):

        def only(waves: Tensor, rate: int, midi: int, best: int = best) -> Tensor:
            assert waves.shape[0] == 4 and rate == 16_000
            asked.append(midi)
            return torch.eye(4)[best]

        monkeypatch.setattr(pitch, "standing_out", only)
        kept, mels, _ = ranked(model, "a flute playing C4")
        torch.testing.assert_close(kept, mels[best])
        kept, mels, likeness = ranked(model, "a C major chord on a flute")
        torch.testing.assert_close(kept, mels[likeness.argmax()])
    assert asked == [60] * 4


@pytest.mark.parametrize("note", ["C0", "C9"])
def test_a_note_beyond_all_instruments_does_not_count(model: Model, note: str) -> None:
    kept, mels, likeness = ranked(model, f"a flute playing {note}")
    torch.testing.assert_close(kept, mels[likeness.argmax()])


def test_mel_and_image_are_inverse() -> None:
    mel = torch.randn(2, 64, 12)
    assert to_image(mel).shape == (2, 1, 12, 64)
    torch.testing.assert_close(to_mel(to_image(mel)), mel)


# --- from a sound ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half a second of a tone, at another rate and in two channels."""
    path = tmp_path_factory.mktemp("sound") / "tone.wav"
    tone = 0.4 * torch.sin(2 * torch.pi * 440 * torch.arange(11_025) / 22_050)
    io.write(path, {"audio": tone.expand(2, -1), "rate": 22_050}, {"schema": 1}, {})
    return path


def own(sound: Path, samples: int) -> torch.Tensor:
    return inputs.wave(io.read(sound), samples, 16_000)


def test_full_strength_is_no_input(model: Model, card: ModelCard, sound: Path) -> None:
    assert torch.equal(run(model, card, input=str(sound), strength=1.0), run(model, card))
    some = run(model, card, input=str(sound), strength=0.5)
    assert some.shape == (1, 8000) and not torch.equal(some, run(model, card))


def test_a_hole_is_filled_and_the_rest_stays(model: Model, card: ModelCard, sound: Path) -> None:
    made = run(model, card, input=str(sound), operator="hole 0.2:0.3", strength=1.0)
    wave = own(sound, 8000)
    known = torch.ones(8000, dtype=torch.bool)
    known[3200 - 160 : 4800 + 160] = False  # and faded over on the side that is known
    torch.testing.assert_close(made[:, known], wave[:, known])
    assert (made - wave)[:, 3200:4800].abs().mean() > 0.01
    problem = model.stages[0].prepare(
        replace(REQUEST, input=str(sound), operator="hole 0.2:0.3", strength=1.0),
        {"input": io.read(sound)},
    )
    assert problem.given is not None and problem.given.keep is not None
    # 4 frames of 10 ms a latent row; rows 5 to 7 stand for the hole, the last two lie beyond the end
    assert (~problem.given.keep[0, 0, :, 0]).nonzero().flatten().tolist() == [5, 6, 7, 12, 13]


def test_a_sound_goes_on(model: Model, card: ModelCard, sound: Path) -> None:
    made = run(model, card, input=str(sound), operator="extend 0:0.2", strength=1.0)
    torch.testing.assert_close(made[:, : 4800 - 160], own(sound, 4800 - 160))
    assert made.shape == (1, 8000) and made[:, 5000:].abs().mean() > 0


def test_numbers_of_a_sound_are_seconds(model: Model, card: ModelCard, sound: Path) -> None:
    for operator, words in (("upscale 2", "no operator 'upscale' here"), ("hole 1:2", "is empty")):
        with pytest.raises(UsageError, match=words):
            run(model, card, input=str(sound), operator=operator)


def test_several_texts_and_the_way_between_two(model: Model, card: ModelCard) -> None:
    one = run(model, card)
    torch.testing.assert_close(run(model, card, to_text="a drum hit", position=0.0), one)
    half = run(model, card, to_text="a drum hit", position=0.5)
    drum = run(model, card, text="a drum hit")
    assert not torch.equal(half, one) and not torch.equal(half, drum)
    weighed = run(model, card, text="a flute playing C4 :1 | a drum hit :-0.5")
    assert not torch.equal(weighed, one)
