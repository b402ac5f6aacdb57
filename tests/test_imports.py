"""The import arrows of the architecture: each package may import only those below it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"configs", "sparse", "kvcache", "engine", "server"}
MAY_IMPORT = {
    "configs": set(),
    "sparse": {"configs"},
    "kvcache": {"configs"},
    "engine": {"configs", "sparse", "kvcache"},
    "server": {"configs", "engine.messages", "engine.errors", "engine.client"},
}
COMMAND_LINE = {  # server/commands, in functions
    *("engine.plans", "engine.startup", "engine.memory", "engine.models", "engine.combinations"),
    *("engine.gate_training", "engine.train_gates", "engine.prebuild"),
}


def imported_modules(tree: ast.AST) -> list[str]:
    modules = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the arrows"
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    return modules


def allowed(package: str, file: Path, module: str) -> bool:
    top = module.split(".")[0]
    if top not in OURS or top == package:
        return True
    permitted = MAY_IMPORT[package] | (COMMAND_LINE if file.parent.name == "commands" else set())
    return any(module == name or module.startswith(f"{name}.") for name in permitted)


@pytest.mark.parametrize("package", sorted(OURS))
def test_packages_import_only_what_is_below_them(package: str) -> None:
    for file in sorted((ROOT / package).rglob("*.py")):
        for module in imported_modules(ast.parse(file.read_text())):
            assert allowed(package, file, module), f"{file.relative_to(ROOT)} imports {module}"


def test_the_command_line_reaches_into_the_engine_only_when_a_command_needs_it() -> None:
    lazy = (ast.FunctionDef, ast.If)  # functions, and what only type checkers read
    for file in (ROOT / "server" / "cli.py", *(ROOT / "server" / "commands").glob("*.py")):
        body = [node for node in ast.parse(file.read_text()).body if not isinstance(node, lazy)]
        at_import = imported_modules(ast.Module(body=body, type_ignores=[]))
        assert not COMMAND_LINE & {".".join(module.split(".")[:2]) for module in at_import}, file


def test_an_arrow_against_the_grain_is_noticed() -> None:
    assert not allowed("sparse", Path("x.py"), "kvcache.cache.KVCache")
    assert not allowed("server", Path("app.py"), "engine.plans.resolve_plan")
    assert allowed("server", Path("commands/plan.py"), "engine.plans.resolve_plan")
    assert not allowed("server", Path("cli.py"), "engine.plans.resolve_plan")
    assert allowed("engine", Path("x.py"), "sparse.base.Chunk")
