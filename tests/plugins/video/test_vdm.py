"""Video Diffusion Models on random weights: sizes, texts, inputs of a clip, guidance, training on clips and stills."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mdiff.core import host as hosts
from mdiff.core import losses, operators, pipeline, times
from mdiff.core.conditions import token_states
from mdiff.core.errors import UsageError
from mdiff.core.hooks import Example, Model, ModelCard, Request, Task, text_encoder
from mdiff.core.training.draws import Draws
from mdiff.plugins.video import inputs, io, training, vdm
from mdiff.plugins.video.nets.unet3d import Unet3D

UNET: dict[str, Any] = {"axes": 2, "in_channels": 3, "out_channels": 3, "channels": 8, "groups": 4}
UNET |= {"multipliers": [1, 2], "blocks": 1, "attention": [1], "heads": 2}
UNET |= {"frame_heads": 2, "frame_levels": [1]}
TOKENS: dict[str, Any] = UNET | {"transformer": True, "context": 384}
TEXT: dict[str, Any] = {"text_encoder": "text/mini", "tokens": 6}
CONFIGS: dict[str, dict[str, Any]] = {
    "no text": {"unet": UNET},
    "tokens": {"unet": TOKENS, **TEXT},
    "pooled": {"unet": UNET | {"vector": 384}, **TEXT},
    "both, rotary": {"unet": TOKENS | {"vector": 384, "frame_rotary": True}, **TEXT},
    "unet3d": {"unet3d": {"channels": 8, "multipliers": [1, 2], "heads": 2, "vector": 384}, **TEXT},
    "unet3d, grey": {"unet3d": {"channels": 8, "multipliers": [1], "heads": 2, "in_channels": 1}},
}


def card(name: str = "no text", **config: Any) -> ModelCard:
    common = {"size": 8, "frames": 4, "fps": 8, "predicts": "v"}
    return ModelCard(
        id="video/tiny",
        plugin="video",
        modality="video",
        system="Video Diffusion Models",
        summary="",
        licence="",
        source="",
        root=Path(),
        config=common | {"schedule": {"name": "cosine_betas"}} | CONFIGS[name] | config,
    )


def built(made: ModelCard, std: float = 0.15) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = vdm.build(made, "cpu", torch.float32)
        for module in model.modules.values():
            module.eval().requires_grad_(False)
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=std)
    return model


def clip_of(
    made: ModelCard, model: Model, files: Mapping[str, Any] | None = None, **fields: Any
) -> dict[str, Any]:
    defaults: dict[str, Any] = {"steps": 3, "sampler": "ddim", "grid": "trailing"}
    if files:
        fields["input"] = "given.mp4"
    how = {"on_step": fields.pop("on_step", None), "files": files or {}}
    request = Request(model=made.id, **(defaults | fields))
    return dict(pipeline.generate(model, made, request, host=hosts.current(), **how))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- what is made ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_a_clip_is_made(name: str) -> None:
    made = card(name)
    model = built(made)
    clip = clip_of(made, model, text="a cat", guidance=2.0)
    assert clip["video"].shape == (3, 4, 8, 8) and clip["fps"] == 8
    assert clip["video"].dtype == torch.float32
    assert 0 <= clip["video"].min() < clip["video"].max() <= 1
    preview = model.stages[0].preview
    assert preview is not None and preview(torch.zeros(1, 3, 4, 8, 8)).size[0] > 8


def test_options_of_size_frames_and_rate() -> None:
    made = card()
    model = built(made)
    options = {"frames": 7, "height": 4, "width": 12, "fps": Fraction(24000, 1001)}
    clip = clip_of(made, model, options=options)
    assert clip["video"].shape == (3, 7, 4, 12) and clip["fps"] == Fraction(24000, 1001)
    assert clip_of(made, model, options={"size": 12})["video"].shape == (3, 4, 12, 12)
    with pytest.raises(Exception, match="multiples of 2, they are 8 and 5"):
        clip_of(made, model, options={"width": 5})


@pytest.mark.parametrize("name", ["tokens", "pooled", "unet3d"])
def test_texts_and_negatives_are_listened_to(name: str) -> None:
    made = card(name)
    model = built(made)
    asked = {"text": "a cat", "guidance": 3.0}
    plain = clip_of(made, model, **asked)["video"]
    others = [{"text": "a red kite, rising"}, {"negative": "a red kite"}, {"guidance": 1.0}]
    for other in others:
        assert (clip_of(made, model, **(asked | other))["video"] - plain).abs().max() > 1e-3
    assert torch.equal(clip_of(made, model, **asked)["video"], plain)


def test_a_config_has_one_network() -> None:
    for config in ({}, {"unet": UNET, "unet3d": {}}):
        made = replace(card(), config={"size": 8, "frames": 4, "fps": 8, **config})
        with pytest.raises(UsageError, match="one of unet, unet3d"):
            vdm.build(made, "cpu", torch.float32)


def test_a_key_that_no_config_has_names_the_nearest() -> None:
    made = card()
    made = replace(made, config={**made.config, "frame": 4})
    with pytest.raises(UsageError, match="config: unknown key 'frame'; did you mean 'frames'"):
        vdm.build(made, "cpu", torch.float32)


# --- inputs ---------------------------------------------------------------------------------------


def ramp(frames: int, fps: float = 8, size: tuple[int, int] = (8, 8)) -> dict[str, Any]:
    """A clip whose k-th frame has the value k / 16."""
    values = torch.arange(frames) / 16
    return {"video": values.reshape(1, -1, 1, 1).expand(3, -1, *size), "fps": fps}


def level(clip: Mapping[str, Any]) -> list[float]:
    """The value of each frame times 16, where it has one alone."""
    flat = clip["video"].transpose(0, 1).flatten(1) * 16
    same = (flat - flat[:, :1]).abs().amax(1) < 1e-2
    return [round(float(v), 2) if s else -1 for v, s in zip(flat[:, 0], same, strict=True)]


OPERATORS = {
    "extend 0:2": [4, 5, -1, -1],
    "extend 2:0": [-1, -1, 0, 1],
    "extend 1": [-1, 0, 1, -1],
    "between 2": [0, -1, 2, -1],
    "between 3": [0, -1, -1, 3],
    "hole 1:3": [0, -1, -1, 3],
    "ends": [0, -1, -1, 5],
}


@pytest.mark.parametrize("reconstruction", [0.0, 2.0])
@pytest.mark.parametrize("operator", OPERATORS)
def test_known_frames_stay(operator: str, reconstruction: float) -> None:
    made = card()
    options = {"reconstruction": reconstruction}
    clip = clip_of(made, built(made), {"input": ramp(6)}, operator=operator, options=options)
    assert level(clip) == OPERATORS[operator]


def test_reconstruction_guidance_moves_what_is_made() -> None:
    made = card()
    model = built(made)

    def extended(**options: float) -> Tensor:
        found = clip_of(made, model, {"input": ramp(6)}, operator="extend 0:2", options=options)
        return found["video"][:, 2:]

    assert torch.equal(extended(), extended(reconstruction=0.0))
    assert (extended() - extended(reconstruction=2.0)).abs().max() > 1e-3


@pytest.mark.parametrize("frames", [4, 9])
def test_super_resolution_is_in_space_alone(frames: int) -> None:
    made, draws = card(), torch.Generator().manual_seed(0)
    small = {"video": 0.3 + 0.4 * torch.rand(3, frames, 4, 4, generator=draws), "fps": 8}
    clips = []
    for reconstruction in (0.0, 1.0):
        options = {"reconstruction": reconstruction, "frames": frames}
        clip = clip_of(made, built(made), {"input": small}, operator="upscale 2", options=options)
        seen = operators.downsample([1, 2, 2])(clip["video"][None])[0]
        # what is cut off at black and white is not what was measured
        assert (seen - small["video"]).abs().median() < 0.02
        clips.append(clip["video"])
    assert (clips[0] - clips[1]).abs().max() > 1e-3


# --- any length -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokens", "unet3d"])
@pytest.mark.parametrize("reconstruction", [0.0, 2.0])
def test_a_longer_clip_begins_as_the_short_one(name: str, reconstruction: float) -> None:
    made = card(name)
    model, asked = built(made), {"text": "a red kite", "guidance": 2.0, "sampler": "ddpm"}
    blocks: list[tuple[int, ...]] = []

    def look(moment: pipeline.Moment) -> None:
        assert moment.state.x0 is not None
        if moment.state.index == 1:
            blocks.append(moment.state.x0.shape)

    options = {"reconstruction": reconstruction}
    short = clip_of(made, model, **asked, options=options)["video"]
    long = clip_of(made, model, on_step=look, **asked, options=options | {"frames": 9})["video"]
    assert long.shape == (3, 9, 8, 8) and torch.equal(long[:, :4], short)
    assert blocks == [(1, 3, 4, 8, 8)] * 4
    assert (long[:, 1:] - long[:, :-1]).abs().amax((0, 2, 3)).min() > 1e-3


def test_options_of_blocks() -> None:
    made = card()
    model = built(made)

    def rest(**options: float) -> Tensor:
        return clip_of(made, model, options={"frames": 6, **options})["video"][:, 4:]

    assert torch.equal(rest(), rest(overlap=2)) and torch.equal(rest(), rest(reconstruction=0.0))
    for other in ({"overlap": 3}, {"reconstruction": 2.0}):
        assert (rest() - rest(**other)).abs().max() > 1e-4
    with pytest.raises(Exception, match="6 are made in blocks of 4, .* and not by 4"):
        rest(overlap=4)


def test_a_length_in_seconds() -> None:
    made = card()
    model = built(made)
    options = {"frames": 3}
    assert clip_of(made, model, duration=0.75, options=options)["video"].shape[1] == 6
    for asked in ({"duration": 0.01}, {"options": {"frames": 0}}):
        with pytest.raises(Exception, match="a clip has at least one frame"):
            clip_of(made, model, **asked)


LONG = {
    "extend 0:5": [2, 3, 4, 5, -1, -1, -1, -1, -1],
    "extend 7:0": [-1, -1, -1, -1, -1, -1, -1, 0, 1],
    "ends": [0, -1, -1, -1, -1, -1, -1, -1, 5],
}


@pytest.mark.parametrize("operator", LONG)
def test_an_input_goes_on_for_as_long_as_is_asked(operator: str) -> None:
    made = card()
    options = {"frames": 9, "reconstruction": 2.0}
    clip = clip_of(made, built(made), {"input": ramp(6)}, operator=operator, options=options)
    assert level(clip) == LONG[operator]


@pytest.mark.parametrize(
    "sampler", ["euler_ancestral", "predictor_corrector", "ancestral_corrected"]
)
def test_samplers_with_noise_follow_texts(sampler: str) -> None:
    made = card("tokens")
    model = built(made)
    asked = {"guidance": 3.0, "sampler": sampler, "steps": 5}
    asked["options"] = {"frames": 6, "reconstruction": 2.0}
    clips = [
        clip_of(made, model, text=text, seed=seed, **asked)["video"]
        for text, seed in (("a red kite", 1), ("a red kite", 1), ("a cat", 1), ("a red kite", 2))
    ]
    assert torch.equal(clips[0], clips[1]) and bool(clips[0].isfinite().all())
    assert min(float((clips[0] - other).abs().max()) for other in clips[2:]) > 1e-2


def test_inputs_are_taken_at_the_rate_that_is_asked_for() -> None:
    made = card()
    model = built(made)
    fast = {"input": ramp(12, fps=24)}
    assert level(clip_of(made, model, fast, operator="between 3")) == [0, -1, -1, 9]
    slow = {"input": ramp(2, fps=4)}
    doubled = clip_of(made, model, slow, operator="between 2")
    assert level(doubled) == [0, -1, 1, -1] and doubled["fps"] == 8


def test_inputs_are_fitted() -> None:
    wide = {"video": torch.rand(4, 3, 10, 30), "fps": 8}
    found = inputs.fitted(wide, (3, 2, 8, 8), Fraction(8))
    assert found.shape == (3, 2, 8, 8) and 0 <= found.min() and found.max() <= 1
    grey = inputs.fitted(
        {"video": torch.full((3, 1, 8, 8), 0.5), "fps": 8}, (1, 1, 8, 8), Fraction(8)
    )
    torch.testing.assert_close(grey, torch.full((1, 1, 8, 8), 0.5))


WRONG = {
    "extend 0:1": "has 2 frames at 8 a second, and 3 are asked of it",
    "extend 2:2": "leaves no room",
    "between 1": "one number from 2 on",
    "between": "one number from 2 on",
    "ends 2": "fewer than half of 4",
    "ends 1 2": "how many frames are known",
    "upscale 3": "no multiples",
    "colour": "no operator 'colour'",
}


@pytest.mark.parametrize("operator", WRONG)
def test_inputs_that_do_not_fit(operator: str) -> None:
    made = card()
    with pytest.raises(Exception, match=WRONG[operator]):
        clip_of(made, built(made), {"input": ramp(2)}, operator=operator)


# --- training -------------------------------------------------------------------------------------


@pytest.fixture
def clips(tmp_path: Path) -> list[Example]:
    """Clips of seven frames of 12 x 10 pixels: a white bar that moves, and two stills for each."""
    found = []
    for k, way in enumerate(("right", "left")):
        video = torch.zeros(3, 7, 10, 12)
        for frame in range(7):
            video[:, frame, :, frame if k == 0 else 11 - frame] = 1
        path = tmp_path / f"{k}.zip"
        io.write(path, {"video": video, "fps": 8}, {}, {})
        still = torch.full((3, 1, 8, 8), 0.25 + 0.5 * k)
        io.write(tmp_path / f"still{k}.zip", {"video": still, "fps": 1}, {}, {})
        texts = (f"a bar goes {way}", f"a bar, {way}")
        named = [[f"still{j}.zip", f"still {j}"] for j in (k, 1 - k)]
        found.append(Example(path=path, texts=texts, facts={"stills": named}))
    return found


def case(name: str = "tokens", **settings: Any) -> tuple[ModelCard, Task]:
    made = card(name)
    model = built(made)
    task = training.task(made, model, vdm.name_of(made.config), settings)
    return made, task


def table(task: Task, examples: list[Example]) -> dict[str, Tensor]:
    every = [row for example in examples for row in task.read(example)]
    return {name: torch.stack([row[name] for row in every]) for name in every[0]}


def asked(
    task: Task, rows: Mapping[str, Tensor], draws: Draws
) -> tuple[Tensor, Mapping[str, Tensor]]:
    assert task.batch is not None
    return task.batch({name: column[draws.mine] for name, column in rows.items()}, draws)


def loss_of(task: Task, rows: Mapping[str, Tensor], draws: Draws) -> Tensor:
    assert task.denoiser is not None
    x0, cond = asked(task, rows, draws)
    law = times.entries("stratified")(task.denoiser.schedule, draws.total, draws.generator)
    z = draws.normal(*x0.shape[1:])
    loss = losses.from_name(task.denoiser.predicts)
    return loss(task.denoiser.bind(**cond), x0, law.t[draws.mine], z)


def test_rows(clips: list[Example]) -> None:
    _, task = case(wordings=3)
    (row,) = task.read(clips[0])
    assert row["video"].dtype == torch.uint8 and row["video"].shape == (3, 4, 8, 8)
    assert row["context"].dtype == torch.float16 and row["context"].shape == (3, 6, 384)
    encoder = text_encoder("text/mini")
    texts = [clips[0].texts[0], clips[0].texts[0], clips[0].texts[1]]
    states = token_states(encoder, texts, 6)
    torch.testing.assert_close(row["context"].float(), states, atol=2e-3, rtol=2e-3)
    _, task = case(wordings=1, stills=3, named=True)
    (row,) = task.read(clips[0])
    assert row["still_video"].shape == (3, 3, 8, 8) and row["still_context"].shape == (3, 6, 384)
    assert [round(float(s.float().mean()) / 255, 2) for s in row["still_video"]] == [
        0.25,
        0.75,
        0.25,
    ]


def test_long_clips_give_several_rows(tmp_path: Path) -> None:
    path = tmp_path / "long.zip"
    io.write(path, ramp(14), {}, {})
    for windows, starts in ((1, [0]), (2, [0, 10]), (5, [0, 5, 10])):
        _, task = case("no text", windows=windows)
        rows = list(task.read(Example(path=path)))
        assert [round(float(row["video"][0, 0, 0, 0]) / 255 * 16) for row in rows] == starts
    with pytest.raises(UsageError, match="has 3 frames at 8"):
        io.write(path, ramp(3), {}, {})
        list(case("no text")[1].read(Example(path=path)))


def test_data_without_named_stills_says_so(clips: list[Example]) -> None:
    _, task = case(named=True)
    with pytest.raises(UsageError, match="names no stills for 0.zip"):
        list(task.read(replace(clips[0], facts={})))


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("name", ["no text", "both, rotary", "unet3d"])
def test_a_split_batch_has_the_losses_of_the_whole(
    name: str, named: bool, clips: list[Example]
) -> None:
    _, task = case(name, stills=2, named=named, drop=0.4)
    rows = {k: torch.cat([v] * 3) for k, v in table(task, clips).items()}
    with torch.no_grad():
        whole = loss_of(task, rows, Draws.of(1, 5, 6))
        parts = [loss_of(task, rows, Draws.of(1, 5, 6, slice(a, b))) for a, b in ((0, 2), (2, 6))]
    assert whole.shape == (6,)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)


def test_stills_come_after_the_clip(clips: list[Example]) -> None:
    _, task = case(stills=2, named=True, drop=0.0, wordings=1)
    rows = table(task, clips)
    x0, cond = asked(task, rows, Draws.of(0, 0, 2))
    assert x0.shape == (2, 3, 6, 8, 8) and cond["clips"].tolist() == [[0, 0, 0, 0, 1, 2]] * 2
    torch.testing.assert_close(x0[:, :, :4], vdm.to_signed(rows["video"]))
    torch.testing.assert_close(x0[:, :, 4:], vdm.to_signed(rows["still_video"]).transpose(1, 2))
    assert cond["context"].shape == (2, 3, 6, 384)
    assert torch.equal(cond["context"][:, 0], rows["context"][:, 0].float())
    assert torch.equal(cond["context"][:, 1:], rows["still_context"].float())


def test_stills_are_frames_of_the_clip_where_none_are_named(clips: list[Example]) -> None:
    _, task = case("tokens", stills=3, drop=0.0, wordings=1)
    rows = {k: torch.cat([v] * 40) for k, v in table(task, clips).items()}
    x0, cond = asked(task, rows, Draws.of(0, 0, 80))
    own, stills = x0[:, :, :4], x0[:, :, 4:]
    same = (stills.unsqueeze(3) == own.unsqueeze(2)).flatten(4).all(4).all(1)
    assert same.any(2).all()
    # each frame of the clip is as likely, and none by chance alone
    counts = same.float().sum((0, 1)) / same.sum()
    assert counts.min() > 0.15 and torch.equal(cond["context"][:, 0], cond["context"][:, 2])


@pytest.mark.parametrize("named", [False, True])
def test_texts_are_dropped_of_clips_and_stills_apart(named: bool, clips: list[Example]) -> None:
    _, task = case(stills=2, named=named, drop=0.3, wordings=1)
    rows = {k: torch.cat([v] * 150) for k, v in table(task, clips).items()}
    _, cond = asked(task, rows, Draws.of(0, 0, 300))
    empty = token_states(text_encoder("text/mini"), [""], 6)
    dropped = (cond["context"] - empty).abs().amax((2, 3)) < 1e-6
    assert dropped.float().mean(0).tolist() == pytest.approx([0.3] * 3, abs=0.08)
    assert 0.02 < dropped.all(1).float().mean() < 0.06


def test_without_stills_a_batch_is_plain(clips: list[Example]) -> None:
    _, task = case("pooled", stills=0, flip=True)
    x0, cond = asked(
        task, {k: torch.cat([v] * 20) for k, v in table(task, clips).items()}, Draws.of(0, 0, 40)
    )
    assert x0.shape == (40, 3, 4, 8, 8) and cond["vector"].shape == (40, 384)
    assert cond.keys() == {"vector"}
    mirrored = (x0 == x0[:1].flip(-1)).flatten(1).all(1)
    assert 0 < mirrored.sum() < 40


def test_unet3d_learns_its_own_condition_of_no_text(clips: list[Example]) -> None:
    _, task = case("unet3d", drop=1.0)
    assert isinstance(task.module, Unet3D) and task.module.nothing is not None
    task.module.requires_grad_(True)
    loss_of(task, table(task, clips), Draws.of(0, 0, 2)).mean().backward()
    assert task.module.nothing.grad is not None and task.module.nothing.grad.abs().max() > 0


def test_the_loss_falls(clips: list[Example]) -> None:
    made = card("pooled")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = vdm.build(made, "cpu", torch.float32)
    task = training.task(made, model, "unet", {"stills": 1, "wordings": 1})
    rows = table(task, clips)
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=1e-2, weight_decay=0)
    said = []
    for step in range(16):
        value = loss_of(task, rows, Draws.of(0, step, 2)).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        said.append(value.item())
    assert sum(said[-4:]) < 0.8 * sum(said[:4])
    # attention along frames, which begins as the identity, takes part
    assert all(p.grad is not None for p in task.module.parameters())


WRONG_SETTINGS = {
    "drop is 2": {"drop": 2.0},
    "windows is 0": {"windows": 0},
    "stills is 0, it has to be 1": {"stills": 0, "named": True},
    "trains no part": {"part": "vocoder"},
}


@pytest.mark.parametrize("message", WRONG_SETTINGS)
def test_wrong_settings(message: str) -> None:
    settings = dict(WRONG_SETTINGS[message])
    part = str(settings.pop("part", "unet"))
    made = card()
    with pytest.raises(UsageError, match=message):
        training.task(made, built(made), part, settings)
