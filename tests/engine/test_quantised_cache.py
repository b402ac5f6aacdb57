"""Engines whose pages hold codes: near what full pages give, and the same however a prompt is computed."""

from typing import Any

import pytest
import torch
from torch import Tensor

from configs.errors import ConfigError
from configs.quantised import FP8, INT8, dequantise, quantise
from engine import startup
from engine.kernels import kernels_for
from engine.messages import Submit
from engine.plans import resolve_plan
from engine.self_check import checked
from engine.sharing import prefill_seed
from kvcache.moves import store
from kvcache.policies import KV_POLICIES
from kvcache.pool import PagePool
from tests.engine.test_plans import MODEL
from tests.tiny import TinyEngine, greedy, make_prompt, plan, tiny_engine, tiny_model

SPARSE = {"method": "minference", "dense_below": 0, "chunk": 128, "vertical": 40, "slash": 10}
SNAP = {"policy": "snapkv", "budget": 100, "query_window": 16}
POLICIES: dict[str, dict[str, Any]] = {
    "ada-snapkv": {"budget": 100, "query_window": 16},
    "snapkv": {"budget": 100, "query_window": 16},
    "pyramidkv": {"budget": 100, "query_window": 16},
    "streaming": {"sink": 64, "window": 128},
}


@pytest.fixture(scope="module")
def network() -> Any:
    return tiny_model()


def engine(network: torch.nn.Module, cache_dtype: str = "int8", **parts: Any) -> TinyEngine:
    options = {
        name: parts.pop(name) for name in ("share_prefixes", "max_num_batched_tokens") if name in parts
    }
    return tiny_engine(plan("p", **parts), network=network, cache_dtype=cache_dtype, **options)


def forced_logits(tiny: TinyEngine, prompt: tuple[int, ...], forced: tuple[int, ...]) -> Tensor:
    """Logits [forced + 1, V] of an answer whose tokens are given."""
    rows: list[Tensor] = []
    hook = tiny.network.lm_head.register_forward_hook(lambda module, given, logits: rows.append(logits[0]))
    try:
        answer = greedy(len(forced) + 1)
        tiny.engine.submit(Submit("only", prompt + forced, len(prompt), "p", answer))
        tiny.run()
    finally:
        hook.remove()
    return torch.cat(rows)[-len(forced) - 1 :]


def rounded(pool: PagePool, k: Tensor, v: Tensor, destinations: Tensor) -> None:
    """Stores what codes would mean, in full."""
    k, v = (dequantise(*quantise(x, INT8), torch.float32) for x in (k, v))
    store(pool, k, v, destinations)


@pytest.mark.parametrize(
    ("policy", "decode"),
    [*((policy, "full") for policy in KV_POLICIES), ("keep_all", "quest"), ("snapkv", "quest")],
)
def test_every_policy_and_decode_method_sees_what_codes_mean(
    network: torch.nn.Module, policy: str, decode: str
) -> None:
    """Teacher-forced logits equal those over full pages of the same rounded keys and values (fp32)."""
    reads = {"method": decode, **({"read": 96, "sink": 16, "window": 16} if decode == "quest" else {})}
    made = plan("p", kv={"policy": policy, **POLICIES.get(policy, {})}, decode=reads)
    prompt, forced = make_prompt(330), make_prompt(12, seed=5)
    kernels = kernels_for(torch.device("cpu")).with_kernel("moves.store", rounded)
    want = forced_logits(tiny_engine(made, network=network, kernels=kernels), prompt, forced)
    tiny = tiny_engine(made, network=network, cache_dtype="int8")
    torch.testing.assert_close(forced_logits(tiny, prompt, forced), want, atol=1e-3, rtol=1e-3)
    tiny.assert_empty()


@pytest.mark.parametrize(("cache_dtype", "most"), [("int8", 0.03), ("fp8", 0.2)])
def test_answers_are_near_those_over_full_pages(
    network: torch.nn.Module, cache_dtype: str, most: float
) -> None:
    """Teacher-forced logits, as a share of their own spread; this random model is far from uniform."""
    prompt, forced = make_prompt(330), make_prompt(12, seed=5)
    want = forced_logits(engine(network, "auto"), prompt, forced)
    got = forced_logits(engine(network, cache_dtype), prompt, forced)
    assert 0 < float((got - want).norm() / (want - want.mean(-1, keepdim=True)).norm()) < most


