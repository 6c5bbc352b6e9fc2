"""Distillation of MiniLM into ``text/mini``.

``python -m mdiff.plugins.text.distil --sources DIR --out DIR --minutes M``

1. Collect texts (corpus) and choose from the teacher's word pieces those that they need.
2. Start from the teacher: its layers, and its input vectors of those pieces.
3. Train the whole, rounded to four bits as it will be stored, on cosine distance to the teacher's vectors plus
   agreement with its in-batch similarities; keep a moving average of the weights.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from mdiff.core.training.draws import Draws
from mdiff.core.training.log import Log
from mdiff.core.training.loop import train
from mdiff.core.training.optimizers import Optimizer
from mdiff.core.training.recipe import Average, Batch, Budget, Recipe
from mdiff.plugins.text.corpus import read
from mdiff.plugins.text.evaluate import evaluate, unverified
from mdiff.plugins.text.mini import NETWORK, TOKENIZER, MiniNet, pack
from mdiff.plugins.text.teacher import Teacher
from mdiff.plugins.text.tokens import FLAT, chosen, tokenizer_of

COMPOSITIONS, CAPTIONS = 140_000, 120_000
VOCABULARY = 24_000
BATCH_TOKENS = 2048
TEMPERATURE, SIMILARITY = 0.05, 0.1
SPELT = {FLAT: "flat"}  # what the teacher has no sign for


def initialise(net: MiniNet, tokenizer: Tokenizer, teacher: Teacher) -> None:
    """Copies the teacher into the network (module docstring, 2.)."""
    w = teacher.weights
    table = w["embeddings.word_embeddings.weight"].float()
    places = (
        w["embeddings.position_embeddings.weight"] + w["embeddings.token_type_embeddings.weight"][0]
    )
    known = teacher.tokenizer.get_vocab()
    with torch.no_grad():
        for token, row in tokenizer.get_vocab().items():
            net.token.weight[row] = table[known[SPELT.get(token, token)]]
        net.position.weight.copy_(places[: len(net.position.weight)])
    state = {f"norm.{kind}": w[f"embeddings.LayerNorm.{kind}"] for kind in ("weight", "bias")}
    for i in range(len(net.blocks)):
        at = f"encoder.layer.{i}."
        for kind in ("weight", "bias"):
            qkv = [w[f"{at}attention.self.{name}.{kind}"] for name in ("query", "key", "value")]
            state |= {
                f"blocks.{i}.qkv.{kind}": torch.cat(qkv),
                f"blocks.{i}.out.{kind}": w[f"{at}attention.output.dense.{kind}"],
                f"blocks.{i}.norm_attention.{kind}": w[f"{at}attention.output.LayerNorm.{kind}"],
                f"blocks.{i}.up.{kind}": w[f"{at}intermediate.dense.{kind}"],
                f"blocks.{i}.down.{kind}": w[f"{at}output.dense.{kind}"],
                f"blocks.{i}.norm_mlp.{kind}": w[f"{at}output.LayerNorm.{kind}"],
            }
    tables = {k: v for k, v in net.state_dict().items() if k.startswith(("token.", "position."))}
    net.load_state_dict({**state, **tables})


def loss(pooled: Tensor, target: Tensor) -> Tensor:
    """Cosine distance, plus KL of the similarities to the batch's teacher vectors."""
    distance = 1 - (pooled * target).sum(-1).mean()
    ours = (pooled @ target.T / TEMPERATURE).log_softmax(-1)
    theirs = (target @ target.T / TEMPERATURE).log_softmax(-1)
    return distance + SIMILARITY * F.kl_div(ours, theirs, log_target=True, reduction="batchmean")


class Batches:
    """Batches of texts of one length each, every text as likely as any other: (row numbers, ids (B, L))."""

    def __init__(self, ids: Sequence[Sequence[int]]) -> None:
        self.rows: dict[int, list[int]] = {}
        for row, tokens in enumerate(ids):
            self.rows.setdefault(len(tokens), []).append(row)
        self.ids = ids
        self.lengths = sorted(self.rows)
        self.share = torch.tensor([float(n * len(self.rows[n])) for n in self.lengths])

    def draw(self, generator: torch.Generator) -> tuple[list[int], Tensor]:
        length = self.lengths[int(self.share.multinomial(1, generator=generator))]
        among = self.rows[length]
        picks = torch.randint(len(among), (max(2, BATCH_TOKENS // length),), generator=generator)
        rows = [among[i] for i in picks.tolist()]
        return rows, torch.tensor([self.ids[row] for row in rows])


def token_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of every text, start and end token among them."""
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]


def save(average: dict[str, Tensor], tokenizer: Tokenizer, out: Path) -> None:
    """Writes the encoder's two files into ``out``: four-bit matrices, the small rest in half precision, tokenizer."""
    state: dict[str, Tensor] = {}
    for name, value in average.items():
        if value.ndim == 2 and not name.startswith("position."):
            state |= {f"{name}.{part}": tensor for part, tensor in pack(value).items()}
        else:
            state[name] = value.half()
    save_file(state, out / NETWORK.name)
    tokenizer.save(str(out / TOKENIZER.name), pretty=False)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sources", type=Path, required=True, help="folder of the packages, filled if empty"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of run and result")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--threads", type=int, default=1, help="processor cores")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    given.out.mkdir(parents=True, exist_ok=True)
    teacher = Teacher(given.sources, torch.bfloat16)
    texts = read(given.sources).texts(COMPOSITIONS, CAPTIONS)
    tokenizer = tokenizer_of(chosen(list(teacher.tokenizer.get_vocab()), texts, VOCABULARY))
    batches = Batches(token_ids(tokenizer, texts))
    net = MiniNet(VOCABULARY)
    initialise(net, tokenizer, Teacher(given.sources))

    def agree(draws: Draws) -> Tensor:
        rows, ids = batches.draw(draws.generator)
        target = teacher.encode([texts[row] for row in rows]).clone()
        return loss(net(ids).pooled, target)

    recipe = Recipe(
        model="text/mini",
        part="network",
        optimizer=Optimizer(rate=1e-4, warmup=50),
        average=Average(decays=(0.99,)),
        batch=Batch(size=1),  # a draw is one batch of texts of one length
        budget=Budget(minutes=given.minutes),
    )
    run = given.out / "run"
    average = train(net, agree, run, recipe, log=Log(run)).state("0.99")
    save(average, tokenizer, given.out)
    print(json.dumps(evaluate(unverified(given.out), given.sources), indent=1))


if __name__ == "__main__":
    main()
