"""Options of benchmarks: what results were asked can be asked again, and means the same everywhere."""

import json
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import torch

from benchmarks import asking
from benchmarks.common import RESULTS
from benchmarks.parts import ROOT


class Parsed(Exception):
    """A benchmark has understood what it was asked."""


@pytest.fixture
def only_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(threads: int) -> None:
        raise Parsed

    monkeypatch.setattr(torch, "set_num_threads", stop)


def users() -> list[str]:
    """The benchmarks that are asked this way: all but those that need a GPU."""
    files = sorted((ROOT / "benchmarks").glob("*.py"))
    return [f"benchmarks.{file.stem}" for file in files if "= command_line(" in file.read_text()]


def asked_before() -> list[list[str]]:
    """The commands of committed results, in words."""
    commands = [json.loads(path.read_text())["command"] for path in sorted(RESULTS.glob("*/*.json"))]
    return [words for words in map(shlex.split, commands) if words[2] in users()]


@pytest.mark.parametrize("words", asked_before(), ids=lambda words: words[2])
@pytest.mark.usefixtures("only_parsed")
def test_commands_of_committed_results_can_be_asked_again(words: list[str]) -> None:
    assert words[:2] == ["python", "-m"]
    with pytest.raises(Parsed):
        import_module(words[2]).main(words[3:])


@pytest.mark.parametrize("module", users())
@pytest.mark.usefixtures("only_parsed")
def test_every_benchmark_on_a_cpu_takes_threads_and_a_folder(tmp_path: Path, module: str) -> None:
    with pytest.raises(Parsed):
        import_module(module).main(["--threads", "1", "--out", str(tmp_path)])


def test_a_server_is_asked_for_the_same(tmp_path: Path) -> None:
    parser = asking.command_line("words")
    asking.add_subject(parser)
    asked = parser.parse_args(["--dtype", "bfloat16", "--threads", "3"])
    flags = ["--plan", "dense", "--plan", "my.yaml", "--dtype", "bfloat16", "--threads", "3"]
    assert asking.serve_flags(asked, ["dense", Path("my.yaml")]) == flags
