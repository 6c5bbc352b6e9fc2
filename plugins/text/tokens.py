"""The tokenizer of ``text/mini``: lower-case word pieces in which every musical note has clean tokens."""

from collections import Counter
from collections.abc import Sequence

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

LENGTH = 64  # tokens of the longest text, start and end token among them
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
PAD, UNK, START, END = range(4)
PREFIX = "##"
FLAT = "♭"
QUALITIES = "maj|min|dim|aug|sus"


def tokenizer_of(vocabulary: Sequence[str]) -> Tokenizer:
    """Greedy word pieces over a vocabulary whose first entries are `SPECIAL`."""
    pieces = {piece: row for row, piece in enumerate(vocabulary)}
    tokenizer = _rules()
    tokenizer.model = models.WordPiece(
        vocab=pieces, unk_token=SPECIAL[UNK], continuing_subword_prefix=PREFIX
    )
    ends = [(SPECIAL[row], row) for row in (START, END)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[START]} $A {SPECIAL[END]}", special_tokens=ends
    )
    tokenizer.enable_truncation(LENGTH)
    return tokenizer


def chosen(pieces: Sequence[str], texts: Sequence[str], size: int) -> list[str]:
    """The `size` entries that spell these texts best: specials, single signs, then the pieces used most."""
    plain = [p for p in pieces if p.isascii() and not p.startswith("[")]
    signs = [FLAT, *(p for p in plain if len(p.removeprefix(PREFIX)) == 1)]
    whole = [*SPECIAL, *signs, *(p for p in plain if len(p.removeprefix(PREFIX)) > 1)]
    counts: Counter[str] = Counter()
    for encoding in tokenizer_of(whole).encode_batch(list(texts)):
        counts.update(encoding.tokens)
    used = sorted(whole[len(SPECIAL) + len(signs) :], key=lambda piece: -counts[piece])
    return [*SPECIAL, *signs, *used][:size]


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
    tokenizer = Tokenizer(models.WordPiece(unk_token=SPECIAL[UNK]))
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
