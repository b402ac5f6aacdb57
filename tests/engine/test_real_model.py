"""The packaged model in float32: our greedy tokens are HuggingFace's, alone, together and in small chunks."""

from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from configs.schema import EngineConfig
from engine.linear import speed_up_decode
from engine.models import prepare_model
from tests.tiny import TinyEngine, greedy, hf_greedy, plan, tiny_engine

TEXT = Path(__file__).parent.parent.parent / "examples" / "texts" / "pride-and-prejudice.txt"
LENGTHS = (32, 150, 500, 1100, 2300)  # together more than one step takes, the last more than one chunk
NEW_TOKENS = 48
STEP_TOKENS = 2048

pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder() -> Path:
    return prepare_model(EngineConfig())


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[list[int]]:
    """Different passages of a real text, one for each length."""
    ids = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT.read_text()).ids
    return [ids[100 * index : 100 * index + length] for index, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def network(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def expected(network: Any, prompts: list[list[int]]) -> list[list[int]]:
    return [hf_greedy(network, prompt, NEW_TOKENS) for prompt in prompts]


@pytest.fixture(scope="module")
def engine(network: Any, expected: list[list[int]]) -> TinyEngine:
    """Made after HuggingFace has answered: both use one copy of the weights."""
    speed_up_decode(network)  # as `farspan serve` does
    chunked = plan("chunked", prefill={"chunk": 256})
    return tiny_engine(
        plan("dense"),
        chunked,
        network=network,
        num_pages=9_000,
        max_length=2400,
        max_num_batched_tokens=STEP_TOKENS,
    )


def test_alone_the_tokens_are_huggingfaces(
    engine: TinyEngine, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert engine.answer(prompt, greedy(NEW_TOKENS), "dense") == tokens
    engine.assert_empty()


@pytest.mark.parametrize("name", ["dense", "chunked"])
def test_together_the_tokens_are_huggingfaces(
    engine: TinyEngine, prompts: list[list[int]], expected: list[list[int]], name: str
) -> None:
    for index, prompt in enumerate(prompts):
        engine.submit(str(index), prompt, greedy(NEW_TOKENS), name)
    together = engine.run()
    assert [together[str(index)] for index in range(len(prompts))] == expected
    engine.assert_empty()
