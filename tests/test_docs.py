"""The pages say what is there: files, commands, flags, settings, plans, options and metrics."""

import dataclasses
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import BaseModel

from configs.loading import load_config, load_plan
from configs.model import ModelInfo
from configs.schema import ServeConfig
from engine.plans import resolve_plan
from kvcache.decode_methods import DECODE_METHODS
from kvcache.policies import KV_POLICIES
from server.cli import app
from server.metrics import Metrics
from server.responses import cost_json
from sparse.methods import PREFILL_METHODS
from tests.server.builders import MODEL, FakeEngine, cost, say

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
GENERATED = DOCS / "kernels.md"  # by configs/aot.py, which has flags of its own
PAGES = [README, *sorted(set(DOCS.glob("*.md")) - {GENERATED})]
PACKAGES = ("configs", "sparse", "kvcache", "engine", "server")
CODE = ("*.py", "*.cpp", "*.h", "*.yaml", "py.typed")  # what the tree must name
PLUGINS: dict[str, dict[str, Any]] = {
    "Prefill methods": dict(PREFILL_METHODS),
    "KV policies": dict(KV_POLICIES),
    "Decode methods": dict(DECODE_METHODS),
}
SMALL = ModelInfo("small", 8, 2, 1, 64, 1000, 8192)  # with the layers that the pages' plans name


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def section(text: str, heading: str) -> str:
    """What stands below a heading, up to the next of its level or above; empty if it is not there."""
    level = len(heading) - len(heading.lstrip("#"))
    match = re.search(rf"^{re.escape(heading)}\n(.*?)(?=^#{{1,{level}}} |\Z)", text, re.MULTILINE | re.DOTALL)
    return match[1] if match else ""


def cells(table_row: str) -> list[str]:
    return [cell.strip().strip("`") for cell in re.split(r"(?<!\\)\|", table_row)[1:-1]]


def named_in_tree(tree: str) -> Iterator[str]:
    """Paths of a tree whose folders end with a slash and whose levels are two spaces deep."""
    folders: list[str] = []
    for line in tree.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip(" "))) // 2
        del folders[depth:]
        yield "".join(folders) + name
        if name.endswith("/"):
            folders.append(name)


def command(*names: str) -> Any:
    found: Any = typer.main.get_command(app)
    for name in names:
        found = found.commands[name]
    return found


def commands(group: Any = None) -> Iterator[Any]:
    """Every command of `farspan`, and what has them."""
    group = group or command()
    yield group
    for found in getattr(group, "commands", {}).values():
        yield from commands(found)


def flags(found: Any) -> set[str]:
    return {name for option in found.params if option.param_type_name == "option" for name in option.opts}


def settings(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted paths of everything that a configuration file may hold."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from settings(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def options(plugin: Any) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(plugin) if field.init}


def test_the_tree_names_what_is_there_and_everything_in_the_packages() -> None:
    named = list(named_in_tree(blocks(DOCS / "architecture.md", "text")[0]))
    assert len(named) == len(set(named))
    assert not [name for name in named if not (ROOT / name).exists()]
    there = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for pattern in CODE
        for path in (ROOT / package).rglob(pattern)
    }
    assert there and not there - set(named), "name them in the tree of docs/architecture.md"


