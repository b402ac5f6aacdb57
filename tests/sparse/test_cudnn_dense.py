"""Dense chunks by cuDNN, in parts. A stand-in is called: its causal mask is of as many keys as queries."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.features import Features
from sparse.attention import Attended, attend
from sparse.kernels.cudnn_dense import CudnnDense, cudnn_attention, cuts
from sparse.selection import dense
from tests.sparse.builders import make_chunk, make_keys, make_qkv, random_selection


class Cudnn:
    """What torch's cuDNN attention gives, with a last axis of one on the lse, and how it was called."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int, bool]] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16)
        assert k.shape == v.shape and (not causal or q.shape[2] == k.shape[2])
        self.shapes.append((q.shape[2], k.shape[2], causal))
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1).float() for x in (k, v))
        scores = q.float() @ k.mT * scale
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        return (scores.softmax(-1) @ v).to(q.dtype), scores.logsumexp(-1, keepdim=True)


def never(*arguments: Any, **options: Any) -> Attended:
    raise AssertionError("not for this attention")


@pytest.mark.parametrize("start", [0, 64, 64 * 7, 64 * 12])
def test_dense_chunks_are_what_torch_gives(start: int) -> None:
    q, k, v = (x.bfloat16() for x in make_qkv(start, 64, num_heads=6, num_kv_heads=2))
    keys, chunk, cudnn = make_keys(k, v), make_chunk(start, 64), Cudnn()
    got = CudnnDense(cudnn, never, least=64)(q, keys, chunk, dense(q.device), scale=0.25)
    want = attend(q.float(), keys, chunk, dense(q.device), scale=0.25)
    assert got.out.dtype == torch.bfloat16 and got.lse.dtype == torch.float32
    assert torch.allclose(got.out.float(), want.out, atol=1e-2)  # bf16 out
    assert torch.allclose(got.lse, want.lse, atol=1e-4)
    assert cudnn.shapes[-1] == (64, 64, True) and not any(causal for *_, causal in cudnn.shapes[:-1])


def test_shapes_are_few() -> None:
    """Of all chunks of a long prompt: powers of two, so that few plans are built."""
    lengths = {last - first for start in range(0, 1 << 17, 2048) for first, last in cuts(start, 2048)}
    assert lengths == {2048 << i for i in range(6)}
    assert cuts(7 * 2048, 2048) == [(0, 8192), (8192, 12288), (12288, 14336), (14336, 16384)]
    assert cuts(0, 2048) == [(0, 2048)]


def test_what_cudnn_cannot_serve_goes_elsewhere() -> None:
    q, k, v = (x.bfloat16() for x in make_qkv(64, 64, num_heads=4, num_kv_heads=2))
    keys, chunk = make_keys(k, v), make_chunk(64, 64)
    holes = make_keys(k, v)
    holes.pages[0, 0] = -1
    cases = [
        (q, keys, chunk, random_selection(chunk, num_lists=2), Features()),
        (q.float(), make_keys(k.float(), v.float()), chunk, dense(q.device), Features()),
        (q, keys, chunk, dense(q.device), Features(window=50)),
        (q, keys, chunk, dense(q.device), Features(softcap=5.0)),
        (q, keys, chunk, dense(q.device), Features(sinks=torch.zeros(4))),
        (q, holes, chunk, dense(q.device), Features()),
        (
            q[:, 16:],
            keys,
            replace(chunk, start=80, length=48),
            dense(q.device),
            Features(),
        ),  # no power of two
        (q[:, 32:], keys, replace(chunk, start=96, length=32), dense(q.device), Features()),  # too few rows
    ]
    for queries, view, part, selection, features in cases:
        way = CudnnDense(never, attend, least=48)  # type: ignore[arg-type]
        got = way(queries, view, part, selection, scale=0.25, features=features)
        want = attend(queries, view, part, selection, scale=0.25, features=features)
        assert torch.equal(got.out, want.out) and torch.equal(got.lse, want.lse)


@pytest.mark.gpu
@pytest.mark.parametrize("start", [0, 1024, 3072])
def test_cudnn_itself_gives_what_torch_gives(start: int) -> None:
    q, k, v = make_qkv(start, 1024, num_heads=8, num_kv_heads=2, head_dim=64)
    q, held, chunk = q.bfloat16().cuda(), make_keys(k.bfloat16(), v.bfloat16()), make_chunk(start, 1024)
    keys = replace(held, **{name: getattr(held, name).cuda() for name in ("k_pool", "v_pool", "pages")})
    got = CudnnDense(cudnn_attention, never)(q, keys, chunk, dense(q.device), scale=0.125)
    want = attend(q, keys, chunk, dense(q.device), scale=0.125)
    assert float((got.out - want.out).float().norm() / want.out.float().norm()) < 1e-2  # bf16
    assert torch.allclose(got.lse, want.lse, atol=1e-2)
