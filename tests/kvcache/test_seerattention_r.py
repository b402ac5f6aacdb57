"""SeerAttention-R: gate keys follow what is written, choices the published formulae; files are checked."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from configs.errors import ConfigError
from configs.model import PAGE_SIZE, ModelInfo
from engine.plans import resolve_plan
from engine.rope import Rotation
from kvcache.cache import KVCache
from kvcache.decode import Queries, Rows, RowSelection, StoredKeys
from kvcache.seerattention_r import KEY, SeerAttentionR
from kvcache.state import NewKeys, StateRegistry
from tests.kvcache.builders import make_cache, make_model
from tests.tiny import greedy, make_prompt, plan, tiny_engine, tiny_model

LAYERS, HEADS, GROUP, SIZE = 2, 2, 3, 8
MODEL = make_model(layers=LAYERS, query_heads=HEADS * GROUP, kv_heads=HEADS, head_dim=SIZE)
ROPE = Rotation(1e4 ** (-torch.arange(0, SIZE, 2) / SIZE), 1.0, interleaved=False)


def make_weights(model: ModelInfo = MODEL, *, norms: bool = True) -> dict[str, Tensor]:
    g, size, heads = torch.Generator().manual_seed(0), model.head_dim, model.num_kv_heads
    weights = {}
    for layer in range(model.num_layers):
        where = f"model.layers.{layer}.self_attn.attn_gate.attngate_"
        weights[f"{where}linear_q.weight"] = torch.randn(heads, model.group_size, size, size, generator=g)
        weights[f"{where}linear_k.weight"] = torch.randn(heads, 3 * size, size, generator=g)
        if norms:
            weights[f"{where}qnorm.weight"] = torch.rand(size, generator=g) + 0.5
            weights[f"{where}knorm.weight"] = torch.rand(size, generator=g) + 0.5
    return weights


def write_gates(folder: Path, weights: dict[str, Tensor], name: str = "gates.safetensors") -> Path:
    if name.endswith(".pth"):
        torch.save(weights, folder / name)
    else:
        save_file(weights, folder / name)
    return folder / name


class Gated:
    """A cache of one sequence beside the method that reads it, and its keys before RoPE [L, Hkv, N, D]."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.method, states = SeerAttentionR(path, **options), StateRegistry()
        self.method.attach(MODEL, path.parent, states)
        self.cache: KVCache = make_cache(model=MODEL, states=states, num_pages=64, max_length=1024)
        self.slot = self.cache.admit(48)
        self.keys = torch.empty(LAYERS, HEADS, 0, SIZE)

    def write(self, length: int) -> None:
        """A chunk, or with length 1 behind it a decode step."""
        cache, start = self.cache, self.keys.shape[2]
        new = torch.randn(LAYERS, HEADS, length, SIZE)
        self.keys = torch.cat((self.keys, new), 2)
        is_chunk = length > 1
        if is_chunk:
            cache.reserve(self.slot, start + length)
        else:
            cache.reserve_next([self.slot])
        cache.sync()
        positions = torch.arange(start, start + length)
        for layer in range(LAYERS):
            k = ROPE.apply(new[layer], positions)
            if is_chunk:
                at = cache.prefill_destinations(self.slot, start, length)[layer]
            else:
                at, k = cache.decode_destinations([self.slot])[layer], k.transpose(0, 1)
            cache.write(k, k, at)
            cache.keep_up(NewKeys(layer, k, at, positions, ROPE, is_chunk))
        cache.advance(self.slot, length)

    def expected_keys(self, layer: int) -> Tensor:
        """The gate's keys from scratch, page by page: [Hkv, P, D]."""
        gate, found = self.method.layers[layer], []
        for first in range(0, self.keys.shape[2], PAGE_SIZE):
            page = self.keys[layer, :, first : first + PAGE_SIZE]
            pooled = torch.cat((page.amax(1), page.amin(1), page.mean(1)), -1)  # [Hkv, 3 D]
            key = torch.stack([pooled[head] @ gate.k[head] for head in range(HEADS)])
            if gate.norm_k is not None:
                key = key / (key.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * gate.norm_k
            found.append(ROPE.apply(key[:, None], torch.tensor([first])))
        return torch.cat(found, 1)

    def found_keys(self, layer: int) -> Tensor:
        pages = self.cache.table.device[self.slot, layer, :, : -(-self.keys.shape[2] // PAGE_SIZE)]
        return self.cache.states.of_pages(self.method.state)[pages.long(), KEY]

    def select(self, q: Tensor, layer: int = 1) -> RowSelection | None:
        """q [Hq, D] before RoPE, of the newest token."""
        cache, position = self.cache, torch.tensor([self.keys.shape[2] - 1])
        held = torch.full((LAYERS, 1, HEADS), self.keys.shape[2], dtype=torch.int32)
        width = -(-self.keys.shape[2] // PAGE_SIZE)
        pages = cache.table.device[self.slot, :, None, :, :width].contiguous()
        stored = StoredKeys(cache.pool.k, cache.pool.k_scales)
        rows = Rows(torch.tensor([self.slot]), pages, held, self.keys.shape[2], stored)
        queries = Queries(ROPE.apply(q[:, None], position).transpose(0, 1), position, ROPE)
        return self.method.select(layer, queries, rows, cache.states)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("length", "norms"), [(2, True), (63, False), (64, True), (129, False)])
def test_gate_keys_are_as_if_rebuilt_after_every_step(length: int, norms: bool, tmp_path: Path) -> None:
    gated = Gated(write_gates(tmp_path, make_weights(norms=norms)))
    other = gated.cache.admit(8)  # leaves its keys behind in pages that come next
    gated.cache.reserve(other, 64)
    gated.cache.release(other)
    gated.cache.states.of_pages(gated.method.state).fill_(1e3)
    gated.write(length)
    for _ in range(70):
        for layer in range(LAYERS):
            torch.testing.assert_close(
                gated.found_keys(layer), gated.expected_keys(layer), atol=2e-4, rtol=1e-4
            )  # fp32
        gated.write(1)


def test_the_best_pages_by_the_published_formula_are_read(tmp_path: Path) -> None:
    gated = Gated(write_gates(tmp_path, make_weights()), read=256)
    gated.write(600)
    q = torch.randn(HEADS * GROUP, SIZE)
    gate, keys = gated.method.layers[1], gated.expected_keys(1)
    selection = gated.select(q)
    assert selection is not None and selection.unit == PAGE_SIZE
    for head in range(HEADS):
        query = q[head * GROUP : (head + 1) * GROUP].reshape(-1) @ gate.q[head]
        query = query / (query.pow(2).mean() + 1e-6).sqrt() * gate.norm_q
        query = ROPE.apply(query[None, None], torch.tensor([599]))[0, 0]
        scores = keys[head, 1:9] @ query  # neither the first nor the newest page
        wanted = sorted({0, 9, *(1 + scores.topk(2).indices).tolist()})
        assert selection.ids[0, head, : selection.counts[0, head]].tolist() == wanted


def test_a_threshold_reads_what_the_softmax_of_earlier_pages_leaves_above_it(tmp_path: Path) -> None:
    path, q = write_gates(tmp_path, make_weights()), torch.randn(HEADS * GROUP, SIZE)
    counts = {}
    for threshold in (0.0, 0.1, 0.99):
        torch.manual_seed(1)
        gated = Gated(path, read=None, threshold=threshold)
        gated.write(600)
        selection = gated.select(q)
        assert selection is not None
        counts[threshold] = selection.counts
        for head in range(HEADS):
            ids = selection.ids[0, head, : selection.counts[0, head]].tolist()
            assert ids == sorted(set(ids)) and ids[0] == 0 and ids[-1] == 9
    assert (counts[0.0] == 10).all() and (counts[0.1] <= counts[0.0]).all()
    assert (counts[0.1] >= counts[0.99]).all() and (counts[0.99] <= 3).all()


def test_rows_within_the_budget_are_read_whole(tmp_path: Path) -> None:
    gated = Gated(write_gates(tmp_path, make_weights()), read=192, dense_layers=1)
    gated.write(192)
    assert gated.select(torch.randn(HEADS * GROUP, SIZE)) is None
    gated.write(1)
    assert gated.select(torch.randn(HEADS * GROUP, SIZE)) is not None
    assert gated.select(torch.randn(HEADS * GROUP, SIZE), layer=0) is None


def test_an_engine_answers_alike_alone_and_in_a_batch_and_as_full_where_all_is_read(tmp_path: Path) -> None:
    network = tiny_model()
    tiny_info = ModelInfo("tiny", 3, 6, 2, 16, 256, 8192)
    path = str(write_gates(tmp_path, make_weights(tiny_info)))
    decode = {"method": "seerattention_r", "gates": path}
    plans = [
        plan("full"),
        plan("narrow", decode={**decode, "read": 192}),
        plan("masked", kv={"policy": "streaming", "window": 256}, decode={**decode, "read": 192}),
        plan("wide", decode={**decode, "read": None, "threshold": 0.0}),
    ]
    prompt = make_prompt(420)
    alone = tiny_engine(*plans, network=network)
    expected = {name: alone.answer(prompt, greedy(8), name) for name in alone.plans}
    assert expected["wide"] == expected["full"]
    together = tiny_engine(*plans, network=network)
    for name in together.plans:
        together.submit(name, prompt, greedy(8), name)
    assert together.run() == expected
    together.assert_empty()


def test_policies_that_move_tokens_are_refused_with_the_reason(tmp_path: Path) -> None:
    decode = {"method": "seerattention_r", "gates": str(write_gates(tmp_path, make_weights()))}
    with pytest.raises(ConfigError, match="snapkv moves tokens .* cannot be rebuilt"):
        resolve_plan(plan("p", kv={"policy": "snapkv"}, decode=decode), MODEL)


def without(name: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in weights.items() if name not in key}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: without("layers.1", w), "gates of 1 layers; tiny has 2"),
        (
            lambda w: without("0.self_attn.attn_gate.attngate_linear_k", w),
            "layer 0 has attngate_linear_k .*None",
        ),
        (lambda w: {**w, "lm_head.weight": torch.ones(1)}, "'lm_head.weight', which is no weight"),
        (lambda w: {k: t[..., :4].contiguous() for k, t in w.items()}, r"needs \[2, 3, 8, 8\]"),
        (lambda w: {k: t * float("nan") for k, t in w.items()}, "no numbers"),
    ],
)
def test_files_that_do_not_fit_are_refused_with_the_reason(change: Any, words: str, tmp_path: Path) -> None:
    for name in ("gates.safetensors", "gates.pth"):
        path = write_gates(tmp_path, change(make_weights()), name)
        with pytest.raises(ValueError, match=words):
            SeerAttentionR(path).attach(MODEL, tmp_path, StateRegistry())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"read": 100}, r"read \(100\)"),
        ({"read": 128}, r"read \(128\)"),
        ({"threshold": 0.1}, "threshold .* needs read: null"),
        ({"read": None}, "one of the two"),
        ({"read": None, "threshold": 1.0}, r"threshold \(1.0\)"),
        ({"dense_layers": -1}, r"dense_layers \(-1\)"),
    ],
)
def test_nonsense_is_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SeerAttentionR(**options)
