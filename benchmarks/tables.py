"""The tables and plots of docs/ that show what quality.py and method_speed.py found, written anew.

    python -m benchmarks.tables        # after a run, or when a result was replaced

`<!-- quality: NAME -->` and `<!-- end -->` hold a table of results/*/NAME.json; several names, one table of
what was judged alike, dense once. `<!-- speed: NAME -->` is the same for method_speed.py, and
`<!-- plot: NAME -->` shows quality as a picture, images/NAME.svg.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.parts import ROOT
from benchmarks.plot import plot

DOCS = ROOT / "docs"
MARKED = re.compile(r"(<!-- (quality|speed|plot): ([\w -]+?) -->\n).*?(<!-- end -->)", re.DOTALL)
WORDS = ("plan", "candidate", "gate")  # columns that are not numbers
QUALITY = {
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
SPEED = {
    "length": "tokens",
    "candidate": "method",
    "density": "density",
    "recall": "recall",
    "recall_p5": "5th percentile",
    "select_ms": "choosing, ms",
    "attend_ms": "attention, ms",
    "select_share": "share of choosing",
    "over_dense": "× own dense",
    "over_torch": "× torch",
}
# What two runs must have alike to stand in one table: the same texts, asked the same.
ALIKE = ("model", "sha256", "dtype", "form", "needles", "needles_per_text", "samples", "rows", "replayed")


def merged(contents: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of several results of quality.py, by length, dense once. Raises ValueError if they differ."""
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for content in contents:
        differ = [
            name for name in ALIKE if content["settings"].get(name) != contents[0]["settings"].get(name)
        ]
        if differ:
            raise ValueError(f"one table of results that differ in {', '.join(differ)}")
        for row in content["rows"]:
            key = (row["length"], row["plan"])
            if row["plan"] != "dense" and key in rows:
                raise ValueError(f"{row['plan']} at {row['length']} tokens stands in two of the results")
            rows.setdefault(key, row)
    lengths = list(dict.fromkeys(length for length, _ in rows))
    return sorted(rows.values(), key=lambda row: lengths.index(row["length"]))


def table(columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: only columns in which something was measured."""
    names = [name for name in columns if any(row.get(name) is not None for row in rows)]
    lines = ["| " + " | ".join(columns[name] for name in names) + " |"]
    lines.append("|" + "|".join("---" if name in WORDS else "--:" for name in names) + "|")
    lines += ["| " + " | ".join(_cell(row.get(name)) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def origin(content: Mapping[str, Any]) -> str:
    """Where a result comes from, and the command that repeats it."""
    versions = content["versions"]
    found = (
        f"{content['settings']['text']}, {content['settings']['dtype']}; {content['device']}; torch"
        f" {versions['torch']}, transformers {versions['transformers']}; {content['when'][:10]}:"
    )
    return "\n".join([found, "", "```", content["command"], "```"])


def quality(contents: Sequence[Mapping[str, Any]]) -> str:
    return "\n\n".join([table(QUALITY, merged(contents)), *map(origin, contents)]) + "\n"


def speed(contents: Sequence[Mapping[str, Any]]) -> str:
    """Of one or more results of method_speed.py, each a table: times of two runs are not compared."""
    parts = []
    for content in contents:
        parts += [table(SPEED, content["rows"]), *map(_reading, content["prompts"]), origin(content)]
    return "\n\n".join(parts) + "\n"


def _reading(prompt: Mapping[str, Any]) -> str:
    """How method_speed.py came to the queries and keys of one prompt."""
    stretched = f"RoPE {prompt['rope_scaling']}, " if prompt["rope_scaling"] else ""
    repeats = prompt["text_repeats"]
    again = f"; the text comes {repeats:.1f} times" if repeats > 1 else ""
    layers = ", ".join(map(str, prompt["layers"]))
    states = f"{stretched}hidden states: {prompt['hidden_states']}"
    return f"{prompt['length']} tokens: layers {layers}; {states}{again}."


def results_of(names: Sequence[str], results: Path) -> list[list[dict[str, Any]]]:
    """The results of these names, of each device that has all of them, else of whoever has each."""
    paths = [sorted(results.glob(f"*/{name}.json")) for name in names]
    for name, found in zip(names, paths, strict=True):
        if not found:
            raise FileNotFoundError(f"a page shows {name}.json, which no results folder has")
    folders = set.intersection(*({path.parent for path in found} for found in paths))
    chosen = [[folder / f"{name}.json" for name in names] for folder in sorted(folders)]
    return [
        [json.loads(path.read_text(encoding="utf-8")) for path in group]
        for group in chosen or [[found[0] for found in paths]]
    ]


def renewed(text: str, results: Path = RESULTS) -> str:
    """A page with all its marked tables, and the words around its plots, written anew."""

    def replace(match: re.Match[str]) -> str:
        names = match[3].split()
        if match[2] == "plot":
            body = f"![Quality against what is read, one line for each method](images/{names[0]}.svg)\n"
        else:
            groups = results_of(names, results)
            body = (
                "\n"
                + "\n".join({"quality": quality, "speed": speed}[match[2]](group) for group in groups)
                + "\n"
            )
        return f"{match[1]}{body}{match[4]}"

    return MARKED.sub(replace, text)


def plots(text: str, results: Path = RESULTS) -> dict[str, str]:
    """The pictures of a page, by file name."""
    found = {}
    for match in MARKED.finditer(text):
        if match[2] == "plot":
            names = match[3].split()
            contents = results_of(names, results)[0]
            settings = {
                name: plan for content in contents for name, plan in content["settings"]["plans"].items()
            }
            found[f"{names[0]}.svg"] = plot(merged(contents), settings)
    return found


def main() -> None:
    written = {path: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
    pages = {path: renewed(text) for path, text in written.items()}
    images = {DOCS / "images" / name: svg for text in written.values() for name, svg in plots(text).items()}
    for path, content in {**pages, **images}.items():
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            path.write_text(content, encoding="utf-8")
            print(f"written: {path.name}", file=sys.stderr)


if __name__ == "__main__":
    main()
