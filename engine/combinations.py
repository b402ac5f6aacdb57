"""The matrix: every prefill method with every KV policy and decode method, as they say of themselves."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.model import ModelInfo
from kvcache.decode_methods import DECODE_METHODS
from kvcache.policies import KV_POLICIES
from kvcache.state import StateRegistry
from sparse.dense import Dense
from sparse.methods import PREFILL_METHODS

ANY_MODEL = ModelInfo("any model", 4, 8, 4, 64, 1000, 8192)  # the rules do not depend on its sizes

LEGEND = {
    "page": "a prompt may be cut at any page, and its answer is the same",
    "grid": "a prompt is cut on the plan's grid (`prefill.chunk`), so that its answer never depends on load",
    "shared": "beginnings of prompts are shared through the prefix cache, whole chunks if there is a grid",
    "copied": "the same, and what stays of a computed prompt is copied out of what is shared",
    "refused": "the plan is refused when it is resolved, with the reason",
}


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under headings; the first cell of a row names it."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def prefill_by_policy() -> Table:
    """What chunking and the prefix cache come to, for every method (row) and policy (column)."""
    rows = tuple(
        (name, *(_cell(method, policy) for policy in KV_POLICIES.values()))
        for name, method in PREFILL_METHODS.items()
    )
    return Table(("prefill", *KV_POLICIES), rows)


def decode_by_policy() -> Table:
    """Which decode methods (rows) go with which policies (columns), under any prefill method."""
    rows = tuple(
        (name, *("refused" if _cannot_move(decode, policy) else "yes" for policy in KV_POLICIES.values()))
        for name, decode in DECODE_METHODS.items()
    )
    return Table(("decode", *KV_POLICIES), rows)


def as_markdown() -> str:
    """Both tables and what their words mean, as they stand in docs/plans.md."""
    lines: list[str] = []
    used = ""
    for table in (prefill_by_policy(), decode_by_policy()):
        rows = [table.headings, tuple("---" for _ in table.headings), *table.rows]
        lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]
        used += " ".join(cell for row in table.rows for cell in row[1:])
    lines += [f"- **{word}**: {says}." for word, says in LEGEND.items() if word in used]
    return "\n".join(lines) + "\n"


def _cell(method: Any, policy: Any) -> str:
    if _cannot_move(method, policy):
        return "refused"
    on_grid = method.grid or (policy.masks and method is not Dense)
    return f"{'grid' if on_grid else 'page'}, {'copied' if policy.compacts else 'shared'}"


def _cannot_move(plugin: Any, policy: Any) -> bool:
    """Does the plug-in, with its default options, keep state of pages that cannot follow moved tokens?"""
    states = StateRegistry()
    with suppress(ValueError):  # one that needs a file declares its state before it asks for that
        plugin().attach(ANY_MODEL, Path(), states)
    return bool(policy.compacts and not states.follows_compaction)
