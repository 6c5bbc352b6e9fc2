"""Requests: complete, checked against the card, and equal requests have equal keys."""

import pytest

from mdiff.core import record, request, schedules
from mdiff.core.errors import MissingError, UsageError
from mdiff.core.request import component, expand, parse_seeds, read_prompts, resolve


@pytest.fixture
def card(toy_registry):
    return toy_registry.cards["toy/gauss"]


def test_what_is_not_said_is_the_cards(card, toy):
    made = resolve(card, {"text": " rain "}, toy)
    assert (made.model, made.text, made.steps, made.guidance) == ("toy/gauss", "rain", 6, 2.0)
    assert (made.sampler, made.grid, made.duration, made.device) == ("ddpm", "linear", 1.0, "cpu")
    assert made.options == {"digits": 7, "gain": 1.0} and made.precision == "fp32"


def test_what_is_said_wins_and_is_typed(card, toy):
    given = {"text": "rain", "steps": 3, "duration": 2, "options": {"digits": "4", "gain": 2}}
    made = resolve(card, {**given, "negative": None}, toy)
    assert (made.steps, made.duration, made.options) == (3, 2.0, {"digits": 4, "gain": 2.0})
    same = resolve(card, {**given, "duration": 2.0, "options": {"digits": 4, "gain": 2.0}}, toy)
    assert record.key(same) == record.key(made)
    assert record.key(resolve(card, {"text": "rain", "seed": 1}, toy)) != record.key(made)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"txt": "x"}, "a request has no 'txt'; did you mean 'text'?"),
        (
            {"class_name": "x"},
            "toy/gauss does not take --class; of such fields it takes: text, neg",
        ),
        ({"duration": 5}, "--duration should be at most 4, it is 5"),
        ({"duration": 0.1}, "--duration should be at least 0.5, it is 0.1"),
        ({"duration": "2"}, "--duration should be a number, it is '2'"),
        ({"duration": float("nan")}, "--duration should be finite"),
        ({"steps": 0}, "--steps should be at least 1"),
        ({"steps": 2.5}, "--steps should be a whole number"),
        ({"steps": True}, "--steps should be a whole number"),
        ({"seed": -1}, "--seed should be at least 0"),
        ({"seed": 2**32}, "--seed should be at most"),
        ({"guidance": float("inf")}, "--guidance should be finite"),
        ({"precision": "fp16"}, "--precision should be one of auto, fp32, bf16"),
        ({"sampler": "dpm"}, "there is no sampler 'dpm'"),
        ({"sampler": "heum"}, "there is no sampler 'heum'; did you mean 'heun'?"),
        ({"grid": "karas"}, "there is no grid 'karas'; did you mean 'karras'?"),
        ({"options": {"digit": 1}}, "toy/gauss has no option 'digit'; did you mean 'digits'?"),
        ({"options": {"steps": 1}}, "'steps' is not an option of the model: give --steps"),
        ({"options": {"digits": "many"}}, "option digits should be a whole number, it is 'many'"),
        ({"options": {"digits": 12}}, "option digits should be at most 9, it is 12"),
        ({"options": 3}, "options should be a table"),
        ({"text": "  \n "}, "--text is empty"),
        ({"text": "a " * 1001}, "--text has 1001 words"),
        ({"text": "a" * 20_001}, "20001 characters"),
        ({"text": "\ud800"}, "--text is not Unicode"),
        ({"text": None}, 'toy/gauss needs a text: --text "..."'),
        ({"text": 3}, "--text should be text"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(card, toy, given, words):
    with pytest.raises(UsageError) as caught:
        resolve(card, {"text": "rain", **given}, toy)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_without_text_refuses_it(toy_registry, toy):
    free = toy_registry.cards["toy/free"]
    assert resolve(free, {}, toy).text is None and resolve(free, {}, toy).duration is None
    with pytest.raises(UsageError, match="does not take --text; .* it takes: none of them"):
        resolve(free, {"text": "rain"}, toy)


def test_parts_of_plugins_by_their_full_name(card, toy):
    assert resolve(card, {"text": "x", "grid": "toy/lazy"}, toy).grid == "toy/lazy"
    # a respacing is a name that says its own number of steps
    assert resolve(card, {"text": "x", "grid": "ddim50"}, toy).grid == "ddim50"
    assert len(component("grids", "ddim50", toy)(20)(schedules.linear())) == 51
    with pytest.raises(MissingError, match="no grid 'lay'; did you mean 'lazy'"):
        resolve(card, {"text": "x", "grid": "toy/lay"}, toy)


def test_devices_and_precision(monkeypatch):
    with pytest.raises(MissingError, match="no device 'cuda:99' here; there is: cpu"):
        request.device("cuda:99")
    monkeypatch.setattr(request, "cpu_flags", lambda: frozenset({"avx2", "amx_bf16"}))
    assert request.precision("auto", "cpu") == "bf16" and request.precision("fp32", "cpu") == "fp32"
    monkeypatch.setattr(request, "cpu_flags", lambda: frozenset({"avx2"}))
    assert request.precision("auto", "cpu") == "fp32" and request.precision("bf16", "cpu") == "bf16"


def test_seeds():
    assert parse_seeds("7") == [7]
    assert parse_seeds("1,2, 5-7,6") == [1, 2, 5, 6, 7]
    for wrong in ("", "x", "1,", "-1", "3-1", "1-2-3", "1.5", str(2**32), "1-999999999", "²"):
        with pytest.raises(UsageError, match="seed"):
            parse_seeds(wrong)


def test_prompts_of_text_and_of_json(tmp_path):
    text = tmp_path / "p.txt"
    text.write_text("rain\n\n  wind \n")
    assert read_prompts(text) == [{"text": "rain"}, {"text": "  wind "}]
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"text": "rain", "seed": 3}\n')
    assert read_prompts(lines) == [{"text": "rain", "seed": 3}]
    lines.write_text('{"text": "rain"}\nrain\n')
    with pytest.raises(UsageError, match="line 2 is not JSON"):
        read_prompts(lines)
    lines.write_text("[1]")
    with pytest.raises(UsageError, match="line 1 should be an object"):
        read_prompts(lines)
    text.write_text("\n")
    with pytest.raises(UsageError, match="has no lines"):
        read_prompts(text)
    text.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_prompts(text)
    with pytest.raises(MissingError, match="cannot read"):
        read_prompts(tmp_path / "none.txt")