@pytest.mark.parametrize("parts", [{}, {"kv": SNAP}, {"prefill": SPARSE}, {"prefill": SPARSE, "kv": SNAP}])
def test_an_answer_depends_on_neither_chunks_nor_batch_mates(
    network: torch.nn.Module, parts: dict[str, Any]
) -> None:
    prompt = make_prompt(450)
    whole = engine(network, **parts, max_num_batched_tokens=4096).answer(prompt)
    small = engine(network, **parts, max_num_batched_tokens=128)
    assert small.answer(prompt) == whole
    for number in range(3):
        small.submit(str(number), make_prompt(200 + 70 * number, seed=number))
    small.submit("whole", prompt)
    assert small.run()["whole"] == whole
    small.assert_empty()


@pytest.mark.parametrize("parts", [{}, {"kv": SNAP}, {"prefill": SPARSE}])
def test_an_answer_is_the_same_with_the_cache_warm_and_cold(
    network: torch.nn.Module, parts: dict[str, Any]
) -> None:
    prompts = [(*make_prompt(450, seed=1), *make_prompt(70, seed=100 + number)) for number in range(3)]
    cold = engine(network, **parts)
    warm = engine(network, **parts, share_prefixes=True)
    assert [warm.answer(prompt) for prompt in prompts] == [cold.answer(prompt) for prompt in prompts]
    assert warm.cache.usage().cached
    warm.assert_empty()


@pytest.mark.parametrize("parts", [{}, {"kv": SNAP}])
def test_choices_of_one_prompt_fork_exactly(network: torch.nn.Module, parts: dict[str, Any]) -> None:
    prompt = make_prompt(330)
    alone = engine(network, **parts).answer(prompt)
    tiny = engine(network, **parts)
    tiny.submit("only", prompt, greedy(), choices=3)
    assert list(tiny.run().values()) == [alone] * 3
    tiny.assert_empty()


def test_sequences_come_back_from_the_host_with_their_codes(network: torch.nn.Module) -> None:
    def answers(**room: int) -> tuple[dict[str, list[int]], bool]:
        tiny = tiny_engine(network=network, cache_dtype="int8", max_num_batched_tokens=128, **room)
        for number, length in enumerate((60, 125, 190, 62)):
            tiny.submit(f"{number}", make_prompt(length, seed=number), greedy(85))
        tokens: dict[str, list[int]] = {}
        was_out = False
        while tiny.engine.has_work:
            for output in tiny.step():
                assert output.error is None, output.error
                tokens.setdefault(output.request_id, []).extend(output.tokens)
            was_out |= tiny.engine.stats().swapped > 0
        tiny.assert_empty()
        return tokens, was_out

    roomy, _ = answers()
    tight, was_out = answers(num_pages=36, host_pages=100)
    assert was_out and tight == roomy


def test_kv_made_in_another_cache_dtype_is_never_reused() -> None:
    seeds = {
        prefill_seed(resolve_plan(plan(), MODEL, cache_dtype=dtype), 100, 120, "")
        for dtype in ("auto", "int8", "fp8")
    }
    assert len(seeds) == 3


@pytest.mark.parametrize("page_dtype", [INT8, FP8])
def test_kernels_are_tried_on_the_pages_that_they_will_read(page_dtype: torch.dtype) -> None:
    mine = kernels_for(torch.device("cpu"), page_dtype)
    assert checked(mine, MODEL, torch.float32, torch.device("cpu"), page_dtype) == mine


def test_fp8_is_refused_where_the_device_does_not_convert_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(
        ConfigError, match="cache.dtype: fp8 needs .* 8.9 or newer.* this one has 8.0: use int8"
    ):
        startup.page_dtype_for("fp8", "cuda")
    assert startup.page_dtype_for("int8", "cuda") == INT8
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert startup.page_dtype_for("fp8", "cuda") == FP8
    assert startup.page_dtype_for("auto", "cuda") is None
