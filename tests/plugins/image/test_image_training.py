"""How parts are trained: rows of any picture, losses that no split of a batch changes, two pictures learnt by heart."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from mdiff.core import host as hosts
from mdiff.core import losses, pipeline, times
from mdiff.core.conditions import spread, token_states
from mdiff.core.errors import UsageError
from mdiff.core.hooks import Example, Model, ModelCard, Request, Task, text_encoder
from mdiff.core.nn.autoencoder import AutoencoderKL
from mdiff.core.training.draws import Draws
from mdiff.plugins.image import mdiff_build, mdiff_recipes, training
from mdiff.plugins.image.training import colour_loss, edge_loss

Card = Callable[..., ModelCard]
CLASSES = {"classes": ["cat", "dog"], "unet": {"classes": 3}}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ddpm": ("ddpm", "unet", {}),
    "ddpm of classes": ("ddpm", "unet", CLASSES),
    "autoencoder": ("stable-diffusion", "autoencoder", {}),
    "latents": ("stable-diffusion", "unet", {}),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Example]:
    """A white bar on black from the left, and one from the top, wide and high ones."""
    sizes, bars = [(32, 32), (48, 32)], [(0, 0, 12, 99), (0, 0, 99, 10)]
    found = []
    for k, (size, bar) in enumerate(zip(sizes, bars, strict=True)):
        picture = Image.new("RGB", size, (20, 40, 80))
        picture.paste((250, 220, 200), bar)
        path = tmp_path / f"{k}.png"
        picture.save(path)
        texts = (f"bar {k}", f"a picture of bar {k}")
        found.append(Example(path=path, texts=texts, label=("cat", "dog")[k]))
    return found


def built(card: ModelCard) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = mdiff_build(card, "cpu", torch.float32)
    for module in model.modules.values():
        module.eval().requires_grad_(False)
    return model


def case(name: str, card: Card, **settings: Any) -> tuple[Model, Task]:
    system, part, config = CASES[name]
    made = card(system, **config)
    model = built(made)
    task = training.task(made, model, part, settings)
    task.module.requires_grad_(True)
    return model, task


def table(task: Task, examples: list[Example]) -> dict[str, Tensor]:
    every = [row for example in examples for row in task.read(example)]
    return {name: torch.stack([row[name] for row in every]) for name in every[0]}


def loss_of(task: Task, rows: Mapping[str, Tensor], draws: Draws) -> Tensor:
    """The loss of each sample."""
    mine = {name: column[draws.mine] for name, column in rows.items()}
    if task.loss is not None:
        return task.loss(mine, draws)
    assert task.batch is not None and task.denoiser is not None
    x0, cond = task.batch(mine, draws)
    law = times.entries("stratified")(task.denoiser.schedule, draws.total, draws.generator)
    z = draws.normal(*x0.shape[1:])
    loss = losses.from_name(task.denoiser.predicts)
    return loss(task.denoiser.bind(**cond), x0, law.t[draws.mine], z)


def repeated(rows: Mapping[str, Tensor], times: int) -> dict[str, Tensor]:
    return {name: value.repeat(times, *[1] * (value.ndim - 1)) for name, value in rows.items()}


def learn(
    task: Task, rows: Mapping[str, Tensor], steps: int = 180, rate: float = 4e-3
) -> list[float]:
    """The mean loss of each step."""
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, rate / 20)
    said = []
    total = len(next(iter(rows.values())))
    for step in range(steps):
        value = loss_of(task, rows, Draws.of(0, step, total)).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        said.append(value.item())
    return said


# --- rows -----------------------------------------------------------------------------------------

ROWS: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {
    "ddpm": {"image": (torch.uint8, (3, 8, 8))},
    "ddpm of classes": {"image": (torch.uint8, (3, 8, 8)), "label": (torch.int64, ())},
    "autoencoder": {"image": (torch.uint8, (3, 16, 16))},
    "latents": {
        "mean": (torch.float16, (2, 8, 8)),
        "deviation": (torch.float16, (2, 8, 8)),
        "tokens": (torch.float16, (4, 8, 384)),
    },
}


@pytest.mark.parametrize("name", CASES)
def test_rows_hold_what_their_part_needs(name: str, card: Card, pictures: list[Example]) -> None:
    _, task = case(name, card)
    for example in pictures:
        (row,) = task.read(example)
        assert {key: (value.dtype, (*value.shape,)) for key, value in row.items()} == ROWS[name]


@pytest.mark.parametrize("name", CASES)
def test_broken_pictures_say_why(name: str, card: Card, tmp_path: Path) -> None:
    path = tmp_path / "bad.png"
    path.write_bytes(b"no picture")
    _, task = case(name, card)
    with pytest.raises(UsageError, match="not a picture"):
        list(task.read(Example(path=path, label="cat")))


def test_labels(card: Card, pictures: list[Example]) -> None:
    _, task = case("ddpm of classes", card)
    nameless, foreign = (replace(pictures[0], label=label) for label in (None, "cow"))
    assert table(task, [*pictures, nameless])["label"].tolist() == [0, 1, 2]
    with pytest.raises(UsageError, match="no class 'cow'; known: cat, dog"):
        list(task.read(foreign))


def test_latents_are_those_of_the_autoencoder(card: Card, pictures: list[Example]) -> None:
    model, task = case("latents", card, wordings=2)
    autoencoder = model.modules["autoencoder"]
    assert isinstance(autoencoder, AutoencoderKL)
    (pixels,) = training.task(card("stable-diffusion"), model, "autoencoder", {}).read(pictures[0])
    (row,) = task.read(pictures[0])
    with torch.no_grad():
        posterior = autoencoder.encode(pixels["image"][None].float() / 127.5 - 1)
    torch.testing.assert_close(row["mean"].float(), posterior.mean[0], atol=2e-3, rtol=2e-3)
    deviation = (0.5 * posterior.log_variance[0]).exp()
    torch.testing.assert_close(row["deviation"].float(), deviation, atol=2e-3, rtol=2e-3)
    states = token_states(text_encoder("text/mini"), pictures[0].texts, 8)
    torch.testing.assert_close(row["tokens"].float(), states, atol=2e-3, rtol=2e-3)


def test_a_picture_without_text_has_the_empty_one(card: Card, pictures: list[Example]) -> None:
    _, task = case("latents", card, wordings=1)
    (row,) = task.read(replace(pictures[0], texts=()))
    empty = token_states(text_encoder("text/mini"), [""], 8)
    torch.testing.assert_close(row["tokens"].float(), empty, atol=2e-3, rtol=2e-3)


def test_mirrored_latents_are_rows_of_their_own(card: Card, pictures: list[Example]) -> None:
    _, task = case("latents", card, flip=True)
    one, two = task.read(pictures[0])
    assert not torch.equal(one["mean"], two["mean"]) and torch.equal(one["tokens"], two["tokens"])


def test_wordings_are_spread() -> None:
    assert spread("abcdefgh", 4) == ["a", "c", "f", "h"]
    assert spread("ab", 4) == ["a", "a", "b", "b"]
    assert spread(["x"], 3) == ["x"] * 3 and spread("ab", 1) == ["a"]


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_split_batch_has_the_losses_of_the_whole(
    name: str, card: Card, pictures: list[Example]
) -> None:
    _, task = case(name, card)
    for parameter in task.module.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    rows = table(task, pictures * 3)
    with torch.no_grad():
        whole = loss_of(task, rows, Draws.of(1, 5, 6))
        parts = [loss_of(task, rows, Draws.of(1, 5, 6, slice(a, b))) for a, b in ((0, 2), (2, 6))]
    assert whole.shape == (6,)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(loss_of(task, rows, Draws.of(1, 6, 6)), whole)


def test_half_of_the_pictures_are_mirrored_unless_the_recipe_says_no(
    card: Card, pictures: list[Example]
) -> None:
    for flip, share in ((True, 0.5), (False, 0.0)):
        _, task = case("ddpm", card, flip=flip)
        assert task.batch is not None
        rows = repeated(table(task, pictures[:1]), 400)
        x0, cond = task.batch(rows, Draws.of(0, 0, 400))
        plain = rows["image"].float() / 127.5 - 1
        same = (x0 == plain).flatten(1).all(1)
        mirror = (x0 == plain.flip(-1)).flatten(1).all(1)
        assert bool((same ^ mirror).all()) and not cond
        assert mirror.float().mean() == pytest.approx(share, abs=0.08)


def test_conditions_are_dropped(card: Card, pictures: list[Example]) -> None:
    _, task = case("ddpm of classes", card, drop=0.3)
    assert task.batch is not None
    rows = repeated(table(task, pictures), 400)
    label = task.batch(rows, Draws.of(0, 0, 800))[1]["label"]
    assert (label == 2).float().mean() == pytest.approx(0.3, abs=0.05)
    assert torch.equal(label[label != 2], rows["label"][label != 2])

    _, task = case("latents", card, drop=0.3, wordings=2)
    assert task.batch is not None
    rows = repeated(table(task, pictures), 200)
    context = task.batch(rows, Draws.of(0, 0, 400))[1]["context"]
    empty = token_states(text_encoder("text/mini"), [""], 8)
    dropped = (context == empty).flatten(1).all(1)
    assert dropped.float().mean() == pytest.approx(0.3, abs=0.07)
    # of what is not dropped either wording is seen as often
    kept = context[~dropped]
    first = (kept == rows["tokens"][~dropped, 0].float()).flatten(1).all(1)
    assert first.float().mean() == pytest.approx(0.5, abs=0.1)


def test_latents_are_scaled_and_drawn_from_their_posterior(card: Card) -> None:
    _, task = case("latents", card)
    assert task.batch is not None
    rows = {
        "mean": torch.full((500, 2, 8, 8), 3.0).half(),
        "deviation": torch.full((500, 2, 8, 8), 0.5).half(),
        "tokens": torch.zeros(500, 4, 8, 384).half(),
    }
    x0, _ = task.batch(rows, Draws.of(0, 0, 500))
    # the card's latent_scale is 2
    assert x0.mean() == pytest.approx(6, abs=0.02) and x0.std() == pytest.approx(1, abs=0.02)


def test_edges_count_where_they_are_missed() -> None:
    wanted = torch.zeros(3, 1, 32, 32)
    wanted[..., 16:] = 1
    brighter, shifted = wanted + 0.2, wanted.roll(1, -1)
    assert edge_loss(wanted, wanted).tolist() == [0, 0, 0]
    assert edge_loss(brighter, wanted).max() < 1e-6 < edge_loss(shifted, wanted).min()
    assert colour_loss(wanted, wanted).tolist() == [0, 0, 0]
    assert colour_loss(shifted, wanted).max() < colour_loss(brighter, wanted).min()


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("ddpm", {"flipp": True}, "unknown key 'flipp'; did you mean 'flip'"),
        ("ddpm", {"flip": 1}, "'flip' should be true or false, it is 1"),
        ("autoencoder", {"kl": "small"}, "'kl' should be a number, it is 'small'"),
        ("latents", {"wordings": 0}, "wordings is 0, it has to be 1 or more"),
        ("latents", {"drop": 1.5}, "drop is 1.5, it has to be between 0 and 1"),
        ("ddpm", {"drop": -0.1}, "drop is -0.1, it has to be between 0 and 1"),
        ("autoencoder", {"unit": -1.0}, "unit is -1.0, it has to be 0 or more"),
    ],
)
def test_wrong_settings(name: str, settings: dict[str, Any], said: str, card: Card) -> None:
    with pytest.raises(UsageError, match=said):
        case(name, card, **settings)


def test_a_part_that_is_not_trained(card: Card) -> None:
    made = card("ddpm")
    with pytest.raises(UsageError, match="DDPM trains no part 'vae'; known: unet"):
        training.task(made, built(made), "vae", {})


def test_what_a_part_needs(card: Card) -> None:
    assert case("latents", card)[1].needs == ("autoencoder",)
    assert case("autoencoder", card)[1].needs == ()


def test_recipes_are_there() -> None:
    names = {"default", "ddpm-emoji", "stable-diffusion-mini", "stable-diffusion-mini-autoencoder"}
    assert names <= set(mdiff_recipes())


# --- two pictures learnt by heart -----------------------------------------------------------------


def generated(model: Model, card: ModelCard, **fields: Any) -> Tensor:
    request = Request(model=card.id, steps=20, grid="trailing", **fields)
    return pipeline.generate(model, card, request, host=hosts.current())["image"]


def test_ddpm_learns_two_pictures(card: Card, pictures: list[Example]) -> None:
    made = card("ddpm", predicts="v")
    model = built(made)
    task = training.task(made, model, "unet", {"flip": False})
    task.module.requires_grad_(True)
    rows = table(task, pictures)
    said = learn(task, repeated(rows, 4))
    assert sum(said[-30:]) / 30 < 0.15 < said[0] - 0.3
    one, two = rows["image"] / 255
    for seed in range(3):
        found = generated(model, made, seed=seed)
        nearest = min((found - one).abs().mean(), (found - two).abs().mean())
        assert nearest < 0.5 * (one - two).abs().mean()


def test_the_autoencoder_learns_two_pictures(card: Card, pictures: list[Example]) -> None:
    model, task = case("autoencoder", card, flip=False, unit=0.1)
    rows = table(task, pictures)
    learn(task, rows, steps=300)
    net = model.modules["autoencoder"]
    assert isinstance(net, AutoencoderKL)
    x = rows["image"] / 127.5 - 1
    with torch.no_grad():
        z = net.encode(x).mean
        assert (net.decode(z) - x).abs().mean() < 0.05
    # latents of unit scale
    assert z.square().mean() == pytest.approx(1, abs=0.1)


def test_stable_diffusion_learns_which_text_is_which_picture(
    card: Card, pictures: list[Example]
) -> None:
    model, task = case("latents", card, wordings=1)
    autoencoder = model.modules["autoencoder"]
    assert isinstance(autoencoder, AutoencoderKL)
    # latents of unit scale, which a random autoencoder does not give
    rows = table(task, pictures)
    rows["mean"] = torch.eye(2)[:, :, None, None].expand(2, 2, 8, 8).half()
    rows["deviation"] = torch.zeros_like(rows["mean"])
    said = learn(task, repeated(rows, 4))
    assert sum(said[-30:]) / 30 < 0.3 < said[0] - 0.5
    with torch.no_grad():
        one, two = ((autoencoder.decode(rows["mean"].float()) + 1) / 2).clamp(0, 1)
    for example, own, other in zip(pictures, (one, two), (two, one), strict=True):
        found = generated(model, card("stable-diffusion"), text=example.texts[0], guidance=1.0)
        assert (found - own).abs().mean() < 0.6 * (found - other).abs().mean()
