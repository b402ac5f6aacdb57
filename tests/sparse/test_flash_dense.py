"""Dense chunks by flash-attn. A stand-in, written as its documentation says, is what is called."""

from typing import Any

import pytest
import torch
from torch import Tensor

from configs.features import Features
from configs.model import PAGE_SIZE
from sparse.attention import Attended, attend
from sparse.kernels.flash_dense import FlashDense
from sparse.selection import dense
from tests.sparse.builders import make_chunk, make_keys, make_qkv, random_selection


class Flash:
    """flash_attn_func: [B, T, H, D] in, causal aligned to the last key, a window of keys beside one's own."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool,
        window_size: tuple[int, int], softcap: float, return_attn_probs: bool,
    ) -> tuple[Tensor, Tensor, None]:  # fmt: skip
        assert causal and return_attn_probs and q.dtype in (torch.float16, torch.bfloat16)
        self.calls += 1
        groups = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(groups, dim=2).float() for x in (k, v))
        scores = torch.einsum("bthd,bnhd->bhtn", q.float(), k) * softmax_scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        distance = (
            torch.arange(q.shape[1])[:, None] + (k.shape[1] - q.shape[1]) - torch.arange(k.shape[1])[None]
        )
        left, right = window_size
        unseen = distance < 0
        if left >= 0:
            unseen |= distance > left
        if right >= 0:
            unseen |= -distance > right
        scores = scores.masked_fill(unseen, -torch.inf)
        out = torch.einsum("bhtn,bnhd->bthd", scores.softmax(-1), v)
        return out.to(q.dtype), scores.logsumexp(-1), None


def never(*arguments: Any, **options: Any) -> Attended:
    raise AssertionError("not for this attention")


FEATURES = [Features(), Features(window=50), Features(softcap=5.0), Features(window=70, softcap=5.0)]


@pytest.mark.parametrize("features", FEATURES, ids=lambda f: f"window{f.window}-softcap{f.softcap}")
@pytest.mark.parametrize(("start", "length"), [(0, 65), (130, 70), (64, 1)])
def test_dense_chunks_are_what_torch_gives(start: int, length: int, features: Features) -> None:
    q, k, v = (x.bfloat16() for x in make_qkv(start, length, num_heads=6, num_kv_heads=2))
    keys, chunk, flash = make_keys(k, v), make_chunk(start, length), Flash()
    got = FlashDense(flash, never)(q, keys, chunk, dense(q.device), scale=0.25, features=features)
    want = attend(q.float(), keys, chunk, dense(q.device), scale=0.25, features=features)
    assert flash.calls == 1 and got.out.dtype == torch.bfloat16 and got.lse.dtype == torch.float32
    assert torch.allclose(got.out.float(), want.out, atol=1e-2)  # bf16 out
    assert torch.allclose(got.lse, want.lse, atol=1e-4)


def test_what_flash_attn_cannot_serve_goes_elsewhere() -> None:
    q, k, v = (x.bfloat16() for x in make_qkv(100, 60, num_heads=4, num_kv_heads=2))
    keys, chunk = make_keys(k, v), make_chunk(100, 60)
    lists = random_selection(chunk, num_lists=2)
    holes = make_keys(k, v)
    holes.pages[0, 0] = -1
    cases = [
        (q, keys, lists, Features()),
        (q.float(), make_keys(k.float(), v.float()), dense(q.device), Features()),
        (q, keys, dense(q.device), Features(sinks=torch.zeros(4))),
        (q, holes, dense(q.device), Features()),
    ]
    for queries, view, selection, features in cases:
        got = FlashDense(never, attend)(queries, view, chunk, selection, scale=0.25, features=features)
        want = attend(queries, view, chunk, selection, scale=0.25, features=features)
        assert torch.equal(got.out, want.out) and torch.equal(got.lse, want.lse)


def test_pages_behind_a_window_may_have_left() -> None:
    q, k, v = (x.bfloat16() for x in make_qkv(192, 64, num_heads=4, num_kv_heads=2))
    keys, chunk, features = make_keys(k, v), make_chunk(192, 64), Features(window=100)
    keys.pages[:, 0] = -1
    assert 192 - features.window >= PAGE_SIZE  # type: ignore[operator]
    flash = Flash()
    got = FlashDense(flash, never)(q, keys, chunk, dense(q.device), scale=0.25, features=features)
    want = attend(q.float(), keys, chunk, dense(q.device), scale=0.25, features=features)
    assert flash.calls == 1 and torch.allclose(got.out.float(), want.out, atol=1e-2)
