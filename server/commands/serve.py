"""`farspan serve`: flags become settings, and the server runs with them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.commands.exits import REFUSED, fail
from server.commands.flags import Flag, Panels, settings_of, takes

if TYPE_CHECKING:
    from configs.schema import ServeConfig

FLAGS: Panels = {
    "Model": (
        Flag("engine.revision", "Branch, tag or commit of a hub model."),
        Flag("engine.dtype", "auto, float32, bfloat16 or float16."),
        Flag(
            "engine.weights_dtype",
            "Of weights in memory: auto (as --dtype), or bfloat16 where a CPU computes in float32.",
            shown="auto",
        ),
        Flag("engine.device", "auto, cpu or cuda."),
        Flag("engine.max_model_len", "Tokens of prompt plus answer: auto, 8192, 8k (8,000) or 8K (8,192)."),
        Flag(
            "engine.rope_scaling",
            "A longer context than the model was made for: linear:F or yarn:F, F times as long.",
        ),
        Flag("engine.threads", "CPU threads of the engine.", int, shown="all cores"),
        Flag(
            "engine.cuda_graphs",
            "Record decode steps at start: auto (where there is a GPU that can), on or off.",
            shown="auto",
        ),
        Flag("engine.cuda_graph_batch", "Sequences of the largest step that is recorded.", int, shown="64"),
        Flag("engine.cuda_graph_memory", "GPU memory that recorded steps may take.", shown="1GiB"),
    ),
    "Cache": (
        Flag("cache.kv_cache_memory_bytes", "Size of the KV cache, such as 4GiB.", shown="from free memory"),
        Flag(
            "cache.dtype",
            "Of keys and values in the cache: auto (the model's), fp8 or int8 (one byte, and a scale).",
            shown="auto",
            name="cache_dtype",
        ),
        Flag("cache.gpu_memory_utilization", "Share of GPU memory to use, weights included.", float),
        Flag(
            "cache.enable_prefix_caching",
            "Compute an equal beginning of several prompts once.",
            bool,
            shown="on",
        ),
        Flag(
            "cache.host_memory",
            "A second pool in the host's memory, such as 16GiB, where sequences give way to others.",
            shown="none",
        ),
        Flag(
            "cache.host_columns",
            "Share of it for beginnings of prompts that the pool has no room for.",
            float,
            shown="0.5",
        ),
    ),
    "Scheduler": (
        Flag("scheduler.max_num_batched_tokens", "Most tokens of one forward."),
        Flag("scheduler.max_num_seqs", "Sequences alive at once.", int),
        Flag("scheduler.step_seconds", "What a step should take while others generate.", float),
        Flag(
            "scheduler.prefill_share",
            "Most of the time that longer chunks may take while others generate.",
            float,
        ),
    ),
    "Server": (
        Flag("server.host", "Address to listen on.", shown="127.0.0.1"),
        Flag("server.port", "Port; 0 picks a free one.", int, shown="8000"),
        Flag("server.served_model_name", "The name that clients use.", shown="the model's own"),
        Flag(
            "server.api_keys",
            "Key that clients need; repeat it for several. Others can read it in the list of"
            " processes: --api-key-file and the environment's FARSPAN_API_KEY hide it.",
            list[str],
            shown="none",
            name="api_key",
        ),
        Flag("server.api_key_file", "File of keys, one a line.", Path),
        Flag(
            "server.admin_key_file",
            "File of keys for /admin, one a line; without any, there are no admin routes.",
            Path,
        ),
        Flag("server.max_open_requests", "Requests open at once; more get 503.", int),
        Flag("server.max_queued_tokens", "Prompt tokens that may wait for an answer to begin; more get 503."),
        Flag("server.max_requests_per_key", "Requests that one key may have open; more get 429.", int),
        Flag(
            "server.engine_restarts",
            "Deaths of the engine process in ten minutes after which it is started again, and goes"
            " on with the open requests.",
            int,
            shown="3",
        ),
        Flag("server.shutdown_timeout", "Seconds that open requests have to end after SIGTERM.", float),
        Flag("server.ssl_certfile", "Certificate chain (PEM) for HTTPS.", Path),
        Flag("server.ssl_keyfile", "Its private key (PEM).", Path),
        Flag("server.sse_keep_alive_interval", "Seconds between comments on a silent stream.", float),
    ),
    "Observability": (
        Flag(
            "server.metrics_prefix",
            "What series at /metrics begin with that vLLM has, too: farspan or vllm.",
            shown="farspan",
        ),
        Flag("server.log_format", "text, or json: one object a line.", shown="text"),
        Flag(
            "server.log_requests",
            "Log each ended request: times and counts, nothing of its text.",
            bool,
            shown="off",
        ),
        Flag(
            "server.otlp_traces_endpoint",
            "Send spans of requests there, such as http://127.0.0.1:4318/v1/traces.",
            shown="none",
        ),
    ),
}


def with_plans(config: Path | None, flags: dict[str, Any]) -> "ServeConfig":
    """The configuration, with the plans that hold where none is named. Raises ConfigError, also of a plan."""
    from configs.loading import DEFAULT_PLAN, load_config, load_plan

    settings = load_config(config, flags)
    if not settings.plans:
        # dense beside the default: the exact answer to compare with costs nothing until it is asked for
        settings = load_config(config, flags | {"plans": [DEFAULT_PLAN, "dense"]})
    for reference in settings.plans:
        load_plan(reference)
    return settings


@takes(FLAGS)
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
    **given: Any,
) -> None:
    """Serve a model over the OpenAI API.

    [bold]Examples[/bold]

      farspan serve
      farspan serve Qwen/Qwen3-0.6B --max-model-len 32K --port 8080
      farspan serve --plan minference-snapkv --plan dense --plan my-plan.yaml
    """
    from configs.errors import ConfigError
    from server import serve as running

    flags = settings_of(FLAGS, given) | {"engine.model": model, "plans": plan}
    try:
        running.serve(with_plans(config, flags))
    except ConfigError as error:
        fail(str(error), REFUSED)
    except running.StartFailed as error:
        fail(str(error), error.code)
