"""The toy's model: Gaussian data, for which the best denoiser is known in closed form."""

import torch
from torch import nn

from mdiff.core import schedules, tasks
from mdiff.core.denoiser import Denoiser
from mdiff.core.hooks import Model, Problem, Stage, Task, TextStates, text_encoder

SCHEDULE = schedules.cosine()
RATE = 8


class Net(nn.Module):
    """E[x_0 | x_t] for x_0 ~ N(mean, width^2), each value on its own."""

    def __init__(self):
        super().__init__()
        self.width = nn.Parameter(torch.rand(1))

    def forward(self, x, t, mean):
        alpha, sigma = (c[:, None, None].to(x) for c in SCHEDULE(t))
        gain = alpha * self.width**2 / (alpha**2 * self.width**2 + sigma**2)
        return mean[:, :, None].to(x) + gain * (x - alpha * mean[:, :, None].to(x))


class Encoder:
    width = 3
    pooled_width = 1

    def encode(self, texts):
        pooled = torch.tensor([[sum(map(ord, text)) % 17 / 4 - 2] for text in texts])
        length = max(len(text.split()) for text in texts)
        mask = torch.tensor([[i < len(text.split()) for i in range(length)] for text in texts])
        return TextStates(pooled, torch.zeros(len(texts), length, 3), mask)


def fitted(sample, shape):
    """The numbers of a file in a shape (1, N), as they are or resampled: (1, 1, N)."""
    values = sample["values"].float().reshape(1, 1, -1)
    return torch.nn.functional.interpolate(values, size=shape[-1], mode="linear")


def build(config, device, dtype):
    net = Net().to(device, dtype)
    encode = text_encoder("toy/letters").encode

    def prepare(request, carry):
        mean = encode([request.text or "x"]).pooled
        away = encode([request.negative]).pooled if request.negative else torch.zeros(1, 1)
        shape = (1, max(1, round((request.duration or 1) * RATE)))
        return Problem(
            shape=shape,
            cond={"mean": mean},
            uncond={"mean": away},
            given=tasks.given(request, carry, shape, fitted, middle=0.5),
            copies=2,
        )

    def choose(request, problem, x, carry):
        # of the two candidates, the one with the larger sum
        return {"coarse": x[x.sum((1, 2)).argmax()]}

    def again(request, carry):
        return Problem(
            shape=tuple(carry["coarse"].shape), cond={"mean": carry["coarse"].mean()[None, None]}
        )

    def fine(request, problem, x, carry):
        return {"fine": carry["coarse"] + 0.1 * x[0]}

    def decode(request, problem, x, carry):
        return {"sample": {"values": carry["fine"][0].float() * request.options["gain"]}}

    def draw(x0):
        from mdiff_toy import thumbnail

        return thumbnail({"values": x0[0, 0]})

    denoiser = Denoiser(net, SCHEDULE, predicts="x0", time="t")
    return Model(
        modules={"net": net},
        stages=(
            Stage(name="coarse", prepare=prepare, denoiser=denoiser, finish=choose),
            Stage(name="fine", prepare=again, denoiser=denoiser, finish=fine, preview=draw),
            Stage(
                name="decode", prepare=lambda r, c: Problem(shape=()), denoiser=None, finish=decode
            ),
        ),
    )


def task(model, part, settings):
    """The network learns numbers from files, `RATE` at a time, and forgets the text of a share of them."""
    from mdiff_toy import read

    drop = settings.get("drop", 0.0)
    encode = text_encoder("toy/letters").encode

    def rows(example):
        values = read(example.path)["values"].float()
        mean = encode([example.texts[0] if example.texts else "x"]).pooled[0]
        return [
            {"values": part[None], "mean": mean} for part in values.split(RATE) if len(part) == RATE
        ]

    def batch(rows, draws):
        return rows["values"], {"mean": rows["mean"] * ~draws.chance(drop)[:, None]}

    denoiser = Denoiser(model.modules[part], SCHEDULE, predicts="x0", time="t")
    return Task(module=model.modules[part], read=rows, denoiser=denoiser, batch=batch)
