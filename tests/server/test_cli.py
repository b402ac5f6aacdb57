"""The command: configuration is refused with exit code 2 and one clear message, before anything is loaded."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from configs.loading import load_plan, shipped_plans
from engine.plans import spelled_out
from kvcache.decode_methods import DECODE_METHODS
from kvcache.policies import KV_POLICIES
from server.cli import app
from server.shadowing import ROOT, ShadowedPackage, refuse_shadowed_packages
from sparse.methods import PREFILL_METHODS
from tests.server.builders import save_tokenizer
from tests.tiny import save_tiny

PATIENCE = 120  # seconds


def farspan(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, prog_name="farspan")


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        (("--plan", "dens"), "did you mean 'dense'?"),
        (("--plan", "mistake.yaml"), "did you mean 'prefill'?"),
        (("--plan", "missing.yaml"), "missing.yaml: cannot be read"),
        (("--config", "config.yaml"), "engine.dytpe: unknown key; did you mean 'dtype'?"),
        (("--dtype", "int3"), "engine.dtype"),
        (("--max-model-len", "plenty"), "'plenty' is not a number such as 8192"),
        (("--max-num-seqs", "0"), "scheduler.max_num_seqs"),
        (("--sse-keep-alive-interval", "0"), "server.sse_keep_alive_interval"),
    ],
)
def test_a_wrong_configuration_exits_with_2_and_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: tuple[str, ...], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mistake.yaml").write_text("prefil: {method: dense}\n")
    Path("config.yaml").write_text("engine: {dytpe: float32}\n")
    ended = farspan("serve", *flag)
    assert ended.exit_code == 2, ended.output
    assert words in ended.stderr and ended.stdout == ""


def test_an_unknown_flag_exits_with_2() -> None:
    ended = farspan("serve", "--max-modle-len", "5")
    assert ended.exit_code == 2 and "--max-model-len" in ended.stderr


def test_a_taken_port_is_said_before_the_model_loads() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = farspan("serve", "--port", str(port))
    assert ended.exit_code == 1 and f"cannot listen on 127.0.0.1:{port}" in ended.stderr


def test_help_shows_examples_and_the_flags_of_vllm() -> None:
    shown = farspan("serve", "--help")
    assert shown.exit_code == 0 and "farspan serve Qwen/Qwen3-0.6B" in shown.stdout
    for flag in ("--max-model-len", "--max-num-batched-tokens", "--served-model-name", "--dtype"):
        assert flag in shown.stdout


def test_version_is_one_line() -> None:
    ended = farspan("version")
    assert ended.exit_code == 0 and len(ended.stdout.splitlines()) == 1


def test_plan_matrix_shows_every_method_and_policy_in_a_narrow_terminal() -> None:
    shown = farspan("plan", "matrix")
    assert shown.exit_code == 0
    for name in (*PREFILL_METHODS, *KV_POLICIES, *DECODE_METHODS):
        assert f"{name} " in shown.stdout
    written = farspan("plan", "matrix", "--markdown").stdout
    assert "| dense | page, shared | page, copied |" in written and "- **grid**: " in written


def test_plan_check_shows_what_each_layer_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tokenizer(save_tiny(tmp_path / "tiny"))
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(
        "prefill: {method: minference, dense_below: auto, layers: {0: dense}}\n"
        "kv: {policy: snapkv, budget: 64}\n"
    )
    shown = farspan("plan", "check", "mine.yaml", "--model", "./tiny")
    assert shown.exit_code == 0, shown.output
    assert "mine" in shown.stdout and "1-2" in shown.stdout and "MInference" in shown.stdout
    assert "7,936" in shown.stdout and "8,192" in shown.stdout and "×64" in shown.stdout
    assert "dense below auto (measured at start)" in shown.stdout


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("prefill: {method: minference, vertcal: 5}", "did you mean 'vertical'?"),
        ("prefill: {layers: {7: dense}}", "layers 0 to 2"),
        ("kv: {policy: snapkw}", "did you mean 'snapkv'?"),
    ],
)
def test_plan_check_says_what_is_wrong_with_a_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: str, words: str
) -> None:
    save_tokenizer(save_tiny(tmp_path / "tiny"))
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(plan)
    ended = farspan("plan", "check", "mine.yaml", "--model", "./tiny")
    assert ended.exit_code == 2 and words in ended.stderr, ended.output


def test_plan_show_prints_a_plan_that_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in shipped_plans():
        shown = farspan("plan", "show", name)
        assert shown.exit_code == 0, shown.output
        if name not in ("moa-smollm2", "seerattention", "seerattention_r"):  # name a file beside them
            Path("copy.yaml").write_text(shown.stdout)
            assert spelled_out(load_plan("copy.yaml")) == spelled_out(load_plan(name)), name
    assert yaml.safe_load(farspan("plan", "show", "snapkv").stdout)["kv"]["query_window"] == 32
    assert json.loads(farspan("plan", "show", "snapkv", "--json").stdout)["kv"]["budget"] == 1024


def test_plan_show_lists_what_is_shipped_with_what_it_does() -> None:
    listed = json.loads(farspan("plan", "show", "--json").stdout)
    assert sorted(listed) == shipped_plans() and all(listed.values())
    assert "minference-snapkv" in farspan("plan", "show").stdout
    refused = farspan("plan", "show", "snapkw")
    assert refused.exit_code == 2 and "did you mean 'snapkv'?" in refused.stderr


def test_plan_matrix_as_json_has_every_cell() -> None:
    cells = json.loads(farspan("plan", "matrix", "--json").stdout)
    assert set(cells["prefill"]) == set(PREFILL_METHODS) and set(cells["decode"]) == set(DECODE_METHODS)
    assert cells["prefill"]["dense"]["snapkv"] == "page, copied"


def test_plan_check_says_how_many_fit_and_refuses_prompts_that_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tokenizer(save_tiny(tmp_path / "tiny"))
    monkeypatch.chdir(tmp_path)
    flags = ("--model", "./tiny", "--dtype", "float32")
    shown = farspan("plan", "check", "dense", *flags, "--kv-cache-memory-bytes", "16MiB", "--json")
    longest = json.loads(shown.stdout)["memory"][-1]
    assert longest["total_tokens"] == 8192
    assert longest["sequences_that_fit"] == 16 * 2**20 // longest["answering_bytes"]["1"]
    for length, words in (("9000", "context of 8192"), ("plenty", "'plenty' is not a number")):
        refused = farspan("plan", "check", "dense", *flags, "--prompt", length)
        assert refused.exit_code == 2 and words in refused.stderr, refused.output


def test_the_serving_process_never_imports_torch() -> None:
    """Weights belong to the engine's process; torch would cost this one seconds and hundreds of megabytes."""
    code = (
        "import sys, server.serve, server.cli, server.app, configs.loading\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=PATIENCE)


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, server.cli\nassert not {'fastapi', 'uvicorn', 'zmq', 'tokenizers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=PATIENCE)


def test_another_package_in_our_place_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_shadowed_packages()
    (tmp_path / "sparse").mkdir()
    (tmp_path / "sparse" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "sparse", raising=False)
    with pytest.raises(ShadowedPackage, match="'sparse'"):
        refuse_shadowed_packages()


def test_a_package_in_the_working_directory_does_not_get_in_the_way(tmp_path: Path) -> None:
    """Neither of the command nor of the processes it starts."""
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "__init__.py").write_text("raise SystemExit('the wrong engine')")
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "server.cli", "serve", "--port", "0", "./no-such-folder"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert ended.returncode == 2 and "./no-such-folder" in ended.stderr, ended
    assert "Traceback" not in ended.stderr and ended.stdout == ""
