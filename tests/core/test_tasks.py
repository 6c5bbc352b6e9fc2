"""Tasks: the laws of what a request asks besides pure noise, on one, two and three axes, and how it fails."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mdiff.cli import main
from mdiff.core import grids, operators, record, schedules, tasks
from mdiff.core.denoiser import Denoiser
from mdiff.core.errors import MdiffError, UsageError
from mdiff.core.hooks import Given, Model, Problem, Request, Stage
from mdiff.core.host import Host
from mdiff.core.pipeline import generate
from mdiff.core.registry import Registry
from mdiff.core.request import resolve, sweep, weighted

SHAPES = [(2, 24), (2, 8, 12), (2, 4, 8, 4)]
WIDTH = 0.5
MEANS = {"rain": 1.0, "wind": -1.0, "snow": 3.0}
"""What texts mean: the mean of every entry."""

Make = Callable[..., Tensor]


class Mixed(nn.Module):
    """A random network on any axes that mixes all entries: nothing is known of it but that it is smooth."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        size = torch.Size(shape).numel()
        draws = torch.Generator().manual_seed(size)
        self.weight = nn.Parameter(torch.randn(size, size, generator=draws) / size**0.5 / 4)

    def forward(self, x: Tensor, t: Tensor, mean: Tensor) -> Tensor:
        mean = mean.reshape(-1, *(1 for _ in x.shape[1:]))
        return torch.tanh((x.flatten(1) @ self.weight).reshape(x.shape) + 0.3 * mean)


def gauss(schedule: schedules.Schedule) -> Callable[..., Tensor]:
    """E[x_0 | x_t] for entries that are N(mean, WIDTH^2), each by itself."""

    def net(x: Tensor, t: Tensor, mean: Tensor) -> Tensor:
        alpha, sigma = (c.reshape(-1, *(1 for _ in x.shape[1:])) for c in schedule(t))
        mean = mean.reshape(-1, *(1 for _ in x.shape[1:]))
        gain = alpha * WIDTH**2 / (alpha**2 * WIDTH**2 + sigma**2)
        return mean + gain * (x - alpha * mean)

    return net


def fit(sample: Mapping[str, Any], shape: tuple[int, ...]) -> Tensor:
    return sample["values"].reshape(1, *shape)


