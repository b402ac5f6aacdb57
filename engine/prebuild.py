"""Kernels compiled before there is a GPU: a start is rehearsed on one that is absent, and first requests.

What Triton keeps of a kernel is found again under the arguments that it was launched with. So the code that
serves runs here as it will there, over a model of the same attention: launches compile, and torch computes
what they would have given.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from configs.errors import ConfigError
from configs.model import ModelInfo
from configs.schema import ServeConfig
from engine import attention
from engine.absent_gpu import pretend
from engine.engine import Engine
from engine.graph_recording import sizes
from engine.graphs import DecodeStep
from engine.kernels import Kernels, triton_kernels
from engine.messages import Sampling, Submit
from engine.narrow_model import narrow_model
from engine.plans import ResolvedPlan
from engine.rope import Rope
from engine.runner import ModelRunner
from engine.scheduler import Scheduler
from engine.self_check import checked
from engine.startup import FP8_CAPABILITY, Resolution, check_weights_dtype, resolve
from kvcache.cache import CacheSize, KVCache
from kvcache.pool import pages_for
from sparse.attention import Attended

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ARCHITECTURES = (80, 90, 100)  # A100, H100 and H200, B200
SHORT, LONG = 130, 3000  # tokens of the prompts: two pages; more than a chunk, a window and most budgets
TOKENS = 3  # of each answer
SEQUENCES = 2  # at once: what one, and what several launch
CPU = torch.device("cpu")

_Functions = TypeVar("_Functions", bound="DataclassInstance")


@dataclass(frozen=True, slots=True)
class Prebuilt:
    """What was made for one architecture."""

    architecture: int
    kernels: int
    seconds: float


def prebuild(config: ServeConfig, architecture: int) -> Prebuilt:
    """Fill Triton's cache with what a server of this configuration launches. Once per process.

    Raises ConfigError where the configuration is refused, or nothing can be compiled.
    """
    began = time.monotonic()
    torch.set_num_threads(config.engine.threads or 1)  # its tensors are small, other architectures run beside
    gpu = pretend(architecture)
    rehearse(resolve_for(config, architecture), triton_kernels())
    if gpu.kernels == 0:
        raise ConfigError(f"no kernel was compiled for sm_{architecture}: the log says why")
    return Prebuilt(architecture, gpu.kernels, time.monotonic() - began)


def prebuild_all(config: ServeConfig, architectures: Sequence[int]) -> Iterator[Prebuilt]:
    """One after the other as they are done, each in a process of its own, as many at once as processors."""
    processes = min(len(architectures), os.cpu_count() or 1)
    with ProcessPoolExecutor(processes, get_context("spawn"), max_tasks_per_child=1) as pool:
        for done in as_completed([pool.submit(prebuild, config, one) for one in architectures]):
            yield done.result()


def resolve_for(config: ServeConfig, architecture: int) -> Resolution:
    """What the server would resolve on such a GPU, to be run here."""
    engine = config.engine
    if engine.device == "cpu":
        raise ConfigError("engine.device: cpu was asked for; kernels are compiled ahead for GPUs")
    dtype = "bfloat16" if engine.dtype == "auto" else engine.dtype
    check_weights_dtype(engine.weights_dtype, dtype, "cuda")
    if config.cache.dtype == "fp8" and (architecture // 10, architecture % 10) < FP8_CAPABILITY:
        raise ConfigError(f"cache.dtype: fp8 needs a newer GPU than {architecture}: use int8")
    here = engine.model_copy(update={"device": "cpu", "dtype": "float32", "cuda_graphs": "auto"})
    return replace(resolve(config.model_copy(update={"engine": here})), dtype=dtype)


def rehearse(resolution: Resolution, kernels: Kernels) -> None:
    """The checks of a start, its decode steps, and prompts under every plan, read sparsely and densely."""
    if kernels == Kernels():
        raise ConfigError("there are no kernels to compile ahead: the log says why")
    attention.register()
    model, dtype = resolution.model, getattr(torch, resolution.dtype)
    network = narrow_model(
        resolution.folder, model, dtype=resolution.dtype, attention=attention.IMPLEMENTATION
    )
    kernels = without_attending(
        checked(with_twins(kernels), model, dtype, CPU, resolution.page_dtype), kernels
    )
    long = min(LONG, model.max_length - TOKENS)
    plans = both_ways(resolution.plans)
    cache = _cache(resolution, kernels, long + TOKENS)
    runner = ModelRunner(network, cache, kernels, CPU)
    make = partial(DecodeStep, network, cache, kernels, Rope.of(network))
    with torch.inference_mode():
        for method, batch, bound in sizes((plan.decode for plan in plans.values()), long, SEQUENCES):
            make(method, batch, bound).run()
    for name in plans:
        for length, count in ((SHORT, SEQUENCES), (long, 1)):
            scheduler = Scheduler(resolution.config.scheduler, cache)
            engine = Engine(plans, scheduler, runner, cache, (), share_prefixes=False)
            _serve(engine, name, length, count, model)


def both_ways(plans: dict[str, ResolvedPlan]) -> dict[str, ResolvedPlan]:
    """Each of these for prompts of any length, and for none: by length a plan reads sparsely or densely."""
    sparse = {name: plan.with_dense_below(0) for name, plan in plans.items()}
    dense = {f"{name}, dense": plan.with_dense_below(LONG + 1) for name, plan in plans.items()}
    return sparse | dense


def _cache(resolution: Resolution, kernels: Kernels, longest: int) -> KVCache:
    model, states = resolution.model, resolution.states
    pages = model.num_layers * model.num_kv_heads * (pages_for(longest) + 1)
    return KVCache(
        model,
        CacheSize(SEQUENCES * pages, SEQUENCES, longest),
        dtype=getattr(torch, resolution.dtype),
        device=CPU,
        states=states,
        moves=kernels.moves,
        page_dtype=resolution.page_dtype,
    )


def _serve(engine: Engine, plan: str, length: int, count: int, model: ModelInfo) -> None:
    """So many prompts of this length."""
    for index in range(count):
        tokens = tuple(i % model.vocab_size for i in range(length))
        sampling = Sampling(max_tokens=TOKENS, ignore_eos=True)
        engine.submit(Submit(f"rehearsal {index}", tokens, length, plan, sampling, share=False))
    while engine.has_work:
        for output in engine.step().outputs:
            if output.error is not None:
                raise ConfigError(f"model: {model.name}: a rehearsal under {plan} failed: {output.error}")


# ----------------------------------------------------------------------
# what launches give where nothing runs
# ----------------------------------------------------------------------


def with_twins(kernels: Kernels) -> Kernels:
    """Each is launched, and torch gives its result."""
    return _paired(kernels, Kernels())


def _paired(launched: _Functions, twins: _Functions) -> _Functions:
    """Of dataclasses of functions, and of more such, one that calls both where they differ."""
    found = {}
    for field in fields(twins):
        kernel, twin = getattr(launched, field.name), getattr(twins, field.name)
        if is_dataclass(twin):
            found[field.name] = _paired(kernel, twin)
        else:
            found[field.name] = twin if kernel is twin else _both(kernel, twin)
    return replace(twins, **found)


def _both(kernel: Callable[..., Any], twin: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        kernel(*arguments, **options)
        return twin(*arguments, **options)

    return run


def without_attending(kernels: Kernels, launched: Kernels) -> Kernels:
    """The same with zeros for attention: no selection waits for what it gives, and torch takes long."""
    twins = Kernels()

    def attend(*arguments: Any, **options: Any) -> Attended:
        found = launched.attend(*arguments, **options)
        return Attended(torch.zeros_like(found.out), torch.zeros_like(found.lse))

    def attend_rows(*arguments: Any, **options: Any) -> Tensor:
        return torch.zeros_like(launched.attend_rows(*arguments, **options))

    if kernels.attend is not twins.attend:
        kernels = kernels.with_kernel("attend", attend)
    if kernels.attend_rows is not twins.attend_rows:
        kernels = kernels.with_kernel("attend_rows", attend_rows)
    return kernels
