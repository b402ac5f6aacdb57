"""Windows, softcaps and sinks in decode follow their formulae, in torch and in C++."""

import math

import pytest
import torch
from torch import Tensor

from configs import native
from configs.features import Features
from engine.kernels import AttendRows
from kvcache.decode import attend_rows as attend_in_torch
from kvcache.kernels import cpu
from kvcache.pool import pages_for
from tests.kvcache.test_decode import make_rows
from tests.reference import attention

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler on this machine")
KERNELS = [
    pytest.param(attend_in_torch, id="torch"),
    pytest.param(cpu.attend_rows, id="cpp", marks=needs_compiler),
]
EDGES = [[1, 63], [64, 65], [255, 256], [257, 330], [1000, 3]]  # tokens held by [sequence][KV head]
SINKS = torch.tensor([-1.0, 0.0, 2.0, 30.0, -40.0, 5.0])
FEATURES = {
    "window of one": Features(window=1),
    "window inside a page": Features(window=21),
    "window of a page": Features(window=64),
    "window over pages": Features(window=270),
    "window longer than all": Features(window=5000),
    "softcap": Features(softcap=2.0),
    "sinks": Features(sinks=SINKS),
    "all": Features(100, 3.0, SINKS),
}


def expected(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, pages: Tensor, held: Tensor, features: Features
) -> Tensor:
    """One row at a time, in fp64."""
    out, group = torch.zeros(q.shape, dtype=torch.float64), q.shape[1] // held.shape[1]
    for b in range(held.shape[0]):
        for h in range(held.shape[1]):
            length, heads = int(held[b, h]), slice(h * group, (h + 1) * group)
            row = pages[b, h, : pages_for(length)].long()
            k, v = (pool[row].flatten(0, 1)[None, :length].double() for pool in (k_pool, v_pool))
            sinks = None if features.sinks is None else features.sinks[heads]
            own = Features(features.window, features.softcap, sinks)
            everything = torch.ones(1, length, dtype=torch.bool)
            out[b, heads] = attention(q[b, heads, None].double(), k, v, everything, 0.25, own)[0][:, 0]
    return out


@pytest.mark.parametrize("attend", KERNELS)
@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_follow_their_formulae(attend: AttendRows, name: str, dtype: torch.dtype) -> None:
    q, k, v, pages, held = make_rows(EDGES, 3, 16, poison=math.nan)
    k, v = k.to(dtype), v.to(dtype)
    out = attend(q, k, v, pages, held, scale=0.25, max_held=1000, features=FEATURES[name])
    wanted = expected(q, k, v, pages, held, FEATURES[name])
    torch.testing.assert_close(out.double(), wanted, atol=5e-6, rtol=0)  # computed in fp32


@pytest.mark.parametrize("attend", KERNELS)
def test_a_row_that_holds_nothing_gives_its_sink_all_weight(attend: AttendRows) -> None:
    q, k, v, pages, held = make_rows([[0, 70]], 3, 16)
    out = attend(q, k, v, pages, held, scale=0.25, max_held=70, features=Features(sinks=SINKS))
    assert out[0, :3].abs().max() == 0 and out[0, 3:].abs().max() > 0


@pytest.mark.parametrize("attend", KERNELS)
def test_pages_dropped_behind_a_window_change_nothing(attend: AttendRows) -> None:
    q, k, v, pages, held = make_rows([[330, 500]], 3, 16)
    features = Features(window=100)
    whole = attend(q, k, v, pages, held, scale=0.25, max_held=500, features=features)
    shorter = attend(q, k, v, pages[..., 3:], held - 192, scale=0.25, max_held=308, features=features)
    torch.testing.assert_close(shorter, whole, atol=2e-6, rtol=0)  # fp32


@pytest.mark.parametrize("attend", KERNELS)
def test_a_softcap_holds_where_exp_would_overflow(attend: AttendRows) -> None:
    q, k, v, pages, held = make_rows(EDGES, 3, 16)
    features = Features(softcap=50.0)
    out = attend(1000 * q, k, v, pages, held, scale=0.25, max_held=1000, features=features)
    wanted = expected(1000 * q, k, v, pages, held, features)
    torch.testing.assert_close(out.double(), wanted, atol=1e-4, rtol=0)  # logits of thousands, in fp32
