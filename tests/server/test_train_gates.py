"""`farspan train-gates` from the command line: gates that a plan can name, or one message and exit code 2."""

from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from configs.loading import load_plan
from configs.schema import EngineConfig
from engine.models import model_info
from engine.plans import resolve_plan
from server.cli import app
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


def train(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["train-gates", *map(str, arguments)], prog_name="farspan")


def test_a_plan_can_name_what_the_command_leaves(tmp_path: Path, model: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "gates"
    text.write_text("One after another, words pass by. " * 40)
    few = ("--pieces", 8, "--length", 512, "--steps", 5, "--threads", 1)
    ended = train(model, "--text", text, "--out", out, *few)
    assert ended.exit_code == 0, ended.output
    assert "nats from the attention of unseen pieces" in ended.stdout
    assert "reading" in ended.stderr and "8/8" in ended.stderr and "3/3" in ended.stderr
    (out / "plan.yaml").write_text("prefill: {method: seerattention, gates: gates.safetensors}")
    info = model_info(model, EngineConfig(model=str(model)))
    assert resolve_plan(load_plan(out / "plan.yaml"), info).methods[0].layers  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--length", "long"), "--length: 'long' is not a number"),
        (("--length", "100"), "--length: 100 must be whole pages of 64"),
        (("--pieces", "2"), "--pieces: 2 are too few"),
        (("--method", "hip"), "--method: 'hip' must be seerattention or seerattention_r"),
        (("--target", "most"), "--target: 'most' must be max or sum"),
        (("--device", "tpu"), "device"),
        ((), "text.txt cannot be read"),
    ],
)
def test_what_is_wrong_is_said_with_exit_code_2(
    tmp_path: Path, model: Path, flags: tuple[str, ...], words: str
) -> None:
    ended = train(model, "--text", tmp_path / "text.txt", "--out", tmp_path / "gates", *flags)
    assert ended.exit_code == 2 and words in ended.stderr, ended.output
    assert not (tmp_path / "gates" / "gates.safetensors").exists()
