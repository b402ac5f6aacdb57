"""What the Triton attention kernel promises, on the device this process has: run by test_triton_kernel.py.

Under TRITON_INTERPRET=1 the kernel runs on CPU tensors, one tile step in milliseconds; else it needs a GPU.
"""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from configs.features import NO_FEATURES, Features
from configs.quantised import INT8
from sparse.attention import Attended
from sparse.attention import attend as twin
from sparse.base import Chunk
from sparse.kernels.triton_attention import _longest_first, attend
from sparse.selection import ALL, ExactRows, Selection, dense, lists_from_mask, num_query_blocks
from tests.reference import attention, causal
from tests.sparse.builders import (
    PagedKeys,
    make_chunk,
    make_keys,
    make_qkv,
    random_selection,
    selected_mask,
)

# the interpreter of Triton 3.6, over loop bounds that a kernel has loaded
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
SCALE = 0.25
# absolute and relative, against fp64 over the same inputs: the kernel rounds softmax weights to its dtype
TOLERANCES = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}


def on_device(keys: PagedKeys) -> PagedKeys:
    tensors = (keys.k_pool, keys.v_pool, keys.pages, keys.k_scales, keys.v_scales)
    return PagedKeys(keys.num_tokens, *(None if x is None else x.to(DEVICE) for x in tensors))


def selection_on_device(selection: Selection) -> Selection:
    def move(value: object) -> object:
        if isinstance(value, Tensor):
            return value.to(DEVICE)
        if hasattr(value, "__dataclass_fields__"):
            fields = value.__dataclass_fields__
            return type(value)(**{name: move(getattr(value, name)) for name in fields})
        return value

    moved = move(selection)
    assert isinstance(moved, Selection)
    return moved


def run(
    q: Tensor, keys: PagedKeys, chunk: Chunk, selection: Selection, features: Features = NO_FEATURES
) -> Attended:
    got = attend(
        q.to(DEVICE),
        on_device(keys),
        chunk,
        selection_on_device(selection),
        scale=SCALE,
        features=features,
    )
    assert got.out.dtype == q.dtype and got.lse.dtype == torch.float32
    return Attended(got.out.cpu(), got.lse.cpu())


