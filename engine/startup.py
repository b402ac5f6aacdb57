"""From a configuration to a running engine, in two steps: resolve (no weights, seconds) and load."""

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch

from configs.errors import ConfigError
from configs.grammars import Grammars
from configs.loading import load_plan
from configs.model import PAGE_SIZE, ModelInfo
from configs.schema import ServeConfig
from engine import attention
from engine.break_even import measured
from engine.engine import Engine
from engine.kernels import kernels_for
from engine.layers import fuse_layers
from engine.linear import speed_up_decode
from engine.messages import ModelCard, Sampling, Submit
from engine.models import end_tokens, load_model, model_info, prepare_model
from engine.plans import ResolvedPlan, resolve_plans
from engine.rope import Rope
from engine.runner import ModelRunner
from engine.scheduler import Scheduler
from engine.self_check import checked
from kvcache.cache import CacheSize, KVCache
from kvcache.pool import page_bytes, pages_for
from kvcache.state import StateRegistry

log = logging.getLogger(__name__)

CPU_CACHE_SHARE = 0.4  # of the memory that is free once weights are loaded
WARM_UP_TOKENS = 128


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
        )


def resolve(config: ServeConfig) -> Resolution:
    """Check model, plans, device and dtype against each other. Raises ConfigError."""
    device = _device(config.engine.device)
    folder = prepare_model(config.engine)
    model = model_info(folder, config.engine)
    states = StateRegistry()
    plans = resolve_plans([load_plan(path) for path in config.plans], model, states)
    if not plans:
        raise ConfigError("plans: at least one plan is needed")
    return Resolution(config, folder, model, states, plans, device, _dtype(config.engine.dtype, device))


def load(resolution: Resolution) -> tuple[Engine, ModelCard]:
    """Load weights, size the cache, run a first request through everything. Raises ConfigError if it cannot
    fit."""
    config, model = resolution.config, resolution.model
    torch.set_num_threads(config.engine.threads or os.cpu_count() or 1)
    attention.register()
    network = load_model(
        resolution.folder,
        dtype=resolution.dtype,
        device=resolution.device,
        attention=attention.IMPLEMENTATION,
        rope_scaling=config.engine.rope_scaling,
    )
    dtype, device = getattr(torch, resolution.dtype), torch.device(resolution.device)
    if device.type == "cpu":
        speed_up_decode(network)
        fuse_layers(network)
    bytes_per_page = page_bytes(model.head_dim, dtype, resolution.states)
    num_pages = _pool_bytes(config, model, bytes_per_page, device) // bytes_per_page
    model = _fit_length(model, config, resolution.plans, num_pages)
    kernels = checked(kernels_for(device), model, dtype, device)
    cache = KVCache(
        model,
        CacheSize(num_pages, config.scheduler.max_num_seqs, model.max_length),
        dtype=dtype,
        device=device,
        states=resolution.states,
        moves=kernels.moves,
    )
    plans = measured(resolution.plans, model, cache, kernels, Rope.of(network))
    runner = ModelRunner(network, cache, kernels, device)

    grammars = Grammars.if_possible(
        resolution.folder / "tokenizer.json", model.vocab_size, end_tokens(resolution.folder)
    )

    def engine() -> Engine:
        scheduler = Scheduler(config.scheduler, cache)
        return Engine(
            plans,
            scheduler,
            runner,
            cache,
            end_tokens(resolution.folder),
            share_prefixes=config.cache.enable_prefix_caching,
            grammars=grammars,
        )

    _warm_up(engine(), plans, model)  # an engine of its own: nobody asked for these tokens
    card = msgspec.structs.replace(
        resolution.card,
        plans=tuple(plan.card for plan in plans.values()),
        max_model_len=model.max_length,
        num_pages=num_pages,
        page_bytes=bytes_per_page,
    )
    return engine(), card


def _device(asked: str) -> str:
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError("engine.device: cuda was asked for, and torch sees no CUDA device")
    return "cuda" if asked == "cuda" or (asked == "auto" and torch.cuda.is_available()) else "cpu"


def _dtype(asked: str, device: str) -> str:
    """bfloat16 where the device multiplies it natively; elsewhere it is slower than float32."""
    if device == "cpu" and asked == "float16":
        raise ConfigError(
            "engine.dtype: float16 is two to three times slower than float32 on a CPU;"
            " use float32 or bfloat16"
        )
    if asked != "auto":
        return asked
    native = torch.cuda.is_bf16_supported() if device == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if native else "float32"


def _pool_bytes(config: ServeConfig, model: ModelInfo, bytes_per_page: int, device: torch.device) -> int:
    """Bytes of the page pool: as configured, else from free memory, never more than all sequences could
    use."""
    if config.cache.kv_cache_memory_bytes is not None:
        return config.cache.kv_cache_memory_bytes
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        available = free - int(total * (1 - config.cache.gpu_memory_utilization))
    else:
        available = int(_free_memory() * CPU_CACHE_SHARE)
    rows = model.num_layers * model.num_kv_heads
    most = config.scheduler.max_num_seqs * rows * pages_for(model.max_length) * bytes_per_page
    return max(0, min(available, most))


def _free_memory() -> int:
    """Bytes a process can still get, from the kernel's own estimate."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ConfigError("cache.kv_cache_memory_bytes: free memory cannot be read on this system; give a size")


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
