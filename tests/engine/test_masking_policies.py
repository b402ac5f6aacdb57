"""Policies that mask: their answers are those of the mask whatever the chunks, and what they hide leaves."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from configs.model import BlockSparse
from configs.plan import PlanFile
from configs.schema import EngineConfig
from engine.engine import Engine
from engine.messages import Submit
from engine.models import info_of, model_info
from engine.plans import ResolvedPlan
from engine.sequence import Sequence
from tests import reference
from tests.tiny import greedy, hf_greedy, make_prompt, plan, save_tiny, tiny_engine, tiny_model

SMALL: dict[str, dict[str, Any]] = {
    "streaming": {"window": 128},
    "moa": {"beta": 0.25},
    "s2": {"local_blocks": 1},
}
Pattern = Callable[[int, int, int, int], bool]  # layer, KV head, page of the query, page of the key


def attend_masked(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **kwargs: Any
) -> Any:
    """HuggingFace's attention call, computed slowly under `mask_of[layer]`, bool [Hkv, N, N] by token."""
    allowed = kwargs["mask_of"][module.layer_idx].repeat_interleave(q.shape[1] // k.shape[1], dim=0)
    out, _ = reference.attention(q[0], k[0], v[0], allowed, scaling)
    return out.transpose(0, 1)[None], None


def assert_masked(network: Any, prompt: tuple[int, ...], answer: list[int], reads: Pattern) -> None:
    """The answer is what the model says, greedily, if every query reads the pages that `reads` allows.

    fp32: tokens are equal. One forward over prompt and answer, since a mask of pages hides the same of both.
    """
    transformers.AttentionInterface.register("masked", attend_masked)
    before = network.config._attn_implementation
    network.set_attn_implementation("masked")
    info = info_of(network.config, "tiny", 8192)
    tokens = [*prompt, *answer]
    pages = -(-len(tokens) // 64)
    causal = reference.causal(0, len(tokens))
    masks = []
    for layer in range(info.num_layers):
        by_page = [
            [[reads(layer, head, i, j) for j in range(pages)] for i in range(pages)]
            for head in range(info.num_kv_heads)
        ]
        by_token = torch.tensor(by_page).repeat_interleave(64, 1).repeat_interleave(64, 2)
        masks.append(by_token[:, : len(tokens), : len(tokens)] & causal)
    with torch.inference_mode():
        logits = network(input_ids=torch.tensor([tokens]), use_cache=False, mask_of=masks).logits
    network.set_attn_implementation(before)
    assert logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == answer


def streaming(sink: int, window: int) -> Pattern:
    return lambda layer, head, i, j: 64 * j < sink or i - j < -(-window // 64)


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    return tiny_model()


def chunked(kv: dict[str, Any], **prefill: Any) -> list[PlanFile]:
    """One policy under three chunkings."""
    return [plan(f"{chunk}", kv=kv, prefill={"chunk": chunk, **prefill}) for chunk in (64, 128, 2048)]


def answers_under_any_chunks(network: Any, kv: dict[str, Any], length: int, count: int = 10) -> list[int]:
    """The answer to a prompt of so many tokens: the same however the prompt is cut."""
    tiny = tiny_engine(*chunked(kv), network=network)
    prompt = make_prompt(length, seed=length)
    for name in tiny.plans:
        tiny.submit(name, prompt, greedy(count), name)
    first, *others = tiny.run().values()
    assert all(other == first for other in others)
    tiny.assert_empty()
    return first


@pytest.mark.parametrize(("sink", "window"), [(64, 128), (0, 64), (100, 1)])
@pytest.mark.parametrize(("length", "count"), [(60, 140), (64, 2), (315, 10)])
def test_streaming_answers_as_huggingface_does_under_its_mask(
    network: Any, length: int, count: int, sink: int, window: int
) -> None:
    """Decode crosses the ends of pages, where the window moves."""
    kv = {"policy": "streaming", "sink": sink, "window": window}
    answer = answers_under_any_chunks(network, kv, length, count)
    assert_masked(network, make_prompt(length, seed=length), answer, streaming(sink, window))


@pytest.mark.parametrize("heads", [2, 6])
def test_moa_answers_as_huggingface_does_under_the_longest_spans_of_groups(
    network: Any, heads: int, tmp_path: Path
) -> None:
    g = torch.Generator().manual_seed(heads)
    alphas = (100 * torch.randint(-3, 3, (3, heads), generator=g)).tolist()
    betas = (torch.randint(0, 9, (3, heads), generator=g) / 8).tolist()
    (tmp_path / "spans.json").write_text(json.dumps({"alphas": alphas, "betas": betas}))
    answer = answers_under_any_chunks(network, {"policy": "moa", "spans": str(tmp_path / "spans.json")}, 315)

    def reads(layer: int, head: int, i: int, j: int) -> bool:
        group = range(head, head + 1) if heads == 2 else range(3 * head, 3 * head + 3)
        spans = [min(int(alphas[layer][h] + betas[layer][h] * 325), 325) for h in group]
        blocks = [math.ceil(max(span, 128) / 64) - 1 for span in spans]
        return j == 0 or i - j < max(blocks)

    assert_masked(network, make_prompt(315, seed=315), answer, reads)


S2_PATTERNS: dict[str, tuple[dict[str, Any], Pattern]] = {
    "dkernel": (
        {"local_blocks": 2, "vert_stride": 2},
        lambda layer, head, i, j: i - j < 2 or (j + head) % 2 == 0,
    ),
    "query heads": (
        {"local_blocks": 1, "vert_stride": 6, "convention": "phi3small"},
        lambda layer, head, i, j: i == j or any((j + h + 1) % 6 == 0 for h in range(3 * head, 3 * head + 3)),
    ),
    "dense layers and heads": (
        {"local_blocks": 1, "vert_stride": 4, "dense_every": 2, "num_dense_heads": 1},
        lambda layer, head, i, j: i == j or j % 4 == 0 or layer == 1 or head == 1,
    ),
    "finer shard nearby": (
        {"local_blocks": 4, "local_stride": 2, "vert_stride": 4, "homo_head": True},
        lambda layer, head, i, j: i == j or j % 4 == 0 or (i - j < 4 and j % 2 == 0),
    ),
}


@pytest.mark.parametrize("name", S2_PATTERNS)
def test_s2_answers_as_huggingface_does_under_its_shards(network: Any, name: str) -> None:
    options, reads = S2_PATTERNS[name]
    answer = answers_under_any_chunks(network, {"policy": "s2", **options}, 445)
    assert_masked(network, make_prompt(445, seed=445), answer, reads)


@pytest.mark.parametrize("group", [True, False])
def test_a_llama_that_says_its_pattern_is_served_with_it(tmp_path: Path, group: bool) -> None:
    """Read from config.json in the form of Phi-3-small; the second layer of two is dense."""
    params = {"block_size": 64, "num_local_blocks": 1, "vert_stride": 2, "homo_head_group": group}
    network = tiny_model(blocksparse_params=params, dense_attention_every_n_layers=2)
    save_tiny(tmp_path, blocksparse_params=params, dense_attention_every_n_layers=2)
    assert model_info(tmp_path, EngineConfig(model=str(tmp_path))).block_sparse == BlockSparse(
        64, 1, 2, homo_head=False, homo_head_group=group, dense_every=2
    )
    answer = answers_under_any_chunks(network, {"policy": "s2"}, 315)

    def reads(layer: int, head: int, i: int, j: int) -> bool:
        # Of three query heads with shards of their own, every block is one's.
        return i == j or layer == 1 or (j + head + 1) % 2 == 0 or not group

    assert_masked(network, make_prompt(315, seed=315), answer, reads)


@pytest.mark.parametrize("policy", ["streaming", "moa", "s2"])
def test_pages_that_leave_take_nothing_from_the_answer(
    network: Any, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokens when nothing leaves before the prompt ends."""
    kv = {"policy": policy, **SMALL[policy]}
    prompt = make_prompt(380)
    expected = tiny_engine(*chunked(kv)[:1], network=network).answer(prompt, greedy(8))
    drop, left = Engine._drop, []

    def drop_late(engine: Engine, sequence: Sequence) -> None:
        if not sequence.in_prefill:
            before = engine._cache.usage().free
            drop(engine, sequence)
            left.append(engine._cache.usage().free - before)

    monkeypatch.setattr(Engine, "_drop", drop_late)
    monkeypatch.setattr(ResolvedPlan, "pages_needed", lambda *lengths: 3 * 2 * 7)
    tiny = tiny_engine(*chunked(kv)[:1], network=network)
    assert tiny.answer(prompt, greedy(8)) == expected
    assert left[0] > 0, "the prompt held them to its end"


@pytest.mark.parametrize("policy", ["streaming", "moa", "s2"])
def test_a_mask_that_hides_nothing_is_dense(network: Any, policy: str) -> None:
    everything = {"streaming": {"window": 2048}, "moa": {"beta": 1.0}, "s2": {"vert_stride": 1}}[policy]
    tiny = tiny_engine(plan("dense"), plan("all", kv={"policy": policy, **everything}), network=network)
    prompt = make_prompt(300)
    assert tiny.plans["all"].policy.reach(308) is None
    assert tiny.answer(prompt, greedy(8), "all") == tiny.answer(prompt, greedy(8), "dense")


@pytest.mark.parametrize("policy", ["streaming", "moa", "s2"])
def test_the_peak_of_pages_is_what_was_promised_and_less_than_without(network: Any, policy: str) -> None:
    """While the prompt is computed, and while it is answered across the ends of pages."""
    kv = {"policy": policy, **SMALL[policy]}
    one = plan("one", prefill={"chunk": 64}, kv=kv)
    tiny = tiny_engine(one, network=network)
    tiny.submit("only", make_prompt(640), greedy(140))
    pool, held = tiny.cache.pool, [0]
    allocate = pool.allocate
    pool.allocate = lambda count: (allocate(count), held.append(pool.num_pages - pool.num_free))[0]  # type: ignore
    tiny.run()
    resolved, rows = tiny.plans["one"], 3 * 2
    assert max(held) <= resolved.pages_needed(640, 780) < 0.75 * rows * 13
    # A last chunk takes up to a page more than this one did.
    assert max(held) >= resolved.pages_needed(640, 780) - rows
    assert held[-1] <= resolved.policy.pages_after_prefill(640, 780)


def test_what_a_mask_hides_is_neither_read_nor_called_recalled(network: Any) -> None:
    tiny = tiny_engine(*chunked({"policy": "streaming", "window": 64}), network=network)
    found = {}
    for name in tiny.plans:
        tiny.submit(name, make_prompt(700), greedy(1), name)
    while tiny.engine.has_work:
        found |= {output.request_id: output.cost for output in tiny.step()}
    cells = sum(row % 64 + 1 + (64 if row >= 64 else 0) for row in range(700))
    for cost in found.values():
        assert cost.prefill_read_fraction == pytest.approx(cells / (700 * 701 / 2))
        assert cost.kv_tokens_kept == 64 + 700 % 64
    assert 0 < found["2048"].attention_recall < 0.9, "judged against all keys, which one chunk still holds"
    assert found["64"].attention_recall is None, "keys had left that full attention reads"


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_behind_the_windows_of_a_model_pages_leave_and_nobody_notices(family: str) -> None:
    network = tiny_model(family, sliding_window=100)
    prompt = make_prompt(310)
    expected = hf_greedy(network, prompt, 14)
    tiny = tiny_engine(*chunked({}), network=network)
    windows = [window is not None for window in tiny.plans["64"].policy.model.windows]
    for name in tiny.plans:
        tiny.submit(name, prompt, greedy(14), name)
        answer: list[int] = []
        while tiny.engine.has_work:
            answer += [token for output in tiny.step() for token in output.tokens]
            if len(answer) in (5, 13):  # 314 and 322 tokens are held
                pages = (tiny.cache.table.host >= 0).sum((0, 2, 3))
                everything = 2 * 5 if len(answer) == 5 else 2 * 6
                assert pages.tolist() == [2 * 3 if slides else everything for slides in windows]
        assert answer == expected
    tiny.assert_empty()


def test_a_replay_under_a_mask_goes_on_exactly(network: Any) -> None:
    tiny = tiny_engine(plan(kv={"policy": "streaming", "window": 100}), network=network)
    prompt = make_prompt(200)
    whole = tiny.answer(prompt, greedy(90))
    tiny.engine.submit(Submit("replay", (*prompt, *whole[:70]), len(prompt), "dense", greedy(90)))
    assert tiny.run()["replay"] == whole[70:]


@pytest.mark.parametrize("policy", ["streaming", "moa", "s2"])
def test_a_beginning_from_the_prefix_cache_changes_no_answer(network: Any, policy: str) -> None:
    """Cold, then warm with the same prompt, and with another that begins alike and is as long."""
    one = plan("one", prefill={"chunk": 64}, kv={"policy": policy, **SMALL[policy]})
    prompt = make_prompt(500)
    alike = (*prompt[:400], *make_prompt(100, seed=1))
    cold = tiny_engine(one, network=network)
    warm = tiny_engine(one, network=network, share_prefixes=True)
    warm.answer(prompt, greedy(6))
    for tokens in (prompt, alike):
        warm.submit("warm", tokens, greedy(6))
        outputs = []
        while warm.engine.has_work:
            outputs += warm.step()
        assert outputs[0].cost is not None and outputs[0].cost.cached_tokens >= 320
        assert [token for output in outputs for token in output.tokens] == cold.answer(tokens, greedy(6))
    warm.assert_empty()
