"""`farspan serve`: flags become settings, and the server runs with them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from server.commands.exits import REFUSED, fail

_MODEL, _CACHE, _STEPS, _HTTP, _WATCH = "Model", "Cache", "Scheduler", "Server", "Observability"


def serve(
    model: Annotated[
        str | None,
        typer.Argument(help="Hub id, local folder or GGUF file.", show_default="smollm2, packaged"),
    ] = None,
    plan: Annotated[
        list[str] | None,
        typer.Option(
            help="Plan file or shipped plan; repeat it to load several. The first is the default, requests"
            " name the others.",
            show_default="minference-snapkv and dense",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with any of these settings; flags go before it.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub model.", rich_help_panel=_MODEL)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=_MODEL)
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.", rich_help_panel=_MODEL)] = None,
    max_model_len: Annotated[
        str | None,
        typer.Option(
            help="Tokens of prompt plus answer: auto, 8192, 8k (8,000) or 8K (8,192).", rich_help_panel=_MODEL
        ),
    ] = None,
    rope_scaling: Annotated[
        str | None,
        typer.Option(
            help="A longer context than the model was made for: linear:F or yarn:F, F times as long.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(help="CPU threads of the engine.", show_default="all cores", rich_help_panel=_MODEL),
    ] = None,
    kv_cache_memory_bytes: Annotated[
        str | None,
        typer.Option(
            help="Size of the KV cache, such as 4GiB.",
            show_default="from free memory",
            rich_help_panel=_CACHE,
        ),
    ] = None,
    cache_dtype: Annotated[
        str | None,
        typer.Option(
            help="Of keys and values in the cache: auto (the model's), fp8 or int8 (one byte, and a scale).",
            show_default="auto",
            rich_help_panel=_CACHE,
        ),
    ] = None,
    gpu_memory_utilization: Annotated[
        float | None,
        typer.Option(help="Share of GPU memory to use, weights included.", rich_help_panel=_CACHE),
    ] = None,
    enable_prefix_caching: Annotated[
        bool | None,
        typer.Option(
            help="Compute an equal beginning of several prompts once.",
            show_default="on",
            rich_help_panel=_CACHE,
        ),
    ] = None,
    host_memory: Annotated[
        str | None,
        typer.Option(
            help="A second pool in the host's memory, such as 16GiB, where sequences give way to others.",
            show_default="none",
            rich_help_panel=_CACHE,
        ),
    ] = None,
    host_columns: Annotated[
        float | None,
        typer.Option(
            help="Share of it for beginnings of prompts that the pool has no room for.",
            show_default="0.5",
            rich_help_panel=_CACHE,
        ),
    ] = None,
    max_num_batched_tokens: Annotated[
        str | None, typer.Option(help="Most tokens of one forward.", rich_help_panel=_STEPS)
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(help="Sequences alive at once.", rich_help_panel=_STEPS)
    ] = None,
    step_seconds: Annotated[
        float | None,
        typer.Option(help="What a step should take while others generate.", rich_help_panel=_STEPS),
    ] = None,
    prefill_share: Annotated[
        float | None,
        typer.Option(
            help="Most of the time that longer chunks may take while others generate.", rich_help_panel=_STEPS
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(help="Address to listen on.", show_default="127.0.0.1", rich_help_panel=_HTTP),
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port; 0 picks a free one.", show_default="8000", rich_help_panel=_HTTP)
    ] = None,
    served_model_name: Annotated[
        str | None,
        typer.Option(
            help="The name that clients use.", show_default="the model's own", rich_help_panel=_HTTP
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Key that clients need; repeat it for several. Others can read it in the list of processes:"
            " --api-key-file and the environment's FARSPAN_API_KEY hide it.",
            show_default="none",
            rich_help_panel=_HTTP,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File of keys, one a line.", rich_help_panel=_HTTP)
    ] = None,
    admin_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File of keys for /admin, one a line; without any, there are no admin routes.",
            rich_help_panel=_HTTP,
        ),
    ] = None,
    max_open_requests: Annotated[
        int | None, typer.Option(help="Requests open at once; more get 503.", rich_help_panel=_HTTP)
    ] = None,
    max_queued_tokens: Annotated[
        str | None,
        typer.Option(
            help="Prompt tokens that may wait for an answer to begin; more get 503.", rich_help_panel=_HTTP
        ),
    ] = None,
    max_requests_per_key: Annotated[
        int | None,
        typer.Option(help="Requests that one key may have open; more get 429.", rich_help_panel=_HTTP),
    ] = None,
    engine_restarts: Annotated[
        int | None,
        typer.Option(
            help="Deaths of the engine process in ten minutes after which it is started again, and goes on"
            " with the open requests.",
            show_default="3",
            rich_help_panel=_HTTP,
        ),
    ] = None,
    shutdown_timeout: Annotated[
        float | None,
        typer.Option(help="Seconds that open requests have to end after SIGTERM.", rich_help_panel=_HTTP),
    ] = None,
    metrics_prefix: Annotated[
        str | None,
        typer.Option(
            help="What series at /metrics begin with that vLLM has, too: farspan or vllm.",
            show_default="farspan",
            rich_help_panel=_WATCH,
        ),
    ] = None,
    log_format: Annotated[
        str | None,
        typer.Option(help="text, or json: one object a line.", show_default="text", rich_help_panel=_WATCH),
    ] = None,
    log_requests: Annotated[
        bool | None,
        typer.Option(
            help="Log each ended request: times and counts, nothing of its text.",
            show_default="off",
            rich_help_panel=_WATCH,
        ),
    ] = None,
    otlp_traces_endpoint: Annotated[
        str | None,
        typer.Option(
            help="Send spans of requests there, such as http://127.0.0.1:4318/v1/traces.",
            show_default="none",
            rich_help_panel=_WATCH,
        ),
    ] = None,
    ssl_certfile: Annotated[
        Path | None, typer.Option(help="Certificate chain (PEM) for HTTPS.", rich_help_panel=_HTTP)
    ] = None,
    ssl_keyfile: Annotated[
        Path | None, typer.Option(help="Its private key (PEM).", rich_help_panel=_HTTP)
    ] = None,
    sse_keep_alive_interval: Annotated[
        float | None, typer.Option(help="Seconds between comments on a silent stream.", rich_help_panel=_HTTP)
    ] = None,
) -> None:
    """Serve a model over the OpenAI API.

    [bold]Examples[/bold]

      farspan serve
      farspan serve Qwen/Qwen3-0.6B --max-model-len 32K --port 8080
      farspan serve --plan minference-snapkv --plan dense --plan my-plan.yaml
    """
    from configs.errors import ConfigError
    from configs.loading import DEFAULT_PLAN, load_config, load_plan
    from server import serve as running

    flags: dict[str, Any] = {
        "plans": plan or None,
        "engine.model": model,
        "engine.revision": revision,
        "engine.dtype": dtype,
        "engine.device": device,
        "engine.max_model_len": max_model_len,
        "engine.rope_scaling": rope_scaling,
        "engine.threads": threads,
        "cache.kv_cache_memory_bytes": kv_cache_memory_bytes,
        "cache.dtype": cache_dtype,
        "cache.gpu_memory_utilization": gpu_memory_utilization,
        "cache.enable_prefix_caching": enable_prefix_caching,
        "cache.host_memory": host_memory,
        "cache.host_columns": host_columns,
        "scheduler.max_num_batched_tokens": max_num_batched_tokens,
        "scheduler.max_num_seqs": max_num_seqs,
        "scheduler.step_seconds": step_seconds,
        "scheduler.prefill_share": prefill_share,
        "server.host": host,
        "server.port": port,
        "server.served_model_name": served_model_name,
        "server.sse_keep_alive_interval": sse_keep_alive_interval,
        "server.api_keys": api_key or None,
        "server.api_key_file": api_key_file,
        "server.admin_key_file": admin_key_file,
        "server.max_open_requests": max_open_requests,
        "server.max_queued_tokens": max_queued_tokens,
        "server.max_requests_per_key": max_requests_per_key,
        "server.engine_restarts": engine_restarts,
        "server.shutdown_timeout": shutdown_timeout,
        "server.metrics_prefix": metrics_prefix,
        "server.log_format": log_format,
        "server.log_requests": log_requests,
        "server.otlp_traces_endpoint": otlp_traces_endpoint,
        "server.ssl_certfile": ssl_certfile,
        "server.ssl_keyfile": ssl_keyfile,
    }
    try:
        settings = load_config(config, flags)
        if not settings.plans:
            # dense beside the default: the exact answer to compare with costs nothing until it is asked for
            settings = load_config(config, flags | {"plans": [DEFAULT_PLAN, "dense"]})
        for reference in settings.plans:
            load_plan(reference)
        running.serve(settings)
    except ConfigError as error:
        fail(str(error), REFUSED)
    except running.StartFailed as error:
        fail(str(error), error.code)