@pytest.fixture(params=SHAPES, ids=["1 axis", "2 axes", "3 axes"])
def shape(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return request.param


@pytest.fixture
def maker(toy: Host, toy_registry: Registry) -> Callable[..., Make]:
    """maker(shape) -> what makes the values of a request's fields with a model of one stage."""

    def maker(
        shape: tuple[int, ...],
        net: Callable[..., Tensor] | None = None,
        schedule: schedules.Schedule | None = None,
        encoded: Callable[[Given | None], Given | None] = lambda given: given,
        guided: bool = True,
    ) -> Make:
        schedule = schedule or schedules.cosine()
        denoiser = Denoiser(net or gauss(schedule), schedule, predicts="v" if net else "x0")

        def prepare(request: Request, carry: dict[str, Any]) -> Problem:
            given = tasks.given(request, carry, shape, fit, middle=0.5)
            text = request.text or ""
            return Problem(
                shape=shape,
                cond={"mean": torch.tensor([[MEANS.get(text, 0.0)]])},
                uncond={"mean": torch.zeros(1, 1)} if guided else None,
                given=encoded(given),
            )

        def finish(*said: Any) -> Mapping[str, Any]:
            return {"sample": {"values": said[2]}}

        stage = Stage(name="only", prepare=prepare, denoiser=denoiser, finish=finish)
        model = Model(modules={}, stages=(stage,))
        card = toy_registry.cards["toy/gauss"]

        def make(
            on_step: Any = None,
            files: Mapping[str, Tensor] | None = None,
            resume: Any = None,
            **fields: Any,
        ) -> Tensor:
            given = {name: {"values": value} for name, value in (files or {}).items()}
            named = dict.fromkeys(given, "file")
            request = Request(model=card.id, **{"sampler": "ddim", "steps": 12, **named, **fields})
            how = {"files": given, "on_step": on_step, "resume": resume}
            return generate(model, card, request, host=toy, **how)["values"]

        return make

    return maker


def data(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Data of the Gaussian that the models know, (1, C, *axes)."""
    return WIDTH * torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


# --- strength -------------------------------------------------------------------------------------


def test_full_strength_is_pure_noise_bit_for_bit(
    maker: Callable[..., Make], shape: tuple[int, ...]
) -> None:
    make = maker(shape, Mixed(shape))
    plain = make(seed=3)
    assert torch.equal(make(seed=3, files={"input": data(shape)}, strength=1.0), plain)
    for sampler in ("ddpm", "dpmpp_2m"):
        full = make(seed=3, files={"input": data(shape)}, strength=1.0, sampler=sampler)
        assert torch.equal(full, make(seed=3, sampler=sampler))


@pytest.mark.parametrize("schedule", [schedules.cosine(), schedules.flow(), schedules.ve(0.01, 20)])
def test_the_less_strength_the_nearer_to_the_input(
    maker: Callable[..., Make], shape: tuple[int, ...], schedule: schedules.Schedule
) -> None:
    make, x0 = maker(shape, schedule=schedule), data(shape)
    gaps = []
    for strength in (0.01, 0.2, 0.4, 0.7, 1.0):
        made = [make(files={"input": x0}, strength=strength, seed=seed) for seed in range(6)]
        gaps.append(float((torch.cat(made) - x0).square().mean().sqrt()))
    # pure noise has nothing of it: two independent samples are sqrt(2) widths apart
    assert gaps == sorted(gaps) and gaps[0] < 0.06 and abs(gaps[-1] - 2**0.5 * WIDTH) < 0.2


def test_strength_is_a_level_whatever_the_number_of_steps(
    maker: Callable[..., Make], shape: tuple[int, ...]
) -> None:
    make, begun = maker(shape), []
    for steps in (1, 4, 10, 50):
        told: list[Any] = []
        make(told.append, files={"input": data(shape)}, strength=0.5, steps=steps)
        begun.append(len(told))
    # and it costs as much less as it changes less
    assert begun[0] == 1 and begun[3] in (25, 26) and begun == sorted(begun)


def test_partial_grids() -> None:
    schedule = schedules.cosine()
    whole = grids.karras(20)
    assert torch.equal(grids.partial(whole, 1.0)(schedule), whole(schedule))
    for share in (0.01, 0.3, 0.77):
        times = grids.partial(whole, share)(schedule)
        assert times[0] == pytest.approx(share * whole(schedule)[0].item())
        assert times[-1] == 0 and bool((times.diff() < 0).all())
        steps = -times.diff()[:-1]
        assert len(steps) < 2 or steps[0] > steps[1] / 4, "no first step that is next to none"
    for share in (0.0, 1.1):
        with pytest.raises(UsageError, match="above 0 and at most 1"):
            grids.partial(whole, share)


# --- what is known --------------------------------------------------------------------------------


def test_what_a_mask_keeps_stays_and_the_rest_is_made(
    maker: Callable[..., Make], shape: tuple[int, ...]
) -> None:
    x0, mask = data(shape), torch.zeros(1, 1, *shape[1:])
    mask[..., : shape[-1] // 2] = 1.0
    for sampler in ("ddim", "ddpm", "dpmpp_2m", "heun"):
        make = maker(shape, Mixed(shape))
        made = make(files={"input": x0, "mask": mask}, sampler=sampler)
        kept = (made - x0)[..., shape[-1] // 2 :]
        assert kept.abs().max() < 1e-4, sampler
        assert (made - x0)[..., : shape[-1] // 2].abs().mean() > 0.05
    nothing = make(files={"input": x0, "mask": torch.zeros_like(mask)})
    torch.testing.assert_close(nothing, x0, atol=1e-4, rtol=0)
    all_of_it = make(files={"input": x0, "mask": torch.ones_like(mask)})
    torch.testing.assert_close(all_of_it, make())


def test_where_entries_know_nothing_of_each_other_a_mask_changes_nothing_elsewhere(
    maker: Callable[..., Make], shape: tuple[int, ...]
) -> None:
    make, x0, mask = maker(shape), data(shape), torch.zeros(1, 1, *shape[1:])
    mask[..., 0] = 1.0
    made = make(files={"input": x0, "mask": mask}, seed=2)
    torch.testing.assert_close(made[..., 0], make(seed=2)[..., 0])


def test_what_was_measured_is_met(maker: Callable[..., Make], shape: tuple[int, ...]) -> None:
    make = maker(shape, Mixed(shape))
    down = operators.downsample([2] * (len(shape) - 1))
    y = down(data(shape))
    made = make(files={"input": y}, operator="upscale 2")
    torch.testing.assert_close(down(made), y, atol=1e-4, rtol=0)
    assert not torch.equal(made, make(files={"input": y}, operator="upscale 2", seed=1))
    blur = operators.blur([0.5] * (len(shape) - 1))
    made = make(files={"input": blur(data(shape))}, operator="sharpen 0.5")
    torch.testing.assert_close(blur(made), blur(data(shape)), atol=1e-3, rtol=0)


def test_extend_and_hole_are_masks_without_a_file(
    maker: Callable[..., Make], shape: tuple[int, ...]
) -> None:
    make, x0 = maker(shape, Mixed(shape)), data(shape)
    axes = " ".join(["0:0"] * (len(shape) - 2) + ["1:2"])
    inner = x0[..., 1:-2]
    made = make(files={"input": inner}, operator=f"extend {axes}")
    assert made.shape == x0.shape
    torch.testing.assert_close(made[..., 1:-2], inner, atol=1e-4, rtol=0)
    inside = (slice(None), slice(None), *(slice(1, -1) for _ in shape[1:]))
    around = make(files={"input": x0[inside]}, operator="extend 1")
    torch.testing.assert_close(around[inside], x0[inside], atol=1e-4, rtol=0)
    made = make(files={"input": x0}, operator="hole 1:3", strength=1.0)
    hole = (slice(None), slice(None), slice(1, 3))
    rest = torch.ones_like(x0, dtype=torch.bool)
    rest[hole] = False
    assert (made - x0)[rest].abs().max() < 1e-4 < (made - x0)[hole].abs().mean()


def test_units_of_operators() -> None:
    def read(shape: tuple[int, ...]) -> Tensor:
        return torch.ones(1, *shape)

    request = Request(model="m", input="f", operator="extend 0:1.5")
    made = tasks.given(request, {"input": 0}, (1, 40, 3), lambda s, w: read(w), units=(10.0, 0.0))
    assert made is not None and made.keep is not None
    assert made.keep[0, 0, :, 0].tolist() == [True] * 25 + [False] * 15
    assert bool(made.keep.all(3).eq(made.keep.any(3)).all()), "an axis without a unit is whole"
    hole = replace(request, operator="hole 1.0:1.5")
    made = tasks.given(hole, {"input": 0}, (1, 40, 3), lambda s, w: read(w), units=(10.0, 0.0))
    assert made is not None and made.keep is not None and made.start is not None
    assert (~made.keep[0, 0, :, 1]).nonzero().flatten().tolist() == [10, 11, 12, 13, 14]


@pytest.mark.parametrize(
    ("operator", "words"),
    [
        ("upscal 2", "no operator 'upscal' here; did you mean 'upscale'?"),
        (" ", "no operator '' here; known: extend, hole, sharpen, upscale"),
        ("upscale", "'upscale' takes one number above 0: --operator 'upscale 4'"),
        ("upscale x", "takes one number"),
        ("upscale -2", "takes one number above 0"),
        ("upscale 5", r"the sizes \(24,\) are no multiples"),
        ("upscale 1.5", "no multiples"),
        ("extend", "takes two numbers for an axis: --operator 'extend 8:16'"),
        ("extend 1:2:3", "takes two numbers"),
        ("extend 12", "leaves no room for the input"),
        ("extend 1:2 1:2", "takes two numbers for an axis"),
        ("hole 5", "takes two numbers for an axis"),
        ("hole 30:40", "is empty"),
        ("hole 5:5", "is empty"),
        ("hole nan:5", "takes two numbers"),
    ],
)
def test_operators_that_are_wrong(maker: Callable[..., Make], operator: str, words: str) -> None:
    make = maker(SHAPES[0])
    with pytest.raises(UsageError, match=words) as caught:
        make(files={"input": data(SHAPES[0])}, operator=operator)
    assert "\n" not in str(caught.value)


# --- latents --------------------------------------------------------------------------------------


def codec(shape: tuple[int, ...]) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """A code that loses something: blocks of two entries along the last axis become two channels, rounded."""

    def encode(x: Tensor) -> Tensor:
        return torch.cat([x[..., ::2] + x[..., 1::2], x[..., ::2] - x[..., 1::2]], 1) / 2**0.5

    def decode(z: Tensor) -> Tensor:
        plus, minus = z.chunk(2, 1)
        pairs = torch.stack([plus + minus, plus - minus], -1).flatten(-2) / 2**0.5
        return pairs * 0.98  # what an autoencoder loses

    return encode, decode


def test_tasks_in_latents(maker: Callable[..., Make], shape: tuple[int, ...]) -> None:
    encode, decode = codec(shape)
    latent = (2 * shape[0], *shape[1:-1], shape[-1] // 2)
    kept: list[Given | None] = []

    def encoded(_: Given | None) -> Given | None:
        return tasks.encoded(kept[-1], encode, decode)

    make = maker(latent, Mixed(latent), encoded=encoded)
    x0 = data(shape)

    def run(given: Given, **fields: Any) -> Tensor:
        kept.append(given)
        named = {"input": torch.zeros(latent)}
        return tasks.restored(given, decode(make(files=named, **fields)))

    keep = torch.ones(1, 1, *shape[1:], dtype=torch.bool)
    keep[..., 3:6] = False
    made = run(Given(start=x0, keep=keep), strength=1.0)
    assert torch.equal(made[..., :3], x0[..., :3]) and torch.equal(made[..., 6:], x0[..., 6:])
    down = operators.downsample([2] * (len(shape) - 1))
    made = run(Given(operator=down, measurement=down(x0)))
    torch.testing.assert_close(down(made), down(x0), atol=1e-5, rtol=0)
    # before it is put right by hand it is as near as the code allows
    found = decode(make(files={"input": torch.zeros(latent)}))
    assert (down(found) - down(x0)).abs().max() < 0.1
    near = run(Given(start=x0), strength=0.01)
    assert (near - x0).abs().max() < 0.2


def test_a_latent_is_kept_where_all_it_stands_for_is() -> None:
    keep = (
        torch.tensor([True, True, True, False, False, False]).reshape(1, 1, 6, 1).expand(1, 1, 6, 4)
    )
    given = Given(start=torch.zeros(1, 3, 6, 4), keep=keep)
    made = tasks.encoded(given, lambda x: x[..., ::2, ::2], lambda z: z)
    assert made is not None and made.keep is not None
    assert made.keep[0, 0].tolist() == [[True, True], [False, False], [False, False]]
    assert tasks.encoded(None, lambda x: x, lambda z: z) is None


# --- between two ends -----------------------------------------------------------------------------


def test_a_way_between_two_seeds_has_them_at_its_ends(
    maker: Callable[..., Make], shape: tuple[int, ...]
) -> None:
    make = maker(shape, Mixed(shape))
    way = [make(seed=1, to_seed=2, position=k / 8) for k in range(9)]
    torch.testing.assert_close(way[0], make(seed=1), atol=1e-5, rtol=0)
    torch.testing.assert_close(way[-1], make(seed=2), atol=1e-5, rtol=0)
    steps = [float((b - a).norm()) for a, b in pairwise(way)]
    assert max(steps) < 0.5 * sum(steps), "no jump"
    # on the great circle noise keeps its size: the middle is as wide as the ends
    wide = maker(shape)
    spread = [float(wide(seed=1, to_seed=2, position=p).std()) for p in (0.0, 0.5, 1.0)]
    assert spread[1] > 0.8 * min(spread[0], spread[2])


def test_a_way_between_two_texts(maker: Callable[..., Make], shape: tuple[int, ...]) -> None:
    make = maker(shape)
    start, middle, end = (
        make(text="rain", to_text="wind", position=p, guidance=2.0) for p in (0.0, 0.5, 1.0)
    )
    assert torch.equal(start, make(text="rain", guidance=2.0))
    assert torch.equal(end, make(text="wind", guidance=2.0))
    torch.testing.assert_close(middle, make(text="", guidance=2.0))
    # a stage that does not guide goes the same way
    plain = maker(shape, guided=False)
    torch.testing.assert_close(
        plain(text="rain", to_text="wind", position=0.5), plain(text="nothing")
    )


# --- weighted texts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("an apple", [("an apple", 1.0)]),
        ("an apple :1.5 | a pear :-0.5", [("an apple", 1.5), ("a pear", -0.5)]),
        ("an apple | a pear :2|leaf", [("an apple", 1.0), ("a pear", 2.0), ("leaf", 1.0)]),
        ("an apple | a pear", [("an apple | a pear", 1.0)]),
        ("an apple :1.5", [("an apple :1.5", 1.0)]),
        ("at 10:30 | rain", [("at 10:30 | rain", 1.0)]),
        ("| rain :2", [("| rain :2", 1.0)]),
        ("rain | :2", [("rain | :2", 1.0)]),
        ("rain :2 |", [("rain :2 |", 1.0)]),
        ("two\nlines :2 | rain", [("two\nlines", 2.0), ("rain", 1.0)]),
    ],
)
def test_texts_and_their_weights(text: str, parts: list[tuple[str, float]]) -> None:
    assert weighted(text) == parts


def test_weighted_texts_add_up(maker: Callable[..., Make], shape: tuple[int, ...]) -> None:
    make = maker(shape, Mixed(shape))
    one = make(text="rain", guidance=2.0)
    for same in ("rain :0.5 | rain :0.5", "rain :1 | wind :0", "rain :2 | rain :-1"):
        torch.testing.assert_close(make(text=same, guidance=2.0), one, atol=1e-5, rtol=1e-4)
    # what is affine in the condition adds up exactly: 0.5 * 3 - 1 * (-1) of the means
    affine = maker(shape)
    made = affine(text="snow :0.5 | wind :-1", guidance=1.0)
    wanted = affine(text="rain", guidance=2.5)
    torch.testing.assert_close(made, wanted, atol=1e-5, rtol=1e-4)


def test_weights_need_guidance(maker: Callable[..., Make]) -> None:
    with pytest.raises(UsageError, match="has no guidance, which several texts need"):
        maker(SHAPES[0], guided=False)(text="rain :2 | wind")


# --- inversion ------------------------------------------------------------------------------------


def test_the_inverted_comes_back_the_better_the_more_steps(
    maker: Callable[..., Make], shape: tuple[int, ...]
) -> None:
    make, x0 = maker(shape, Mixed(shape)), data(shape)

    def gap(**fields: Any) -> float:
        made = make(files={"input": x0}, text="rain", guidance=1.5, **{"invert": 1, **fields})
        return float((made - x0).square().mean().sqrt())

    by_steps = [gap(steps=steps) for steps in (5, 10, 20, 40, 80)]
    assert by_steps == sorted(by_steps, reverse=True) and by_steps[-1] < by_steps[0] / 8
    # iterated to its fixed point, each step has an exact inverse (where a signal is left for it)
    assert gap(steps=10, invert=30, strength=0.8) < 1e-4
    assert gap(steps=10, strength=0.8) > 1e-2
    # and it does not depend on the seed
    assert gap(steps=10, seed=7) == gap(steps=10)
    # part of the way up is nearer still
    assert gap(steps=20, strength=0.3) < by_steps[2]


def test_from_the_inverted_to_another_text_and_to_other_noise(
    maker: Callable[..., Make], shape: tuple[int, ...]
) -> None:
    make, x0 = maker(shape, Mixed(shape)), data(shape)
    same = {"files": {"input": x0}, "invert": 30, "text": "rain", "strength": 0.8}
    gaps = [
        float((make(**same, **end, position=p) - x0).norm())
        for end in ({"to_text": "snow"}, {"to_seed": 5})
        for p in (0.0, 0.3, 1.0)
    ]
    assert gaps[0] < 1e-2 and gaps[3] < 1e-2, "at its beginning it is the reconstruction"
    assert gaps[:3] == sorted(gaps[:3]) and gaps[3:] == sorted(gaps[3:])


# --- interrupted ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"strength": 0.6},
        {"operator": "hole 1:5", "strength": 0.9},
        {"strength": 0.8, "invert": 2, "sampler": "ddim"},
        {"to_seed": 4, "to_text": "wind", "position": 0.3, "strength": 1.0},
        {"text": "rain :0.7 | wind :0.6", "strength": 0.5},
    ],
    ids=["strength", "hole", "invert", "way", "weights"],
)
def test_a_task_goes_on_from_its_state_bit_for_bit(
    maker: Callable[..., Make], fields: dict[str, Any]
) -> None:
    shape = SHAPES[1]
    make, states = maker(shape, Mixed(shape)), []
    asked = {"files": {"input": data(shape)}, "text": "rain", "sampler": "ddpm", **fields}
    whole = make(lambda moment: states.append(moment.state), **asked)
    assert torch.equal(make(resume={0: states[2]}, **asked), whole)


# --- what cannot be -------------------------------------------------------------------------------


def test_less_than_full_strength_needs_a_sample(maker: Callable[..., Make]) -> None:
    y = data((2, 12))
    for fields in ({"strength": 0.5}, {"invert": 1}):
        with pytest.raises(UsageError, match="makes all of the sample anew"):
            maker(SHAPES[0])(files={"input": y}, operator="upscale 2", **fields)


def test_a_start_of_another_shape_is_refused(maker: Callable[..., Make]) -> None:
    wrong = maker(SHAPES[0], encoded=lambda given: Given(start=torch.zeros(1, 2, 5)))
    with pytest.raises(
        UsageError, match=r"the start is \(1, 2, 5\), and the stage makes \(2, 24\)"
    ):
        wrong(files={"input": data(SHAPES[0])}, strength=0.5)


def test_an_input_that_no_stage_uses_is_the_plugins_fault(maker: Callable[..., Make]) -> None:
    deaf = maker(SHAPES[0], encoded=lambda given: None)
    with pytest.raises(MdiffError, match="plugin 'toy': no stage of toy/gauss did anything"):
        deaf(files={"input": data(SHAPES[0])}, strength=0.5)


# --- requests -------------------------------------------------------------------------------------


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    path = tmp_path / "numbers.txt"
    path.write_text("[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]\n")
    return path


def test_what_tasks_bring_with_them(toy: Host, toy_registry: Registry, numbers: Path) -> None:
    card, path = toy_registry.cards["toy/gauss"], str(numbers)

    def ask(**given: Any) -> Request:
        return resolve(card, {"text": "rain", **given}, toy)

    plain = ask()
    assert (plain.strength, plain.position, plain.sha256) == (None, None, {})
    assert ask(input=path).strength == 0.75 and ask(input=path, mask=path).strength == 1.0
    assert ask(input=path, operator="upscale 2").strength == 1.0
    card = replace(card, defaults={**card.defaults, "strength": 0.6})
    assert ask(input=path).strength == 0.6 and ask().strength is None
    assert (ask(input=path, invert=2).sampler, ask(input=path).sampler) == ("ddim", "ddpm")
    assert ask(input=path, invert=2, sampler="heun").sampler == "heun"
    assert ask(to_seed=3).position == 0.5 and ask(to_text="wind", position=1).position == 1.0
    assert set(ask(input=path, mask=path).sha256) == {"input", "mask"}
    # without a text there is still the input
    assert resolve(card, {"input": path}, toy).text is None


def test_a_request_that_uses_none_of_it_keeps_its_key(toy: Host, toy_registry: Registry) -> None:
    request = Request(model="toy/gauss", text="rain", options={"digits": 7})
    said = record.values(request)
    assert list(said) == [
        *("model", "text", "negative", "class_name", "duration", "seed", "sampler", "grid"),
        *("steps", "guidance", "precision", "device", "options"),
    ]
    # written down before there were tasks
    assert record.key(request) == "fb71bf16a7b7"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"strength": 0.5}, "--strength means nothing by itself: give --input too"),
        ({"mask": "m.txt"}, "--mask means nothing by itself: give --input too"),
        ({"position": 0.5}, "give --to-seed or --to-text too"),
        ({"input": "numbers.txt", "strength": 0.0}, "--strength should be at least 0.001"),
        ({"input": "numbers.txt", "strength": 1.5}, "--strength should be at most 1, it is 1.5"),
        ({"input": "numbers.txt", "strength": float("nan")}, "--strength should be finite"),
        ({"input": "numbers.txt", "invert": 0}, "--invert should be at least 1"),
        (
            {"input": "numbers.txt", "invert": 1, "operator": "upscale 2"},
            "--operator and --invert exclude each other",
        ),
        ({"to_seed": -1}, "--to-seed should be at least 0"),
        ({"to_text": " "}, "--to-text is empty"),
        ({"to_text": "x", "position": 2}, "--position should be at most 1"),
        ({"text": "a :1 | b", "to_text": "x"}, "--to-text begins at one text"),
    ],
)
def test_what_does_not_go_together(
    toy: Host,
    toy_registry: Registry,
    numbers: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, Any],
    words: str,
) -> None:
    monkeypatch.chdir(numbers.parent)
    with pytest.raises(UsageError, match=words):
        resolve(toy_registry.cards["toy/gauss"], {"text": "rain", **given}, toy)


def test_a_sweep_goes_from_end_to_end() -> None:
    assert [line["position"] for line in sweep({"to_seed": 3}, 5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    for fields, count in (({}, 5), ({"to_seed": 3}, None), ({"to_text": "x", "position": 1}, 5)):
        assert sweep(fields, count) == []


# --- the command line -----------------------------------------------------------------------------


@pytest.fixture
def run(
    toy: Host, numbers: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """run(...) -> exit code, stdout, stderr of `mdiff run toy --text rain --seed 3 ...` beside numbers.txt."""
    monkeypatch.chdir(numbers.parent)

    def run(
        *arguments: object, target: tuple[str, ...] = ("toy", "--text", "rain", "--seed", "3")
    ) -> Any:
        code = main(["run", *target, *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def outputs() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


def test_a_run_with_an_input_and_the_same_again(run: Callable[..., Any]) -> None:
    code, out, _ = run("--input", "numbers.txt", "--strength", 0.5, "--out", "a.txt")
    assert code == 0 and out.strip() == "a.txt"
    made = record.read_sidecar(Path("a.txt"))
    assert made is not None
    hash = record.sha256("numbers.txt")
    assert made["request"]["sha256"] == {"input": hash} and made["request"]["strength"] == 0.5
    assert record.request_of(made).input == "numbers.txt"
    assert run("--again", "a.txt", "--out", "b.txt", target=())[0] == 0
    assert Path("a.txt").read_bytes() == Path("b.txt").read_bytes()

    Path("numbers.txt").write_text("[5, 5, 5]\n")
    code, out, err = run("--again", "a.txt", "--out", "c.txt", target=())
    assert code == 4 and "numbers.txt is not the file that the record names as its input" in err
    # given anew it is what is meant
    assert run("--again", "a.txt", "--input", "numbers.txt", "--out", "d.txt", target=())[0] == 0
    assert Path("d.txt").read_bytes() != Path("a.txt").read_bytes()
    Path("numbers.txt").unlink()
    code, out, err = run("--again", "a.txt", "--out", "c.txt", target=())
    assert code == 3 and "cannot read numbers.txt: No such file" in err
    assert not Path("c.txt").exists() and not Path("c.txt.json").exists()


def test_a_changed_input_is_another_output(run: Callable[..., Any]) -> None:
    def path() -> str:
        return run("--input", "numbers.txt", "--out", "o")[1].strip()

    one = path()
    assert path() == one
    Path("numbers.txt").write_text("[5, 5, 5]\n")
    assert path() != one


def test_a_mask_and_operators(run: Callable[..., Any]) -> None:
    Path("mask.txt").write_text("[1, 1, 1, 1, 0, 0, 0, 0]\n")
    asked = ("--input", "numbers.txt", "--mask", "mask.txt")
    assert run(*asked, "--out", "a.txt")[0] == 0
    made = record.read_sidecar(Path("a.txt"))
    assert made is not None and set(made["request"]["sha256"]) == {"input", "mask"}
    # the toy's second stage adds a tenth of a sample of its own
    values = json.loads(Path("a.txt").read_text().splitlines()[0])
    assert all(abs(a - 0.1 * k) < 0.2 for k, a in enumerate(values) if k >= 4)
    for operator in ("upscale 2", "extend 2", "hole 2:4", "sharpen 1"):
        assert run("--input", "numbers.txt", "--operator", operator)[0] == 0, operator


def test_a_sweep_is_one_output_a_position(run: Callable[..., Any]) -> None:
    code, out, _ = run("--to-seed", 9, "--to-text", "wind", "--count", 5, "--out", "o")
    paths = out.split()
    asked = [json.loads(Path(f"{path}.json").read_text())["request"] for path in paths]
    assert code == 0 and [one["position"] for one in asked] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert {one["seed"] for one in asked} == {3} and len(set(paths)) == 5
    _, out, _ = run("--to-seed", 9, "--dry-run", "--json")
    assert json.loads(out)["request"]["position"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--input", "none.txt"], 3, "cannot read none.txt: No such file"),
        (["--input", "."], 3, "cannot read .: Is a directory"),
        (["--input", "broken.txt"], 1, "failed in reading broken.txt"),
        (["--input", "numbers.txt", "--mask", "none.txt"], 3, "cannot read none.txt"),
        (["--input", "numbers.txt", "--mask", "short.txt"], 2, "the mask short.txt has the size"),
        (["--input", "numbers.txt", "--strength", "0"], 2, "--strength should be at least 0.001"),
        (["--input", "numbers.txt", "--strength", "2"], 2, "--strength should be at most 1"),
        (["--input", "numbers.txt", "--operator", "blur"], 2, "no operator 'blur' here"),
        (["--mask", "numbers.txt"], 2, "--mask means nothing by itself: give --input too"),
        (["--count", "3", "--to-text", " "], 2, "--to-text is empty"),
    ],
)
def test_what_is_wrong_is_one_line_and_leaves_nothing(
    run: Callable[..., Any], arguments: list[str], code: int, words: str
) -> None:
    Path("short.txt").write_text("[1, 0]\n")
    Path("broken.txt").write_text("[1, 0")
    before = outputs()
    got, out, err = run(*arguments)
    assert (got, out) == (code, "") and words in err, err
    assert len([line for line in err.splitlines() if line.startswith("mdiff: ")]) == 1
    assert outputs() == before


def test_variations_of_what_was_made(run: Callable[..., Any]) -> None:
    def values(name: str, *arguments: object, target: tuple[str, ...] = ()) -> Tensor:
        assert run(*arguments, "--out", name, target=target)[0] == 0
        return torch.tensor(json.loads(Path(name).read_text().splitlines()[0]))

    made = values("a.txt", "--sampler", "ddim", target=("toy", "--text", "rain", "--seed", "3"))
    near, far = (
        values(f"{p}.txt", "--again", "a.txt", "--to-seed", 7, "--position", p) for p in (0.2, 1)
    )
    assert 0 < (near - made).norm() < (far - made).norm()
    other = values("c.txt", "--again", "a.txt", "--to-seed", 8, "--position", 0.2)
    assert not torch.equal(other, near)


def test_an_input_for_a_model_of_texts_alone(run: Callable[..., Any]) -> None:
    code, _, err = run("--input", "numbers.txt", target=("toy/free",))
    assert code == 2 and "toy/free does not take --input; of such fields it takes: none" in err


def test_the_negative_text_and_weights_from_the_command_line(run: Callable[..., Any]) -> None:
    def values(*arguments: str) -> list[float]:
        path = run(*arguments, target=("toy", "--seed", "3"))[1].strip()
        return json.loads(Path(path).read_text().splitlines()[0])

    plain = values("--text", "rain")
    assert values("--text", "rain", "--negative", "wind") != plain
    both = values("--text", "rain :0.5 | rain :0.5")
    assert both == pytest.approx(plain, abs=1e-4)
    assert values("--text", "rain :1 | wind :-0.5") != plain
