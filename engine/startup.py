"""From a configuration to a running engine, in two steps: resolve (no weights, seconds) and load."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch

from configs.bf16_products import bf16_products
from configs.errors import ConfigError
from configs.grammars import Grammars
from configs.loading import load_plan
from configs.machine import cores, free_memory, reuse_freed_memory
from configs.model import PAGE_SIZE, ModelInfo
from configs.quantised import FP8, INT8
from configs.schema import EngineConfig, ServeConfig
from engine import attention
from engine.break_even import measured
from engine.cuda_graph import check_graphs, cuda_graphs, graph_bytes
from engine.decode_layers import fuse_decode
from engine.dense_prefill import with_fastest_dense
from engine.engine import Engine
from engine.kernels import Kernels, kernels_for
from engine.layers import fuse_layers
from engine.linear import GROUP, can_be_fast, speed_up_decode
from engine.messages import ModelCard, Sampling, Submit
from engine.models import end_tokens, load_model, model_info, prepare_model
from engine.plans import ResolvedPlan, resolve_plans
from engine.rope import Rope
from engine.runner import ModelRunner
from engine.scheduler import Scheduler
from engine.self_check import checked
from engine.weights import compute_in_float32, keep_in_bf16, keep_in_int8
from kvcache.cache import CacheSize, KVCache
from kvcache.pool import page_bytes, pages_for
from kvcache.state import StateRegistry

log = logging.getLogger(__name__)

CPU_CACHE_SHARE = 0.4  # of the memory that is free once weights are loaded
WARM_UP_TOKENS = 128
REUSED_BYTES = 1 << 28  # of what a forward needs and frees, on a CPU
FP8_CAPABILITY = (8, 9)  # of CUDA devices, from which on e4m3 has instructions


@dataclass(frozen=True)
class Resolution:
    """All that is known before weights load."""

    config: ServeConfig
    folder: Path
    model: ModelInfo
    states: StateRegistry
    plans: dict[str, ResolvedPlan]
    device: str
    dtype: str
    page_dtype: torch.dtype | None = None  # of quantised pages

    @property
    def on(self) -> torch.device:
        return torch.device(self.device)

    @property
    def computes_in(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def bytes_per_page(self) -> int:
        return page_bytes(self.model.head_dim, self.page_dtype or self.computes_in, self.states)

    @property
    def bytes_per_token(self) -> int:
        """Of one token in all rows of a sequence."""
        return self.bytes_per_page * self.model.num_layers * self.model.num_kv_heads // PAGE_SIZE

    @property
    def card(self) -> ModelCard:
        return ModelCard(
            name=self.config.server.served_model_name or self.model.name,
            max_model_len=self.model.max_length,
            vocab_size=self.model.vocab_size,
            max_num_seqs=self.config.scheduler.max_num_seqs,
            plans=tuple(plan.card for plan in self.plans.values()),
            device=self.device,
            dtype=self.dtype,
            cache_dtype=self.config.cache.dtype,
        )


def resolve(config: ServeConfig) -> Resolution:
    """Check model, plans, device and dtype against each other. Raises ConfigError."""
    device = device_for(config.engine.device)
    folder = prepare_model(config.engine)
    model = model_info(folder, config.engine)
    states = StateRegistry()
    page_dtype = page_dtype_for(config.cache.dtype, device)
    plans = resolve_plans(
        [load_plan(path) for path in config.plans], model, states, cache_dtype=config.cache.dtype
    )
    if not plans:
        raise ConfigError("plans: at least one plan is needed")
    dtype = dtype_for(config.engine.dtype, device)
    check_weights_dtype(config.engine.weights_dtype, dtype, device)
    check_graphs(config.engine.cuda_graphs, device)
    return Resolution(config, folder, model, states, plans, device, dtype, page_dtype)


def load(
    resolution: Resolution, tell: Callable[[str, float], None] = lambda phase, fraction: None
) -> tuple[Engine, ModelCard]:
    """Load weights, size the cache, run a first request through everything. Raises ConfigError if it cannot
    fit. `tell` hears what is done next, and how much of it all has been done by then, roughly."""
    config = resolution.config
    tell("weights", 0.0)
    torch.set_num_threads(config.engine.threads or cores())
    network = network_as_served(
        resolution.folder,
        resolution.config.engine,
        dtype=resolution.dtype,
        device=resolution.device,
    )
    num_pages = _pool_bytes(resolution) // resolution.bytes_per_page
    model = _fit_length(resolution.model, config, resolution.plans, num_pages)
    log.info("KV cache: %d pages, %d bytes per token held", num_pages, resolution.bytes_per_token)
    tell("kernels", 0.4)
    kernels = _kernels(resolution, model)
    cache = _cache(resolution, model, num_pages, kernels)
    tell("from which length on sparse plans pay", 0.5)
    plans = measured(resolution.plans, model, cache, kernels, Rope.of(network))
    tell("decode steps", 0.7)
    methods = [plan.decode for plan in plans.values()]
    graphs = cuda_graphs(config.engine, network, methods, cache, kernels)
    runner = ModelRunner(network, cache, kernels, resolution.on, graphs)
    ends = end_tokens(resolution.folder)
    grammars = Grammars.if_possible(resolution.folder / "tokenizer.json", model.vocab_size, ends)

    def engine() -> Engine:
        scheduler = Scheduler(config.scheduler, cache)
        sharing = config.cache.enable_prefix_caching
        return Engine(plans, scheduler, runner, cache, ends, share_prefixes=sharing, grammars=grammars)

    if resolution.device == "cpu":
        reuse_freed_memory(REUSED_BYTES)
    tell("a first request under every plan", 0.8)
    _warm_up(engine(), plans, model)  # an engine of its own: nobody asked for these tokens
    card = msgspec.structs.replace(
        resolution.card,
        plans=tuple(plan.card for plan in plans.values()),
        max_model_len=model.max_length,
        num_pages=num_pages,
        page_bytes=resolution.bytes_per_page,
    )
    return engine(), card


def network_as_served(folder: Path, config: EngineConfig, *, dtype: str, device: str) -> Any:
    """The model with its weights, and on a CPU with our layers in the place of some of its own."""
    attention.register()
    network = load_model(
        folder,
        dtype=dtype,
        device=device,
        attention=attention.IMPLEMENTATION,
        rope_scaling=config.rope_scaling,
    )
    if device == "cpu":
        if dtype == "bfloat16" and not compute_in_float32(network):
            if config.weights_dtype == "int8":
                raise ConfigError(
                    f"engine.weights_dtype: int8 is for models of linear layers and plain embeddings, and"
                    f" {folder.name} has other large weights: leave it out, or use engine.dtype: float32"
                )
            return network
        speed_up_decode(network)
        fuse_layers(network)
        if config.weights_dtype == "bfloat16":
            keep_in_bf16(network)
        elif config.weights_dtype == "int8" and not keep_in_int8(network):
            raise ConfigError(
                f"engine.weights_dtype: int8 is for linear layers of whole groups of {GROUP} inputs, and"
                f" {folder.name} has none: leave it out"
            )
        fuse_decode(network)
    return network


def _kernels(resolution: Resolution, model: ModelInfo) -> Kernels:
    """Those that run here and err nowhere, the fastest of them for dense chunks."""
    device, page_dtype = resolution.on, resolution.page_dtype
    of_model = (model, resolution.computes_in, device, page_dtype)
    return with_fastest_dense(checked(kernels_for(device, page_dtype), *of_model), *of_model)


def _cache(resolution: Resolution, model: ModelInfo, num_pages: int, kernels: Kernels) -> KVCache:
    slots = resolution.config.scheduler.max_num_seqs
    return KVCache(
        model,
        CacheSize(num_pages, slots, model.max_length, *host_sizes(resolution)),
        dtype=resolution.computes_in,
        device=resolution.on,
        states=resolution.states,
        moves=kernels.moves,
        page_dtype=resolution.page_dtype,
    )


def device_for(asked: str) -> str:
    """The device that `engine.device` means here."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError("engine.device: cuda was asked for, and torch sees no CUDA device")
    return "cuda" if asked == "cuda" or (asked == "auto" and torch.cuda.is_available()) else "cpu"