def test_lines_and_seeds_multiply_and_repeats_are_left_out(card, toy):
    lines = [{"text": "a"}, {"text": "b", "seed": 9}, {"text": "a"}]
    made = expand(card, lines, [1, 2], toy, steps=3)
    assert [(r.text, r.seed, r.steps) for r in made] == [("a", 1, 3), ("a", 2, 3), ("b", 9, 3)]
    with pytest.raises(UsageError, match="prompt 2: a request has no 'txt'"):
        expand(card, [{"text": "a"}, {"txt": "b"}], [1], toy)


def test_vary_makes_every_combination(card, toy):
    values = {"guidance": "1, 2.5", "gain": "0.5,2", "sampler": "ddim"}
    lines = request.varied(
        [{"text": "rain"}, {"text": "snow", "options": {"digits": 2}}], values, card
    )
    made = expand(card, lines, [1], toy, options={"digits": "3"})
    rows = [(r.text, r.guidance, r.options["gain"], r.options["digits"], r.sampler) for r in made]
    assert rows[:5] == [
        ("rain", 1.0, 0.5, 3, "ddim"),
        ("rain", 1.0, 2.0, 3, "ddim"),
        ("rain", 2.5, 0.5, 3, "ddim"),
        ("rain", 2.5, 2.0, 3, "ddim"),
        ("snow", 1.0, 0.5, 2, "ddim"),
    ]
    assert len(made) == 8 and request.varied([{}], {}, card) == [{}]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"guidnace": "1"}, "--vary knows no 'guidnace'; did you mean 'guidance'?"),
        ({"seed": "1,2"}, "give several as --seed 1-4"),
        ({"text": "a,b"}, "give several as --prompts FILE"),
        ({"steps": "5,x"}, "--steps should be a whole number, it is 'x'"),
        ({"digits": "5,"}, "option digits should be a whole number, it is ''"),
        ({"guidance": "1,200"}, "prompt 2: --guidance should be at most 100"),
    ],
)
def test_what_cannot_be_varied(card, toy, values, words):
    with pytest.raises(UsageError) as caught:
        expand(card, request.varied([{"text": "x"}], values, card), [1], toy)
    assert words in str(caught.value)
