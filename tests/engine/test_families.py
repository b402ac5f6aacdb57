"""Every family we serve gives HuggingFace's own answers, packed with others and chunked."""

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.errors import ConfigError
from configs.features import Features
from configs.schema import EngineConfig
from engine import attention
from engine.models import FAMILIES, info_of, load_model, model_info
from engine.rope import Rope
from tests.tiny import greedy, hf_greedy, make_prompt, plan, save_tiny, tiny_config, tiny_engine, tiny_model

PROMPTS = [make_prompt(length, seed=length) for length in (1, 63, 65, 300)]
SLIDING: list[tuple[str, dict[str, Any]]] = [
    ("mistral", {"sliding_window": 50}),
    ("phi3", {"sliding_window": 64}),
    ("starcoder2", {"sliding_window": 50}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 50, "max_window_layers": 1}),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 50}),
]


@pytest.mark.parametrize(("family", "overrides"), [*((name, {}) for name in sorted(FAMILIES)), *SLIDING])
def test_greedy_tokens_equal_huggingface_alone_together_and_chunked(
    family: str, overrides: dict[str, Any]
) -> None:
    network = tiny_model(family, **overrides)
    expected = [hf_greedy(network, prompt, 12) for prompt in PROMPTS]
    assert len({token for answer in expected for token in answer}) > 5  # a model that has something to say
    tiny = tiny_engine(plan(), plan("chunked", prefill={"chunk": 64}), network=network)
    assert [tiny.answer(prompt, greedy(12)) for prompt in PROMPTS] == expected
    for index, prompt in enumerate(PROMPTS):
        tiny.submit(str(index), prompt, greedy(12), "chunked")
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


YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "rope_theta": 1e4,
    "original_max_position_embeddings": 2048,
}


