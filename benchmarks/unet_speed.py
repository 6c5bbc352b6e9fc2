"""A step of three UNets at full size, ours against the peer's at its default and at its best, in one run.

    python benchmarks/unet_speed.py [--small] [--rounds 5] [--precision bf16] [--only ddpm-cifar10] [--threads 2]

The networks: Stable Diffusion 1.5's on latents of 64 x 64 with 77 tokens of context, one guided step of it (the batch
is the condition and its absence), and DDPM's for CIFAR-10, one picture, both of diffusers; and that of
video-diffusion-pytorch as its readme builds it, one clip of 16 frames of 64 x 64. Weights are random and the same
everywhere; ours come from theirs by their layout.

The peer at its default is what its constructor gives: float32. Its best is the fastest of all that one can set in the
precision asked for (`SETTINGS`; bf16 where the processor computes in it), which is looked for first; nothing is
compiled, which takes minutes. Then both and ours take turns, each in a process of its own, and ours in float32 too
where another precision is asked for. Printed are medians over rounds; the peak memory of each process; how far each
output is from the default's, against the deviation of that; the floor, which is the operations of the network over the
rate of a large matrix product in the same precision; and where the time of ours goes.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any
from zlib import crc32

import torch
import video_diffusion_pytorch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor, FusedAttnProcessor2_0
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from mdiff.core import request
from mdiff.core.nn import layouts
from mdiff.core.nn.unet import UNet
from mdiff.plugins.video.formats import lucidrains
from mdiff.plugins.video.nets.unet3d import Unet3D

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""The largest root mean square difference from the default's output, as a share of that output's deviation."""
MATRIX, TOP = 2048, 12
"""Rows of the matrices whose product gives the rate; operators of the profile that are shown."""
DIFFUSERS = (
    "as it is",
    "channels_last",
    "plain attention",
    "channels_last, plain attention",
    "channels_last, fused QKV",
)
AUTOCAST = "autocast"
"""A setting for networks that do not run in another precision by themselves."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network as both have it.

    Attributes:
        theirs, config: the peer's class and its arguments. own, ours: our class and its arguments.
        shape: of x. context: of the tokens it attends to, () for none.
        settings: those of `SETTINGS` that its peer has.
    """

    theirs: type[Any]
    config: Mapping[str, Any]
    own: type[nn.Module] = UNet
    ours: Mapping[str, Any]
    shape: tuple[int, ...]
    context: tuple[int, ...] = ()
    settings: tuple[str, ...] = DIFFUSERS


def stable_diffusion(channels: int, heads: int, context: int, size: int) -> Network:
    return Network(
        theirs=UNet2DConditionModel,
        config={
            "sample_size": size,
            "block_out_channels": [channels * m for m in (1, 2, 4, 4)],
            "attention_head_dim": heads,
            "cross_attention_dim": context,
        },
        ours={
            "axes": 2,
            "in_channels": 4,
            "out_channels": 4,
            "channels": channels,
            "multipliers": [1, 2, 4, 4],
            "attention": [0, 1, 2],
            "heads": heads,
            "transformer": True,
            "context": context,
        },
        shape=(2, 4, size, size),
        context=(2, 77, context),
    )


def ddpm(channels: int, size: int) -> Network:
    return Network(
        theirs=UNet2DModel,
        config={
            "sample_size": size,
            "block_out_channels": [channels * m for m in (1, 2, 2, 2)],
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
            "attention_head_dim": None,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "downsample_padding": 0,
            "norm_eps": 1e-6,
        },
        ours={
            "axes": 2,
            "in_channels": 3,
            "out_channels": 3,
            "channels": channels,
            "multipliers": [1, 2, 2, 2],
            "attention": [1],
            "heads": 1,
            "padding": "end",
            "eps": 1e-6,
            "sine_first": True,
            "frequency_shift": 1,
        },
        shape=(1, 3, size, size),
    )


def video_diffusion(channels: int, size: int) -> Network:
    return Network(
        theirs=video_diffusion_pytorch.Unet3D,
        config={"dim": channels, "dim_mults": (1, 2, 4, 8)},
        own=Unet3D,
        ours={"channels": channels, "multipliers": [1, 2, 4, 8]},
        shape=(1, 3, 16, size, size),
        settings=(AUTOCAST,),
    )


NETWORKS = {
    "stable-diffusion": stable_diffusion(320, 8, 768, 64),
    "ddpm-cifar10": ddpm(128, 32),
    "video-diffusion": video_diffusion(64, 64),
}
SMALL = {
    "stable-diffusion": stable_diffusion(32, 4, 64, 16),
    "ddpm-cifar10": ddpm(32, 16),
    "video-diffusion": video_diffusion(32, 32),
}

