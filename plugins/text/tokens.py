"""The tokenizer of ``text/mini``: lower-case BPE in which every musical note has clean tokens."""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

LENGTH = 64  # tokens of the longest text, the start token among them
SPECIAL = ("[PAD]", "[UNK]", "[BOS]")
PAD, UNK, BOS = range(3)
PREFIX = "##"
QUALITIES = "maj|min|dim|aug|sus"


def train_tokenizer(texts: Sequence[str], size: int, pieces: int) -> Tokenizer:
    """A BPE of ``pieces`` entries, filled up to ``size`` with the commonest whole words.

    Whole words are looked up before any merge, so that no entry is spent on the way to one.
    """
    tokenizer = _rules()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=pieces,
            special_tokens=list(SPECIAL),
            initial_alphabet=list("#♭0123456789abcdefghijklmnopqrstuvwxyz"),
            limit_alphabet=100,
            continuing_subword_prefix=PREFIX,
            show_progress=False,
        ),
    )
    learnt = json.loads(tokenizer.to_str())["model"]
    tokenizer.model = models.BPE(
        vocab=_filled(learnt["vocab"], size, _counts(tokenizer, texts)),
        merges=[tuple(merge) for merge in learnt["merges"]],
        unk_token=SPECIAL[UNK],
        continuing_subword_prefix=PREFIX,
        ignore_merges=True,
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[BOS]} $A", special_tokens=[(SPECIAL[BOS], BOS)]
    )
    tokenizer.enable_truncation(LENGTH)
    return tokenizer


def grown(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    size: int,
    preferred: Collection[str] = (),
    keep: Iterable[str] = (),
) -> Tokenizer:
    """``tokenizer`` with more whole words, up to ``size`` entries; all that it had stays as it was.

    The commonest words come first, ``preferred`` ones counting fourfold. Words of the texts in
    ``keep`` go on being spelt as before: models may have learnt with them.
    """
    counts, kept = _counts(tokenizer, texts), _counts(tokenizer, keep)
    score = {w: n * (4 if w in preferred else 1) for w, n in counts.items() if w not in kept}
    state = json.loads(tokenizer.to_str())
    state["model"]["vocab"] = _filled(state["model"]["vocab"], size, score)
    return Tokenizer.from_str(json.dumps(state))


def padded(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids (B, L), padded at the end, and their mask (B, L), true at real tokens."""
    rows = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    longest = max(map(len, rows), default=1)
    ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = True
    return ids, mask


def _rules() -> Tokenizer:
    """No vocabulary yet: lower case, no accents, single digits, notes as letter, sign, octave."""
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL[UNK]))
    # In "bb3" and "eb minor" the second letter is an accidental, not the note B.
    flat = rf"(?<=[^a-z0-9][a-g]|\A[a-g])b(?=[0-9]|\s+(?:{QUALITIES}|seventh))"
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace("♯", "#"),
            normalizers.Replace(Regex(flat), "♭"),
        ]
    )
    chord = rf"(?<![a-z0-9])[a-g](?=(?:{QUALITIES})(?![a-z]))"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s+"), "removed"),
            pre_tokenizers.Split(Regex(r"[0-9]|[^\w\s]|_"), "isolated"),
            pre_tokenizers.Split(Regex(chord), "isolated"),
        ]
    )
    return tokenizer


def _filled(vocabulary: dict[str, int], size: int, score: Mapping[str, int]) -> dict[str, int]:
    """``vocabulary`` with the words of the highest scores at its end."""
    vocabulary = dict(vocabulary)
    for word in sorted(score, key=lambda word: -score[word]):
        if len(vocabulary) >= size:
            break
        vocabulary.setdefault(word, len(vocabulary))
    return vocabulary


def _counts(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[str]:
    """How often each word occurs, words being what is split before any merge."""
    counts: Counter[str] = Counter()
    for text in texts:
        normal = tokenizer.normalizer.normalize_str(text)
        counts.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal))
    return counts