@dataclass
class Recorder:
    """In the place of a ForwardBatch: what a model gives to attention, and what it had before RoPE."""

    features: list[Features] = field(default_factory=list)
    rotated: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # q and k by layer
    unrotated: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    before: tuple[Tensor, Tensor] | None = None

    def attend(self, layer: attention.Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert layer.index == len(self.features)
        self.features.append(layer.features)
        self.rotated.append((q, k))
        self.unrotated.append(self.before or (q, k))
        self.before = None
        return q.transpose(0, 1)


def record(network: Any, positions: Tensor, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """One forward of a model, with a look into its RoPE."""
    attention.register()
    network.set_attn_implementation(attention.IMPLEMENTATION)
    recorder, modeling = Recorder(), sys.modules[type(network).__module__]
    rotate = modeling.apply_rotary_pos_emb

    def listening(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
        recorder.before = (q[0].clone(), k[0].clone())
        return rotate(q, k, *args, **kwargs)

    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", listening)
    tokens = torch.arange(3, 3 + len(positions))
    network(input_ids=tokens[None], position_ids=positions[None], use_cache=False, batch=recorder)
    return recorder


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        *((name, {}) for name in sorted(FAMILIES)),
        ("llama", {"rope_parameters": YARN}),
        ("glm4", {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}}),
        ("phi3", {"rope_parameters": {**YARN, "rope_type": "default", "partial_rotary_factor": 0.5}}),
    ],
)
def test_unrotated_queries_and_keys_are_those_before_rope(
    family: str, overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = tiny_model(family, **overrides)
    positions = torch.tensor([0, 1, 63, 64, 65, 1000, 4000, 7, 8191])
    seen, rope = record(network, positions, monkeypatch), Rope.of(network)
    for layer, (rotated, before) in enumerate(zip(seen.rotated, seen.unrotated, strict=True)):
        for x, expected in zip(rotated, before, strict=True):
            back = rope.unrotate(x, positions, layer)
            torch.testing.assert_close(back, expected, atol=2e-5, rtol=1e-5)  # float32


@pytest.mark.parametrize(("family", "overrides"), [*((name, {}) for name in sorted(FAMILIES)), *SLIDING])
def test_plans_know_the_windows_that_the_modules_ask_for(
    family: str, overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = tiny_model(family, **overrides)
    seen = record(network, torch.arange(4), monkeypatch)
    windows = info_of(network.config, "tiny", 8192).windows
    assert windows == tuple(features.window for features in seen.features)
    assert any(windows) == (bool(overrides) or family in {"cohere2", "gemma2", "gemma3_text", "gpt_oss"})


def refusal(folder: Path, **config: Any) -> str:
    with pytest.raises(ConfigError) as error:
        model_info(folder, EngineConfig(model=str(folder), **config))
    return str(error.value)


def test_what_cannot_be_served_exactly_is_refused_with_the_reason(tmp_path: Path) -> None:
    tiny_config(
        "llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    ).save_pretrained(tmp_path / "dynamic")
    assert "'dynamic'" in refusal(tmp_path / "dynamic")
    tiny_config("gemma").save_pretrained(tmp_path / "gemma")
    assert "'gemma' is not served" in refusal(tmp_path / "gemma")
    tiny_config("gemma3_text", use_bidirectional_attention=True).save_pretrained(tmp_path / "both")
    assert "use_bidirectional_attention" in refusal(tmp_path / "both")
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    by_type = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    tiny_config("gemma3_text", rope_parameters=by_type).save_pretrained(tmp_path / "one-of-two")
    assert "'dynamic'" in refusal(tmp_path / "one-of-two")
    layers = ["full_attention", "sliding_attention", "full_attention"]
    tiny_config("smollm3", layer_types=layers, sliding_window=9).save_pretrained(tmp_path / "both-ways")
    assert "use_sliding_window" in refusal(tmp_path / "both-ways")
    tiny_config("llama").save_pretrained(tmp_path / "llama")
    assert "8192" in refusal(tmp_path / "llama", max_model_len=9000)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "cohere2"])
def test_sparse_prefill_that_covers_everything_gives_huggingfaces_answers(family: str) -> None:
    """With softcap and sinks the rows that the estimator knows are computed again, as it knows neither."""
    network = tiny_model(family)
    if family == "gpt_oss":
        for layer in network.model.layers:
            layer.self_attn.sinks.data += 4  # enough to be seen
    expected = [hf_greedy(network, prompt, 12) for prompt in PROMPTS]
    everything = {"method": "minference", "dense_below": 0, "chunk": 128, "vertical": 2000, "slash": 2000}
    tiny = tiny_engine(plan(prefill=everything), network=network)
    assert [tiny.answer(prompt, greedy(12)) for prompt in PROMPTS] == expected


def test_a_window_that_never_slides_is_none(tmp_path: Path) -> None:
    tiny_config("mistral", sliding_window=256).save_pretrained(tmp_path)
    whole = model_info(tmp_path, EngineConfig(model=str(tmp_path)))
    assert whole.windows == (256, 256, 256) and whole.window(1) == 256
    short = model_info(tmp_path, EngineConfig(model=str(tmp_path), max_model_len=256))
    assert short.windows == (None, None, None)


def test_a_saved_model_loads_with_our_attention(tmp_path: Path) -> None:
    attention.register()
    network = load_model(
        save_tiny(tmp_path), dtype="float32", device="cpu", attention=attention.IMPLEMENTATION
    )
    assert network.config._attn_implementation == attention.IMPLEMENTATION
    info = model_info(tmp_path, EngineConfig(model=str(tmp_path)))
    assert dataclasses.asdict(info)["num_kv_heads"] == 2 and info.group_size == 3


def test_experts_in_mxfp4_are_widened_when_they_load(tmp_path: Path) -> None:
    """gpt-oss as it is published: two values of 4 bits in a byte, the low one first, one scale for 32."""
    save_tiny(tmp_path, "gpt_oss")
    weights, expected = load_file(tmp_path / "model.safetensors"), {}
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([magnitudes, -magnitudes])
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        num_experts, inputs, outputs = weights.pop(name).shape
        blocks = torch.randint(0, 256, (num_experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(123, 126, (num_experts, outputs, inputs // 32), dtype=torch.uint8)
        pairs = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], dim=-1).flatten(3)
        wide = pairs * 2.0 ** (scales[..., None].float() - 127)
        expected[name] = wide.flatten(2).transpose(1, 2)
        weights |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (tmp_path / "config.json").write_text(json.dumps(config))
    attention.register()
    network = load_model(tmp_path, dtype="float32", device="cpu", attention=attention.IMPLEMENTATION)
    loaded = network.state_dict()
    for name, weight in expected.items():
        assert torch.equal(loaded[name], weight)
    assert tiny_engine(network=network).answer(PROMPTS[-1], greedy(6)) == hf_greedy(network, PROMPTS[-1], 6)


BY_TYPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


@pytest.mark.parametrize(
    ("family", "scaling", "rope"),
    [
        ("llama", "yarn:2", {**YARN, "factor": 2.0, "original_max_position_embeddings": 8192}),
        ("llama", "linear:2.5", {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}),
        (
            "gemma3_text",
            "linear:8",
            {**BY_TYPE, "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}},
        ),
    ],
)
def test_stretching_at_load_is_huggingfaces_scaling(
    tmp_path: Path, family: str, scaling: str, rope: dict[str, Any]
) -> None:
    own = {"rope_parameters": BY_TYPE} if family == "gemma3_text" else {}
    save_tiny(tmp_path, family, **own)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.rope_parameters = rope
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, config=config).eval()
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    expected = hf_greedy(reference, PROMPTS[-1], 12)
    assert expected != hf_greedy(plain, PROMPTS[-1], 12)
    attention.register()
    network = load_model(
        tmp_path, dtype="float32", device="cpu", attention=attention.IMPLEMENTATION, rope_scaling=scaling
    )
    assert tiny_engine(network=network).answer(PROMPTS[-1], greedy(12)) == expected
    info = model_info(tmp_path, EngineConfig(model=str(tmp_path), rope_scaling=scaling))
    assert info.max_length == int(8192 * float(scaling.split(":")[1])) and info.rope_scaling == scaling


def test_what_cannot_be_stretched_is_refused_with_the_reason(tmp_path: Path) -> None:
    tiny_config("llama", rope_parameters=YARN).save_pretrained(tmp_path / "scaled")
    assert "already scaled (yarn)" in refusal(tmp_path / "scaled", rope_scaling="yarn:2")
    for family in ("cohere2", "mistral"):
        tiny_config(family, sliding_window=50).save_pretrained(tmp_path / family)
        assert "nothing to stretch" in refusal(tmp_path / family, rope_scaling="yarn:2")
    tiny_config("llama").save_pretrained(tmp_path / "llama")
    assert "20480" in refusal(tmp_path / "llama", rope_scaling="linear:2.5", max_model_len=20481)


def test_experts_run_without_asking_the_device_how_many_tokens_each_has(tmp_path: Path) -> None:
    attention.register()
    folder = save_tiny(tmp_path, "qwen3_moe")
    network = load_model(folder, dtype="float32", device="cpu", attention=attention.IMPLEMENTATION)
    assert network.config._experts_implementation == "grouped_mm"