def dtype_for(asked: str, device: str) -> str:
    """bfloat16 where the device multiplies it natively; elsewhere it is slower than float32."""
    if device == "cpu" and asked == "float16":
        raise ConfigError(
            "engine.dtype: float16 is two to three times slower than float32 on a CPU;"
            " use float32 or bfloat16"
        )
    if asked != "auto":
        return asked
    native = torch.cuda.is_bf16_supported() if device == "cuda" else bool(bf16_products())
    return "bfloat16" if native else "float32"


def check_weights_dtype(asked: str, dtype: str, device: str) -> None:
    """Weights of fewer bits need kernels that know them. Raises ConfigError."""
    if asked == "auto":
        return
    computes_in = ("float32", "bfloat16") if asked == "int8" else ("float32",)
    if device != "cpu" or dtype not in computes_in:
        raise ConfigError(
            f"engine.weights_dtype: {asked} is for a CPU with engine.dtype {' or '.join(computes_in)}; here"
            f" is {dtype} on {device}: leave it out"
        )
    if not can_be_fast():
        raise ConfigError(
            f"engine.weights_dtype: {asked} needs our C++ kernels, which cannot be compiled here: install g++"
        )


def page_dtype_for(asked: str, device: str) -> torch.dtype | None:
    """What quantised pages hold, None = what the model computes in."""
    if asked == "fp8" and device == "cuda" and torch.cuda.get_device_capability() < FP8_CAPABILITY:
        raise ConfigError(
            "cache.dtype: fp8 needs a GPU that converts it (compute capability"
            f" {'.'.join(map(str, FP8_CAPABILITY))} or newer), this one has"
            f" {'.'.join(map(str, torch.cuda.get_device_capability()))}: use int8, which takes as much"
        )
    return {"auto": None, "int8": INT8, "fp8": FP8}[asked]


