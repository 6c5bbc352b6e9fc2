"""What the core costs a step beside the network, against the diffusers scheduler of the same name, in turn, in one run.

    python benchmarks/core_overhead.py

The claim: at most 0.7 of its time, with classifier-free guidance on in both. The network does nothing and the tensor is
tiny, so what is left is the core's own; the peer's loop is that of its pipelines and models (the batch doubled, scaled,
given a time per row, split, combined, stepped). Set-up and the first step are not counted; the time is the thread's,
so that other load does not count either.
"""

import statistics
import time
from collections.abc import Callable

import diffusers
import torch
from torch import Tensor

from mdiff.core import Denoiser, grids, guidance, noise, sampling, schedules

STEPS, RUNS, SHAPE, SCALE = 50, 41, (4, 8, 8), 5.0
PEERS = {
    "euler": "EulerDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}


def net(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
    return x


def ours(sampler: str) -> float:
    denoise = guidance.classifier_free(
        Denoiser(net, schedules.scaled_linear(), time="index"),
        cond={"c": torch.ones(1, 8)},
        uncond={"c": torch.zeros(1, 8)},
        scale=SCALE,
    )
    streams = noise.from_seeds([0], SHAPE)
    states = sampling.steps(denoise, streams, sampler=sampler, grid=grids.trailing(STEPS))
    next(states)
    start = time.thread_time()
    for _ in states:
        pass
    return (time.thread_time() - start) / (STEPS - 1)


@torch.no_grad()
def peer(sampler: str) -> float:
    scheduler = getattr(diffusers, PEERS[sampler])(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        **({"clip_sample": False} if sampler == "ddim" else {}),
    )
    scheduler.set_timesteps(STEPS)
    x = noise.from_seeds([0], SHAPE).draw() * scheduler.init_noise_sigma
    c = torch.cat([torch.zeros(1, 8), torch.ones(1, 8)])
    start = 0.0
    for number, t in enumerate(scheduler.timesteps):
        if number == 1:
            start = time.thread_time()
        both = scheduler.scale_model_input(torch.cat([x, x]), t)
        negative, positive = net(both, t.expand(both.shape[0]), c).chunk(2)
        said = negative + SCALE * (positive - negative)
        x = scheduler.step(said, t, x, return_dict=False)[0]
    return (time.thread_time() - start) / (STEPS - 1)


def median(sampler: str, *runs: Callable[[str], float]) -> list[tuple[float, ...]]:
    """The seconds a step of each, in turn; the first round warms up."""
    return [tuple(run(sampler) for run in runs) for _ in range(RUNS + 1)][1:]


def main() -> None:
    torch.set_num_threads(1)
    for sampler, name in PEERS.items():
        pairs = median(sampler, ours, peer)
        a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(one / two for one, two in pairs)
        print(
            f"{sampler:9} {a * 1e6:6.1f} us a step   {name} {b * 1e6:6.1f} us   ratio {ratio:.2f}"
        )


if __name__ == "__main__":
    main()
