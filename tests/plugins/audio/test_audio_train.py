"""How parts are trained: rows of any sound, losses that no split of a batch changes, and two sounds learnt by heart."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from mdiff.core import host, losses, registry, times, weights
from mdiff.core.errors import MdiffError, UsageError
from mdiff.core.hooks import Example, Model, ModelCard, Task, text_encoder
from mdiff.core.training import recipe
from mdiff.core.training.draws import Draws
from mdiff.plugins.audio import mdiff_build, mdiff_recipes, training
from mdiff.plugins.audio.audioldm import embed_texts
from mdiff.plugins.audio.training import TEXT_BYTES, WORDINGS

MODELS = registry.load(host.current())
SMALL: dict[str, Any] = {
    "unet": {"channels": 16, "multipliers": [1, 2, 2], "groups": 8, "head_width": 16},
    "autoencoder": {"channels": 8, "multipliers": [1, 2, 2], "groups": 4},
    "vocoder": {"channels": 16, "hidden": 32, "blocks": 1},
}
SECONDS = 1.28  # of a window here: 20480 samples, 128 frames


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tone(path: Path, hertz: float, seconds: float = SECONDS, rate: int = 16_000) -> Path:
    t = np.arange(round(seconds * rate)) / rate
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * hertz * t) * np.exp(-t), rate)
    return path


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    """Four tones with two wordings each, of which two are the same."""
    folder = tmp_path_factory.mktemp("sounds")
    return [
        Example(
            path=tone(folder / f"{k}.flac", 200.0 + 150 * k),
            texts=("a tone", f"tone number {k}"),
            label=f"class {k}",
            facts={"kind": "note", "midi": 40 + 20 * k},
        )
        for k in range(4)
    ]


def audioldm(**config: Any) -> tuple[ModelCard, Model]:
    """A small AudioLDM with random weights."""
    card = MODELS.resolve("audio/audioldm-mini")
    return built(replace(card, config=recipe.laid_over(card.config, {**SMALL, **config})))


def diffwave(**config: Any) -> tuple[ModelCard, Model]:
    network = {"channels": 8, "layers": 4, "cycle": 2, **config.pop("network", {})}
    card = replace(
        MODELS.resolve("audio/audioldm-mini"),
        system="DiffWave",
        config={
            "network": network,
            "betas": {"start": 1e-4, "end": 0.05, "steps": 50},
            "rate": 16_000,
            **config,
        },
        files=(),
    )
    return built(card)


def built(card: ModelCard) -> tuple[ModelCard, Model]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = mdiff_build(card, "cpu", torch.float32)
    for module in model.modules.values():
        module.eval().requires_grad_(False)
    return card, model


CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "unet": (audioldm, "unet", {}),
    "autoencoder": (audioldm, "autoencoder", {}),
    "vocoder": (audioldm, "vocoder", {}),
    "joint": (audioldm, "joint", {}),
    "diffwave": (diffwave, "diffwave", {}),
    "diffwave of a class": (diffwave, "diffwave", {"classes": [f"class {k}" for k in range(4)]}),
    "diffwave of a mel": (diffwave, "diffwave", {"network": {"mels": 64, "strides": [16, 10]}}),
}


def case(name: str, **settings: Any) -> tuple[Model, Task]:
    make, part, config = CASES[name]
    card, model = make(**config)
    task = training.task(card, model, part, {"seconds": SECONDS, **settings})
    task.module.requires_grad_(True)
    return model, task


def rows(task: Task, examples: list[Example]) -> dict[str, Tensor]:
    every = [row for example in examples for row in task.read(example)]
    return {name: torch.stack([row[name] for row in every]) for name in every[0]}


def loss_of(task: Task, table: Mapping[str, Tensor], draws: Draws) -> Tensor:
    """The loss of each sample."""
    mine = {name: column[draws.mine] for name, column in table.items()}
    if task.loss is not None:
        return task.loss(mine, draws)
    assert task.batch is not None and task.denoiser is not None
    x0, cond = task.batch(mine, draws)
    law = times.entries("stratified")(task.denoiser.schedule, draws.total, draws.generator)
    loss = losses.from_name(task.denoiser.predicts)
    z = draws.normal(*x0.shape[1:])
    return loss(task.denoiser.bind(**cond), x0, law.t[draws.mine], z)


# --- rows


ROWS: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {
    "unet": {
        "latent": (torch.float16, (4, 32, 16)),
        "heard": (torch.float16, (512,)),
        "said": (torch.float16, (WORDINGS, 512)),
    },
    "autoencoder": {"mel": (torch.float16, (64, 128))},
    "vocoder": {"wave": (torch.int16, (20_480,)), "decoded": (torch.float16, (64, 128))},
    "joint": {
        "mel": (torch.float16, (64, 128)),
        "texts": (torch.uint8, (WORDINGS, TEXT_BYTES)),
    },
    "diffwave": {"wave": (torch.int16, (20_480,))},
    "diffwave of a class": {"wave": (torch.int16, (20_480,)), "label": (torch.int64, ())},
    "diffwave of a mel": {"wave": (torch.int16, (20_480,))},
}


@pytest.mark.parametrize("name", CASES)
def test_rows_hold_what_their_part_needs(name: str, sounds: list[Example]) -> None:
    _, task = case(name)
    (row,) = task.read(sounds[0])
    assert {key: (value.dtype, (*value.shape,)) for key, value in row.items()} == ROWS[name]


def test_a_long_sound_in_stereo_is_cut_into_windows_and_none_of_them_is_silent(
    tmp_path: Path,
) -> None:
    rate = 44_100
    t = np.arange(round(8.0 * rate)) / rate
    left = 1.5 * np.sin(2 * np.pi * 440 * t) * (t < 2.5)  # beyond full scale, then nothing
    path = tmp_path / "long.wav"
    soundfile.write(path, np.stack([left, left], axis=1), rate, subtype="FLOAT")
    _, task = case("vocoder")
    waves = rows(task, [Example(path=path)])["wave"].float() / 32768
    # windows begin every 0.64 s: 0, 0.64, 1.28 and 1.92 hold sound
    assert waves.shape == (4, 20_480)
    torch.testing.assert_close(waves[0, 10_240:], waves[1, :10_240])
    assert 0.98 < waves.abs().max() <= 1
    spectrum = torch.fft.rfft(waves[0]).abs()
    assert abs(int(spectrum.argmax()) * 16_000 / 20_480 - 440) < 1


def test_a_short_sound_is_followed_by_silence(tmp_path: Path) -> None:
    example = Example(path=tone(tmp_path / "a.wav", 300, seconds=0.3))
    _, task = case("diffwave")
    (row,) = task.read(example)
    assert row["wave"][:4800].abs().max() > 10_000
    assert not row["wave"][4800:].any()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros(16_000), "is silent"),
        (np.full(100, 0.5), "holds 0.006 s of sound: give at least 0.05 s"),
        (np.full(16_000, np.nan), "NaN"),
    ],
)
def test_a_sound_that_cannot_be_used_says_why(
    tmp_path: Path, content: np.ndarray, message: str
) -> None:
    path = tmp_path / "bad.wav"
    soundfile.write(path, content, 16_000, subtype="FLOAT")
    for name in CASES:
        _, task = case(name)
        with pytest.raises(MdiffError, match=message):
            list(task.read(Example(path=path, label="class 0")))


def test_a_sound_without_captions_is_called_by_its_class_or_by_nothing() -> None:
    def named(**known: Any) -> list[str]:
        return training.wordings(Example(path=Path("a.wav"), **known))

    assert named() == [""] * WORDINGS
    assert named(label="rain") == ["rain"] * WORDINGS
    assert named(label="rain", texts=("a", "b", "c")) == ["a", "b", "c", "a", "b", "c", "a", "b"]
    assert named(texts=tuple("abcdefghij")) == list("abcdefgh")


@pytest.mark.parametrize("text", ["", "a flute playing C#4", "Glöckchen \U0001f514", "ä" * 400])
def test_texts_pass_through_rows(text: str) -> None:
    numbers = training._to_bytes(text)
    assert numbers.shape == (TEXT_BYTES,)
    assert training._to_text(numbers) == text[: TEXT_BYTES // 2 if text[:2] == "ää" else None]


# --- losses


@pytest.mark.parametrize("name", [name for name in CASES if name != "joint"])
@pytest.mark.parametrize("step", [0, 1])
def test_no_split_of_a_batch_changes_its_loss(name: str, step: int, sounds: list[Example]) -> None:
    _, task = case(name)
    table = rows(task, sounds)
    with torch.no_grad():
        whole = loss_of(task, table, Draws.of(7, step, 4)).mean()
        parts = [
            loss_of(task, table, Draws.of(7, step, 4, mine)).mean() * share
            for mine, share in ((slice(0, 1), 0.25), (slice(1, 4), 0.75))
        ]
    assert whole.isfinite()
    torch.testing.assert_close(sum(parts), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_reaches_what_is_trained_and_nothing_else(
    name: str, sounds: list[Example]
) -> None:
    model, task = case(name)
    table = rows(task, sounds)
    for step in range(2):
        loss_of(task, table, Draws.of(0, step, 4)).mean().backward()
    own = dict(task.module.named_parameters())
    assert all(p.grad is not None for p in own.values())
    assert any(p.grad.any() for p in own.values() if p.grad is not None)
    for module in model.modules.values():
        if module is not task.module:
            assert all(p.grad is None for p in module.parameters())


def test_conditions_are_made_in_full_precision(sounds: list[Example]) -> None:
    for name in ("unet", "diffwave of a mel"):
        found = []
        for precision in (False, True):
            _, task = case(name)
            assert task.batch is not None
            table = rows(task, sounds)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision):
                found.append(task.batch(table, Draws.of(0, 1, 4)))
        (x0, cond), (other_x0, other_cond) = found
        assert torch.equal(x0, other_x0)
        assert all(torch.equal(cond[key], other_cond[key]) for key in cond)


def test_a_contrast_needs_its_whole_batch(sounds: list[Example]) -> None:
    _, task = case("joint")
    with pytest.raises(UsageError, match=r"--set batch\.micro=0"):
        loss_of(task, rows(task, sounds), Draws.of(0, 0, 4, slice(0, 2)))


def test_sounds_with_the_same_caption_are_not_each_others_negatives(sounds: list[Example]) -> None:
    _, task = case("joint")
    same = [replace(sound, texts=("a tone",)) for sound in sounds]
    with torch.no_grad():
        assert abs(float(loss_of(task, rows(task, same), Draws.of(0, 0, 4)))) < 1e-4
        other = [replace(sound, texts=(f"number {k}",)) for k, sound in enumerate(sounds)]
        assert float(loss_of(task, rows(task, other), Draws.of(0, 0, 4))) > 0.1


def test_a_condition_is_the_sounds_a_wordings_or_that_of_no_text(sounds: list[Example]) -> None:
    def conditions(**settings: float) -> tuple[Tensor, dict[str, Tensor]]:
        _, task = case("unet", **settings)
        table = {
            name: column.repeat_interleave(16, 0) for name, column in rows(task, sounds).items()
        }
        assert task.batch is not None
        return task.batch(table, Draws.of(0, 0, 64))[1]["vector"], table

    card, model = audioldm()
    encoder = text_encoder(card.config["text_encoder"])
    none = embed_texts(model.modules["joint"], encoder, [""])  # type: ignore[arg-type]
    cond, _ = conditions(drop=1.0)
    torch.testing.assert_close(cond, none.expand(64, -1))
    cond, table = conditions(drop=0.0, heard=1.0)
    assert torch.equal(cond, table["heard"].float())
    cond, table = conditions(drop=0.0, heard=0.0)
    found = (cond[:, None] == table["said"].float()).all(-1)
    assert found.any(1).all()
    assert found[:, 0].any() and not found[:, 0].all()
    cond, table = conditions()
    assert 1 <= (cond == none).all(1).sum() <= 16
    assert 8 <= (cond == table["heard"].float()).all(1).sum() <= 30


def test_a_scale_that_does_not_fit_the_latents_is_told(
    sounds: list[Example], caplog: pytest.LogCaptureFixture
) -> None:
    card, model = audioldm()
    latents = rows(training.task(card, model, "unet", {"seconds": SECONDS}), sounds)["latent"]
    right = 1 / float(latents.float().std())
    for scale, told in ((right, False), (5 * right, True)):
        task = training.task(
            replace(card, config={**card.config, "latent_scale": scale}),
            model,
            "unet",
            {"seconds": SECONDS},
        )
        assert task.batch is not None
        task.batch(rows(task, sounds), Draws.of(0, 0, 4))
        assert (f"--set config.latent_scale={right:.4g}" in caplog.text) == told


def test_two_sounds_are_learnt_by_heart(sounds: list[Example]) -> None:
    card = MODELS.resolve("audio/audioldm-mini")
    small = {"channels": 16, "multipliers": [1, 2], "attention": [], "groups": 8, "head_width": 16}
    card, model = built(replace(card, config=recipe.laid_over(card.config, {"unet": small})))
    for file in card.files:
        if file.module in ("autoencoder", "joint"):
            tensors = weights.read(card.root / file.name, file)
            weights.fill(model.modules[file.module], tensors, file.name)
    task = training.task(card, model, "unet", {"seconds": 0.32})
    two = [next(iter(task.read(replace(sounds[k], texts=sounds[k].texts[1:])))) for k in (0, 3)]
    table = {name: torch.stack([row[name] for row in two * 4]) for name in two[0]}
    task.module.requires_grad_(True).train()
    optimizer = torch.optim.Adam(task.module.parameters(), lr=2e-3)

    def measured() -> float:
        with torch.no_grad():
            return float(loss_of(task, table, Draws.of(1, 0, 8)).mean())

    before = measured()
    for step in range(200):
        loss_of(task, table, Draws.of(0, step, 8)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before > 1
    assert measured() < 0.15
    # out of pure noise, the caption alone decides
    assert task.batch is not None and task.denoiser is not None
    x0, _ = task.batch(table, Draws.of(0, 1, 8))
    said = table["said"][:, 0].float()
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = task.denoiser.bind(vector=said)(noise, 1.0).x0
    assert float(((found - x0) ** 2).mean() / x0.var()) < 0.1


# --- settings


def test_what_is_favoured_is_seen_more_often(sounds: list[Example]) -> None:
    _, task = case("unet", favour={"notes": 2.0, "low_notes": 3.0})
    assert task.weigh is not None
    assert [task.weigh(sound) for sound in sounds] == [6.0, 2.0, 2.0, 2.0]
    assert task.weigh(Example(path=Path("a.wav"), facts={"kind": "chord", "midi": 40})) == 1.0
    assert task.weigh(Example(path=Path("a.wav"))) == 1.0


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("unet", {"dropp": 0.1}, "unknown key 'dropp'; did you mean 'drop'"),
        ("unet", {"kl": 0.1}, "unknown key 'kl'"),
        ("unet", {"drop": "a"}, "'drop' should be a number"),
        ("vocoder", {"favour": {"low": 2.0}}, "unknown kind of sound to favour 'low'"),
        ("joint", {"favour": {"notes": 0.0}}, "favour.notes is 0.0, it has to be above 0"),
        ("unet", {"seconds": 2.5}, "a multiple of 0.16, such as 2.56"),
        ("autoencoder", {"seconds": 0.01}, "a multiple of 0.16, such as 0.16"),
    ],
)
def test_a_wrong_setting_is_named(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        case(name, **settings)


def test_a_part_or_a_class_that_is_not_there_is_named(sounds: list[Example]) -> None:
    card, model = audioldm()
    with pytest.raises(UsageError, match="unknown part of AudioLDM 'unett'; did you mean 'unet'"):
        training.task(card, model, "unett", {})
    _, task = case("diffwave of a class")
    with pytest.raises(UsageError, match="its class 'class 9' is none of the model's"):
        list(task.read(replace(sounds[0], label="class 9")))
    card, model = diffwave(network={"mels": 80, "strides": [16, 16]})
    with pytest.raises(UsageError, match="log-mels of 64 bands"):
        training.task(card, model, "diffwave", {"seconds": 1.024})


@pytest.mark.parametrize("name", mdiff_recipes())
def test_every_recipe_fits_its_model(name: str) -> None:
    read = recipe.find(f"audio/{name}", MODELS)
    card, model = built(recipe.card_of(read, MODELS))
    task = training.task(card, model, read.part, read.task)
    assert task.module is model.modules[read.part]
    assert set(task.needs) <= {file.module for file in card.files}
    if read.times is not None:
        assert task.denoiser is not None
        times.from_name(read.times.name, **read.times.parameters)(
            task.denoiser.schedule, 4, torch.Generator()
        )
