"""What every method that scores pages by query block owes: causal lists, dense when all is asked for, and
the same choice however a prompt is cut."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import ConfigError
from engine.plans import resolve_plan
from kvcache.state import StateRegistry
from sparse.attention import attend
from sparse.base import Chunk, PrefillMethod
from sparse.methods import PREFILL_METHODS
from sparse.page_rules import forced_pages, pages_with_mass
from sparse.recall import causal_cells, read_cells, recall, recall_rows
from sparse.selection import dense
from tests.reference import attention, causal
from tests.sparse.builders import PagedKeys, make_chunk, make_keys, make_model, make_qkv, selected_mask
from tests.tiny import plan

SCALE = 0.25
SPARSE: dict[str, dict[str, Any]] = {  # settings under which even short prompts are sparse
    "mean_pool": {"threshold": 0.5},
    "xattention": {"threshold": 0.5},
    "flashprefill": {"alpha": 1.0, "relative_to": "all", "sink": 64, "window": 64, "last_rows_dense": 0},
    "flexprefill": {"threshold": 0.3, "min_budget": 64},
    "hip": {"widths": [16, 8], "keep": [64, 64], "strides": [4, 1], "window": 64, "last_rows_dense": 0},
}
EVERYTHING: dict[str, dict[str, Any]] = {
    "mean_pool": {"threshold": 1.0},
    "xattention": {"threshold": 1.0},
    "flashprefill": {"alpha": 0.0, "last_rows_dense": 0},
    "flexprefill": {"threshold": 1.0},
    "hip": {"widths": [8], "keep": [4096], "strides": [1], "last_rows_dense": 0},
}
GRID_FREE = [name for name in SPARSE if not PREFILL_METHODS[name]().grid]


def make(name: str, **options: Any) -> PrefillMethod:
    method = PREFILL_METHODS[name](**options)
    method.attach(make_model(), Path("."), StateRegistry())
    return method


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize(
    ("start", "length"), [(0, 1), (0, 63), (0, 64), (0, 65), (1, 64), (64, 65), (1000, 1), (1000, 300)]
)
@pytest.mark.parametrize("heads", [(4, 2), (3, 1)])
def test_lists_are_causal_and_hold_the_rows_own_page_and_the_first(
    name: str, start: int, length: int, heads: tuple[int, int]
) -> None:
    q, k, v = make_qkv(start, length, *heads)
    chunk, keys = make_chunk(start, length), make_keys(k, v)
    selection = make(name, **SPARSE[name]).select(0, q, keys, chunk, scale=SCALE)
    if not selection.is_dense:
        assert selection.pages.num_heads in (1, *heads)
        for head in range(selection.pages.num_heads):
            for block in range(selection.pages.counts.shape[1]):
                at, count = int(selection.pages.starts[head, block]), int(selection.pages.counts[head, block])
                if count == -1:
                    continue
                own = start // 64 + block
                pages = selection.pages.indices[at : at + count].tolist()
                assert pages == sorted(set(pages)) and pages[-1] == own and pages[0] == 0
                if selection.gathered is not None:
                    units = selection.gathered
                    at, count = int(units.starts[head, block]), int(units.counts[head, block])
                    ids = units.indices[at : at + count].tolist()
                    in_page = {i * units.unit // 64 for i in ids}
                    assert ids == sorted(set(ids)) and all(page < own for page in in_page)
                    assert not in_page & set(pages), "no key is read twice"
        mask = selected_mask(selection, chunk)
        mask = mask.repeat_interleave(heads[0] // mask.shape[0], 0)
        got = attend(q, keys, chunk, selection, scale=SCALE)
        out, _ = attention(q.double(), k.double(), v.double(), mask, SCALE)
        exact = 0 if selection.exact is None else selection.exact.lse.shape[1]
        rows = slice(0, length - exact)
        torch.testing.assert_close(got.out.double()[:, rows], out[:, rows], atol=1e-5, rtol=1e-5)  # fp32


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize(("start", "length"), [(0, 65), (1, 300), (64, 65), (1000, 300)])
def test_options_that_cover_everything_equal_dense(name: str, start: int, length: int) -> None:
    q, k, v = make_qkv(start, length, 4, 2)
    chunk, keys = make_chunk(start, length), make_keys(k, v)
    selection = make(name, **EVERYTHING[name]).select(0, q, keys, chunk, scale=SCALE)
    assert not selection.is_dense, "by its lists, not by a short cut"
    assert int(read_cells(selection, chunk, 4)) == causal_cells(chunk, 4)
    got = attend(q, keys, chunk, replace(selection, exact=None), scale=SCALE)
    full = attend(q, keys, chunk, dense(q.device), scale=SCALE)
    torch.testing.assert_close(got.out, full.out, atol=1e-5, rtol=0)  # fp32


@pytest.mark.parametrize("name", GRID_FREE)
def test_a_page_that_a_block_looks_at_is_read_and_most_others_are_not(name: str) -> None:
    """All rows of one block ask for what the keys of page 9 have."""
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(4, 2048, 32, generator=g), torch.randn(2, 2048, 32, generator=g)
    wanted = torch.randn(32, generator=g)
    q[:, 25 * 64 : 26 * 64] = wanted
    k[:, 9 * 64 : 10 * 64] += 2 * wanted
    chunk, keys = make_chunk(0, 2048), make_keys(k, torch.randn(2, 2048, 32, generator=g))
    method = make(name, **SPARSE[name])
    selection = method.select(0, q, keys, chunk, scale=SCALE)
    mask = selected_mask(selection, chunk)
    assert mask[:, 25 * 64 : 26 * 64, 9 * 64 : 10 * 64].float().mean() > 0.9
    assert mask[:, 25 * 64 : 26 * 64].sum() < 0.25 * mask.shape[0] * 64 * 25 * 64
    recalled = recall(q, keys, chunk, selection, scale=SCALE)
    in_block = recall_rows(chunk, selection) // 64 == 25
    assert not in_block.any() or recalled[:, in_block].min() > 0.9


@pytest.mark.parametrize("name", GRID_FREE)
@pytest.mark.parametrize("cuts", [(0, 64, 900), (0, 128, 192, 900), (0, 832, 900)])
def test_the_choice_does_not_depend_on_where_chunks_end(name: str, cuts: tuple[int, ...]) -> None:
    num_tokens = cuts[-1]
    q, k, v = make_qkv(0, num_tokens, 4, 2)
    method = make(name, **(SPARSE[name] | {"last_rows_dense": 70}))
    whole = method.select(0, q, make_keys(k, v), make_chunk(0, num_tokens), scale=SCALE)
    expected = selected_mask(whole, make_chunk(0, num_tokens))
    assert expected.float().mean() < 0.45, "dense would be a half"
    for start, end in zip(cuts, cuts[1:], strict=False):
        chunk = Chunk(start, end - start, num_tokens, num_tokens + 1, slot=0)
        keys = make_keys(k[:, :end], v[:, :end])
        selection = method.select(0, q[:, start:end], keys, chunk, scale=SCALE)
        got = causal(start, end - start) if selection.is_dense else selected_mask(selection, chunk)
        assert torch.equal(got.expand(expected.shape[0], -1, -1), expected[:, start:end, :end])


@pytest.mark.parametrize("name", GRID_FREE)
@pytest.mark.parametrize("rows", [1, 64, 100, 10_000])
def test_the_last_rows_of_a_prompt_may_read_everything(name: str, rows: int) -> None:
    q, k, v = make_qkv(64, 300, 4, 2)
    keys = make_keys(k, v)
    method = make(name, **(SPARSE[name] | {"last_rows_dense": rows}))
    without = make(name, **(SPARSE[name] | {"last_rows_dense": 0}))
    ending = make_chunk(64, 300)
    selection = method.select(0, q, keys, ending, scale=SCALE)
    assert min(rows, 300) <= selection.estimator_rows < rows + 64 or rows == 10_000
    first = 300 - selection.estimator_rows
    if selection.is_dense:
        assert first == 0 and rows == 10_000
    else:
        mask, sparse = (
            selected_mask(s, ending) for s in (selection, without.select(0, q, keys, ending, scale=SCALE))
        )
        assert mask[:, first:].sum() == mask.shape[0] * sum(range(64 + first + 1, 365))
        assert torch.equal(mask[:, :first], sparse[:, :first])
    earlier = replace(ending, prompt_length=20_000)  # this chunk does not end the prompt
    again = method.select(0, q, keys, earlier, scale=SCALE)
    assert again.estimator_rows == 0 and not (again.pages.counts == -1).any()


@pytest.mark.parametrize("name", SPARSE)
def test_dropped_pages_and_what_lies_behind_the_prompt_are_never_looked_at(name: str) -> None:
    """Both hold NaN here; page 3 is dropped of one row, and could only spoil the choice."""
    q, k, v = make_qkv(500, 300, 4, 2)
    keys = make_keys(k, v)
    keys.k_pool[keys.pages[1, 3].long()] = float("nan")
    keys.pages[1, 3] = -1
    chunk = make_chunk(500, 300)
    selection = make(name, **SPARSE[name]).select(0, q, keys, chunk, scale=SCALE)
    got = attend(q, keys, chunk, selection, scale=SCALE)
    assert got.out.isfinite().all()
    if selection.pages.num_heads > 1:
        half = selection.pages.num_heads // 2
        listed = selected_mask(replace(selection, exact=None), chunk)
        assert not listed[half:, :, 192:256].any()
        assert listed[:, :, :64].all() and listed.sum() > 0


@pytest.mark.parametrize("name", SPARSE)
def test_selecting_never_waits_for_the_device(name: str) -> None:
    """Meta tensors have no values: whatever would bring one to the host raises."""
    q, k, v = (x.to("meta") for x in make_qkv(128, 200, 4, 2))
    pool = torch.empty(20, 64, 16, device="meta")
    keys = PagedKeys(328, pool, pool, torch.empty(2, 8, dtype=torch.int32, device="meta"))
    chunk = make_chunk(128, 200)
    selection = make(name, **SPARSE[name]).select(0, q, keys, chunk, scale=SCALE)
    assert selection.pages.counts.is_meta and read_cells(selection, chunk, 4).is_meta


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SPARSE)
def test_half_precision_is_served(name: str, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(128, 200, 4, 2)
    chunk = make_chunk(128, 200)
    method = make(name, **SPARSE[name])
    exact = selected_mask(method.select(0, q, make_keys(k, v), chunk, scale=SCALE), chunk)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    rounded = selected_mask(method.select(0, q, make_keys(k, v), chunk, scale=SCALE), chunk)
    assert (exact == rounded).float().mean() > 0.9, "rounding moves what is near the line, no more"


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("mean_pool", {"threshold": 0.0}, ["threshold (0.0)", "above 0"]),
        ("mean_pool", {"threshold": 1.5}, ["threshold (1.5)", "at most 1"]),
        ("mean_pool", {"top_k": -1}, ["top_k (-1)", "at least 0"]),
        ("mean_pool", {"window": 0}, ["window (0)", "at least 1"]),
        ("xattention", {"stride": 5}, ["stride (5)", "4, 8, 16, 32"]),
        ("xattention", {"threshold": -0.1}, ["threshold (-0.1)"]),
        ("xattention", {"sink": -1}, ["sink (-1)", "at least 0"]),
        ("flashprefill", {"alpha": 1.1}, ["alpha (1.1)", "0 to 1"]),
        ("flashprefill", {"relative_to": "best"}, ["relative_to ('best')", "all or unforced"]),
        ("flashprefill", {"last_rows_dense": -1}, ["last_rows_dense (-1)"]),
        ("flashprefill", {"window": 0}, ["window (0)"]),
        ("flexprefill", {"threshold": 2.0}, ["threshold (2.0)"]),
        ("flexprefill", {"distance": -0.5}, ["distance (-0.5)", "0 to 1"]),
        ("flexprefill", {"min_budget": 0}, ["min_budget (0)"]),
        ("flexprefill", {"max_budget": 64}, ["max_budget (64)", "min_budget (1024)"]),
        ("flexprefill", {"last_q": 65}, ["last_q (65)", "1 to 64"]),
        ("hip", {"widths": [64, 16, "8"]}, ["widths"]),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(
    name: str, options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as refusal:
        resolve_plan(plan("mine", prefill={"method": name, **options}), make_model())
    for word in ["mine.yaml: prefill.", *words]:
        assert word in str(refusal.value)


def test_the_fewest_pages_that_hold_a_share_are_kept() -> None:
    mass = torch.tensor([[[1.0, 4.0, 0.0, 3.0, 1.0, 1.0]]])  # 10 in all; pages 0 and 5 are forced
    forced = torch.tensor([[True, False, False, False, False, True]])
    allowed = torch.ones(1, 6, dtype=torch.bool)

    def kept(share: float, most: int | None = None) -> list[int]:
        return pages_with_mass(mass, forced, allowed, share, most)[0, 0].nonzero()[:, 0].tolist()

    assert kept(0.1) == kept(0.2) == [0, 5], "what is forced counts"
    assert kept(0.21) == kept(0.6) == [0, 1, 5]
    assert kept(0.61) == kept(0.9) == [0, 1, 3, 5]
    assert kept(0.95) == [0, 1, 3, 4, 5], "a page that holds nothing is never needed"
    assert kept(1.0) == [0, 1, 2, 3, 4, 5], "but everything is everything"
    assert kept(1.0, most=2) == kept(0.95, most=2) == [0, 1, 3, 5]
    allowed[0, 1] = False
    assert kept(0.9) == [0, 3, 4, 5], "what is not allowed neither counts nor stays"


@pytest.mark.parametrize("window", [1, 2, 65, 66, 200])
def test_the_window_reaches_every_key_of_every_row(window: int) -> None:
    pages = forced_pages(10, window, torch.arange(6), 6)
    for block in range(6):
        first, last = max(0, 64 * block - window + 1), 64 * block + 63
        nearest = {key // 64 for key in range(first, last + 1)}
        assert set(pages[block].nonzero()[:, 0].tolist()) == nearest | {0}