Setting = Callable[[Any], Any]
"""A network of the peer's -> itself, set otherwise."""


def _channels_last(net: Any) -> Any:
    return net.to(memory_format=torch.channels_last)


def _fused(net: Any) -> Any:
    for attention in _attentions(net):
        attention.fuse_projections(fuse=True)
        attention.set_processor(FusedAttnProcessor2_0())
    return net


def _plain(net: Any) -> Any:
    for attention in _attentions(net):
        attention.set_processor(AttnProcessor())
    return net


def _attentions(net: nn.Module) -> list[Any]:
    """One of the two networks has methods that do this."""
    return [module for module in net.modules() if isinstance(module, Attention)]


SETTINGS: Mapping[str, tuple[Setting, ...]] = {
    "as it is": (),
    "channels_last": (_channels_last,),
    "plain attention": (_plain,),
    "channels_last, plain attention": (_channels_last, _plain),
    "channels_last, fused QKV": (_channels_last, _fused),
    AUTOCAST: (),
}
"""What a user can set; each in the precision asked for, by `AUTOCAST` or wholly."""


# --- in the processes -----------------------------------------------------------------------------


@contextmanager
def made_in(dtype: torch.dtype) -> Iterator[None]:
    """Within, networks are built without memory for their weights, in a type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


def their_net(network: Network, dtype: torch.dtype) -> Any:
    if network.own is Unet3D:  # it keeps tables beside its weights
        return network.theirs(**network.config).to(dtype).eval()
    with made_in(dtype):
        net = network.theirs.from_config(dict(network.config))
    return net.eval()


def their_tensors(network: Network, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights by their names: the same numbers in every process, rounded to the type."""
    tensors = {}
    for name, like in their_net(network, torch.float32).state_dict().items():
        if name.endswith(".freqs"):  # constants
            tensors[name] = like
            continue
        generator = torch.Generator().manual_seed(crc32(name.encode()))
        value = torch.empty(like.shape).uniform_(-1, 1, generator=generator)
        if like.ndim > 1:  # outputs of the size of inputs
            value *= (3 / like[0].numel()) ** 0.5
        elif name.endswith(("weight", "gamma")):
            value = 1 + 0.1 * value
        else:
            value *= 0.1
        tensors[name] = value.to(dtype)
    return tensors


def call_of(network: Network, setting: str, precision: str) -> Callable[[], Tensor]:
    """What a step of a network is: "ours", or a row of `SETTINGS`."""
    dtype = torch.float32 if setting == AUTOCAST else DTYPES[precision]
    generator = torch.Generator().manual_seed(0)
    x, context = (
        torch.randn(s, generator=generator).to(dtype) for s in (network.shape, network.context)
    )
    tensors = their_tensors(network, dtype)
    net: Any
    if setting == "ours":
        with made_in(dtype):
            net = network.own(**network.ours).eval()
        # theirs are handed over, so that no tensor is there twice
        net.load_state_dict(converted(net, tensors), assign=True)
        net.requires_grad_(False)
        cond = {"context": context} if network.context else {}
        t = torch.full(network.shape[:1], 500.0)
        return lambda: net(x, t, **cond)
    net = their_net(network, dtype)
    net.load_state_dict(tensors, assign=True)
    for change in SETTINGS[setting]:
        net = change(net)
    given = (context,) if network.context else ()
    if network.own is UNet:
        return lambda: net(x, 500, *given).sample
    at = torch.full(network.shape[:1], 500)

    def call() -> Tensor:
        with torch.autocast("cpu", DTYPES[precision], enabled=precision != "fp32"):
            return net(x, at)

    return call


