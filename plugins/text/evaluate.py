"""How well an encoder finds the name for words that distillation never saw, beside its teacher.

``python -m mdiff.plugins.text.evaluate --sources DIR`` measures the shipped encoder on two
retrievals: keywords, a held-out look-up word -> the names of the emoji that carry it, among all names;
glosses, a held-out WordNet definition -> its first lemma, among the lemmas of 2000 definitions.
"""

import argparse
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mdiff.plugins.text.corpus import Corpus, read
from mdiff.plugins.text.mini import FOLDER, NETWORK, TOKENIZER, MiniEncoder, from_bytes
from mdiff.plugins.text.teacher import Teacher

Encode = Callable[[Sequence[str]], Tensor]
DEFINITIONS = 2000
TOPS = (1, 5)


def retrieval(
    encode: Encode, queries: Sequence[str], answers: Sequence[set[int]], candidates: Sequence[str]
) -> dict[str, float]:
    """Share of queries whose k nearest candidates (cosine) hold a right answer, for k of TOPS."""
    nearest = (encode(queries) @ encode(candidates).T).topk(max(TOPS), dim=-1).indices.tolist()
    return {
        f"top{k}": sum(
            bool(right & set(row[:k])) for right, row in zip(answers, nearest, strict=True)
        )
        / len(queries)
        for k in TOPS
    }


def keyword_task(corpus: Corpus) -> tuple[list[str], list[set[int]], list[str]]:
    """(held-out look-up words, right candidates of each, all emoji names)."""
    names = sorted(set(corpus.names.values()))
    position = {name: index for index, name in enumerate(names)}
    queries = corpus.held_keywords()
    carriers: dict[str, set[int]] = {query: set() for query in queries}
    for emoji, name in corpus.names.items():
        for word in corpus.keywords.get(emoji, ()):
            if word in carriers:
                carriers[word].add(position[name])
    return queries, [carriers[query] for query in queries], names


def gloss_task(corpus: Corpus) -> tuple[list[str], list[set[int]], list[str]]:
    """(held-out definitions, right candidate of each, first lemmas), lemmas distinct."""
    by_lemma = {synset.lemmas[0]: synset.gloss for synset in reversed(corpus.held_synsets())}
    lemmas = random.Random(0).sample(sorted(by_lemma), DEFINITIONS)
    return [by_lemma[lemma] for lemma in lemmas], [{index} for index in range(DEFINITIONS)], lemmas


def figures(ours: Encode, teacher: Encode, corpus: Corpus) -> dict[str, dict[str, float]]:
    """Per task: queries, top-1 and top-5 of both encoders, and their ratio."""
    report = {}
    for name, task in (("keywords", keyword_task(corpus)), ("glosses", gloss_task(corpus))):
        a, b = retrieval(ours, *task), retrieval(teacher, *task)
        agreement = (ours(task[0]) * teacher(task[0])).sum(-1).mean().item()
        report[name] = {
            "queries": float(len(task[0])),
            "cosine": round(agreement, 4),
            **{f"ours_{top}": round(a[top], 4) for top in a},
            **{f"teacher_{top}": round(b[top], 4) for top in b},
            **{f"ratio_{top}": round(a[top] / b[top], 4) for top in a},
        }
    return report


def note_probe(encoder: MiniEncoder) -> float:
    """Share of notes that a linear probe reads right, symbol by symbol, in phrases new to it."""
    seen = (
        "piano playing {}",
        "a soft {} on the flute",
        "{}",
        "violin, {}, loud",
        "notes {} and g4",
    )
    unseen = ("trumpet {}", "the note {} played by a harp", "a loud cello plays {}")
    inputs, symbols, _ = _note_states(encoder, seen)
    known = symbols.unique()
    target = F.one_hot(torch.searchsorted(known, symbols)).double()
    ridge = inputs.T @ inputs + 1e-2 * torch.eye(inputs.shape[1], dtype=torch.float64)
    solution = torch.linalg.solve(ridge, inputs.T @ target)
    inputs, symbols, notes = _note_states(encoder, unseen)
    wrong = notes[known[(inputs @ solution).argmax(-1)] != symbols]
    return 1 - len(wrong.unique()) / (int(notes.max()) + 1)


def _note_states(encoder: MiniEncoder, forms: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """(states (N, D + 1), ids (N,), which note (N,)) of the tokens that spell notes in phrases."""
    names = [f"{a}{sign}{n}" for a in "cdefgab" for sign in ("", "#", "b") for n in range(1, 8)]
    states, ids, notes = [], [], []
    for number, form in enumerate(forms):
        start = form.index("{")
        texts = [form.format(name) for name in names]
        for row, (text, tokens) in enumerate(zip(texts, encoder.encode(texts).tokens, strict=True)):
            encoding = encoder.tokenizer.encode(text)
            end = start + len(names[row])
            where = [
                place
                for place, (left, right) in enumerate(encoding.offsets)
                if start <= left < right <= end
            ]
            states.append(tokens[where])
            ids += [encoding.ids[place] for place in where]
            notes += [number * len(names) + row] * len(where)
    inputs = F.pad(torch.cat(states).double(), (0, 1), value=1.0)
    return inputs, torch.tensor(ids), torch.tensor(notes)


def in_chunks(encoder: MiniEncoder) -> Encode:
    """The encoder's pooled vectors, 256 texts at a time."""

    def encode(texts: Sequence[str]) -> Tensor:
        return torch.cat(
            [encoder.encode(texts[i : i + 256]).pooled for i in range(0, len(texts), 256)]
        )

    return encode


def evaluate(encoder: MiniEncoder, sources: Path) -> Mapping[str, object]:
    """Every figure of the encoder."""
    report = figures(in_chunks(encoder), Teacher(sources).encode, read(sources))
    return {**report, "note_probe": round(note_probe(encoder), 4)}


def unverified(folder: Path) -> MiniEncoder:
    """The encoder whose two files lie in ``folder``, whatever their digests."""
    return from_bytes((folder / NETWORK.name).read_bytes(), (folder / TOKENIZER.name).read_bytes())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sources", type=Path, required=True, help="packages; fetched if absent")
    parser.add_argument("--weights", type=Path, default=FOLDER, help="folder of the encoder")
    given = parser.parse_args()
    print(json.dumps(evaluate(unverified(given.weights), given.sources), indent=1))


if __name__ == "__main__":
    main()
