"""Distillation of MiniLM into ``text/mini``.

``python -m mdiff.plugins.text.distil --sources DIR --out DIR --minutes M``

1. Collect texts (corpus), label them with the teacher once, keep the labels in ``out``.
2. Learn the vocabulary. Give each token the mean label of the texts that it stands in, short texts
   counting most, and project it on the labels' leading directions; the readout starts as the
   inverse projection. The network is thus a bag of meanings before its first step.
3. Train the whole on cosine distance plus agreement with the teacher's in-batch similarities, and
   keep a moving average of the weights.
4. Grow the vocabulary: new words cost no training, only their initial vectors, carried over.
"""

import argparse
import hashlib
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mdiff.core.training import Budget, ema_decay
from mdiff.plugins.text.corpus import read
from mdiff.plugins.text.evaluate import evaluate, unverified
from mdiff.plugins.text.mini import NETWORK, TOKENIZER, MiniNet, like
from mdiff.plugins.text.teacher import Teacher, equal_lengths
from mdiff.plugins.text.tokens import grown, train_tokenizer

COMPOSITIONS, CAPTIONS = 140_000, 120_000
VOCABULARY, PIECES, GROWN = 12_000, 3_500, 22_000
BATCH_TOKENS = 2048
TEMPERATURE, SIMILARITY = 0.05, 0.1


def label(texts: Sequence[str], sources: Path, out: Path) -> Tensor:
    """The teacher's vectors (N, 384), float16; kept in ``out`` for the next run on these texts."""
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]
    path = out / f"labels-{digest}.safetensors"
    if not path.exists():
        save_file({"labels": Teacher(sources, torch.bfloat16).encode(texts, 8192).half()}, path)
    return load_file(path)["labels"]


