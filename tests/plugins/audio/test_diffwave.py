"""DiffWave: the network's laws, its schedules, and the published ways of sampling with it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mdiff.core import grids, host, noise, samplers
from mdiff.core.denoiser import Denoiser
from mdiff.core.errors import UsageError
from mdiff.core.hooks import ModelCard, Request
from mdiff.core.host import Host
from mdiff.core.pipeline import generate
from mdiff.core.sampling import sample
from mdiff.plugins.audio import io
from mdiff.plugins.audio.diffwave import Clamped, aligned, build, linear, schedule
from mdiff.plugins.audio.formats.diffwave import PUBLISHED
from mdiff.plugins.audio.nets.diffwave import DiffWave

BASE: dict[str, Any] = {"start": 1e-4, "end": 0.05, "steps": 50}
LARGE: dict[str, Any] = {"start": 1e-4, "end": 0.02, "steps": 200}
FAST = (1e-4, 1e-3, 1e-2, 0.05, 0.2, 0.5)


def small(**options: Any) -> DiffWave:
    torch.manual_seed(0)
    net = DiffWave(**{"channels": 8, "layers": 4, "cycle": 2, **options})
    torch.nn.init.normal_(net.output_projection.weight, std=0.3)
    return net


# --- the network


def test_starts_by_predicting_nothing() -> None:
    net = DiffWave(channels=8, layers=2)
    assert not net(torch.randn(1, 1, 64), torch.zeros(1)).any()


def test_reaches_as_far_as_its_dilations() -> None:
    net = small()  # dilations 1, 2, 1, 2: six samples to either side
    x, t = torch.randn(1, 1, 64), torch.tensor([5.0])
    other = x.clone()
    other[..., 32] += 1
    with torch.no_grad():
        moved = (net(other, t) - net(x, t))[0, 0].abs() > 1e-6
    assert moved.nonzero().flatten().tolist() == list(range(26, 39))


def test_condition_and_step_reach_every_sample_of_their_own_row_only() -> None:
    x, t = torch.randn(2, 1, 512), torch.tensor([3.0, 40.0])
    forms: list[tuple[DiffWave, dict[str, Tensor], dict[str, Tensor]]] = [
        (small(mels=6), {"mel": torch.rand(2, 6, 2)}, {"mel": torch.rand(2, 6, 2)}),
        (small(classes=3), {"label": torch.tensor([0, 1])}, {"label": torch.tensor([2, 2])}),
    ]
    for net, cond, other in forms:
        mixed = {k: torch.stack([cond[k][0], other[k][1]]) for k in cond}
        with torch.no_grad():
            a, b, later = net(x, t, **cond), net(x, t, **mixed), net(x, t + 0.5, **cond)
        torch.testing.assert_close(a[0], b[0])
        assert ((a[1] - b[1]).abs() > 0).float().mean() > 0.9
        assert ((a - later).abs() > 0).float().mean() > 0.9


def test_strides_set_the_hop() -> None:
    net = small(mels=6, strides=(16, 10))
    assert net(torch.randn(1, 1, 480), torch.zeros(1), mel=torch.rand(1, 6, 3)).shape == (1, 1, 480)
    with pytest.raises(UsageError, match="3 mel frames of 160 do not cover 481 samples"):
        net(torch.randn(1, 1, 481), torch.zeros(1), mel=torch.rand(1, 6, 3))


def test_wrong_arguments_are_named() -> None:
    x, t = torch.randn(1, 1, 256), torch.zeros(1)
    with pytest.raises(UsageError, match="conditioned on mel; got nothing"):
        small(mels=6)(x, t)
    with pytest.raises(UsageError, match="conditioned on nothing; got label"):
        small()(x, t, label=torch.zeros(1, dtype=torch.long))
    with pytest.raises(UsageError, match="not both"):
        DiffWave(mels=80, classes=10)
    with pytest.raises(UsageError, match="two even numbers"):
        DiffWave(mels=80, strides=(15, 17))
    with pytest.raises(UsageError, match="'rising'"):
        DiffWave(embedding="rissing")


@pytest.mark.parametrize("residual_includes_time", [False, True])
def test_every_weight_learns_in_bfloat16(residual_includes_time: bool) -> None:
    net = small(mels=6, upsampler_per_layer=True, residual_includes_time=residual_includes_time)
    x, z = torch.randn(2, 1, 512), torch.randn(2, 1, 512)
    with torch.autocast("cpu", torch.bfloat16):
        found = net(x, torch.tensor([1.0, 30.0]), mel=torch.rand(2, 6, 2))
    (found.float() - z).abs().mean().backward()
    # the last layer's residual half goes nowhere; in all else something has to arrive
    silent = [k for k, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters() if p.grad is not None)


# --- the schedule, and shorter tables on it


@pytest.mark.parametrize("table", [BASE, LARGE], ids=["base", "large"])
def test_schedule_is_exact_at_its_entries_and_inverts(table: dict[str, Any]) -> None:
    trained, steps = schedule(linear(**table)), table["steps"]
    t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    alpha, sigma = trained(t)
    expected = (1 - linear(**table)).cumprod(0)
    torch.testing.assert_close(alpha**2, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t))
    assert trained(torch.zeros(1)) == (1, 0)
    between = torch.linspace(trained.low, 1, 333, dtype=torch.float64)
    torch.testing.assert_close(trained.time(trained.log_snr(between)), between, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("table", "last", "steps"),
    [
        (BASE, 0.279673, [0, 0.894134, 4.086654, 10.451817, 22.992493, 42.918643]),
        (LARGE, 0.132183, [0, 3.200681, 13.430277, 33.820288, 73.982461, 138.083865]),
    ],
    ids=["base", "large"],
)
def test_aligned_steps_are_the_published(
    table: dict[str, Any], last: float, steps: list[float]
) -> None:
    trained = schedule(linear(**table))
    alpha, _ = trained(torch.ones(1, dtype=torch.float64))
    assert float(alpha) ** 2 == pytest.approx(last, abs=1e-6)
    times = aligned(FAST)(trained)
    assert times[-1] == 0
    found = [trained.index(float(t)) for t in times[:-1].flip(0)]
    assert found == pytest.approx(steps, abs=1e-5)
    # and the levels there are the short table's own
    expected = (1 - torch.tensor(FAST, dtype=torch.float64)).cumprod(0).sqrt().flip(0)
    torch.testing.assert_close(trained(times[:-1])[0], expected, atol=1e-12, rtol=0)


def test_tables_beyond_the_training_are_refused() -> None:
    trained = schedule(linear(**BASE))
    with pytest.raises(UsageError, match="this table of 6 betas has alpha from 0.1939"):
        aligned((*FAST[:-1], 0.95))(trained)
    with pytest.raises(UsageError, match="choose betas that stay inside"):
        aligned((1e-5, *FAST[1:]))(trained)
    with pytest.raises(UsageError, match="each above 0 and below 1"):
        aligned((0.1, 1.0))


# --- sampling, against the published loop


def published_loop(
    net: DiffWave, trained: Tensor, short: Tensor, z: list[Tensor], clamp: bool
) -> Tensor:
    """The papers' and repositories' sampling, from its formulas; z[0] is the start."""
    trained_bar = [float(v) for v in (1 - trained).cumprod(0)]
    beta, bar = short.tolist(), [float(v) for v in (1 - short).cumprod(0)]
    steps = []
    for level in bar:
        t = min(len(trained_bar) - 2, sum(level < other for other in trained_bar[1:]))
        above, below = trained_bar[t] ** 0.5, trained_bar[t + 1] ** 0.5
        steps.append(t + (above - level**0.5) / (above - below))
    x = z[0]
    for n in reversed(range(len(beta))):
        eps = net(x, torch.full((len(x),), steps[n]))
        x = (x - beta[n] / (1 - bar[n]) ** 0.5 * eps) / (1 - beta[n]) ** 0.5
        if n > 0:
            std = (beta[n] * (1 - bar[n - 1]) / (1 - bar[n])) ** 0.5
            x = x + std * z[len(beta) - n]
        if clamp:
            x = x.clamp(-1, 1)
    return x


@pytest.mark.parametrize(
    ("short", "embedding", "clamp"),
    [(FAST, "rising", True), (FAST, "falling", False), (None, "rising", True)],
)
def test_sampling_is_the_published(short: Any, embedding: str, clamp: bool) -> None:
    net, trained = small(embedding=embedding), linear(**BASE)
    grid = aligned(short) if short else grids.trailing(50)
    table = torch.tensor(short, dtype=torch.float64) if short else trained
    streams = noise.from_seeds([1, 2], (1, 128))
    same = noise.from_seeds([1, 2], (1, 128))
    z = [same.draw() for _ in range(len(table))]
    sampler: samplers.Sampler = samplers.DDPM()
    if clamp:
        sampler = Clamped(inner=sampler)
    denoise = Denoiser(net, schedule(trained), predicts="eps", time="index")
    with torch.no_grad():
        expected = published_loop(net, trained, table, z, clamp)
    found = sample(denoise, streams, sampler=sampler, grid=grid)
    assert (expected.abs().max() <= 1) == clamp
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# --- the models


def card(network: dict[str, Any], **config: Any) -> ModelCard:
    network = {"channels": 8, "layers": 2, **network}
    return ModelCard(
        id="audio/wave",
        plugin="audio",
        modality="audio",
        system="DiffWave",
        summary="",
        licence="MIT",
        source="",
        root=Path(),
        config={"network": network, "betas": LARGE, "rate": 16_000, **config},
    )


def made(card: ModelCard, by: Host | None = None, **request: Any) -> Tensor:
    torch.manual_seed(0)
    model = build(card, "cpu", torch.float32)
    for parameter in model.modules["diffwave"].parameters():  # the last ones start at zero
        torch.nn.init.normal_(parameter, std=0.3)
    full = {"sampler": "ddpm", "grid": "trailing", "steps": 4, "duration": 0.02, **request}
    result = generate(model, card, Request(model=card.id, **full), host=by or Host([]))
    assert result["rate"] == 16_000
    assert result["audio"].dtype == torch.float32
    return result["audio"]


def test_unconditional_model() -> None:
    found = made(card({}))
    assert found.shape == (1, 320)
    assert torch.equal(found, made(card({})))
    assert not torch.equal(found, made(card({}), seed=1))
    with pytest.raises(UsageError, match="needs a duration: --duration 1"):
        made(card({}), duration=None)


def test_class_model() -> None:
    digits = card({}, classes=["zero", "one", "two"])
    one, two = made(digits, class_name="one"), made(digits, class_name="two")
    assert one.shape == (1, 320)
    assert not torch.allclose(one, two)
    with pytest.raises(UsageError, match="needs a class: --class zero"):
        made(digits)
    with pytest.raises(UsageError, match="no class 'tow'; did you mean 'two'"):
        made(digits, class_name="tow")


def test_vocoder_stage_takes_the_mel_that_was_left() -> None:
    vocoder = card({"mels": 80}, **{k: PUBLISHED["lmnt"][k] for k in ("fast", "clamp")})
    stage = build(vocoder, "cpu", torch.float32).stages[0]
    request = Request(model=vocoder.id, sampler="ddpm", options={"fast": True}, duration=0.04)
    problem = stage.prepare(request, {"mel": torch.rand(80, 3)})
    assert stage.denoiser is not None
    assert stage.denoiser.schedule.steps == 200
    assert problem.shape == (1, 768)
    streams = noise.from_seeds([0], problem.shape)
    x = sample(
        stage.denoiser.bind(**problem.cond), streams, sampler=problem.sampler, grid=problem.grid
    )
    audio = stage.finish(request, problem, x, {})["sample"]["audio"]
    assert audio.shape == (1, 640)
    assert audio.abs().max() <= 1
    assert len(problem.grid(stage.denoiser.schedule)) == 7
    with pytest.raises(UsageError, match="stands behind a stage that leaves one"):
        stage.prepare(request, {})


def test_a_sound_to_start_from(tmp_path: Path) -> None:
    """On the waveform itself: what is kept is kept to the bit."""
    path = tmp_path / "tone.wav"
    tone = 0.4 * torch.sin(torch.arange(320) / 5)[None]
    io.write(path, {"audio": tone, "rate": 16_000}, {"schema": 1}, {})
    tone = io.read(path)["audio"]
    given = {"input": str(path), "by": host.current()}
    assert torch.equal(made(card({}), **given, strength=1.0), made(card({})))
    near = made(card({}), **given, strength=0.001)
    far = made(card({}), **given, strength=0.5)
    assert (near - tone).abs().max() < 0.1 < (far - tone).abs().max()
    filled = made(card({}), **given, operator="hole 0.005:0.01", strength=1.0)
    torch.testing.assert_close(filled[:, :80], tone[:, :80], atol=1e-5, rtol=0)
    torch.testing.assert_close(filled[:, 160:], tone[:, 160:], atol=1e-5, rtol=0)
    assert (filled - tone)[:, 80:160].abs().mean() > 0.05
