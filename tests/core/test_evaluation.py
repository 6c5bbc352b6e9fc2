"""Evaluation: laws of the distances, intervals that cover, and the runner from a data set to figures."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mdiff.cli import main
from mdiff.core import distances, evaluation
from mdiff.core.errors import MissingError, PluginError, UsageError
from mdiff.core.hooks import Example, Metric


def normal(n: int, d: int, seed: int = 0, mean: float = 0.0, width: float = 1.0) -> np.ndarray:
    return mean + width * np.random.default_rng(seed).standard_normal((n, d))


# Distances between sets


def test_frechet_is_the_closed_form_of_gaussians():
    """On samples, with their own means and covariances: against a root of the product of covariances."""
    from scipy.linalg import sqrtm

    mix = np.random.default_rng(3).standard_normal((6, 6))
    a, b = normal(300, 6) @ mix, normal(200, 6, seed=1, mean=0.3, width=2.0)
    ca, cb = np.cov(a.T), np.cov(b.T)
    root = np.real(sqrtm(ca @ cb))
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * root)
    assert distances.frechet(a, b) == pytest.approx(expected, rel=1e-9)
    assert distances.frechet(b, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_with_fewer_rows_than_columns():
    a, b = normal(8, 20), normal(9, 20, seed=1, mean=1.0)
    assert distances.frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert distances.frechet(a, a + 2.0) == pytest.approx(20 * 4.0)
    # the same value where rows of nothing but zeros make the sets wide
    wide = np.hstack([a, np.zeros((8, 5))]), np.hstack([b, np.zeros((9, 5))])
    assert distances.frechet(*wide) == pytest.approx(distances.frechet(a, b))


def test_frechet_of_one_dimension():
    a, b = normal(500, 1), normal(400, 1, seed=1, mean=2.0, width=3.0)
    expected = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert distances.frechet(a, b) == pytest.approx(expected)


def test_kernel_distance_of_one_distribution_is_nothing_within_its_error():
    values = [
        distances.kernel(normal(60, 8, seed=2 * k), normal(60, 8, seed=2 * k + 1))
        for k in range(80)
    ]
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 3 * error and min(values) < 0 < max(values)
    assert distances.kernel(normal(60, 8), normal(60, 8, seed=1, mean=1.0)) > 10 * np.std(values)


def test_kernel_distance_is_the_sum_over_pairs():
    a, b = normal(4, 3), normal(5, 3, seed=1)

    def k(x, y):
        return (float(x @ y) / 3 + 1) ** 3

    own_a = np.mean([k(a[i], a[j]) for i in range(4) for j in range(4) if i != j])
    own_b = np.mean([k(b[i], b[j]) for i in range(5) for j in range(5) if i != j])
    cross = np.mean([k(x, y) for x in a for y in b])
    assert distances.kernel(a, b) == pytest.approx(own_a + own_b - 2 * cross)


def test_precision_and_recall():
    a = normal(50, 4)
    assert distances.precision(a, a) == distances.recall(a, a) == 1.0
    far = a + 100
    assert distances.precision(far, a) == distances.recall(far, a) == 0.0
    # two of four clusters are made, and made well: all of it is real, half of the real is made
    centres = np.repeat(np.arange(4)[:, None] * 50.0, 25, axis=0)
    whole = normal(100, 2) + centres
    assert distances.precision(whole[:50] + 1e-3, whole) == 1.0
    assert distances.recall(whole[:50] + 1e-3, whole) == 0.5


def test_nearest_rows():
    a = np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    assert distances.nearest(a[:2], a[2:]) == pytest.approx([1.0, np.sqrt(18)])
    assert distances.nearest_other(a) == pytest.approx([1.0, np.sqrt(18), 1.0])
    many = normal(1100, 3)
    assert (distances.nearest_other(many) > 0).all()
    assert distances.nearest(many, many) == pytest.approx(np.zeros(1100), abs=1e-6)


# Intervals


def metric(score, reference=None, least=1) -> Metric:
    return Metric(
        summary="s",
        better="higher",
        measure=lambda s, e: [0.0],
        score=score,
        reference=reference,
        least=least,
    )


MEAN = metric(lambda rows, reference: float(rows.mean()))
GAP = metric(lambda rows, reference: float(abs(rows.mean() - reference.mean())), "held_out")


def test_the_bootstrap_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for seed in range(100):
        rows = normal(40, 1, seed=seed)
        low, high = evaluation.interval(
            evaluation.resample(MEAN, rows, rows[:0], float(rows.mean()), 0)
        )
        covered += low <= 0 <= high
    assert 0.87 < covered / 100 < 0.99


def test_halves_spread_like_the_whole():
    rows, reference = normal(400, 1, mean=1.0), normal(400, 1, seed=9)
    value = GAP.score(rows, reference)
    scores = evaluation.resample(GAP, rows, reference, value, 0)
    assert scores.mean() == pytest.approx(value)
    assert scores.std() == pytest.approx(rows.std() / np.sqrt(400), rel=0.3)


def test_sets_drawn_twice_are_the_same():
    rows = normal(20, 1)
    once, again = (evaluation.resample(MEAN, rows, rows[:0], 0.0, 5) for _ in range(2))
    assert (once == again).all() and len(once) == evaluation.RESAMPLES
    assert (once != evaluation.resample(MEAN, rows, rows[:0], 0.0, 6)).any()


def test_one_sample_has_no_interval():
    one = np.ones((1, 1))
    assert evaluation.interval(evaluation.resample(MEAN, one, one[:0], 1.0, 0)) == (None, None)


# The runner


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six lists of numbers: four held out, of which two have a label."""
    data = tmp_path / "data"
    data.mkdir()
    lines = []
    for k, word in enumerate(["rain", "snow", "hail", "fog", "sun", "wind"]):
        (data / f"{word}.txt").write_text(json.dumps([float(k), k + 1.0]) + "\n")
        row = {"file_name": f"{word}.txt", "text": word, "split": "held_out" if k < 4 else "train"}
        lines.append(json.dumps(row | ({"label": "wet"} if k < 2 else {})))
    (data / "metadata.jsonl").write_text("\n".join(lines))
    return data


