"""`farspan plan ...`: what a plan does, whether it fits a model and memory, which parts go together."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.commands.exits import REFUSED, fail
from server.commands.flags import Flag, Panels, settings_of, takes

if TYPE_CHECKING:
    from rich.table import Table

    from engine.memory import Footprint
    from engine.plans import ResolvedPlan
    from engine.startup import Resolution

AT_ONCE = (1, 4, 16, 64)  # sequences, where nobody says how many

app = typer.Typer(help="Work with plan files.", no_args_is_help=True)
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]
SERVER: Panels = {
    "Server": (
        Flag("engine.revision", "Branch, tag or commit of a hub model."),
        Flag("engine.dtype", "As for `farspan serve`."),
        Flag("engine.device", "As for `farspan serve`."),
        Flag("engine.max_model_len", "As for `farspan serve`."),
        Flag("engine.rope_scaling", "As for `farspan serve`."),
        Flag("cache.dtype", "As for `farspan serve`.", name="cache_dtype"),
        Flag("cache.kv_cache_memory_bytes", "Say how many sequences live in so much, such as 4GiB."),
    )
}


@app.command()
@takes(SERVER)
def check(
    file: Annotated[str, typer.Argument(help="Plan file, or the name of a shipped plan.")],
    model: Annotated[str, typer.Option(help="Model as for `farspan serve`.")],
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="Prompt length in tokens, such as 8K; repeat it for several.",
            show_default="the longest and its halves",
        ),
    ] = None,
    answer: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 256,
    concurrency: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Sequences at once; repeat it.", show_default="1, 4, 16, 64"),
    ] = None,
    as_json: AsJson = False,
    **given: Any,
) -> None:
    """Say whether a plan fits a model, what it does in each layer, what memory it takes. Loads no weights.

    [bold]Examples[/bold]

      farspan plan check my-plan.yaml --model smollm2
      farspan plan check snapkv --model smollm2 --prompt 4K --prompt 8K --concurrency 32 --json
    """
    from rich.console import Console

    from configs.errors import ConfigError
    from configs.loading import load_config
    from configs.schema import parse_count

    flags = settings_of(SERVER, given) | {"plans": [file], "engine.model": model}
    try:
        with Console(stderr=True).status("preparing the model"):
            from engine.memory import footprints
            from engine.startup import resolve

            resolution = resolve(load_config(None, flags))
        (plan,) = resolution.plans.values()
        lengths = [int(parse_count(length)) for length in prompt or ()]
        found = footprints(resolution, plan, lengths, answer)
    except (ConfigError, ValueError) as error:
        fail(str(error), REFUSED)
    if as_json:
        print(json.dumps(_as_json(resolution, plan, found, concurrency or AT_ONCE), indent=2))
    else:
        _show(resolution, plan, found, concurrency or AT_ONCE)


@app.command()
def show(
    name: Annotated[
        str | None, typer.Argument(help="Plan file or shipped plan.", show_default="list the shipped ones")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print a plan with all that it leaves to defaults, or list the plans that come with Farspan.

    [bold]Examples[/bold]

      farspan plan show
      farspan plan show minference-snapkv > mine.yaml
    """
    import yaml

    from configs.errors import ConfigError
    from configs.loading import SHIPPED_PLANS, load_plan, shipped_plans

    if name is None:
        plans = {plan: _first_comment(SHIPPED_PLANS / f"{plan}.yaml") for plan in shipped_plans()}
        print(json.dumps(plans, indent=2)) if as_json else _show_shipped(plans)
        return
    try:
        written = load_plan(name)
        from engine.plans import spelled_out

        content = spelled_out(written)
    except ConfigError as error:
        fail(str(error), REFUSED)
    print(json.dumps(content, indent=2) if as_json else yaml.safe_dump(content, sort_keys=False), end="\n")