def _pool_bytes(resolution: Resolution) -> int:
    """Bytes of the page pool: as configured, else from free memory, never more than all sequences could
    use."""
    config, model, device = resolution.config, resolution.model, resolution.on
    if config.cache.kv_cache_memory_bytes is not None:
        return config.cache.kv_cache_memory_bytes
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        available = free - int(total * (1 - config.cache.gpu_memory_utilization))
        available -= graph_bytes(config.engine, device)
    else:
        memory = free_memory()
        if memory is None:
            words = "free memory cannot be read on this system; give a size"
            raise ConfigError(f"cache.kv_cache_memory_bytes: {words}")
        available = int(memory * CPU_CACHE_SHARE)
    rows = model.num_layers * model.num_kv_heads
    most = config.scheduler.max_num_seqs * rows * pages_for(model.max_length) * resolution.bytes_per_page
    return max(0, min(available, most))


def host_sizes(resolution: Resolution) -> tuple[int, int]:
    """Pages of the host tier, and how many columns of them are for beginnings of prompts."""
    config, model = resolution.config.cache, resolution.model
    rows = model.num_layers * model.num_kv_heads
    pages = config.host_memory // resolution.bytes_per_page
    if config.host_memory and pages < rows:
        raise ConfigError(
            f"cache.host_memory: {config.host_memory} bytes are less than one block of tokens takes,"
            f" {rows * resolution.bytes_per_page}; give it more, or 0 for no host tier"
        )
    return pages, int(pages * config.host_columns) // rows if config.enable_prefix_caching else 0


def _fit_length(
    model: ModelInfo, config: ServeConfig, plans: dict[str, ResolvedPlan], num_pages: int
) -> ModelInfo:
    """The context length that one sequence can have under every plan, in whole pages."""

    def fits(length: int) -> bool:
        return all(plan.pages_needed(length, length) <= num_pages for plan in plans.values())

    if fits(model.max_length):
        return model
    low, high = 0, model.max_length // PAGE_SIZE
    while low < high:  # pages_needed grows with the length
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * PAGE_SIZE) else (low, middle - 1)
    longest = low * PAGE_SIZE
    if config.engine.max_model_len != "auto":
        raise ConfigError(
            f"engine.max_model_len: {model.max_length} tokens do not fit the cache of {num_pages} pages;"
            f" {longest} would (or give more memory: cache.kv_cache_memory_bytes)"
        )
    if longest < WARM_UP_TOKENS + PAGE_SIZE:
        raise ConfigError(
            f"cache.kv_cache_memory_bytes: {num_pages} pages hold {longest} tokens of context;"
            " that is too few to serve"
        )
    log.warning("context is cut to the %d tokens that the cache can hold", longest)
    return replace(model, max_length=longest)


def _warm_up(engine: Engine, plans: dict[str, ResolvedPlan], model: ModelInfo) -> None:
    """One short request through each plan, so that the first client waits for no first-use cost."""
    length = min(WARM_UP_TOKENS, model.max_length - 4)
    sampling = Sampling(max_tokens=2, ignore_eos=True)
    for name in plans:
        tokens = tuple(i % model.vocab_size for i in range(length))
        engine.submit(Submit("warm-up", tokens, length, name, sampling, share=False))
        while engine.has_work:
            for output in engine.step().outputs:
                if output.error is not None:
                    raise ConfigError(f"model: {model.name}: the first request failed: {output.error}")
