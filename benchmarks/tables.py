"""The tables and plots of docs/ that show what quality.py found, written anew from its results.

    python -m benchmarks.tables        # after a run, or when a result was replaced

A table stands between `<!-- quality: NAME -->` and `<!-- end -->`, and shows results/*/NAME.json.
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.parts import ROOT

DOCS = ROOT / "docs"
MARKED = re.compile(r"(<!-- quality: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
COLUMNS = {
    "length": "tokens",
    "plan": "plan",
    "read_fraction": "read",
    "recall": "recall",
    "kept": "kept",
    "digit_accuracy": "digits",
    "needles_exact": "exact",
    "copy_perplexity_prefill": "copy pre",
    "copy_perplexity_decode": "copy dec",
    "kl_prefill": "KL pre",
    "kl_decode": "KL dec",
    "top1_prefill": "top-1 pre",
    "top1_decode": "top-1 dec",
    "perplexity_prefill": "ppl pre",
    "perplexity_decode": "ppl dec",
    "gate": "gate",
}


def table(content: Mapping[str, Any]) -> str:
    """One result as Markdown: only columns in which something was measured, and where it comes from."""
    rows = content["rows"]
    names = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    lines = ["| " + " | ".join(COLUMNS[name] for name in names) + " |"]
    lines.append("|" + "|".join("---" if name in ("plan", "gate") else "--:" for name in names) + "|")
    lines += ["| " + " | ".join(_cell(row.get(name)) for name in names) + " |" for row in rows]
    versions = content["versions"]
    origin = (
        f"{content['settings']['text']}, {content['settings']['dtype']}; {content['device']}; torch"
        f" {versions['torch']}, transformers {versions['transformers']}; {content['when'][:10]}:"
    )
    return "\n".join([*lines, "", origin, "", "```", content["command"], "```", ""])


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def renewed(text: str, results: Path = RESULTS) -> str:
    """A page with all its marked tables written anew."""

    def replace(match: re.Match[str]) -> str:
        found = sorted(results.glob(f"*/{match[2]}.json"))
        if not found:
            raise FileNotFoundError(f"a table shows {match[2]}.json, which no results folder has")
        parts = [table(json.loads(path.read_text(encoding="utf-8"))) for path in found]
        return f"{match[1]}\n" + "\n".join(parts) + f"\n{match[3]}"

    return MARKED.sub(replace, text)


def main() -> None:
    for path in sorted(DOCS.glob("*.md")):
        before = path.read_text(encoding="utf-8")
        after = renewed(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"written: {path.name}", file=sys.stderr)


if __name__ == "__main__":
    main()