@app.command()
def matrix(
    markdown: Annotated[bool, typer.Option("--markdown", help="As it stands in docs/plans.md.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say which methods and policies go together, and what becomes of chunks and the prefix cache."""
    from rich.console import Console

    from configs.errors import ConfigError
    from engine.combinations import LEGEND, as_markdown, decode_by_policy, prefill_by_policy

    try:
        tables = (prefill_by_policy(), decode_by_policy())
    except ConfigError as error:
        fail(str(error), REFUSED)
    if markdown:
        print(as_markdown(), end="")
        return
    if as_json:
        cells = {
            found.headings[0]: {
                row[0]: dict(zip(found.headings[1:], row[1:], strict=True)) for row in found.rows
            }
            for found in tables
        }
        print(json.dumps(cells | {"legend": LEGEND}, indent=2))
        return
    console = Console(highlight=False)
    for found in tables:
        table = _table(*found.headings, apart=1)
        table.columns[0].no_wrap = True
        for row in found.rows:
            table.add_row(*row)
        console.print(table)
    for word, says in LEGEND.items():
        console.print(f"[bold]{word}[/bold]: {says}")


def _show(
    resolution: "Resolution",
    plan: "ResolvedPlan",
    found: "list[Footprint]",
    at_once: "list[int] | tuple[int, ...]",
) -> None:
    """What each run of layers does, then what prompts of several lengths take."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(title=f"{plan.name} ({plan.digest}) on {resolution.model.name}")
    for heading in ("layers", "prefill", "kv", "decode"):
        table.add_column(heading)
    for run in plan.card.layers:
        layers = str(run.first) if run.first == run.last else f"{run.first}-{run.last}"
        table.add_row(layers, *map(repr, (plan.methods[run.first], plan.policy, plan.decode)))
    console.print(table)
    floor = "none" if plan.recall_floor is None else plan.recall_floor
    below = "auto (measured at start)" if plan.dense_below is None else f"{plan.dense_below} tokens"
    delta = "none" if plan.delta is None else f"every {plan.delta} rows"
    console.print(f"chunk {plan.chunk} tokens, dense below {below}, recall floor {floor}, delta {delta}\n")
    console.print(
        f"KV memory in pages of {resolution.bytes_per_page} bytes"
        f" ({resolution.card.cache_dtype.replace('auto', resolution.dtype)}),"
        f" {resolution.bytes_per_token} bytes a token, at most:"
        " one prompt while it is computed; then so many sequences (×) that answer"
    )
    capacity = resolution.config.cache.kv_cache_memory_bytes
    memory = _table("prompt", "with answer", "computing", *(f"×{count}" for count in at_once))
    if capacity is not None:
        console.print(f"fit: sequences that live in {_size(capacity)} at once")
        memory.add_column("fit")
    for column in memory.columns:
        column.justify = "right"
    for one in found:
        sizes = [one.computing, *map(one.of, at_once)]
        fit = [] if capacity is None else [str(one.that_fit(capacity))]
        memory.add_row(f"{one.prompt:,}", f"{one.total:,}", *map(_size, sizes), *fit)
    console.print(memory)


def _as_json(
    resolution: "Resolution",
    plan: "ResolvedPlan",
    found: "list[Footprint]",
    at_once: "list[int] | tuple[int, ...]",
) -> dict[str, Any]:
    import msgspec

    capacity = resolution.config.cache.kv_cache_memory_bytes
    memory = [
        {
            "prompt_tokens": one.prompt,
            "total_tokens": one.total,
            "computing_bytes": one.computing,
            "answering_bytes": {str(count): one.of(count) for count in at_once},
        }
        | ({} if capacity is None else {"sequences_that_fit": one.that_fit(capacity)})
        for one in found
    ]
    return {
        "plan": msgspec.to_builtins(plan.card),
        "model": resolution.model.name,
        "max_model_len": resolution.model.max_length,
        "device": resolution.device,
        "dtype": resolution.dtype,
        "page_bytes": resolution.bytes_per_page,
        "memory": memory,
    }


def _show_shipped(plans: dict[str, str]) -> None:
    from rich.console import Console

    table = _table("plan", "what it does")
    table.columns[0].no_wrap = True
    for name, words in plans.items():
        table.add_row(name, words)
    Console(highlight=False).print(table)


def _table(*headings: str, apart: int = 0) -> "Table":
    """Lines of plain text under headings, so many empty lines apart."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, apart, 0))
    for heading in headings:
        table.add_column(heading, min_width=len(heading))
    return table


def _first_comment(file: Path) -> str:
    """What a plan file says of itself: the comment it begins with."""
    lines = file.read_text(encoding="utf-8").splitlines()
    first = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return " ".join(line.lstrip("# ") for line in lines[:first])


def _size(count: int) -> str:
    """Bytes as people read them."""
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if size >= 100 or unit == "B" else f"{size:.1f} {unit}"
