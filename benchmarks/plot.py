"""Quality against what is read, as a picture (SVG): one line for each method, through its settings.

Rows of panels are prompt lengths. Left: digits of needles that are right. Right: perplexity of a repeated
passage over dense attention's, logarithmic. Dashed: dense attention. Shaded: where the gate is passed.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

GATE_DIGITS, GATE_COPY = 0.03, 1.05  # as in quality.py, which needs torch and a model's libraries
WIDTH, HEIGHT = 300, 190  # of a panel
LEFT, TOP, GAP_X, GAP_Y = 52, 62, 72, 66
TICKS = (0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 1000, 10_000)  # of ratios
AXES = {
    "read_fraction": ("read", "share of the prompt's keys that is read"),
    "kept": ("kept", "share of tokens that is kept"),
}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b65c91", "#c98a00", "#3a9bdc", "#8a63d2", "#b3403a", "#808080")
MARKS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",  # a circle
    "M-3.5 -3.5h7v7h-7z",
    "M0 -4.5l4.5 8h-9z",
    "M0 -5l5 5l-5 5l-5 -5z",
    "M0 4.5l4.5 -8h-9z",
)
STYLE = """
.paper { fill: #ffffff } text { fill: #1f2328; font: 12px system-ui, sans-serif }
.frame { fill: none; stroke: #8c959f } .grid { stroke: #d0d7de } .gate { fill: #1a7f37; opacity: 0.12 }
.dense { stroke: #57606a; stroke-dasharray: 5 4 } .line { fill: none; stroke-width: 1.6 }
.heading { font-weight: 600 } .tick { font-size: 11px }
@media (prefers-color-scheme: dark) {
  .paper { fill: #0d1117 } text { fill: #e6edf3 } .grid { stroke: #30363d }
  .gate { fill: #3fb950; opacity: 0.16 } .dense { stroke: #9ea7b3 }
}
"""


@dataclass(frozen=True)
class Panel:
    """One drawing: what is read from 0 to 1 to the right, `low` to `high` upwards."""

    left: float
    top: float
    low: float
    high: float
    log: bool

    def x(self, value: float) -> float:
        return round(self.left + WIDTH * value, 1)

    def y(self, value: float) -> float:
        scale: Callable[[float], float] = math.log if self.log else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return round(self.top + HEIGHT * (1 - share), 1)

    def frame(self, heading: str, ticks: Sequence[float], across: str) -> Iterator[str]:
        """Grid, numbers and words."""
        left, right, bottom = self.left, self.left + WIDTH, self.top + HEIGHT
        yield _text(left, self.top - 8, heading, "heading")
        for tick in ticks:
            yield f'<path class="grid" d="M{left} {self.y(tick)}H{right}"/>'
            yield _text(left - 6, self.y(tick) + 4, f"{tick:g}", "tick", "end")
        for tick in (0, 0.2, 0.4, 0.6, 0.8, 1):
            yield _text(self.x(tick), bottom + 15, f"{tick:g}", "tick", "middle")
        yield _text((left + right) / 2, bottom + 31, across, "tick", "middle")
        yield f'<rect class="frame" x="{left}" y="{self.top}" width="{WIDTH}" height="{HEIGHT}"/>'

    def band(self, lower: float, upper: float, dense: float) -> Iterator[str]:
        """Where the gate is passed, and dense attention's line."""
        top, bottom = self.y(min(upper, self.high)), self.y(max(lower, self.low))
        height = round(bottom - top, 1)
        yield f'<rect class="gate" x="{self.left}" y="{top}" width="{WIDTH}" height="{height}"/>'
        yield f'<path class="dense" d="M{self.left} {self.y(dense)}h{WIDTH}"/>'

    def line(self, label: str, number: int, points: Sequence[tuple[float, float]]) -> Iterator[str]:
        """The settings of one method, joined by what they read."""
        colour, places = COLOURS[number % len(COLOURS)], [(self.x(x), self.y(y)) for x, y in sorted(points)]
        path = "L".join(f"{x} {y}" for x, y in places)
        yield f'<path class="line" stroke="{colour}" d="M{path}"/>'
        for x, y in places:
            yield _mark(x, y, number, label)


def plot(rows: Sequence[Mapping[str, Any]], plans: Mapping[str, Mapping[str, Any]]) -> str:
    """rows: of quality.py; plans: as it writes them down, by name.

    Where all read everything, what they keep takes the place of what they read.
    """
    others = [row for row in rows if row["plan"] != "dense"]
    across = "read_fraction" if any(row["read_fraction"] < 1 for row in others) else "kept"
    part = "prefill" if any(row.get("copy_perplexity_prefill") for row in others) else "decode"
    labels = list(dict.fromkeys(label_of(row["plan"], plans) for row in others))
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    drawn: list[str] = []
    for place, length in enumerate(lengths):
        dense = next(row for row in rows if (row["plan"], row["length"]) == ("dense", length))
        here = [row for row in others if row["length"] == length]
        top = TOP + place * (HEIGHT + GAP_Y)
        digits = _points(here, plans, across, "digit_accuracy", 1)
        copies = _points(here, plans, across, f"copy_perplexity_{part}", dense[f"copy_perplexity_{part}"])
        drawn += _digits(digits, labels, dense["digit_accuracy"], length, top, across)
        drawn += _copies(copies, labels, length, top, across)
    return "\n".join(
        [*_head(AXES[across][0], labels, lengths), *drawn, *_legend(labels, len(lengths)), "</svg>\n"]
    )


def label_of(name: str, plans: Mapping[str, Mapping[str, Any]]) -> str:
    """What a plan differs from `dense` by, its options aside; a peer is called what it calls itself."""
    variant, over, dtype = name.partition(" over ")
    if variant not in plans:
        return name.rpartition(" ")[0] or name  # its budget comes last
    plan = plans[variant]
    parts = {plan["prefill"]["method"], plan["kv"]["policy"], plan["decode"]["method"]}
    own = sorted(parts - {"dense", "keep_all", "full"})
    if plan["prefill"].get("delta"):
        own.append("delta")
    return " + ".join(own or ["dense"]) + over + dtype


def _points(
    rows: Sequence[Mapping[str, Any]],
    plans: Mapping[str, Mapping[str, Any]],
    across: str,
    name: str,
    over: float,
) -> dict[str, list[tuple[float, float]]]:
    """By label: (read or kept, value over that of dense)."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.get(name) is not None:
            found.setdefault(label_of(row["plan"], plans), []).append((row[across], row[name] / over))
    return found


def _digits(
    points: Mapping[str, list[tuple[float, float]]],
    labels: Sequence[str],
    dense: float,
    length: int,
    top: float,
    across: str,
) -> Iterator[str]:
    lowest = min([dense - GATE_DIGITS, *(y for line in points.values() for _, y in line)])
    low = math.floor(lowest * 10) / 10
    panel = Panel(LEFT, top, low, 1.0, log=False)
    ticks = [round(low + step * 0.1, 1) for step in range(round((1 - low) * 10) + 1)]
    yield from panel.band(dense - GATE_DIGITS, 1.0, dense)
    yield from panel.frame(f"{length} tokens: digits right", ticks[:: 1 + len(ticks) // 7], AXES[across][1])
    for label, line in points.items():
        yield from panel.line(label, labels.index(label), line)


def _copies(
    points: Mapping[str, list[tuple[float, float]]],
    labels: Sequence[str],
    length: int,
    top: float,
    across: str,
) -> Iterator[str]:
    ratios = [y for line in points.values() for _, y in line]
    low, high = min([0.9, *(0.95 * y for y in ratios)]), max([1.2, *(1.05 * y for y in ratios)])
    panel = Panel(LEFT + WIDTH + GAP_X, top, low, high, log=True)
    ticks = [tick for tick in TICKS if low <= tick <= high]
    yield from panel.band(low, GATE_COPY, 1.0)
    yield from panel.frame("perplexity of a copy, over dense", ticks, AXES[across][1])
    for label, line in points.items():
        yield from panel.line(label, labels.index(label), line)


def _head(across: str, labels: Sequence[str], lengths: Sequence[int]) -> Iterator[str]:
    width = LEFT + 2 * WIDTH + GAP_X + 20
    height = TOP + len(lengths) * (HEIGHT + GAP_Y) + 22 * -(-len(labels) // 4)
    title = f"Quality against what is {across}"
    spoken = f"{', '.join(labels)} at {', '.join(map(str, lengths))} tokens; the table beside has the numbers"
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
        f' height="{height}" role="img" aria-labelledby="title about">'
    )
    yield f'<title id="title">{title}</title>\n<desc id="about">{escape(spoken)}</desc>'
    yield f"<style>{STYLE}</style>"
    yield f'<rect class="paper" width="{width}" height="{height}"/>'
    yield _text(LEFT, 24, title, "heading")
    yield _text(LEFT + WIDTH + GAP_X, 24, "dashed: dense attention; shaded: passes the gate", "tick")


def _legend(labels: Sequence[str], num_rows: int) -> Iterator[str]:
    top = TOP + num_rows * (HEIGHT + GAP_Y) - 10
    for number, label in enumerate(labels):
        x, y = LEFT + 6 + 170 * (number % 4), top + 22 * (number // 4)
        yield _mark(x, y, number, label)
        yield _text(x + 12, y + 4, label)


def _mark(x: float, y: float, number: int, label: str) -> str:
    colour, shape = COLOURS[number % len(COLOURS)], MARKS[number % len(MARKS)]
    return (
        f'<path class="mark" fill="{colour}" d="{shape}" transform="translate({x} {y})">'
        f"<title>{escape(label)}</title></path>"
    )


def _text(x: float, y: float, words: str, style: str = "", anchor: str = "start") -> str:
    place = f'x="{round(x, 1)}" y="{round(y, 1)}" class="{style}" text-anchor="{anchor}"'
    return f"<text {place}>{escape(words)}</text>"
