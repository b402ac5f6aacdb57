"""The tables and plots of docs/ say what the committed results say."""

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import quality
from benchmarks.plot import GATE_COPY, GATE_DIGITS, HEIGHT, LEFT, TOP, WIDTH, Panel, label_of, plot
from benchmarks.tables import DOCS, merged, plots, renewed

PAGES = sorted(DOCS.glob("*.md"))
READS = {"thin": 0.25, "wide": 0.5, "other": 0.75}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_and_plots_are_what_the_results_say(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert renewed(text) == text, "python -m benchmarks.tables"
    for name, svg in plots(text).items():
        drawn = DOCS / "images" / name
        assert drawn.exists() and drawn.read_text(encoding="utf-8") == svg, "python -m benchmarks.tables"


def test_every_picture_of_a_result_is_shown() -> None:
    shown = {name for page in PAGES for name in plots(page.read_text(encoding="utf-8"))}
    assert {path.name for path in (DOCS / "images").glob("*.svg")} == shown


def result(*rows: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """As quality.py writes it."""
    plans = {
        row["plan"]: {
            "prefill": {"method": method},
            "kv": {"policy": "keep_all"},
            "decode": {"method": "full"},
        }
        for row in rows
        for method in [{"dense": "dense", "other": "hip"}.get(row["plan"], "xattention")]
    }
    return {
        "rows": list(rows),
        "settings": {"text": "novel.txt", "dtype": "float32", "sha256": "1", "plans": plans, **settings},
        "device": "a machine",
        "versions": {"torch": "2", "transformers": "5"},
        "when": "2026-01-02T03:04:05",
        "command": "python -m benchmarks.quality --lengths 512",
    }


def row(plan: str, **values: Any) -> dict[str, Any]:
    judged = {"digit_accuracy": 0.9, "copy_perplexity_prefill": 1.5, "read_fraction": READS.get(plan, 1.0)}
    return {"length": 512, "plan": plan, **judged, **values}


def save(folder: Path, name: str, content: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content))


def test_a_table_shows_what_was_measured_and_how(tmp_path: Path) -> None:
    dense = {"length": 512, "plan": "dense", "digit_accuracy": 0.91666, "recall": None, "kl_decode": 0.0}
    short = {
        "length": 512,
        "plan": "snapkv",
        "digit_accuracy": 0.5,
        "kl_decode": 123.4,
        "gate": "fails: digits",
    }
    save(tmp_path / "device", "quality-x", result(dense, short))
    before = "# Page\n<!-- quality: quality-x -->\nold\n<!-- end -->\nrest\n"
    after = renewed(before, tmp_path)
    assert "| tokens | plan | digits | KL dec | gate |" in after and "old" not in after
    assert "| 512 | snapkv | 0.5 | 123 | fails: digits |" in after and "0.917" in after
    assert "python -m benchmarks.quality --lengths 512" in after and after.endswith("<!-- end -->\nrest\n")
    assert renewed(after, tmp_path) == after
    with pytest.raises(FileNotFoundError, match="quality-y.json"):
        renewed("<!-- quality: quality-y -->\n<!-- end -->", tmp_path)


def test_results_on_the_same_text_are_one_table_with_dense_once(tmp_path: Path) -> None:
    longer = {"length": 1024}
    save(tmp_path / "one", "a", result(row("dense"), row("thin"), row("dense", **longer)))
    save(tmp_path / "two", "b", result(row("dense"), row("wide"), row("wide", **longer)))
    after = renewed("<!-- quality: a b -->\n<!-- end -->", tmp_path)
    found = re.findall(r"^\| (\d+) \| (\w+) ", after, re.MULTILINE)
    assert found == [
        *(("512", name) for name in ("dense", "thin", "wide")),
        *(("1024", name) for name in ("dense", "wide")),
    ]
    assert after.count("python -m benchmarks.quality") == 2


def test_results_that_asked_otherwise_or_say_a_thing_twice_are_not_merged() -> None:
    first = result(row("dense"), row("thin"))
    with pytest.raises(ValueError, match="differ in sha256"):
        merged([first, result(row("dense"), row("wide"), sha256="2")])
    with pytest.raises(ValueError, match="thin at 512 tokens stands in two"):
        merged([first, first])


def test_a_table_of_speeds_says_how_prompts_were_read(tmp_path: Path) -> None:
    content = result(command="python -m benchmarks.method_speed")
    content["rows"] = [
        {"length": 512, "candidate": "dense", "density": 1.0, "over_torch": 1.234},
        {"length": 512, "candidate": "hip", "density": 0.25, "select_share": 0.5, "over_torch": 0.9},
    ]
    content["prompts"] = [
        {
            "length": 512,
            "rope_scaling": "yarn:4",
            "layers": [1, 2],
            "text_repeats": 2.5,
            "hidden_states": "dense",
        }
    ]
    save(tmp_path / "device", "speed", content)
    after = renewed("<!-- speed: speed -->\n<!-- end -->", tmp_path)
    assert "| tokens | method | density | share of choosing | × torch |" in after
    assert "| 512 | hip | 0.25 | 0.5 | 0.9 |" in after
    assert "512 tokens: layers 1, 2; RoPE yarn:4, hidden states: dense; the text comes 2.5 times." in after


def test_a_plot_puts_every_method_where_its_numbers_are() -> None:
    dense = row("dense", digit_accuracy=0.8, copy_perplexity_prefill=1.5)
    drawn = [
        row("wide", digit_accuracy=0.75, copy_perplexity_prefill=1.5),
        row("thin", digit_accuracy=0.5, copy_perplexity_prefill=6.0),
        row("other", digit_accuracy=0.8, copy_perplexity_prefill=3.0),
    ]
    content = result(dense, *drawn)
    svg = ElementTree.fromstring(plot(merged([content]), content["settings"]["plans"]))
    marks = {"xattention": [], "hip": []}  # type: dict[str, list[tuple[float, float]]]
    for mark in (element for element in svg.iter() if element.get("class") == "mark"):
        x, y = map(float, mark.attrib["transform"].removeprefix("translate(").rstrip(")").split())
        marks[mark[0].text or ""].append((x, y))
    digits = Panel(LEFT, TOP, 0.5, 1.0, log=False)
    places = [(LEFT + WIDTH / 2, digits.y(0.75)), (LEFT + WIDTH / 4, TOP + HEIGHT)]  # wide and thin
    assert sorted(marks["xattention"][:2]) == sorted(places)
    assert marks["hip"][0] == (LEFT + WIDTH * 3 / 4, digits.y(0.8))
    heights = dict(zip(("thin", "wide"), (y for _, y in sorted(marks["xattention"][2:4])), strict=True))
    assert heights["thin"] < heights["wide"], "a higher perplexity is higher up"
    # Logarithmic: twice dense lies in the middle between dense and four times dense.
    assert marks["hip"][1][1] == pytest.approx((heights["thin"] + heights["wide"]) / 2, abs=0.2)
    lines = [element.attrib["d"] for element in svg.iter() if element.get("class") == "line"]
    assert (
        len(lines) == 4 and sum("L" in line for line in lines) == 2
    )  # two settings are joined, one is a point
    bands = [element for element in svg.iter() if element.get("class") == "gate"]
    lowest = float(bands[0].attrib["y"]) + float(bands[0].attrib["height"])
    assert lowest == pytest.approx(digits.y(0.77), abs=0.2)


def test_a_line_is_what_a_plan_differs_from_dense_by() -> None:
    plans = result(row("dense"), row("thin"))["settings"]["plans"]
    plans["both"] = {
        "prefill": {"method": "hip", "delta": 16},
        "kv": {"policy": "snapkv"},
        "decode": {"method": "full"},
    }
    assert label_of("thin", plans) == "xattention" and label_of("dense over int8", plans) == "dense over int8"
    assert label_of("both", plans) == "hip + snapkv + delta"
    assert label_of("kvpress 0.5.5: snapkv 1024", plans) == "kvpress 0.5.5: snapkv"


def test_a_plot_of_policies_goes_by_what_they_keep() -> None:
    kept = {"read_fraction": 1.0, "copy_perplexity_prefill": None, "copy_perplexity_decode": 2.0}
    content = result(row("dense", kept=1.0, **kept), row("thin", kept=0.5, **kept))
    svg = plot(merged([content]), content["settings"]["plans"])
    assert "share of tokens that is kept" in svg and f"translate({LEFT + WIDTH / 2} " in svg


def test_the_gate_of_plots_is_the_gate_that_is_judged() -> None:
    assert (GATE_DIGITS, GATE_COPY) == (quality.GATE_DIGITS, quality.GATE_COPY)
