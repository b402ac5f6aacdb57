"""The command `farspan`. Imports the rest when a command runs: help is instant, shadowing is found first."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.shadowing import ShadowedPackage, protect_children, refuse_shadowed_packages
from server.version import farspan_version

if TYPE_CHECKING:
    from configs.model import ModelInfo
    from engine.plans import ResolvedPlan

EXIT_FAILED = 1
EXIT_REFUSED = 2  # something configured is wrong

app = typer.Typer(
    name="farspan",
    help="Long-context LLM inference server: sparse prefill and a compressed KV cache behind the OpenAI API.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)
plan_app = typer.Typer(help="Work with plan files.", no_args_is_help=True)
app.add_typer(plan_app, name="plan")

_MODEL, _CACHE, _STEPS, _HTTP = "Model", "Cache", "Scheduler", "Server"


@app.command()
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
    shutdown_timeout: Annotated[
        float | None,
        typer.Option(help="Seconds that open requests have to end after SIGTERM.", rich_help_panel=_HTTP),
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
        "cache.gpu_memory_utilization": gpu_memory_utilization,
        "cache.enable_prefix_caching": enable_prefix_caching,
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
        "server.max_open_requests": max_open_requests,
        "server.max_queued_tokens": max_queued_tokens,
        "server.max_requests_per_key": max_requests_per_key,
        "server.shutdown_timeout": shutdown_timeout,
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
        _fail(str(error), EXIT_REFUSED)
    except running.StartFailed as error:
        _fail(str(error), error.code)


@plan_app.command()
def check(
    file: Annotated[str, typer.Argument(help="Plan file, or the name of a shipped plan.")],
    model: Annotated[str, typer.Option(help="Model as for `farspan serve`.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
) -> None:
    """Say whether a plan fits a model, and what it does in each layer. Loads no weights.

    [bold]Example[/bold]

      farspan plan check my-plan.yaml --model smollm2
    """
    from configs.errors import ConfigError
    from configs.loading import load_config, load_plan
    from engine.models import model_info, prepare_model
    from engine.plans import resolve_plan

    try:
        settings = load_config(None, {"engine.model": model, "engine.revision": revision}).engine
        written = load_plan(file)
        info = model_info(prepare_model(settings), settings)
        _show(resolve_plan(written, info), info)
    except ConfigError as error:
        _fail(str(error), EXIT_REFUSED)


@plan_app.command()
def matrix(
    markdown: Annotated[bool, typer.Option("--markdown", help="As it stands in docs/plans.md.")] = False,
) -> None:
    """Say which methods and policies go together, and what becomes of chunks and the prefix cache."""
    from rich.console import Console
    from rich.table import Table

    from engine.combinations import LEGEND, as_markdown, decode_by_policy, prefill_by_policy

    if markdown:
        print(as_markdown(), end="")
        return
    console = Console(highlight=False)
    for found in (prefill_by_policy(), decode_by_policy()):
        table = Table(box=None, padding=(0, 1, 1, 0))
        for heading in found.headings:
            table.add_column(heading, min_width=len(heading))
        table.columns[0].no_wrap = True
        for row in found.rows:
            table.add_row(*row)
        console.print(table)
    for word, says in LEGEND.items():
        console.print(f"[bold]{word}[/bold]: {says}")


@app.command()
def version() -> None:
    """Print the version."""
    print(farspan_version())


def main() -> None:
    """The entry point of the command."""
    try:
        refuse_shadowed_packages()
    except ShadowedPackage as error:
        _fail(str(error), EXIT_FAILED)
    protect_children()
    app(prog_name="farspan")


def _show(plan: "ResolvedPlan", model: "ModelInfo") -> None:
    """The resolved plan as a table: a line per run of layers with the same method."""
    from rich.console import Console
    from rich.table import Table

    from configs.model import PAGE_SIZE

    table = Table(title=f"{plan.name} ({plan.digest}) on {model.name}")
    for heading in ("layers", "prefill", "kv", "decode"):
        table.add_column(heading)
    first = 0
    for layer, method in enumerate(plan.methods):
        if layer + 1 == len(plan.methods) or plan.methods[layer + 1] != method:
            layers = str(first) if first == layer else f"{first}-{layer}"
            table.add_row(layers, *map(repr, (method, plan.policy, plan.decode)))
            first = layer + 1
    context = model.max_length
    most, later = plan.pages_needed(context, context), plan.policy.pages_after_prefill(context, context)
    page_bytes = 2 * PAGE_SIZE * model.head_dim * 2  # keys and values of 16 bits
    floor = "none" if plan.recall_floor is None else plan.recall_floor
    below = "auto (measured at start)" if plan.dense_below is None else f"{plan.dense_below} tokens"
    console = Console(highlight=False)
    console.print(table)
    console.print(f"chunk {plan.chunk} tokens, dense below {below}, recall floor {floor}")
    console.print(
        f"KV cache of a prompt of {context} tokens in 16 bits: at most {most * page_bytes / 2**20:.0f} MiB"
        f" while it is computed, {later * page_bytes / 2**20:.0f} MiB afterwards"
    )


def _fail(message: str, code: int) -> None:
    if message:
        print(f"farspan: {message}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