def initialise(net: MiniNet, ids: Sequence[Sequence[int]], labels: Tensor) -> None:
    """Makes the untrained network a bag of meanings (module docstring, 2.)."""
    vocabulary, width = net.token.weight.shape
    total, weight, seen = (
        torch.zeros(vocabulary, labels.shape[1]),
        torch.zeros(vocabulary),
        torch.zeros(vocabulary),
    )
    for rows, batch in equal_lengths(ids, 1 << 16):
        if batch.shape[1] == 1:
            continue
        words = batch[:, 1:]  # the start token means nothing
        share = words.shape[1] ** -4.0
        flat = words.flatten()
        total.index_add_(
            0, flat, labels[rows].float().repeat_interleave(words.shape[1], 0), alpha=share
        )
        weight.index_add_(0, flat, torch.full(flat.shape, share))
        seen.index_add_(0, flat, torch.ones(flat.shape))
    known = weight > 0
    mean = labels.float().mean(0)
    meaning = torch.zeros_like(total)
    meaning[known] = total[known] / weight[known].unsqueeze(-1) - mean
    _, directions = torch.linalg.eigh(torch.cov(labels[:: max(1, len(labels) // 50_000)].float().T))
    basis = directions[:, -width:]
    projected = meaning @ basis
    scale = 1 / projected[known].square().mean().sqrt()
    with torch.no_grad():
        net.token.weight.copy_(projected * scale)
        net.readout.weight.copy_(basis)
        net.readout.bias.copy_(mean * scale)
        # Rare tokens say more: inverse frequency as in tf-idf; the start token says nothing.
        net.salience.weight.copy_(0.4 * torch.log(len(ids) / (1 + seen)).unsqueeze(-1))
        net.salience.weight[:3] = -3.0


def grow(
    net: MiniNet,
    tokenizer: Tokenizer,
    larger: Tokenizer,
    ids: Sequence[Sequence[int]],
    labels: Tensor,
) -> MiniNet:
    """The trained network with the vocabulary of ``larger``, without training.

    Old tokens, and so every text without new ones, keep their states to the bit. A new token gets
    its initial vector, moved as training moved the initial vectors of the old ones (least squares).
    ``ids`` are of ``larger``.
    """
    state = net.state_dict()
    grown_net = like(state, larger.get_vocab_size())
    initialise(grown_net, ids, labels)
    initial = grown_net.state_dict()
    count = tokenizer.get_vocab_size()
    for name in ("token.weight", "salience.weight"):
        before = F.pad(initial[name], (0, 1), value=1.0)
        moves = torch.linalg.lstsq(before[:count], state[name]).solution
        state[name] = torch.cat([state[name], before[count:] @ moves])
    grown_net.load_state_dict(state)
    return grown_net


def loss(pooled: Tensor, target: Tensor) -> Tensor:
    """Cosine distance, plus KL of the similarities to the batch's teacher vectors."""
    distance = 1 - (pooled * target).sum(-1).mean()
    ours = (pooled @ target.T / TEMPERATURE).log_softmax(-1)
    theirs = (target @ target.T / TEMPERATURE).log_softmax(-1)
    return distance + SIMILARITY * F.kl_div(ours, theirs, log_target=True, reduction="batchmean")


def optimiser(net: MiniNet) -> torch.optim.Optimizer:
    """AdamW; a rate for each scale: tables (entries near 1), blocks, readout (orthonormal)."""
    tables = [net.token.weight, net.position.weight, net.salience.weight]
    groups = [
        {"params": tables, "lr": 6e-3, "weight_decay": 0.0},
        {
            "params": [*net.blocks.parameters(), *net.weigh.parameters()],
            "lr": 1.5e-3,
            "weight_decay": 0.01,
        },
        {"params": [*net.readout.parameters()], "lr": 3e-4, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def epochs(ids: Sequence[Sequence[int]], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches without end: (rows (B,), ids (B, L)), texts of one length each."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(range(len(ids)), len(ids))
        batches = list(equal_lengths([ids[row] for row in order], BATCH_TOKENS))
        rng.shuffle(batches)
        rows = torch.tensor(order)
        yield from ((rows[batch_rows], batch) for batch_rows, batch in batches)


def update(
    net: MiniNet, steps: torch.optim.Optimizer, ids: Tensor, target: Tensor, clip: float = 1.0
) -> float:
    """One step on ids (B, L) without padding and teacher vectors (B, 384); the loss before it."""
    # On short sequences the plain attention kernel is faster on a processor than the fused one.
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        pooled = net(ids).pooled
    value = loss(pooled, target)
    steps.zero_grad()
    value.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
    steps.step()
    return value.item()


def train(
    net: MiniNet, ids: Sequence[Sequence[int]], labels: Tensor, budget: Budget
) -> dict[str, Tensor]:
    """Trains ``net`` in place until the budget is used up; returns the averaged weights."""
    steps = optimiser(net)
    rates = [group["lr"] for group in steps.param_groups]
    average = {key: value.clone() for key, value in net.state_dict().items()}
    # Processor time: a neighbour on the machine must not cut the training short.
    start, recent = time.process_time(), 0.0
    for step, (rows, batch) in enumerate(epochs(ids, budget.seed)):
        progress = budget.progress(step, time.process_time() - start)
        if progress >= 1:
            break
        factor = budget.rate_at(step, progress) / budget.rate
        for group, rate in zip(steps.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        value = update(net, steps, batch, labels[rows].float(), budget.clip)
        keep = ema_decay(budget.decay, step)
        torch._foreach_lerp_(list(average.values()), list(net.state_dict().values()), 1 - keep)
        recent = value if step == 0 else 0.99 * recent + 0.01 * value
        if step % 100 == 0:
            print(f"step {step}  {100 * progress:.0f} %  loss {recent:.4f}", flush=True)
    return average


def token_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of every text, start token first."""
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]


def save(average: dict[str, Tensor], tokenizer: Tokenizer, out: Path) -> None:
    """Writes the encoder's two files into ``out``: float16 weights, int8 token table, tokenizer."""
    table = average["token.weight"]
    scale = table.abs().amax(1, keepdim=True).clamp(min=1e-6) / 127
    state = {key: value.half() for key, value in average.items() if key != "token.weight"}
    state |= {"token.levels": (table / scale).round().to(torch.int8), "token.scale": scale}
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
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the labels and of the result"
    )
    parser.add_argument("--minutes", type=float, default=22, help="processor minutes of training")
    parser.add_argument("--keep", type=Path, help="lines whose words get no token of their own")
    parser.add_argument("--threads", type=int, default=1, help="processor cores")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    given.out.mkdir(parents=True, exist_ok=True)
    texts = read(given.sources).texts(COMPOSITIONS, CAPTIONS)
    labels = label(texts, given.sources, given.out)
    tokenizer = train_tokenizer(texts, VOCABULARY, PIECES)
    ids = token_ids(tokenizer, texts)
    net = MiniNet(VOCABULARY)
    initialise(net, ids, labels)
    budget = Budget(minutes=given.minutes, warmup=100, decay=0.998)
    net.load_state_dict(train(net, ids, labels, budget))
    keep = given.keep.read_text().splitlines() if given.keep else ()
    larger = grown(tokenizer, texts, GROWN, Teacher(given.sources).words(), keep)
    net = grow(net, tokenizer, larger, token_ids(larger, texts), labels)
    save(net.state_dict(), larger, given.out)
    print(json.dumps(evaluate(unverified(given.out), given.sources), indent=1))


if __name__ == "__main__":
    main()
