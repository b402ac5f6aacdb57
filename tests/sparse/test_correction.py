"""Mean correction: a page that is left out counts as 64 keys at its mean, in the same softmax."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.features import Features
from sparse.attention import attend
from sparse.correction import mean_correction
from sparse.flashprefill import FlashPrefill
from sparse.kernels import cpu
from sparse.masks import intersect
from sparse.mean_pool import MeanPool
from sparse.recall import raise_to_floor, read_cells, recall
from sparse.selection import Selection, lists_from_mask
from sparse.xattention import XAttention
from tests.sparse.builders import make_chunk, make_keys, make_qkv

PAGE, SCALE = 64, 0.25
KERNELS = [attend] + ([cpu.attend] if cpu.is_available() else [])


def random_pages(num_heads: int, start: int, length: int, seed: int = 0) -> Tensor:
    """Half of the pages before each block, and its own: bool [H, B, P]."""
    own = torch.arange(start // PAGE, -(-(start + length) // PAGE))[:, None]
    page = torch.arange(-(-(start + length) // PAGE))
    draw = torch.rand(num_heads, own.shape[0], page.shape[0], generator=torch.Generator().manual_seed(seed))
    return ((draw < 0.5) & (page < own)) | (page == own)


def by_formula(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, start: int, cap: float | None = None
) -> Tensor:
    """Every seventh row, in float64: listed keys as they are, others as 64 equal ones. [Hq, T / 7, D]."""
    group = q.shape[0] // k.shape[0]
    out = torch.zeros(q.shape, dtype=torch.float64)
    for head in range(q.shape[0]):
        keys, values = k[head // group].double(), v[head // group].double()
        listed = pages[head * pages.shape[0] // q.shape[0]]
        for row in range(0, q.shape[1], 7):
            position = start + row
            logits, read = [], []
            for page in range(position // PAGE + 1):
                here = slice(page * PAGE, min((page + 1) * PAGE, position + 1))
                if listed[position // PAGE - start // PAGE, page]:
                    logits.append(SCALE * keys[here] @ q[head, row].double())
                    read.append(values[here])
                elif page < position // PAGE:
                    mean = keys[here].mean(0)
                    logits.append((SCALE * mean @ q[head, row].double()).expand(PAGE))
                    read.append(values[here].mean(0).expand(PAGE, -1))
            scores = torch.cat(logits)
            if cap is not None:
                scores = cap * torch.tanh(scores / cap)
            out[head, row] = scores.softmax(0) @ torch.cat(read)
    return out[:, ::7]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("num_lists", [1, 2, 4])
@pytest.mark.parametrize(("start", "length"), [(0, 330), (128, 150), (100, 200)])
def test_a_page_left_out_counts_as_64_keys_at_its_mean(
    kernel: Any, num_lists: int, start: int, length: int
) -> None:
    q, k, v = make_qkv(start, length, 4, 2)
    chunk, keys, pages = make_chunk(start, length), make_keys(k, v), random_pages(num_lists, start, length)
    correction = mean_correction(pages, keys, chunk)
    selection = Selection(PAGE, lists_from_mask(pages, PAGE), correction=correction)
    found = kernel(q, keys, chunk, selection, scale=SCALE)
    torch.testing.assert_close(
        found.out[:, ::7].double(), by_formula(q, k, v, pages, start), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_softcaps_and_sinks_hold_for_means_too(kernel: Any) -> None:
    q, k, v = make_qkv(128, 70, 4, 2)
    chunk, keys, pages = make_chunk(128, 70), make_keys(k, v), random_pages(4, 128, 70)
    selection = Selection(PAGE, lists_from_mask(pages, PAGE), correction=mean_correction(pages, keys, chunk))
    capped = kernel(q, keys, chunk, selection, scale=SCALE, features=Features(softcap=2.0))
    wanted = by_formula(q, k, v, pages, 128, cap=2.0)
    torch.testing.assert_close(capped.out[:, ::7].double(), wanted, rtol=1e-4, atol=1e-5)
    plain = kernel(q, keys, chunk, selection, scale=SCALE)
    sinks = torch.tensor([0.0, 1.0, 2.0, 3.0])
    found = kernel(q, keys, chunk, selection, scale=SCALE, features=Features(sinks=sinks))
    share = torch.sigmoid(plain.lse - sinks[:, None])[..., None]  # what the sink leaves of each row
    torch.testing.assert_close(found.out, plain.out * share, rtol=1e-4, atol=1e-5)


def test_pages_of_equal_keys_lose_nothing() -> None:
    q, k, v = make_qkv(0, 320, 4, 2)
    k, v = (x.view(2, 5, PAGE, -1)[:, :, :1].expand(2, 5, PAGE, -1).flatten(1, 2) for x in (k, v))
    chunk, keys, pages = make_chunk(0, 320), make_keys(k, v), random_pages(4, 0, 320)
    selection = Selection(PAGE, lists_from_mask(pages, PAGE), correction=mean_correction(pages, keys, chunk))
    everything = lists_from_mask(torch.ones_like(pages).tril(), PAGE)
    exact = attend(q, keys, chunk, Selection(PAGE, everything), scale=SCALE)
    found = attend(q, keys, chunk, selection, scale=SCALE)
    torch.testing.assert_close(found.out, exact.out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.lse, exact.lse, rtol=1e-4, atol=1e-5)


def test_dropped_pages_count_for_nothing_whatever_they_hold() -> None:
    q, k, v = make_qkv(192, 64, 4, 2)
    chunk, keys, pages = make_chunk(192, 64), make_keys(k, v), random_pages(4, 192, 64)
    gone = keys.pages[:, 1].long()
    keys.k_pool[gone], keys.v_pool[gone] = float("nan"), float("nan")
    keys.pages[:, 1] = -1
    pages[:, :, 1] = False
    correction = mean_correction(pages, keys, chunk)
    assert not correction.left_out[:, :, 1].any()
    found = attend(
        q, keys, chunk, Selection(PAGE, lists_from_mask(pages, PAGE), correction=correction), scale=SCALE
    )
    assert found.out.isfinite().all()


def test_what_reads_everything_or_is_hidden_has_no_means() -> None:
    q, k, v = make_qkv(0, 320, 4, 2)
    chunk, keys = make_chunk(0, 320), make_keys(k, v)
    pages = random_pages(2, 0, 320)
    selection = Selection(PAGE, lists_from_mask(pages, PAGE), correction=mean_correction(pages, keys, chunk))
    exact = attend(
        q, keys, chunk, Selection(PAGE, lists_from_mask(torch.ones(1, 5, 5).tril().bool(), PAGE)), scale=SCALE
    )
    raised = raise_to_floor(selection, torch.tensor([[0.1], [0.9], [0.9], [0.9]]), 0.5)
    found = attend(q, keys, chunk, raised, scale=SCALE)
    torch.testing.assert_close(found.out[:2], exact.out[:2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found.out[2:], exact.out[2:], atol=1e-3)

    mask = random_pages(2, 0, 320, seed=1)
    masked = intersect(raised, mask, chunk)
    assert masked.correction is not None
    wanted = mask & ~pages & torch.tensor([False, True])[:, None, None]
    assert torch.equal(masked.correction.left_out, wanted & torch.ones(5, 5).tril(-1).bool())


@pytest.mark.parametrize(
    "method", [MeanPool(0.5), XAttention(threshold=0.5), FlashPrefill(alpha=1.0, window=64)]
)
def test_methods_offer_it_and_recall_judges_what_was_selected(method: Any) -> None:
    q, k, v = make_qkv(0, 640, 4, 2)
    chunk, keys = replace(make_chunk(0, 640), prompt_length=2000), make_keys(k, v)
    without = method.select(0, q, keys, chunk, scale=SCALE)
    selection = replace(method, correct_means=True).select(0, q, keys, chunk, scale=SCALE)
    assert without.correction is None and selection.correction is not None
    assert torch.equal(selection.pages.counts, without.pages.counts)
    found, bare = (recall(q, keys, chunk, each, scale=SCALE) for each in (selection, without))
    assert torch.equal(found, bare)
    heads = selection.pages.num_heads
    means = int(selection.correction.left_out.sum()) * PAGE * (4 // heads)
    assert int(read_cells(selection, chunk, 4)) == int(read_cells(without, chunk, 4)) + means > means > 0
    far = (
        attend(q, keys, chunk, selection, scale=SCALE).lse - attend(q, keys, chunk, without, scale=SCALE).lse
    )
    assert far.min() >= -1e-5 and far.max() > math.log(1.1)
