"""What the Triton decode kernel promises, on the device this process has: run by test_triton_kernels.py.

Under TRITON_INTERPRET=1 it runs on CPU tensors; else it needs a GPU.
"""

import math
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from configs.features import NO_FEATURES, Features
from configs.quantised import INT8, quantise
from kvcache.decode import RowSelection
from kvcache.decode import attend_rows as attend_rows_in_torch
from kvcache.kernels import triton_decode
from kvcache.kernels.triton_decode import attend_rows
from tests.kvcache.test_decode import make_rows
from tests.kvcache.test_row_selection import expected, poisoned, selection_of, some_units

# the interpreter of Triton 3.6, over loop bounds that a kernel has loaded
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
SCALE = 0.25
# absolute and relative, against fp64 over the same inputs: the kernel rounds softmax weights to its dtype
TOLERANCES = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
EDGES = [[0, 1], [63, 64], [65, 330]]  # tokens held by [sequence][KV head]

Rows = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def plain(rows: Rows, features: Features = NO_FEATURES) -> tuple[Tensor, Tensor]:
    """out and lse by the formulae, one row and one query head at a time, in fp64."""
    q, k_pool, v_pool, pages, held = rows
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=torch.float64)
    group = q.shape[1] // held.shape[1]
    for b in range(q.shape[0]):
        for head in range(q.shape[1]):
            length = int(held[b, head // group])
            read = slice(max(0, length - (features.window or length)), length)
            row = pages[b, head // group, : -(-length // 64)].long()
            k, v = (pool[row].flatten(0, 1)[read].double() for pool in (k_pool, v_pool))
            logits = SCALE * (k @ q[b, head].double())
            if features.softcap is not None:
                logits = features.softcap * torch.tanh(logits / features.softcap)
            if features.sinks is not None:
                logits = torch.cat([logits, features.sinks[head, None].double().cpu()])
                v = torch.cat([v, torch.zeros_like(q[0, :1], dtype=v.dtype)])
            if logits.numel():
                out[b, head], lse[b, head] = logits.softmax(0) @ v, logits.logsumexp(0)
    return out, lse


def run(
    rows: Rows, features: Features = NO_FEATURES, selection: RowSelection | None = None
) -> tuple[Tensor, Tensor]:
    q, *others = (x.to(DEVICE) for x in rows)
    if selection is not None:
        selection = RowSelection(selection.ids.to(DEVICE), selection.counts.to(DEVICE), selection.unit)
    lse = torch.full(q.shape[:2], float("nan"), device=DEVICE)
    longest = int(rows[4].max())
    out = attend_rows(
        q, *others, scale=SCALE, max_held=longest, features=features, selection=selection, lse=lse
    )
    assert out.dtype == q.dtype
    return out.cpu(), lse.cpu()


def expect(rows: Rows, features: Features = NO_FEATURES) -> tuple[Tensor, Tensor]:
    (out, lse), (wanted, wanted_lse) = run(rows, features), plain(rows, features)
    tolerance = TOLERANCES[out.dtype]
    torch.testing.assert_close(out.double(), wanted, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), wanted_lse, atol=1e-5, rtol=1e-5)  # summed in fp32
    return out, lse


def split_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device with many multiprocessors, down to single pages, and merged a few at a time."""
    monkeypatch.setattr(triton_decode, "num_processors", lambda device: 40)
    monkeypatch.setattr(triton_decode, "LEAST_PAGES", 1)
    monkeypatch.setattr(triton_decode, "MERGED_AT_ONCE", 4)


@pytest.mark.parametrize(("group", "is_split"), [(1, True), (3, False), (4, True), (8, False), (17, False)])
def test_rows_of_any_length_equal_a_plain_loop(
    group: int, is_split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_split:
        split_rows(monkeypatch)
    out, lse = expect(make_rows(EDGES, group, 16, poison=math.nan))
    assert out[0, :group].abs().max() == 0 and (lse[0, :group] == float("-inf")).all()  # the empty row


@pytest.mark.parametrize("is_split", [False, True])
def test_the_lse_is_optional(is_split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if is_split:
        split_rows(monkeypatch)
    rows = make_rows([[65, 130]], 3, 16)
    out = attend_rows(*(x.to(DEVICE) for x in rows), scale=SCALE, max_held=130)
    assert torch.equal(out.cpu(), run(rows)[0])


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [
        (64, torch.bfloat16),
        (80, torch.float16),
        (96, torch.bfloat16),
        (128, torch.float16),
        (256, torch.bfloat16),
    ],
)
def test_head_sizes_and_dtypes(head_dim: int, dtype: torch.dtype) -> None:
    q, k, v, *others = make_rows([[130, 0]], 3, head_dim, poison=math.nan)
    expect((q.to(dtype) * 0.3, k.to(dtype), v.to(dtype), *others))


FEATURES: dict[str, Callable[[], Features]] = {
    "a window inside a page": lambda: Features(window=20),
    "a window of pages": lambda: Features(window=300),
    "a softcap": lambda: Features(softcap=2.0),
    "sinks": lambda: Features(sinks=torch.tensor([-1.0, 0.0, 2.0, 5.0, 0.5, -3.0], device=DEVICE)),
    "all": lambda: Features(100, 3.0, torch.tensor([1.0, 0.0, 2.0, -5.0, 0.0, 9.0], device=DEVICE)),
}


@pytest.mark.parametrize(("feature", "is_split"), [("all", False), *((name, True) for name in FEATURES)])
def test_features_follow_their_formulae(
    feature: str, is_split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_split:
        split_rows(monkeypatch)
    expect(make_rows([[0, 330]], 3, 16, poison=math.nan), FEATURES[feature]())


@pytest.mark.parametrize(("unit", "dtype"), [(16, torch.float32), (64, torch.float32), (16, torch.bfloat16)])
@pytest.mark.parametrize("is_split", [False, True])
def test_exactly_the_named_units_are_read(
    unit: int, dtype: torch.dtype, is_split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_split:
        split_rows(monkeypatch)
    held = [[0, 1], [15, 16], [17, 63], [65, 330]]
    q, k, v, *others = make_rows(held, 3, 16, poison=math.nan)
    read = some_units(others[1], unit)
    features = Features(None, 2.0, torch.tensor([-1.0, 0.0, 2.0, 5.0, 0.5, -3.0], device=DEVICE))
    rows = poisoned((q, k, v, *others), read, unit)
    rows = (q.to(dtype), rows[1].to(dtype), rows[2].to(dtype), rows[3], rows[4])
    for own in (NO_FEATURES, features):
        found = run(rows, own, selection_of(read, unit))[0]
        wanted = expected(rows, read, unit, own, SCALE)
        torch.testing.assert_close(found.double(), wanted, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@pytest.mark.parametrize("unit", [16, 64])
@pytest.mark.parametrize("is_split", [False, True])
def test_naming_everything_equals_full_bit_for_bit(
    unit: int, is_split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_split:
        split_rows(monkeypatch)
    rows = make_rows(EDGES, 3, 16, poison=math.nan)
    units = -(-rows[4] // unit)
    everything = selection_of(torch.arange(int(units.max())) < units.unsqueeze(-1), unit)
    for found, full in zip(run(rows, selection=everything), run(rows), strict=True):
        assert torch.equal(found, full)


def test_parts_of_very_different_weight_are_merged_rightly(monkeypatch: pytest.MonkeyPatch) -> None:
    split_rows(monkeypatch)
    q, k, v, pages, held = make_rows([[640]], 3, 64)
    for place in range(10):  # the maximum rises with every page, to logits of several hundred
        k[pages[0, 0, place]] += place * q[0, 0]
    expect((q, k, v, pages, held))
    q = -q  # and falls
    expect((q, k, v, pages, held))


def test_a_long_row_is_split_by_what_it_holds_and_short_ones_are_not() -> None:
    most = triton_decode.MOST_SPLITS
    cpu = torch.device("cpu")
    assert triton_decode.num_splits(8, 64 * triton_decode.LEAST_PAGES, cpu) == 1
    assert triton_decode.num_splits(1, 1 << 20, cpu) == triton_decode.PROGRAMS_PER_PROCESSOR
    assert triton_decode.num_splits(1000, 1 << 20, cpu) == 1
    assert most * triton_decode.LEAST_PAGES * 64 <= 1 << 17  # 128K tokens can be shared by that many


def test_strided_queries_and_tables_are_read_as_they_are() -> None:
    q, k, v, pages, held = make_rows([[63, 64], [65, 3]], 3, 16)
    expected = run((q, k, v, pages, held))[0]
    wide = torch.cat([pages, pages], dim=2)[:, :, : pages.shape[2]]
    for strided in (q.transpose(0, 1).contiguous().transpose(0, 1), q.mT.contiguous().mT):
        assert not strided.is_contiguous() and not wide.is_contiguous()
        assert torch.equal(run((strided, k, v, wide, held))[0], expected)


def test_pages_past_two_billion_elements_are_read() -> None:
    num_pages = 2**31 // (64 * 128) + 8
    # untouched memory costs nothing
    pool = torch.empty(num_pages, 64, 128, dtype=torch.float16, device=DEVICE)
    pages = torch.tensor([[[num_pages - 1, num_pages - 3]]], dtype=torch.int32)
    torch.manual_seed(0)
    tokens, q = torch.randn(2, 64, 128).half(), torch.randn(1, 2, 128).half()
    pool[pages[0, 0].long()] = tokens.to(DEVICE)
    held = torch.tensor([[100]], dtype=torch.int32)
    out = attend_rows(q.to(DEVICE), pool, pool, pages.to(DEVICE), held.to(DEVICE), scale=SCALE, max_held=100)
    small = (q, tokens, tokens, torch.tensor([[[0, 1]]], dtype=torch.int32), held)
    torch.testing.assert_close(out.cpu().double(), plain(small)[0], atol=3e-3, rtol=3e-3)  # fp16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unit", [None, 16])
def test_codes_are_read_as_what_they_mean(dtype: torch.dtype, unit: int | None) -> None:
    """Scales of what no row holds are NaN."""
    q, k, v, pages, held = make_rows(EDGES, 3, 20, poison=math.nan)
    (k, k_scales), (v, v_scales) = quantise(k, INT8), quantise(v, INT8)
    rows = (q.to(dtype), k, v, pages, held)
    selection = None if unit is None else selection_of(some_units(held, unit), unit)
    wanted = attend_rows_in_torch(
        *rows, scale=SCALE, max_held=330, selection=selection, k_scales=k_scales, v_scales=v_scales
    )
    if selection is not None:
        selection = RowSelection(selection.ids.to(DEVICE), selection.counts.to(DEVICE), selection.unit)
    found = attend_rows(
        *(x.to(DEVICE) for x in rows),
        scale=SCALE,
        max_held=330,
        selection=selection,
        k_scales=k_scales.to(DEVICE),
        v_scales=v_scales.to(DEVICE),
    )
    torch.testing.assert_close(found.cpu(), wanted, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])
