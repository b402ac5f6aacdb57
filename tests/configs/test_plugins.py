"""Plug-ins of other distributions: found by name, imported when named, refused in words."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.plugins import Plugins
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "extending.md"
GROUP = "farspan.test_plugins"


class Owed:
    """What a plug-in of these tests owes."""

    def attach(self) -> None: ...


@dataclass
class Ours(Owed):
    size: int = 1


Install = Callable[..., None]


def installed(site: Path, distribution: str, code: str, group: str = GROUP, **plugins: str) -> None:
    """A distribution as pip leaves it: a module, and what its metadata says of entry points."""
    (site / f"{distribution}.py").write_text(code)
    info = site / f"{distribution}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    lines = "".join(f"{name} = {value}\n" for name, value in plugins.items())
    (info / "entry_points.txt").write_text(f"[{group}]\n{lines}")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(tmp_path))
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        del sys.modules[name]


GOOD = """
from dataclasses import dataclass
@dataclass
class Toy:
    depth: int = 2
    def attach(self): pass
"""


def plugins() -> Plugins[Owed]:
    return Plugins(GROUP, Owed, {"ours": Ours})


def test_a_plug_in_of_another_distribution_is_found_beside_ours_and_imported_when_named(site: Path) -> None:
    installed(site, "good_toy", GOOD, toy="good_toy:Toy")
    installed(site, "broken_toy", "raise RuntimeError('out of luck')", broken="broken_toy:Toy")
    found = plugins()
    assert list(found) == ["ours", "broken", "toy"] and len(found) == 3 and "toy" in found
    assert "good_toy" not in sys.modules
    assert found["toy"]().depth == 2 and found["toy"] is found["toy"]  # type: ignore[attr-defined]
    assert found.name_of(found["toy"]) == "toy" and found.name_of(Ours) == "ours"
    with pytest.raises(KeyError):
        found["other"]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise RuntimeError('out of luck')", "cannot be loaded: RuntimeError: out of luck"),
        ("import no_such_module", "cannot be loaded: ModuleNotFoundError"),
        ("Other = 1", "cannot be loaded: AttributeError"),
        ("class Toy: pass", "is not a dataclass whose fields are its options"),
        ("def Toy(): pass", "is not a dataclass"),
        (GOOD.replace("attach", "attack"), "lacks attach"),
    ],
)
def test_what_is_wrong_with_a_plug_in_is_said_with_its_distribution(
    site: Path, code: str, words: str
) -> None:
    installed(site, "bad_toy", code, toy="bad_toy:Toy")
    with pytest.raises(ConfigError, match=words) as refused:
        plugins()["toy"]
    assert f"{GROUP}: 'toy' (bad_toy:Toy) of bad_toy 1.0" in str(refused.value)
    assert plugins()["ours"] is Ours


def test_two_plug_ins_of_one_name_are_refused_with_both_sources(site: Path) -> None:
    installed(site, "one_toy", GOOD, toy="one_toy:Toy", ours="one_toy:Toy")
    installed(site, "two_toy", GOOD, toy="two_toy:Toy")
    found = plugins()
    with pytest.raises(ConfigError, match=r"(one_toy|two_toy) 1.0 and (one_toy|two_toy) 1.0"):
        found["toy"]
    with pytest.raises(ConfigError, match="'ours' is what Farspan itself and one_toy 1.0 call a plug-in"):
        found["ours"]


def test_the_method_of_the_page_serves_from_outside_the_package(tmp_path: Path) -> None:
    """In a process of its own, as after pip install: resolved by the command, then run by an engine."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (toml,) = re.findall(r"^```toml\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    match = re.search(r'entry-points."([\w.]+)"\]\n(\w+) = "(\w+):(\w+)"', toml)
    assert match
    group, name, module, kind = match.groups()
    installed(tmp_path, module, code, group, **{name: f"{module}:{kind}"})
    save_tiny(tmp_path / "tiny")
    (tmp_path / "mine.yaml").write_text(f"prefill: {{method: {name}, window: 128}}\n")
    (tmp_path / "wrong.yaml").write_text(f"prefill: {{method: {name}, window: 0}}\n")
    environment = {
        **{name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "FARSPAN_CACHE")},
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path))),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.configs.outside_plugin", name]
    served = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert served.stdout == "served\n", served
