"""Reference implementations as functions: k-diffusion's samplers, and runs of diffusers' schedulers.

Both are asked in the precision of x. diffusers keeps its tables in float32 whatever x is, so for a
float64 x the names float32 of `torch` and `numpy` mean float64 in the scheduler's module while it
runs: what remains is its arithmetic.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType, ModuleType
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

Network = Callable[[Tensor, Any], Tensor]


def k_diffusion(module: str = "sampling") -> ModuleType:
    """A module of k-diffusion, without its package, which imports what sampling does not need."""
    if "k_diffusion" not in sys.modules:
        spec = importlib.util.find_spec("k_diffusion")
        assert spec is not None, "k-diffusion is not installed"
        package = ModuleType("k_diffusion")
        package.__path__ = list(spec.submodule_search_locations or ())
        sys.modules["k_diffusion"] = package
    return importlib.import_module(f"k_diffusion.{module}")


class _Changed(ModuleType):
    """A module in which some names mean something else."""

    def __init__(self, module: ModuleType, **names: Any) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(names)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@contextmanager
def prescribed(module: ModuleType, draws: Iterable[Tensor], double: bool = False) -> Iterator[None]:
    """The module draws these tensors, in turn, as its noise; if `double`, float32 is float64 in it.

    Its noise is what it asks of `torch.randn_like`, `torch.randn` or diffusers' `randn_tensor`.
    """
    queue = iter(draws)
    names: dict[str, Any] = {
        "randn_like": lambda x, **_: next(queue).to(x),
        "randn": lambda *_, dtype=None, **__: next(queue).to(dtype),
        **({"float32": torch.float64} if double else {}),
    }
    changed: dict[str, Any] = {"torch": _Changed(torch, **names)}
    if double and "np" in vars(module):
        changed["np"] = _Changed(np, float32=np.float64)
    if "randn_tensor" in vars(module):
        changed["randn_tensor"] = lambda *_, dtype=None, **__: next(queue).to(dtype)
    before, default = {name: vars(module)[name] for name in changed}, torch.get_default_dtype()
    vars(module).update(changed)
    torch.set_default_dtype(torch.float64 if double else default)
    try:
        yield
    finally:
        vars(module).update(before)
        torch.set_default_dtype(default)


def run_k_diffusion(
    name: str,
    model: Network,
    x: Tensor,
    sigmas: Tensor,
    draws: Iterable[Tensor] = (),
    **options: Any,
) -> Tensor:
    """`sample_<name>` of k-diffusion: model(x, sigma (B,)) -> x0, on x of variance sigma_0^2."""
    module = k_diffusion()
    with prescribed(module, draws):
        return getattr(module, f"sample_{name}")(
            model, x, sigmas.to(x.dtype), disable=True, **options
        )


def run_diffusers(
    name: str,
    network: Network,
    x: Tensor,
    steps: int,
    draws: Iterable[Tensor] = (),
    begin: int = 0,
    by_sigma: bool = False,
    step: Mapping[str, Any] = MappingProxyType({}),
    **config: Any,
) -> tuple[Tensor, Any]:
    """A run of `diffusers.<name>(**config)`: where it ends, and the scheduler.

    The network is called as network(x, timestep), or with the scheduler's sigma if `by_sigma`. The
    run starts at the timestep number `begin`; what the scheduler asks for first is left to the
    caller, who gives x. `step` are options of the scheduler's steps.
    """
    kind = getattr(diffusers, name)
    module = sys.modules[kind.__module__]
    with prescribed(module, draws, double=x.dtype == torch.float64):
        scheduler = kind(**config)
        scheduler.set_timesteps(steps)
        if begin:
            scheduler.set_begin_index(begin)
        for k, timestep in enumerate(scheduler.timesteps[begin:], begin):
            asked = scheduler.scale_model_input(x, timestep) if _scales(scheduler) else x
            said = network(asked, scheduler.sigmas[k] if by_sigma else timestep)
            x = scheduler.step(said, timestep, x, return_dict=False, **step)[0]
    return x, scheduler


def _scales(scheduler: Any) -> bool:
    """Flow-matching schedulers have no such method."""
    return "scale_model_input" in dir(scheduler)