@pytest.fixture
def metrics(toy, monkeypatch):
    """Gives the toy other metrics: makers by name."""

    def give(**makers):
        monkeypatch.setattr(toy, "each", lambda hook: [(toy.record("toy"), makers)])

    return give


def test_a_model_is_measured_next_to_real_data(toy_registry, folder, tmp_path):
    told = []
    result = evaluation.evaluate(
        ["toy"], toy_registry, folder, tmp_path / "out", on_progress=lambda *a: told.append(a)
    )
    (judged,) = result.judged
    figure = judged.figures["toy/mean"]
    assert figure.samples == 4 and figure.real_samples == 4 and figure.real == pytest.approx(2.0)
    assert figure.low <= figure.value <= figure.high and figure.warning == ""
    kept = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    (model,) = kept["models"]
    assert [sample["rows"]["toy/mean"] for sample in model["samples"]] == [
        [
            pytest.approx(
                np.mean(json.loads((tmp_path / "out" / s["file"]).read_text().splitlines()[0])),
                abs=1e-6,
            )
        ]
        for s in model["samples"]
    ]
    assert {sample["text"] for sample in model["samples"]} == {"rain", "snow", "hail", "fog"}
    assert np.mean([s["rows"]["toy/mean"] for s in model["samples"]]) == pytest.approx(
        figure.value, abs=1e-6
    )
    assert ("samples of toy", 4, 4) in told


def test_what_is_there_is_not_made_again_and_the_figures_are_the_same(
    toy_registry, folder, tmp_path, monkeypatch
):
    once = evaluation.evaluate(["toy"], toy_registry, folder, tmp_path / "out")
    before = (tmp_path / "out" / "evaluation.json").read_bytes()
    monkeypatch.setattr("mdiff.core.pipeline.generate", lambda *a, **k: pytest.fail("made again"))
    again = evaluation.evaluate(["toy"], toy_registry, folder, tmp_path / "out")
    assert once.judged[0].figures == again.judged[0].figures
    assert (tmp_path / "out" / "evaluation.json").read_bytes() == before


def test_fewer_examples_are_the_first_of_more(toy_registry, folder, tmp_path):
    three = evaluation.evaluate(["toy"], toy_registry, folder, tmp_path / "out", count=3)
    assert three.examples == 3
    two = evaluation.evaluate(["toy"], toy_registry, folder, tmp_path / "out", count=2)
    assert list(two.judged[0].samples) == list(three.judged[0].samples)[:2]


def test_a_model_without_text_needs_only_seeds(toy_registry, folder, tmp_path):
    result = evaluation.evaluate(["free"], toy_registry, folder, tmp_path / "out", seed=7)
    records = [json.loads(p.read_text()) for p in (tmp_path / "out").glob("*.txt.json")]
    assert sorted(r["seed"] for r in records) == [7, 8, 9, 10]
    assert result.judged[0].figures["toy/mean"].samples == 4


