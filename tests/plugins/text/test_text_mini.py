"""The shipped text encoder: what models may rely on, and that its recipe learns."""

import hashlib
import string
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer

from mdiff.core import weights
from mdiff.core.errors import IntegrityError, MissingError
from mdiff.core.hooks import TextStates
from mdiff.core.training.draws import Draws
from mdiff.core.training.log import Log
from mdiff.core.training.loop import train
from mdiff.core.training.optimizers import Optimizer
from mdiff.core.training.recipe import Batch, Budget, Recipe
from mdiff.plugins.text import corpus, distil, evaluate, mini, sources, tokens
from mdiff.plugins.text.mini import MiniEncoder, MiniNet
from mdiff.plugins.text.teacher import Teacher

NOTES = [
    f"{letter}{sign}{octave}" for letter in "CDEFGAB" for sign in ("", "#", "b") for octave in "34"
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Networks this small are slower on several threads, and far slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def encoder() -> MiniEncoder:
    return mini.shipped()


def cosine(encoder: MiniEncoder, a: str, b: str) -> float:
    first, second = encoder.encode([a, b]).pooled
    return float(first @ second)


def test_shapes_norms_and_types(encoder: MiniEncoder) -> None:
    states = encoder.encode(["a red apple, 3D", "piano"])
    assert isinstance(states, TextStates)
    assert states.pooled.shape == (2, encoder.pooled_width) == (2, 384)
    assert states.tokens.shape == (2, states.mask.shape[1], encoder.width)
    assert states.mask.dtype is torch.bool and states.mask.sum(1).tolist() == [8, 3]
    assert states.pooled.dtype is states.tokens.dtype is torch.float32
    torch.testing.assert_close(states.pooled.norm(dim=-1), torch.ones(2))
    assert states.tokens[~states.mask].abs().max() == 0
    assert not states.pooled.requires_grad


def test_a_text_alone_is_the_text_in_a_batch(encoder: MiniEncoder) -> None:
    texts = ["dog", "a small blue fish swimming slowly in the dark sea at night", "", "C#4 piano"]
    together = encoder.encode(texts)
    for row, text in enumerate(texts):
        alone = encoder.encode([text])
        length = alone.mask.shape[1]
        assert together.mask[row].sum() == length
        torch.testing.assert_close(together.pooled[row], alone.pooled[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(
            together.tokens[row, :length], alone.tokens[0], atol=1e-5, rtol=0
        )


def test_the_same_text_gives_the_same_bits(encoder: MiniEncoder) -> None:
    first, again = (
        encoder.encode(["violin, G#3, soft"]),
        mini.shipped().encode(["violin, G#3, soft"]),
    )
    assert torch.equal(first.pooled, again.pooled) and torch.equal(first.tokens, again.tokens)


@pytest.mark.parametrize(
    ("text", "near", "far"),
    [
        ("a sad person weeping", "crying face", "fire engine"),
        ("puppy", "dog face", "airplane"),
        ("a big truck for putting out fires", "fire engine", "red apple"),
        ("a stringed instrument played with a bow", "violin", "snare drum"),
        ("automobile", "car", "banana"),
        ("very happy", "grinning face", "skull"),
        ("a kitten", "cat", "trumpet"),
        ("sailing vessel", "boat", "guitar"),
    ],
)
def test_meaning(encoder: MiniEncoder, text: str, near: str, far: str) -> None:
    assert cosine(encoder, text, near) > cosine(encoder, text, far) + 0.1


def test_case_and_accents_do_not_matter(encoder: MiniEncoder) -> None:
    a, b = encoder.encode(["A Café, 3D", "a cafe, 3d"]).pooled
    assert torch.equal(a, b)


def test_notes_have_clean_tokens(encoder: MiniEncoder) -> None:
    def words(text: str) -> list[str]:
        return encoder.tokenizer.encode(text).tokens[1:-1]

    assert words("c4") == ["c", "4"]
    assert words("F#3 piano") == ["f", "#", "3", "piano"]
    assert words("F♯3") == ["f", "#", "3"]
    assert words("Bb3") == ["b", "♭", "3"] and words("B3") == ["b", "3"]
    assert words("Eb minor, 12") == ["e", "♭", "minor", ",", "1", "2"]
    assert words("Cmaj7") == ["c", "maj", "7"]


def test_notes_stay_apart(encoder: MiniEncoder) -> None:
    states = encoder.encode([f"piano playing {note}" for note in NOTES])
    kept = torch.nn.functional.normalize(states.tokens.sum(1), dim=-1)
    likeness = kept @ kept.T - torch.eye(len(NOTES))
    assert likeness.max() < 0.999
    assert evaluate.note_probe(encoder) > 0.99


def test_long_empty_and_unknown_texts(encoder: MiniEncoder) -> None:
    long = encoder.encode(
        ["a very long text about everything " * 50, "", "\u4f60\u597d \U0001f3b9"]
    )
    assert long.mask.sum(1).tolist()[:2] == [tokens.LENGTH, 2]
    assert long.mask[2].sum() > 2
    assert long.pooled.isfinite().all() and long.tokens.isfinite().all()
    assert encoder.encode([]).pooled.shape == (0, 384)


def test_files_are_small_and_are_the_ones_pinned() -> None:
    files = (mini.NETWORK, mini.TOKENIZER)
    assert sum((mini.FOLDER / file.name).stat().st_size for file in files) <= 12_000_000
    for file in files:
        assert hashlib.sha256((mini.FOLDER / file.name).read_bytes()).hexdigest() == file.sha256
    with pytest.raises(IntegrityError, match="should have"):
        weights.verified(mini.FOLDER / mini.NETWORK.name, mini.TOKENIZER)


def toy() -> tuple[list[str], Tokenizer]:
    texts = [
        f"{colour} {thing}" for colour in ("red", "blue", "big") for thing in ("dog", "car", "sea")
    ]
    pieces = [*string.ascii_lowercase, *(f"##{c}" for c in string.ascii_lowercase), "red", "dog"]
    return texts, tokens.tokenizer_of(tokens.chosen(pieces, texts, 56))


def test_the_vocabulary_is_what_the_texts_need() -> None:
    pieces = ["a", "b", "##a", "##b", "[unused1]", "\u4f60", "abba", "##bb", "ab", "ba"]
    found = tokens.chosen(pieces, ["abba abba", "ab"], 11)
    assert found == [*tokens.SPECIAL, tokens.FLAT, "a", "b", "##a", "##b", "abba", "ab"]


def toy_net(tokenizer: Tokenizer) -> MiniNet:
    torch.manual_seed(0)
    return MiniNet(tokenizer.get_vocab_size(), width=64, depth=1, hidden=96)


def test_distillation_learns_a_toy_corpus(tmp_path: Path) -> None:
    texts, tokenizer = toy()
    labels = torch.nn.functional.normalize(torch.randn(len(texts), 64), dim=-1)
    batches = distil.Batches(distil.token_ids(tokenizer, texts))
    net = toy_net(tokenizer)

    losses = []

    def loss(draws: Draws) -> torch.Tensor:
        rows, ids = batches.draw(draws.generator)
        value = distil.loss(net(ids).pooled, labels[rows])
        losses.append(value.item())
        return value

    recipe = Recipe(
        model="text/toy",
        part="network",
        optimizer=Optimizer(rate=2e-3, warmup=1),
        batch=Batch(size=1),
        budget=Budget(steps=60),
    )
    train(net, loss, tmp_path, recipe, log=Log(tmp_path, quiet=True))
    assert losses[-1] < 0.3 * losses[0]


def test_batches_draw_every_text_alike() -> None:
    batches = distil.Batches([[1], [2, 3], [2, 3, 4, 5], [2, 6], [2, 3, 4, 7]])
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(5)
    for _ in range(200):
        rows, ids = batches.draw(generator)
        assert ids.shape == (len(rows), len(batches.ids[rows[0]]))
        assert [tuple(row) for row in ids.tolist()] == [tuple(batches.ids[row]) for row in rows]
        counts += torch.bincount(torch.tensor(rows), minlength=5)
    torch.testing.assert_close(counts / counts.mean(), torch.ones(5), atol=0.25, rtol=0)


def test_it_starts_as_the_teacher() -> None:
    """A vocabulary and sizes that the two share: at the start they say the same."""
    torch.manual_seed(0)
    _, tokenizer = toy()
    net = MiniNet(tokenizer.get_vocab_size(), depth=1).eval()
    teacher = SimpleNamespace(weights=teacher_weights(tokenizer), tokenizer=tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distil, "SPELT", {})  # this teacher has a sign for flats
        distil.initialise(net, tokenizer, teacher)
    reference = Teacher.__new__(Teacher)
    reference.weights = teacher.weights
    ids = torch.tensor(distil.token_ids(tokenizer, ["red dog", "dog red"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mdiff.plugins.text.teacher.DEPTH", 1)
        expected = torch.nn.functional.normalize(reference._forward(ids).mean(1), dim=-1)
    torch.testing.assert_close(net(ids).pooled, expected, atol=1e-5, rtol=0)


def teacher_weights(tokenizer: Tokenizer) -> dict[str, torch.Tensor]:
    """Random weights under the teacher's names, one layer of them."""
    at, width, hidden = "encoder.layer.0.", 384, 1536
    shapes = {
        "embeddings.word_embeddings": (tokenizer.get_vocab_size(), width),
        "embeddings.position_embeddings": (tokens.LENGTH, width),
        "embeddings.token_type_embeddings": (2, width),
        **{f"{at}attention.self.{name}": (width, width) for name in ("query", "key", "value")},
        f"{at}attention.output.dense": (width, width),
        f"{at}intermediate.dense": (hidden, width),
        f"{at}output.dense": (width, hidden),
    }
    found = {f"{name}.weight": torch.randn(shape) * 0.1 for name, shape in shapes.items()}
    found |= {
        f"{name}.bias": torch.randn(shape[0]) * 0.1
        for name, shape in shapes.items()
        if name.startswith(at)
    }
    for name in ("embeddings.", f"{at}attention.output.", f"{at}output."):
        found[f"{name}LayerNorm.weight"] = 1 + torch.randn(width) * 0.1
        found[f"{name}LayerNorm.bias"] = torch.randn(width) * 0.1
    return found


def test_a_matrix_packs_into_four_bits() -> None:
    weight = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    packed = mini.pack(weight)
    assert packed["levels"].dtype is torch.uint8 and packed["levels"].shape == (5, 48)
    back = mini.unpack(**packed)
    assert (back - weight).square().mean() < 0.015 * weight.square().mean()
    # what was rounded once stays, and training sees just what is stored
    torch.testing.assert_close(mini.rounded(weight), back, atol=1e-6, rtol=0)
    weight.requires_grad_()
    mini.rounded(weight).sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_a_saved_encoder_comes_back(tmp_path: Path) -> None:
    texts, tokenizer = toy()
    net = toy_net(tokenizer)
    distil.save(net.state_dict(), tokenizer, tmp_path)
    back = evaluate.unverified(tmp_path).encode(texts)
    # in training mode the network rounds as the file does
    ids, mask = tokens.padded(tokenizer, texts)
    torch.testing.assert_close(net.train()(ids, mask).pooled, back.pooled, atol=2e-3, rtol=0)


def test_held_out_strings_are_no_training_texts() -> None:
    words = [f"word {number}" for number in range(400)]
    synsets = [
        sources.Synset(
            lemmas=(f"lemma {n}", f"word {n}"), gloss=f"the gloss {n}", examples=(f"word {n}",)
        )
        for n in range(400)
    ]
    small = corpus.Corpus(
        names={"x": "name", "y": "word 3"}, keywords={"x": tuple(words)}, synsets=synsets
    )
    kept_out = small.kept_out()
    texts = small.texts(compositions=50, captions=50)
    assert 10 < len(small.held_keywords()) < 40 and 10 < len(small.held_synsets()) < 40
    assert not kept_out & set(texts) and len(set(texts)) == len(texts)
    assert texts == small.texts(compositions=50, captions=50)


def test_retrieval_counts_any_right_answer() -> None:
    def encode(texts: list[str]) -> torch.Tensor:
        return torch.eye(8)[[int(text) for text in texts]]

    found = evaluate.retrieval(encode, ["0", "1"], [{0, 3}, {5}], [str(n) for n in range(8)])
    assert found["top1"] == 0.5


def test_absent_and_wrong_packages_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = sources.PACKAGES["names"]
    absent = sources.Package(file=wanted.file, fetch=("no-such-client",), sha256=wanted.sha256)
    monkeypatch.setattr(sources, "PACKAGES", {"names": absent})
    with pytest.raises(MissingError, match="no-such-client"):
        sources.package("names", tmp_path)
    (tmp_path / wanted.file).write_bytes(b"something else")
    with pytest.raises(IntegrityError, match="delete it"):
        sources.package("names", tmp_path)
