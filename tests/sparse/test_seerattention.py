"""SeerAttention reads what the published gate gives weight to; files that do not fit are refused."""

import math
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from configs.errors import ConfigError
from engine.plans import resolve_plan
from engine.rope import Rotation
from kvcache.state import StateRegistry
from sparse.attention import attend
from sparse.base import Chunk
from sparse.page_scores import pooled_keys
from sparse.recall import causal_cells, read_cells
from sparse.seerattention import SeerAttention
from sparse.selection import dense
from tests.sparse.builders import PagedKeys, make_chunk, make_keys, make_model, make_qkv, selected_mask
from tests.tiny import plan

SCALE = 0.25
PAGE, D = 64, 16
ROPE = Rotation(1e4 ** (-torch.arange(0, D, 2) / D), 1.0, interleaved=False)


def make_weights(
    double: bool, num_layers: int = 2, num_heads: int = 4, num_kv_heads: int = 2
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    weights = {}
    for layer in range(num_layers):
        where = f"model.layers.{layer}.self_attn.attn_gate.mask_linear_"
        heads = num_kv_heads if double else num_heads
        weights[f"{where}k.weight"] = torch.randn(heads, 3 * D, D, generator=g)
        if double:
            weights[f"{where}q.weight"] = torch.randn(num_heads, D, D, generator=g)
    return weights


def write(folder: Path, weights: dict[str, Tensor], name: str = "gates.safetensors") -> Path:
    path = folder / name
    if path.suffix == ".pth":
        torch.save(weights, path)
    else:
        save_file(weights, path)
    return path


def make_method(path: Path, **options: Any) -> SeerAttention:
    method = SeerAttention(path, **options)
    method.attach(make_model(), path.parent, StateRegistry())
    return method


@dataclass
class Prompt:
    """A prompt before and after RoPE."""

    q: Tensor  # [Hq, N, D] before
    k: Tensor  # [Hkv, N, D] before
    v: Tensor

    def select(self, method: SeerAttention, start: int, end: int, layer: int = 1) -> Any:
        """The selection of rows [start, end), and its chunk."""
        positions = torch.arange(self.k.shape[1])
        q, k = ROPE.apply(self.q, positions), ROPE.apply(self.k, positions)
        num_tokens = k.shape[1]
        chunk = Chunk(
            *(start, end - start, num_tokens, num_tokens + 1, 0),
            pre_rope=lambda: (self.q[:, start:end], self.k[:, start:end]),
            rotation=ROPE,
        )
        keys = make_keys(k[:, :end], self.v[:, :end])
        return method.select(layer, q[:, start:end], keys, chunk, scale=SCALE), chunk, keys


def make_prompt(num_tokens: int) -> Prompt:
    return Prompt(*make_qkv(0, num_tokens, 4, 2))


def rotated(x: Tensor, position: int) -> Tensor:
    """One vector [D], pair by pair: element i goes with element i + D / 2."""
    out = x.clone()
    for i in range(D // 2):
        angle = position * 1e4 ** (-2 * i / D)
        a, b = x[i], x[i + D // 2]
        out[i], out[i + D // 2] = (
            a * math.cos(angle) - b * math.sin(angle),
            b * math.cos(angle) + a * math.sin(angle),
        )
    return out


def published_gate(
    prompt: Prompt, weights: dict[str, Tensor], layer: int, head: int, block: int
) -> list[float]:
    """The softmax of one head's gate for one block of queries, over the pages up to it; in float64."""
    where = f"model.layers.{layer}.self_attn.attn_gate.mask_linear_"
    w_k, w_q = weights[f"{where}k.weight"].double(), weights.get(f"{where}q.weight")
    kv_head = head // 2
    query = prompt.q[head, block * PAGE : (block + 1) * PAGE].double().mean(0)
    if w_q is not None:
        query = query @ w_q[head].double()
    query = rotated(query, block * PAGE)
    logits = []
    for page in range(block + 1):
        keys = prompt.k[kv_head, page * PAGE : (page + 1) * PAGE].double()
        pooled = torch.cat((keys.amax(0), keys.amin(0), keys.mean(0)))
        key = pooled @ w_k[head if w_q is None else kv_head]
        logits.append(query @ rotated(key, page * PAGE) / D**0.5)
    return torch.stack(logits).softmax(0).tolist()


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("num_tokens", [640, 650, 703])
def test_pages_are_those_above_the_threshold_of_the_published_gate(
    tmp_path: Path, double: bool, suffix: str, num_tokens: int
) -> None:
    weights, prompt = make_weights(double), make_prompt(num_tokens)
    method = make_method(write(tmp_path, weights, "gates" + suffix), threshold=0.02, last_rows_dense=0)
    selection, chunk, _ = prompt.select(method, 0, num_tokens)
    mask = selected_mask(selection, chunk)
    assert mask.float().mean() < 0.4
    for head in range(4):
        for block in (0, 3, 9, (num_tokens - 1) // PAGE):
            gate = published_gate(prompt, weights, 1, head, block)
            wanted = {page for page, share in enumerate(gate) if share > 0.02} | {0, block}
            row = mask[head, min(num_tokens, (block + 1) * PAGE) - 1]
            assert {int(key) // PAGE for key in row.nonzero()} == wanted, (head, block)


@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_a_ratio_reads_the_best_of_the_pages_up_to_each_row(tmp_path: Path, ratio: float) -> None:
    weights, prompt = make_weights(double=True), make_prompt(640)
    method = make_method(write(tmp_path, weights), threshold=None, ratio=ratio, last_rows_dense=0)
    selection, chunk, _ = prompt.select(method, 0, 640)
    mask = selected_mask(selection, chunk)
    for block in range(10):
        gate = published_gate(prompt, weights, 1, 3, block)
        best = sorted(range(block + 1), key=lambda page: -gate[page])[: math.ceil(ratio * (block + 1))]
        row = mask[3, (block + 1) * PAGE - 1]
        assert {int(key) // PAGE for key in row.nonzero()} == {*best, 0, block}


@pytest.mark.parametrize("cuts", [(0, 64, 700), (0, 256, 320, 700)])
def test_the_choice_does_not_depend_on_where_chunks_end(tmp_path: Path, cuts: tuple[int, ...]) -> None:
    prompt = make_prompt(700)
    method = make_method(write(tmp_path, make_weights(double=False)), threshold=0.05)
    whole, chunk, _ = prompt.select(method, 0, 700)
    expected = selected_mask(whole, chunk)
    assert expected[:, 570:].all(1).any() and whole.estimator_rows == 700 - 570 // 64 * 64
    for start, end in zip(cuts, cuts[1:], strict=False):
        selection, chunk, _ = prompt.select(method, start, end)
        assert torch.equal(selected_mask(selection, chunk), expected[:, start:end, :end])


def test_options_that_cover_everything_equal_dense_and_others_read_the_past_alone(tmp_path: Path) -> None:
    prompt = make_prompt(300)
    path = write(tmp_path, make_weights(double=True))
    for options in ({"threshold": 0.0}, {"threshold": None, "ratio": 1.0}):
        selection, chunk, keys = prompt.select(make_method(path, **options, last_rows_dense=0), 64, 300)
        assert int(read_cells(selection, chunk, 4)) == causal_cells(chunk, 4)
        q = ROPE.apply(prompt.q[:, 64:300], torch.arange(64, 300))
        got = attend(q, keys, chunk, selection, scale=SCALE)
        full = attend(q, keys, chunk, dense(q.device), scale=SCALE)
        torch.testing.assert_close(got.out, full.out, atol=1e-5, rtol=0)  # fp32


def test_even_weights_over_many_pages_leave_no_row_without_keys(tmp_path: Path) -> None:
    """1 / 4096 for each page is below the published 5e-4: nothing but what is forced is read."""
    weights = {name: 0 * weight for name, weight in make_weights(double=False).items()}
    prompt = make_prompt(64 * 40)
    method = make_method(write(tmp_path, weights), threshold=0.03, last_rows_dense=0)
    selection, _, _ = prompt.select(method, 0, 64 * 40)
    assert selection.pages.counts[:, 38:].tolist() == [[2, 2]] * 4


def test_pooling_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    k = torch.randn(2, 5, 64, D, generator=torch.Generator().manual_seed(0))
    whole = pooled_keys(k, 300, ROPE)
    monkeypatch.setattr("sparse.page_scores.SCORE_ELEMS", 2 * 2 * 64 * D)  # two pages at once
    assert torch.equal(pooled_keys(k, 300, ROPE), whole)


def test_rotating_and_back_changes_nothing() -> None:
    x = make_qkv(0, 50, 2, 2)[0]
    for rotation in (ROPE, replace(ROPE, scaling=1.2), replace(ROPE, interleaved=True)):
        back = rotation.undo(rotation.apply(x, torch.arange(50)), torch.arange(50))
        torch.testing.assert_close(back, x, atol=1e-5, rtol=1e-5)  # fp32
    torch.testing.assert_close(ROPE.apply(x, torch.arange(50))[1, 7], rotated(x[1, 7], 7))


class Trap:
    """Writes a file when a pickle of it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "gates.pth").write_bytes(pickle.dumps({"x": Trap(tmp_path / "sprung")}, protocol=2))
    torch.save({"x": Trap(tmp_path / "sprung")}, tmp_path / "zipped.pth")
    for name in ("gates.pth", "zipped.pth"):
        with pytest.raises(ValueError, match=f"gates: cannot read .*{name}"):
            make_method(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [b"", b"no weights", b"\x80\x02]q\x00.", b"PK\x03\x04 cut short"])
@pytest.mark.parametrize("name", ["gates.pth", "gates.safetensors"])
def test_what_is_no_file_of_weights_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"gates: .*{name}"):
        make_method(tmp_path / name)


def broken(weights: dict[str, Tensor], what: str) -> dict[str, Any]:
    first = "model.layers.0.self_attn.attn_gate.mask_linear_"
    match what:
        case "layer":
            return {name: weight for name, weight in weights.items() if ".0." not in name}
        case "query":
            return {name: weight for name, weight in weights.items() if name != first + "q.weight"}
        case "key":
            return {name: weight for name, weight in weights.items() if name != first + "k.weight"}
        case "shape":
            return {**weights, first + "k.weight": torch.zeros(2, 3 * D, 2 * D)}
        case "name":
            return {**weights, "model.embed_tokens.weight": torch.zeros(2)}
        case "nan":
            return {**weights, first + "k.weight": weights[first + "k.weight"] * float("nan")}
    raise AssertionError(what)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("layer", ["1 layers", "tiny has 2"]),
        ("query", ["mask_linear_q for 1 of 2 layers"]),
        ("key", ["layer 0", "mask_linear_k", "None", "[2, 48, 16]"]),
        ("shape", ["layer 0", "[2, 48, 32]", "[2, 48, 16]"]),
        ("name", ["'model.embed_tokens.weight'", "no weight of a gate"]),
        ("nan", ["layer 0", "no numbers"]),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_what_would(
    tmp_path: Path, what: str, words: list[str]
) -> None:
    path = write(tmp_path, broken(make_weights(double=True), what))
    prefill = {"method": "seerattention", "gates": str(path)}
    with pytest.raises(ConfigError) as refusal:
        resolve_plan(plan("mine", prefill=prefill), make_model())
    for word in ["mine.yaml: prefill.gates: ", *words]:
        assert word in str(refusal.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["gates", "needs a file"]),
        ({"gates": "none.pth"}, ["gates", "none.pth"]),
        ({"gates": "gates.bin"}, ["gates", ".pth or .safetensors"]),
        ({"gates": "x.pth", "ratio": 0.5}, ["ratio (0.5)", "threshold: null"]),
        ({"gates": "x.pth", "threshold": 1.0}, ["threshold (1.0)"]),
        ({"gates": "x.pth", "threshold": None, "ratio": 0.0}, ["ratio (0.0)"]),
        ({"gates": "x.pth", "last_rows_dense": -1}, ["last_rows_dense (-1)"]),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        resolve_plan(plan("mine", prefill={"method": "seerattention", **options}), make_model())
    for word in ["mine.yaml: prefill.", *words]:
        assert word in str(refusal.value)


def test_selecting_never_waits_for_the_device(tmp_path: Path) -> None:
    """Meta tensors have no values: whatever would bring one to the host raises."""
    method = make_method(write(tmp_path, make_weights(double=True)))
    q, k, _ = (x.to("meta") for x in make_qkv(128, 200, 4, 2))
    pool = torch.empty(20, PAGE, D, device="meta")
    keys = PagedKeys(328, pool, pool, torch.empty(2, 8, dtype=torch.int32, device="meta"))
    chunk = replace(
        make_chunk(128, 200),
        pre_rope=lambda: (q, k),
        rotation=replace(ROPE, frequencies=ROPE.frequencies.to("meta")),
    )
    selection = method.select(0, q, keys, chunk, scale=SCALE)
    assert selection.pages.counts.is_meta and read_cells(selection, chunk, 4).is_meta