def test_files_of_a_folder_are_judged_like_samples(toy_registry, folder, tmp_path):
    result = evaluation.evaluate(["toy"], toy_registry, folder, tmp_path / "out", made=folder)
    figure = result.judged[0].figures["toy/mean"]
    assert (
        figure.value == pytest.approx(3.0)
        and figure.real == pytest.approx(2.0)
        and figure.samples == 6
    )


def test_files_can_be_judged_where_there_is_no_model(toy_registry, folder, tmp_path):
    bare = replace(toy_registry, cards={}, defaults={})
    result = evaluation.evaluate(["toy"], bare, folder, tmp_path / "out", made=folder)
    assert result.judged[0].figures["toy/mean"].value == pytest.approx(3.0)
    with pytest.raises(MissingError, match="no model 'toy'"):
        evaluation.evaluate(["toy"], bare, folder, tmp_path / "out")


def test_two_models_are_compared_on_the_same_seeds(toy_registry, folder, tmp_path):
    same = evaluation.evaluate(["toy", "toy/gauss"], toy_registry, folder, tmp_path / "out")
    (difference,) = same.differences
    assert (difference.value, difference.low, difference.high) == (0.0, 0.0, 0.0)
    apart = evaluation.evaluate(["toy", "free"], toy_registry, folder, tmp_path / "out")
    (difference,) = apart.differences
    values = [judged.figures["toy/mean"].value for judged in apart.judged]
    assert difference.value == pytest.approx(values[0] - values[1])
    assert difference.low < difference.value < difference.high
    assert len(evaluation.table(apart)[0]) == len(evaluation.table(apart)[1])


def test_each_kind_of_reference_gets_its_rows(toy_registry, metrics, folder, tmp_path):
    seen = {}

    def maker(name, reference, least=1):
        def score(rows, against):
            seen.setdefault(name, []).append((len(rows), sorted(against.ravel())))
            return float(len(against))

        return lambda: Metric(
            summary=name,
            better="lower",
            measure=lambda s, e: [float(s["values"][0])],
            score=score,
            reference=reference,
            least=least,
        )

    metrics(
        alone=maker("alone", None),
        held=maker("held", "held_out"),
        train=maker("train", "train"),
        many=maker("many", "held_out", 5),
        wet=lambda: Metric(
            summary="wet",
            better="lower",
            measure=lambda s, e: [1.0],
            score=lambda rows, against: float(len(rows)),
            applies=lambda example: example.label == "wet",
        ),
        dry=lambda: Metric(
            summary="dry",
            better="lower",
            measure=None,
            score=None,
            applies=lambda example: example.label == "dry",
        ),
    )
    result = evaluation.evaluate(["toy"], toy_registry, folder, tmp_path / "out")
    figures = result.judged[0].figures
    assert seen["alone"][0] == (4, []) and figures["toy/alone"].real == 0.0
    assert seen["held"][0] == (4, [0.0, 1.0, 2.0, 3.0])
    # real data: one half of what is held out against the other, and what is held out against the training files
    assert (figures["toy/held"].real, figures["toy/held"].alike) == (2.0, 2.0)
    assert figures["toy/alone"].alike is None and figures["toy/train"].alike is None
    assert seen["train"][0] == (4, [4.0, 5.0]) and (4, [4.0, 5.0]) in seen["train"][1:]
    many = figures["toy/many"]
    assert (many.value, many.low) == (None, None) and many.warning == "needs 5 samples and has 4"
    assert figures["toy/wet"].samples == 2
    assert result.left_out == {"toy/dry": "applies to none of the examples"}
    with pytest.raises(UsageError, match="toy/dry .* applies to none of the examples"):
        evaluation.evaluate(["toy"], toy_registry, folder, tmp_path / "out", metrics=["dry"])


def test_rows_of_real_files_are_kept_until_the_files_change(
    toy_registry, metrics, folder, tmp_path
):
    looked = []

    def measure(sample, example):
        looked.append(example.path.name)
        return [0.0]

    metrics(
        one=lambda: Metric(
            summary="s", better="lower", measure=measure, score=lambda r, a: float(len(r))
        )
    )
    for count in (8, 4, 8):  # made and real; made alone; both again
        looked.clear()
        evaluation.evaluate(["toy"], toy_registry, folder, tmp_path / "out")
        assert len(looked) == count
        if count == 4:
            (folder / "rain.txt").write_text("[9.0, 9.0, 9.0]\n")


