"""Configuration: precedence, and refusals that name the key and the remedy."""

from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.loading import load_config, load_plan, shipped_plans


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    file = write(tmp_path / "farspan.yaml", "server: {port: 9000, host: 0.0.0.0}\n")
    config = load_config(file, {"server.port": 9001, "engine.dtype": None})
    assert config.server.port == 9001
    assert config.server.host == "0.0.0.0"
    assert config.engine.dtype == "auto"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("server: {prot: 1}", ["server.prot", "unknown key", "'port'"]),
        ("servers: {port: 1}", ["servers", "'server'"]),
        ("server: {port: 70000}", ["server.port", "65535", "70000"]),
        ("engine: {max_model_len: 8x}", ["engine.max_model_len: '8x' is not a number"]),
        ("engine: {rope_scaling: 'ntk:2'}", ["engine.rope_scaling: ", "'ntk:2'", "linear:FACTOR", "yarn:2"]),
        ("engine: {rope_scaling: 'yarn:1'}", ["engine.rope_scaling: ", "'yarn:1'", "above 1"]),
        ("engine: {rope_scaling: yarn}", ["engine.rope_scaling: ", "'yarn'", "yarn:FACTOR"]),
        ("engine: {rope_scaling: 'linear:inf'}", ["engine.rope_scaling: ", "'linear:inf'"]),
        ("engine: {max_model_len: 0}", ["engine.max_model_len: ", "greater than or equal to 1"]),
        ("scheduler: {prefill_share: 0}", ["scheduler.prefill_share", "greater than 0"]),
        ("server: 5", ["server"]),
        ("- a", ["mapping"]),
        ("a: [", ["not valid YAML"]),
    ],
)
def test_a_wrong_config_is_refused_with_the_key_and_the_remedy(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_config(write(tmp_path / "c.yaml", text), {})
    for word in words:
        assert word in str(refusal.value)
    assert "literal" not in str(refusal.value), "how the schema is written is no news"


@pytest.mark.parametrize(
    ("text", "count"),
    [("8k", 8000), ("8K", 8192), ("2GiB", 2 * 2**30), ("1.5k", 1500), ("77", 77), ("2g", 2 * 10**9)],
)
def test_counts_are_read_as_people_write_them(text: str, count: int) -> None:
    assert load_config(None, {"engine.max_model_len": text}).engine.max_model_len == count


def test_every_shipped_plan_loads() -> None:
    assert shipped_plans() == [
        "ada-snapkv",
        "dense",
        "flashprefill",
        "flexprefill",
        "hip",
        "mean-pool",
        "minference",
        "minference-snapkv",
        "moa",
        "moa-smollm2",
        "pyramidkv",
        "quest",
        "s2",
        "seerattention",
        "seerattention_r",
        "snapkv",
        "streaming",
        "xattention",
    ]
    for name in shipped_plans():
        assert load_plan(name).name == name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prefil: {}", ["prefil", "'prefill'"]),
        ("prefill: {chunk: 100}", ["prefill.chunk", "multiple of 64"]),
        ("prefill: {recall_floor: 2}", ["prefill.recall_floor"]),
        ("prefill: {layers: {a-b: dense}}", ["prefill.layers", "a-b"]),
        ("name: x", ["name", "file's name"]),
    ],
)
def test_a_wrong_plan_is_refused_with_the_key_and_the_remedy(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_plan(write(tmp_path / "p.yaml", text))
    for word in words:
        assert word in str(refusal.value)


def test_an_unknown_plan_name_gets_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'minference'"):
        load_plan("minferense")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_plan(tmp_path / "missing.yaml")
