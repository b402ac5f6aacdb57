"""The Dockerfile, step by step without an image: what it copies exists, installs, starts and is probed."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "Dockerfile").read_text()


def instructions(name: str) -> list[str]:
    joined = TEXT.replace("\\\n", " ")
    return [line.removeprefix(name).strip() for line in joined.splitlines() if line.startswith(f"{name} ")]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `COPY` and `pip install .` leave: the build context copied, then installed in a folder."""
    context = tmp_path_factory.mktemp("context")
    for copy in instructions("COPY"):
        *sources, target = copy.split()
        for source in sources:
            path = ROOT / source
            if path.is_dir():
                shutil.copytree(path, context / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, context / target)
    site = tmp_path_factory.mktemp("site")
    command = ["install", "-q", "--no-deps", "--no-build-isolation", "--target", str(site), str(context)]
    subprocess.run([sys.executable, "-m", "pip", *command], check=True)
    return site


def run(image: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(image),
        "PYTHONSAFEPATH": "1",
        "HOME": str(image),
    }
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=image, env=environment, timeout=120
    )


def test_the_entrypoint_is_a_command_that_the_package_installs(image: Path) -> None:
    (entrypoint,) = instructions("ENTRYPOINT")
    assert entrypoint == '["farspan", "serve"]'
    assert (image / "bin" / "farspan").exists()
    help_text = run(image, "-m", "server.cli", "serve", "--help")
    assert help_text.returncode == 0 and "--max-model-len" in help_text.stdout


def test_the_installed_packages_hold_the_plans_and_the_kernel_sources(image: Path) -> None:
    for folder in ("configs", "sparse", "kvcache", "engine", "server"):
        files = {
            path.relative_to(ROOT)
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        missing = {str(path) for path in files if not (image / path).exists()}
        assert not missing, f"pyproject.toml installs no {missing}"


def test_a_wrong_flag_is_refused_as_on_any_machine(image: Path) -> None:
    refused = run(image, "-m", "server.cli", "serve", "--plan", "no-such-plan")
    assert refused.returncode == 2 and "no plan 'no-such-plan'" in refused.stderr


def test_no_pin_stands_against_the_triton_that_torch_brings() -> None:
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert "torch" in pinned and not any("triton" in name or "nvidia" in name for name in pinned)


def test_it_runs_as_nobody_special_and_keeps_models_in_a_volume() -> None:
    assert instructions("USER") == ["farspan"]
    uid = re.search(r"useradd .*--uid (\d+)", TEXT)
    assert uid and int(uid[1]) > 0
    assert instructions("VOLUME") == ["/data"]
    folders = re.findall(r"(?:HF_HOME|FARSPAN_CACHE|TRITON_CACHE_DIR)=(\S+)", TEXT)
    assert len(folders) == 3 and all(value.startswith("/data/") for value in folders)


def test_the_image_is_for_cpu_unless_the_other_is_asked_for() -> None:
    stages = [line.split() for line in instructions("FROM")]
    assert [stage[-1] for stage in stages] == ["base", "cuda", "cpu"], "the last is what a plain build makes"
    assert {stage[0] for stage in stages[1:]} == {"base"}


def test_the_cuda_image_brings_kernels_from_outside_its_volume(image: Path) -> None:
    settings = dict(word.split("=", 1) for line in instructions("ENV") for word in line.split())
    (built,) = [line for line in instructions("RUN") if "farspan prebuild" in line]
    (arguments,) = [line.partition("=")[2] for line in instructions("ARG") if line.startswith("PREBUILD=")]
    assert built.endswith('farspan prebuild $PREBUILD --into "$FARSPAN_PREBUILT"')
    assert not settings["FARSPAN_PREBUILT"].startswith("/data")
    command = ["prebuild", *shlex.split(arguments.strip('"')), "--into", str(image), "--plan", "no-such-plan"]
    refused = run(image, "-m", "server.cli", *command)
    assert refused.returncode == 2 and "no plan 'no-such-plan'" in refused.stderr, "the flags are known"
    module, _, name = settings["TRITON_CACHE_MANAGER"].partition(":")
    found = run(image, "-c", f"import {module}; print({module}.{name}.__name__)")
    assert found.stdout.strip() == name, found.stderr


def test_health_is_asked_where_it_is_answered() -> None:
    (probe,) = instructions("HEALTHCHECK")
    url = next(word for word in shlex.split(probe) if word.startswith("http"))
    path = url.split(":8000", 1)[1]
    assert f'"{path}"' in (ROOT / "server" / "app.py").read_text()
    assert instructions("EXPOSE") == ["8000"]