def converted(net: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the peer's network under the names of ours."""
    if isinstance(net, Unet3D):
        # ours has pictures' convolutions, and so fewer axes
        return {
            name: value.contiguous() for name, value in lucidrains.convert(net, tensors).items()
        }
    assert isinstance(net, UNet)
    return layouts.convert(net, tensors, "diffusers")


def serve(pipe: Connection, network: Network, setting: str, precision: str, threads: int) -> None:
    """Answers questions in a process of its own until there are none left."""
    torch.set_num_threads(threads)
    call = call_of(network, setting, precision)

    def seconds() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    answers: Mapping[str, Callable[[], Any]] = {
        "seconds": seconds,
        "output": lambda: call().float().numpy(),
        "memory": lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "profile": lambda: profiled(call),
    }
    with torch.inference_mode():
        while (question := pipe.recv()) is not None:
            pipe.send(answers[question]())


def profiled(call: Callable[[], Tensor]) -> str:
    """The operators that take the most time, and the share of each."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
        call()
    rows = sorted(seen.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    lines = [
        f"    {row.self_cpu_time_total / total:6.1%} {row.self_cpu_time_total / 1e3:9.1f} ms "
        f"{row.count:5} x {row.key}"
        for row in rows[:TOP]
    ]
    return "\n".join(lines)


# --- in this process ------------------------------------------------------------------------------


class Process:
    """A network in a process of its own."""

    def __init__(self, network: Network, setting: str, precision: str, threads: int) -> None:
        context = multiprocessing.get_context("forkserver")
        self.pipe, other = context.Pipe()
        self.process = context.Process(
            target=serve, args=(other, network, setting, precision, threads), daemon=True
        )
        self.process.start()
        other.close()

    def ask(self, question: str) -> Any:
        self.pipe.send(question)
        return self.pipe.recv()

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()


def matrix_rate(dtype: torch.dtype, threads: int, size: int) -> float:
    """Operations a second of a product of two matrices."""
    torch.set_num_threads(threads)
    a, b = torch.randn(2, size, size).to(dtype)
    torch.mm(a, b)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times)


def operations(network: Network) -> int:
    """Of a step: two for each product with a weight, and between tokens."""
    with torch.device("meta"):
        net = network.own(**network.ours)
        given = {"context": torch.empty(network.context)} if network.context else {}
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(network.shape), torch.empty(network.shape[0]), **given)
    return counter.get_total_flops()


def best_setting(network: Network, precision: str, threads: int, rounds: int) -> str:
    """The fastest of `SETTINGS`, each by the best of its steps; they are printed."""
    found = {}
    for setting in network.settings:
        process = Process(network, setting, precision, threads)
        process.ask("seconds")
        found[setting] = min(process.ask("seconds") for _ in range(rounds))
        process.close()
        print(f"  theirs, {precision}, {setting:32} {found[setting] * 1e3:9.1f} ms", flush=True)
    return min(found, key=found.__getitem__)


def measure(name: str, network: Network, options: argparse.Namespace) -> None:
    precision, threads, rounds = options.precision, options.threads, options.rounds
    print(f"{name}, {precision}, {threads} threads", flush=True)
    best = options.best or best_setting(network, precision, threads, min(rounds, 2))
    which = {
        "default": ("as it is", "fp32"),
        "best": (best, precision),
        "ours": ("ours", precision),
    }
    if precision != "fp32":
        which["ours in fp32"] = ("ours", "fp32")
    processes = {k: Process(network, *said, threads) for k, said in which.items()}
    outputs = {k: torch.from_numpy(p.ask("output")) for k, p in processes.items()}
    times: dict[str, list[float]] = {k: [] for k in which}
    for _ in range(rounds):
        for k, process in processes.items():
            times[k].append(process.ask("seconds"))
    memory = {k: process.ask("memory") for k, process in processes.items()}
    told = processes["ours"].ask("profile")
    for process in processes.values():
        process.close()
    middle = {k: statistics.median(seen) for k, seen in times.items()}
    rate = matrix_rate(DTYPES[precision], threads, MATRIX // (4 if options.small else 1))
    count = operations(network)
    wanted = outputs["default"]
    for k, (setting, of) in which.items():
        far = float((outputs[k] - wanted).square().mean().sqrt() / wanted.std())
        said = k if setting == "ours" else f"theirs, {k} ({of}, {setting})"
        within = "" if far <= TOLERANCE[of] else f" OUTSIDE of {TOLERANCE[of]}"
        print(
            f"  {said:60} {middle[k] * 1e3:9.1f} ms  peak {memory[k] / 1e9:5.2f} GB  "
            f"floor {count / rate / middle[k]:5.1%}  differs by {far:.1e}{within}"
        )
    ratios = [("default", "ours"), ("best", "ours"), ("default", "ours in fp32")]
    told_ratios = [f"{a} / {b} {middle[a] / middle[b]:.2f}" for a, b in ratios if b in middle]
    print(f"  {'   '.join(told_ratios)}")
    print(
        f"  {count / 1e9:.1f} billion operations, {rate / 1e9:.0f} billion a second in a matrix product: "
        f"the floor is {count / rate * 1e3:.1f} ms; where the time of ours goes:"
    )
    print(told, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="small networks: a quick check")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=DTYPES, default=request.precision("auto", "cpu"))
    parser.add_argument("--only", choices=NETWORKS)
    parser.add_argument(
        "--best", choices=SETTINGS, help="the peer's best, which is looked for else"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # of the profiler, which looks for a GPU
    # a server that has imported them makes the processes
    multiprocessing.set_forkserver_preload(
        [UNet.__module__, Unet3D.__module__, UNet2DConditionModel.__module__]
    )
    for name, network in (SMALL if options.small else NETWORKS).items():
        if options.only in (None, name):
            measure(name, network, options)


if __name__ == "__main__":
    main()
