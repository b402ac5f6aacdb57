"""The tables of docs/ say what the committed results say."""

import json
from pathlib import Path

import pytest

from benchmarks.tables import DOCS, renewed


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_tables_are_what_the_results_say(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert renewed(text) == text, "python -m benchmarks.tables"


def test_a_table_shows_what_was_measured_and_how(tmp_path: Path) -> None:
    content = {
        "rows": [
            {"length": 512, "plan": "dense", "digit_accuracy": 0.91666, "recall": None, "kl_decode": 0.0},
            {
                "length": 512,
                "plan": "snapkv",
                "digit_accuracy": 0.5,
                "kl_decode": 123.4,
                "gate": "fails: digits",
            },
        ],
        "settings": {"text": "novel.txt", "dtype": "float32"},
        "device": "a machine",
        "versions": {"torch": "2", "transformers": "5"},
        "when": "2026-01-02T03:04:05",
        "command": "python -m benchmarks.quality --lengths 512",
    }
    folder = tmp_path / "device"
    folder.mkdir()
    (folder / "quality-x.json").write_text(json.dumps(content))
    before = "# Page\n<!-- quality: quality-x -->\nold\n<!-- end -->\nrest\n"
    after = renewed(before, tmp_path)
    assert "| tokens | plan | digits | KL dec | gate |" in after and "old" not in after
    assert "| 512 | snapkv | 0.5 | 123 | fails: digits |" in after and "0.917" in after
    assert "python -m benchmarks.quality --lengths 512" in after and after.endswith("<!-- end -->\nrest\n")
    assert renewed(after, tmp_path) == after
    with pytest.raises(FileNotFoundError, match="quality-y.json"):
        renewed("<!-- quality: quality-y -->\n<!-- end -->", tmp_path)