def expect(got: Attended, out: Tensor, lse: Tensor, dtype: torch.dtype = torch.float32) -> None:
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(got.out.double(), out.double(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(got.lse.double(), lse.double(), atol=2e-5, rtol=1e-5)  # weights sum up in fp32


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    mask = mask.repeat_interleave(q.shape[0] // mask.shape[0], 0)
    return attention(q.double(), k.double(), v.double(), mask, SCALE)


@pytest.mark.parametrize(
    ("start", "length", "num_heads", "num_kv_heads"),
    [
        (0, 1, 6, 2),
        (0, 64, 2, 2),
        (1, 17, 4, 1),
        (63, 65, 6, 2),
        (64, 129, 2, 2),
        (64, 129, 4, 1),
        (127, 2, 2, 1),
        (300, 64, 6, 2),
        (128, 128, 8, 1),
    ],
)
def test_dense_selection_is_causal_attention(
    start: int, length: int, num_heads: int, num_kv_heads: int
) -> None:
    q, k, v = make_qkv(start, length, num_heads, num_kv_heads)
    got = run(q, make_keys(k, v), make_chunk(start, length), dense(q.device))
    expect(got, *reference(q, k, v, causal(start, length)[None]))


@pytest.mark.parametrize("axis", ["one", "kv", "query"])
@pytest.mark.parametrize(
    ("start", "length", "num_heads", "num_kv_heads"),
    [(0, 63, 4, 4), (1, 64, 8, 2), (63, 130, 3, 1), (300, 65, 6, 2), (520, 17, 8, 1)],
)
def test_lists_mean_what_they_mean_to_the_twin(
    start: int, length: int, num_heads: int, num_kv_heads: int, axis: str
) -> None:
    q, k, v = make_qkv(start, length, num_heads, num_kv_heads)
    chunk, keys = make_chunk(start, length), make_keys(k, v)
    num_lists = {"one": 1, "kv": num_kv_heads, "query": num_heads}[axis]
    for query_block, unit in ((64, 1), (128, None)):
        selection = random_selection(chunk, num_lists, query_block, unit)
        want = twin(q, keys, chunk, selection, scale=SCALE)
        expect(run(q, keys, chunk, selection), want.out, want.lse)


@pytest.mark.parametrize("unit", [1, 8, 16])
@pytest.mark.parametrize("query_block", [64, 128])
def test_gathered_units_of_every_size_are_read(unit: int, query_block: int) -> None:
    q, k, v = make_qkv(300, 100, 6, 2)
    chunk = make_chunk(300, 100)
    selection = random_selection(chunk, 2, query_block, unit, density=0.2)
    got = run(q, make_keys(k, v), chunk, selection)
    expect(got, *reference(q, k, v, selected_mask(selection, chunk)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_head_sizes_and_dtypes(head_dim: int, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in make_qkv(100, 70, 4, 2, head_dim))
    chunk = make_chunk(100, 70)
    selection = random_selection(chunk, 2, 64, 8)
    got = run(q, make_keys(k, v), chunk, selection)
    expect(got, *reference(q, k, v, selected_mask(selection, chunk)), dtype)


def test_rows_that_select_nothing_are_zero_and_minus_infinity() -> None:
    q, k, v = make_qkv(64, 128, 4, 2)
    nothing = lists_from_mask(torch.zeros(2, 2, 3, dtype=torch.bool), 64)
    no_units = lists_from_mask(torch.zeros(2, 2, 24, dtype=torch.bool), 8)
    for selection in (Selection(64, nothing), Selection(64, nothing, no_units)):
        got = run(q, make_keys(k, v), make_chunk(64, 128), selection)
        assert torch.equal(got.out, torch.zeros_like(q))
        assert torch.equal(got.lse, torch.full_like(got.lse, float("-inf")))


def test_all_reads_every_causal_key_once_whatever_units_are_listed() -> None:
    q, k, v = make_qkv(130, 70, 4, 2)
    chunk = make_chunk(130, 70)
    selection = random_selection(chunk, 2, 64, 8)
    selection.pages.counts.fill_(ALL)
    got = run(q, make_keys(k, v), chunk, selection)
    expect(got, *reference(q, k, v, causal(130, 70)[None]))


@pytest.mark.parametrize("is_dense", [True, False])
def test_dropped_pages_are_absent(is_dense: bool) -> None:
    q, k, v = make_qkv(200, 60, 4, 2)
    chunk, keys = make_chunk(200, 60), make_keys(k, v)
    keys.pages[0, 1] = keys.pages[1, 3] = -1
    selection = dense(q.device) if is_dense else random_selection(chunk, 2, 64, 1, density=0.7)
    want = twin(q, keys, chunk, selection, scale=SCALE)
    expect(run(q, keys, chunk, selection), want.out, want.lse)


def test_pages_not_selected_are_never_read() -> None:
    q, k, v = make_qkv(256, 64, 4, 2)
    chunk = make_chunk(256, 64)
    pages = torch.zeros(2, 1, 5, dtype=torch.bool)
    pages[0, 0, [0, 4]] = pages[1, 0, [2, 4]] = True
    units = torch.zeros(2, 1, 40, dtype=torch.bool)
    units[0, 0, 9] = units[1, 0, 30] = True
    selection = Selection(64, lists_from_mask(pages, 64), lists_from_mask(units, 8))
    clean = run(q, make_keys(k, v), chunk, selection)
    read = selected_mask(selection, chunk).any(1)  # [Hkv, N]
    poisoned = run(
        q,
        make_keys(
            k.masked_fill(~read[..., None], float("nan")), v.masked_fill(~read[..., None], float("nan"))
        ),
        chunk,
        selection,
    )
    assert torch.equal(clean.out, poisoned.out) and torch.equal(clean.lse, poisoned.lse)


def test_a_later_key_changes_no_earlier_row() -> None:
    q, k, v = make_qkv(40, 100, 4, 2)
    chunk = make_chunk(40, 100)
    for selection in (dense(q.device), random_selection(chunk, 2, 128, density=1.0)):
        before = run(q, make_keys(k, v), chunk, selection)
        changed = [x.clone() for x in (k, v)]
        for x in changed:
            x[:, 90] += 100
        after = run(q, make_keys(*changed), chunk, selection)
        assert torch.equal(before.out[:, :50], after.out[:, :50])
        assert torch.equal(before.lse[:, :50], after.lse[:, :50])
        assert not torch.equal(before.out[:, 50:], after.out[:, 50:])


@pytest.mark.parametrize("num_exact", [1, 40, 100])
def test_exact_rows_are_taken_as_they_are(num_exact: int) -> None:
    q, k, v = make_qkv(50, 100, 4, 2)
    chunk = make_chunk(50, 100)
    listed = random_selection(chunk, 2)
    exact = ExactRows(torch.full((4, num_exact, 16), 7.0), torch.full((4, num_exact), 3.0))
    got = run(q, make_keys(k, v), chunk, Selection(64, listed.pages, exact=exact))
    out, lse = reference(q, k, v, selected_mask(listed, chunk))
    out[:, -num_exact:], lse[:, -num_exact:] = exact.out, exact.lse
    expect(got, out, lse)


def test_queries_may_have_any_strides() -> None:
    q, k, v = make_qkv(10, 70, 4, 2)
    chunk, keys = make_chunk(10, 70), make_keys(k, v)
    want = run(q, keys, chunk, dense(q.device))
    for strided in (q.transpose(0, 1).contiguous().transpose(0, 1), q.mT.contiguous().mT):
        got = run(strided, keys, chunk, dense(q.device))
        assert torch.equal(got.out, want.out) and torch.equal(got.lse, want.lse)


def test_output_lies_token_by_token_as_a_model_wants_it() -> None:
    q, k, v = make_qkv(10, 70, 4, 2)
    got = attend(q.to(DEVICE), on_device(make_keys(k, v)), make_chunk(10, 70), dense(DEVICE), scale=SCALE)
    assert got.out.shape == (4, 70, 16) and got.out.transpose(0, 1).is_contiguous()


def test_pages_past_two_billion_elements_are_read() -> None:
    q, k, v = make_qkv(0, 100, 1, 1, head_dim=128)
    num_pages = 2**31 // (64 * 128) + 8
    pool = torch.empty(
        num_pages, 64, 128, dtype=torch.float16, device=DEVICE
    )  # untouched memory costs nothing
    pages = torch.tensor([[num_pages - 1, num_pages - 3]], dtype=torch.int32, device=DEVICE)
    filled = torch.zeros(128, 128, dtype=torch.float16)
    filled[:100] = k[0].half()
    pool[pages[0].long()] = filled.view(2, 64, 128).to(DEVICE)
    keys = PagedKeys(100, pool, pool, pages)
    got = attend(q.half().to(DEVICE), keys, make_chunk(0, 100), dense(DEVICE), scale=SCALE)
    out, lse = reference(q.half(), k.half(), k.half(), causal(0, 100)[None])
    expect(Attended(got.out.cpu(), got.lse.cpu()), out, lse, torch.float16)


def test_the_longest_lists_start_first() -> None:
    chunk = make_chunk(100, 500)
    selection = random_selection(chunk, 4, 64, 8)
    selection.pages.counts[1, 2] = ALL
    assert selection.gathered is not None
    order = _longest_first(selection.pages, selection.gathered, 100, 64)
    blocks = torch.arange(num_query_blocks(100, 500, 64)) + 100 // 64 + 1
    work = selection.pages.counts * 64 + selection.gathered.counts * 8
    work = torch.where(selection.pages.counts == ALL, blocks * 64, work).flatten()
    assert sorted(order.tolist()) == list(range(work.shape[0]))
    assert work[order].tolist() == sorted(work.tolist(), reverse=True)


def featured_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, start: int, features: Features
) -> tuple[Tensor, Tensor]:
    """Attention with a window, a softcap and sinks by their formulae, fp64. Masks as in `reference`."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], 0) for x in (k, v))
    mask = mask.repeat_interleave(q.shape[0] // mask.shape[0], 0)
    logits = SCALE * q @ k.mT
    if features.softcap is not None:
        logits = features.softcap * torch.tanh(logits / features.softcap)
    if features.window is not None:
        distance = torch.arange(start, start + q.shape[1])[:, None] - torch.arange(k.shape[1])
        mask = mask & (distance < features.window)
    logits = logits.masked_fill(~mask, float("-inf"))
    if features.sinks is not None:
        sinks = features.sinks.double()[:, None, None].expand(-1, q.shape[1], 1)
        logits = torch.cat([logits, sinks], dim=-1)
        v = torch.cat([v, torch.zeros_like(v[:, :1])], dim=1)
    lse = logits.logsumexp(-1)
    return (logits - lse[..., None]).exp().nan_to_num(0) @ v, lse


FEATURES: dict[str, Callable[[], Features]] = {
    "a window inside a page": lambda: Features(window=20),
    "a window of pages": lambda: Features(window=128),
    "a softcap": lambda: Features(softcap=2.0),
    "sinks": lambda: Features(sinks=torch.tensor([-1.0, 0.0, 2.0, 5.0], device=DEVICE)),
    "all of them": lambda: Features(100, 3.0, torch.tensor([1.0, 0.0, 2.0, -5.0], device=DEVICE)),
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("is_dense", [True, False])
def test_features_follow_their_formulae(feature: str, is_dense: bool) -> None:
    q, k, v = make_qkv(250, 70, 4, 2)
    chunk, features = make_chunk(250, 70), FEATURES[feature]()
    selection = dense(q.device) if is_dense else random_selection(chunk, 4, 64, 8)
    mask = causal(250, 70)[None] if is_dense else selected_mask(selection, chunk)
    got = run(q, make_keys(k, v), chunk, selection, features)
    sinks = None if features.sinks is None else features.sinks.cpu()
    expected = Features(features.window, features.softcap, sinks)
    expect(got, *featured_attention(q, k, v, mask, 250, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_lists", "query_block", "unit"), [(None, 64, None), (2, 64, 8), (6, 128, 1)])
def test_codes_are_read_as_what_they_mean(
    dtype: torch.dtype, num_lists: int | None, query_block: int, unit: int | None
) -> None:
    """Scales of what was never written are NaN."""
    q, k, v = make_qkv(250, 70, 6, 2, 20)
    q, keys, chunk = q.to(dtype), make_keys(k, v).quantised(INT8), make_chunk(250, 70)
    selection, mask = dense(torch.device("cpu")), causal(250, 70)[None]
    if num_lists is not None:
        selection = random_selection(chunk, num_lists, query_block, unit)
        mask = selected_mask(selection, chunk)
    got = run(q, keys, chunk, selection)
    for found, wanted in zip((got.out, got.lse), reference(q, *keys.contiguous(), mask), strict=True):
        torch.testing.assert_close(found.double(), wanted, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])