def test_a_tree_is_read_by_its_levels() -> None:
    tree = "a/   folder\n  b.py  file\n  c/\n    d.py\ne.py\n"
    assert list(named_in_tree(tree)) == ["a/", "a/b.py", "a/c/", "a/c/d.py", "e.py"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_targets_flags_and_links_of_a_page_exist(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert not set(re.findall(r"(?:`|^)make ([a-z]+)", text, re.MULTILINE)) - targets
    known = {"--help"} | {flag for found in commands() for flag in flags(found)}
    ours = re.sub(
        r"^(?: {4}(?!farspan )|python -m benchmarks\.).*$", "", text, flags=re.MULTILINE
    )  # other programs have flags of theirs
    assert not set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", ours)) - known
    for target in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        found = (page.parent / file) if file else page
        assert found.exists(), target
        headings = re.findall(r"^#+ (.+)$", found.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
    named = re.findall(r"`((?:configs|sparse|kvcache|engine|server|tests|docs|examples)/[\w./-]+)`", text)
    assert not [name for name in named if not (ROOT / name).exists()]


def written_commands(page: Path) -> Iterator[str]:
    """Commands of ours that a page tells people to type: in blocks, and between backticks."""
    text = page.read_text()
    lines = [
        line
        for language in ("sh", "bash", "console")
        for block in blocks(page, language)
        for line in block.splitlines()
    ]
    lines += re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE) + re.findall(r"`([^`\n]+ [^`\n]+)`", text)
    for line in lines:
        for part in re.split(r" \| | && ", re.sub(r"\s+#.*|\s*<.*", "", line)):
            if re.match(r"(farspan|python -m (benchmarks|engine|sparse|kvcache|configs))[ .]", part):
                yield re.sub(r"\s*\[[^]]*\]", "", part).strip()  # what is optional is not typed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_can_be_parsed(page: Path) -> None:
    for written in written_commands(page):
        words = shlex.split(written)
        if words[0] == "python":
            _, _, module, *rest = words
            source = ROOT.joinpath(*module.split("."))
            file = source.with_suffix(".py") if source.with_suffix(".py").exists() else source / "__main__.py"
            assert file.exists(), written
            assert all(flag in file.read_text() for flag in rest if flag.startswith("--")), written
            continue
        found = command()
        while hasattr(found, "commands") and words[1:] and not words[1].startswith("-"):
            assert words[1] in found.commands, written
            found, words = found.commands[words[1]], words[1:]
        if not hasattr(found, "commands") and words[1:] and "..." not in words:
            found.make_context(words[0], words[1:])  # exits with an error if it cannot be parsed


def test_functions_that_check_invariants_exist() -> None:
    """`Class.method` in the pages is a method of a class of that name."""
    code = {
        path: path.read_text() for package in (*PACKAGES, "tests") for path in (ROOT / package).rglob("*.py")
    }
    for owner, name in set(re.findall(r"`([A-Z]\w+)\.(\w+)`", (DOCS / "architecture.md").read_text())):
        bodies = [
            text.partition(f"\nclass {owner}")[2] for text in code.values() if f"\nclass {owner}" in text
        ]
        assert any(re.search(rf"^    (async )?def {name}\(", body, re.MULTILINE) for body in bodies), (
            owner,
            name,
        )


@pytest.mark.parametrize("page", [README, DOCS / "plans.md"], ids=lambda page: page.name)
def test_every_plan_of_a_page_fits_a_model(page: Path, tmp_path: Path) -> None:
    entry = ["vertical_and_slash", 100, 200, 0.5]
    heads = [{str(head): entry for head in range(SMALL.num_query_heads)}] * SMALL.num_layers
    (tmp_path / "heads.json").write_text(json.dumps(heads))
    plans = blocks(page, "yaml")
    assert plans
    for number, written in enumerate(plans):
        file = tmp_path / f"plan-{number}.yaml"
        file.write_text(written)
        assert resolve_plan(load_plan(file), SMALL).methods


def test_the_plan_that_the_readme_explains_is_the_default() -> None:
    (written,) = blocks(README, "yaml")
    assert yaml.safe_load(written) == yaml.safe_load(
        (ROOT / "configs/plans/minference-snapkv.yaml").read_text()
    )


def test_the_published_table_of_budgets_fits_the_model_it_names(tmp_path: Path) -> None:
    (table,) = blocks(DOCS / "plans.md", "json")
    (tmp_path / "heads.json").write_text(table)
    (tmp_path / "plan.yaml").write_text("prefill: {method: minference, heads: heads.json}")
    assert resolve_plan(load_plan(tmp_path / "plan.yaml"), dataclasses.replace(SMALL, num_layers=2)).methods


def test_the_configuration_of_the_operations_page_is_accepted(tmp_path: Path) -> None:
    (written,) = blocks(DOCS / "operations.md", "yaml")
    (tmp_path / "server.yaml").write_text(written)
    for plan in load_config(tmp_path / "server.yaml", {}).plans:
        load_plan(plan)


def test_every_flag_and_setting_of_a_server_is_described() -> None:
    text = section((DOCS / "operations.md").read_text(), "## Settings")
    rows = [cells(line) for line in text.splitlines() if line.startswith("| ")][1:]
    assert {row[0] for row in rows if row[0].startswith("--")} == flags(command("serve"))
    assert {row[1] for row in rows if row[1]} == set(settings(ServeConfig))


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, plugins in PLUGINS.items() for name in plugins]
)
def test_every_option_of_a_plugin_is_described_with_its_default(kind: str, name: str) -> None:
    text = section(section((DOCS / "methods.md").read_text(), f"## {kind}"), f"### `{name}`")
    assert text.strip(), f"{name} has no section in docs/methods.md"
    rows = [cells(line) for line in text.splitlines() if line.startswith("| `")]
    described = {row[0]: row[1] for row in rows}
    expected = {
        option: "none" if default is None else str(default)
        for option, default in options(PLUGINS[kind][name]).items()
    }
    assert described == expected


def test_every_metric_is_described() -> None:
    metrics = Metrics(MODEL, FakeEngine(say(1)))
    text = section((DOCS / "operations.md").read_text(), "## Metrics")
    described = {tuple(cells(line)[:2]) for line in text.splitlines() if line.startswith("| `")}
    suffix = {"counter": "_total"}
    exposed = {
        (family.name + suffix.get(family.type, ""), family.type) for family in metrics.registry.collect()
    }
    assert described == exposed


def test_every_key_of_the_cost_is_explained() -> None:
    text = section(README.read_text(), "## Asking")
    explained = [cells(line)[0] for line in text.splitlines() if line.startswith("| `")]
    assert explained == list(cost_json(cost()) or ())


def test_the_example_of_the_readme_is_python() -> None:
    for source in blocks(README, "python"):
        compile(source, "README.md", "exec")
