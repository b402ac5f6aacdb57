"""Every family we serve gives HuggingFace's own answers, packed with others and chunked."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import ConfigError
from configs.schema import EngineConfig
from engine import attention
from engine.models import FAMILIES, load_model, model_info
from engine.rope import Rope
from tests.tiny import greedy, hf_greedy, make_prompt, plan, save_tiny, tiny_config, tiny_engine, tiny_model

PROMPTS = [make_prompt(length, seed=length) for length in (1, 63, 64, 65, 300)]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_greedy_tokens_equal_huggingface_alone_together_and_chunked(family: str) -> None:
    network = tiny_model(family)
    expected = [hf_greedy(network, prompt, 12) for prompt in PROMPTS]
    tiny = tiny_engine(plan(), plan("chunked", prefill={"chunk": 64}), network=network)
    for name in ("dense", "chunked"):
        assert [tiny.answer(prompt, greedy(12), name) for prompt in PROMPTS] == expected
        for index, prompt in enumerate(PROMPTS):
            tiny.submit(str(index), prompt, greedy(12), name)
        together = tiny.run()
        assert [together[str(index)] for index in range(len(PROMPTS))] == expected
    tiny.assert_empty()


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 4096},
    ],
    ids=lambda rope: str(rope["rope_type"]),
)
def test_static_rope_scaling_gives_huggingfaces_answers(rope: dict[str, Any]) -> None:
    network = tiny_model(rope_parameters=rope)
    expected = hf_greedy(network, PROMPTS[-1], 12)
    assert tiny_engine(network=network).answer(PROMPTS[-1], greedy(12)) == expected


def test_dims_that_are_not_rotated_are_left_alone() -> None:
    network = tiny_model("phi3", partial_rotary_factor=0.5)
    x = torch.randn(6, 3, 16)
    unrotated = Rope.of(network).unrotate(x, torch.tensor([3, 70, 900]))
    assert torch.equal(unrotated[..., 8:], x[..., 8:]) and not torch.equal(unrotated[..., :8], x[..., :8])


@pytest.mark.parametrize("scaling", ["default", "yarn"])
def test_unrotated_queries_are_those_before_rope(scaling: str) -> None:
    rope = {"rope_type": scaling, "rope_theta": 1e4}
    if scaling == "yarn":
        rope |= {"factor": 4.0, "original_max_position_embeddings": 2048}
    network = tiny_model(rope_parameters=rope)
    x = torch.randn(6, 9, 16)
    positions = torch.tensor([0, 1, 63, 64, 65, 1000, 4000, 7, 8191])
    cos, sin = network.model.rotary_emb(x, positions[None])
    rotated = x * cos + torch.cat((-x[..., 8:], x[..., :8]), dim=-1) * sin
    torch.testing.assert_close(Rope.of(network).unrotate(rotated, positions), x, atol=2e-5, rtol=0)  # float32


def refusal(folder: Path, **config: Any) -> str:
    with pytest.raises(ConfigError) as error:
        model_info(folder, EngineConfig(model=str(folder), **config))
    return str(error.value)


def test_what_cannot_be_served_exactly_is_refused_with_the_reason(tmp_path: Path) -> None:
    tiny_config(
        "llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    ).save_pretrained(tmp_path / "dynamic")
    assert "'dynamic'" in refusal(tmp_path / "dynamic")
    tiny_config("gemma2").save_pretrained(tmp_path / "gemma2")
    assert "'gemma2' is not served" in refusal(tmp_path / "gemma2")
    tiny_config("llama").save_pretrained(tmp_path / "llama")
    assert "8192" in refusal(tmp_path / "llama", max_model_len=9000)


@pytest.mark.parametrize("family", ["mistral", "phi3", "starcoder2"])
def test_a_sliding_window_is_served_where_it_never_slides(tmp_path: Path, family: str) -> None:
    tiny_config(family, sliding_window=256).save_pretrained(tmp_path)
    assert "--max-model-len 256" in refusal(tmp_path)
    config = EngineConfig(model=str(tmp_path), max_model_len=256)
    assert model_info(tmp_path, config).max_length == 256
    network = tiny_model(family, sliding_window=256)
    prompt = make_prompt(200)
    expected = hf_greedy(network, prompt, 12)
    assert tiny_engine(network=network).answer(prompt, greedy(12)) == expected


def test_a_saved_model_loads_with_our_attention(tmp_path: Path) -> None:
    attention.register()
    network = load_model(
        save_tiny(tmp_path), dtype="float32", device="cpu", attention=attention.IMPLEMENTATION
    )
    assert network.config._attn_implementation == attention.IMPLEMENTATION
    info = model_info(tmp_path, EngineConfig(model=str(tmp_path)))
    assert dataclasses.asdict(info)["num_kv_heads"] == 2 and info.group_size == 3


def test_attention_features_we_do_not_have_are_refused_when_they_reach_the_seam() -> None:
    q = torch.zeros(1, 2, 1, 16)
    with pytest.raises(ConfigError, match="softcap"):
        attention.attention(
            torch.nn.Module(),
            q,
            q,
            q,
            None,
            scaling=1.0,
            batch=None,
            softcap=50.0,  # type: ignore[arg-type]
        )