def test_what_cannot_be_had_is_left_out_or_named(toy_registry, metrics, folder, tmp_path):
    def missing():
        raise MissingError("it needs a network; get it with: pip install network")

    def broken():
        return Metric(
            summary="s", better="lower", measure=lambda s, e: 1 / 0, score=lambda r, a: 0.0
        )

    fine = metric(lambda r, a: 1.0)
    metrics(missing=missing, fine=lambda: fine)
    said = []
    result = evaluation.evaluate(["toy"], toy_registry, folder, tmp_path / "out", say=said.append)
    assert list(result.judged[0].figures) == ["toy/fine"] and "pip install network" in said[0]
    with pytest.raises(MissingError, match="pip install network"):
        evaluation.evaluate(["toy"], toy_registry, folder, tmp_path / "out", metrics=["missing"])
    with pytest.raises(UsageError, match="no metric 'fina'; did you mean 'fine'"):
        evaluation.evaluate(["toy"], toy_registry, folder, tmp_path / "out", metrics=["fina"])
    metrics(broken=broken)
    with pytest.raises(
        PluginError, match=r"plugin 'toy' .* the metric toy/broken, of .*ZeroDivisionError"
    ):
        evaluation.evaluate(["toy"], toy_registry, folder, tmp_path / "out")


def test_real_files_that_cannot_be_read_are_left_out_with_a_line(
    toy_registry, folder, tmp_path, monkeypatch
):
    import mdiff_toy

    plain = mdiff_toy.read

    def read(path):
        if Path(path).name == "snow.txt":
            raise UsageError("snow.txt is broken")
        return plain(path)

    monkeypatch.setattr(mdiff_toy, "read", read)
    said = []
    result = evaluation.evaluate(["toy"], toy_registry, folder, tmp_path / "out", say=said.append)
    assert said == ["left out: snow.txt is broken"]
    assert result.judged[0].figures["toy/mean"].real_samples == 3


def test_what_is_asked_must_be_there(toy_registry, folder, tmp_path):
    with pytest.raises(
        UsageError, match="no example of the split 'test'; its splits: held_out, train"
    ):
        evaluation.evaluate(["toy"], toy_registry, folder, tmp_path / "out", split="test")
    with pytest.raises(MissingError, match="there is no folder"):
        evaluation.evaluate(["toy"], toy_registry, tmp_path / "none", tmp_path / "out")
    with pytest.raises(UsageError, match="needs a text and a.txt has no caption"):
        evaluation.make("toy", [Example(path=Path("a.txt"))], toy_registry, tmp_path / "out")


# The command


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main(["eval", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_prints_a_table_or_an_object(toy, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "toy", "--data", folder, "--steps", 3)
    head, line = out.splitlines()
    assert (
        code == 0 and head.split()[:3] == ["metric", "good", "is"] and line.startswith("toy/mean")
    )
    assert "samples of toy: 4" in err and "4 of held_out, seed 0" in err
    assert (tmp_path / "outputs" / "eval-toy" / "evaluation.json").is_file()
    code, out, err = run(
        capsys,
        "toy",
        "--data",
        folder,
        "--json",
        "--quiet",
        "--compare",
        "free",
        "--out",
        "o",
        "--metrics",
        "mean",
    )
    found = json.loads(out)
    assert code == 0 and err == "" and len(found["models"]) == 2 and found["differences"]
    assert found["models"][0]["figures"][0]["metric"] == "toy/mean"
    record = json.loads(next((tmp_path / "outputs" / "eval-toy").glob("*.txt.json")).read_text())
    assert record["request"]["steps"] == 3


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "Missing option '--data'"),
        (["--data", "none"], 3, "there is no folder 'none'"),
        (["--data", "data", "--metrics", "meen"], 2, "did you mean 'mean'"),
        (["--data", "data", "--split", "x"], 2, "no example of the split"),
        (["--data", "data", "-o", "digit=1"], 2, "no option 'digit'"),
        (["--data", "data", "--made", "data", "--compare", "free"], 2, "leave one of them out"),
        (["--data", "data", "--count", "0"], 2, "--count"),
    ],
)
def test_a_wrong_command_says_what_is_wrong(
    toy, folder, tmp_path, monkeypatch, capsys, arguments, code, words
):
    monkeypatch.chdir(tmp_path)
    got, out, err = run(capsys, "toy", *arguments)
    assert got == code and out == "" and words in err.splitlines()[-1]
