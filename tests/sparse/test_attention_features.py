"""Windows, softcaps and sinks follow their formulae, in torch and in C++, dense and sparse."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from configs import native
from configs.bf16_products import Bf16Products
from configs.features import Features
from sparse.attention import Attend
from sparse.attention import attend as attend_in_torch
from sparse.kernels import cpu
from sparse.selection import dense
from tests.reference import attention, causal
from tests.sparse.builders import make_chunk, make_keys, make_qkv, random_selection, selected_mask

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler on this machine")
KERNELS = [
    pytest.param(attend_in_torch, id="torch"),
    pytest.param(cpu.attend, id="cpp", marks=needs_compiler),
]
SCALE = 0.25
SINKS = torch.tensor([-1.0, 0.0, 2.0, 30.0, -40.0, 5.0])
FEATURES: dict[str, Features] = {
    "window of one": Features(window=1),
    "window inside a page": Features(window=20),
    "window of a page": Features(window=64),
    "window over pages": Features(window=150),
    "window longer than all": Features(window=5000),
    "softcap": Features(softcap=2.0),
    "sinks": Features(sinks=SINKS),
    "all": Features(100, 3.0, SINKS),
}
SPANS = [(0, 1), (63, 65), (250, 70), (1000, 129)]


def expect(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: int,
    features: Features,
    lists: tuple[int, int] | None,
    atol: float = 2e-5,
) -> None:
    """Equal to the reference in fp64. lists: head axis and query block, None = dense."""
    chunk = make_chunk(start, q.shape[1])
    selection, mask = dense(q.device), causal(start, q.shape[1])[None]
    if lists is not None:
        unit = None if features.window else 8
        selection = random_selection(chunk, *lists, unit)
        mask = selected_mask(selection, chunk).repeat_interleave(q.shape[0] // lists[0], 0)
    got = attend(q, make_keys(k, v), chunk, selection, scale=SCALE, features=features)
    out, lse = attention(q.double(), k.double(), v.double(), mask, SCALE, features)
    torch.testing.assert_close(got.out.double(), out, atol=atol, rtol=atol)
    torch.testing.assert_close(got.lse.double(), lse, atol=atol, rtol=atol)


@pytest.mark.parametrize("attend", KERNELS)
@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("lists", [None, (1, 64), (2, 128), (6, 64)])
def test_features_follow_their_formulae(attend: Attend, name: str, lists: tuple[int, int] | None) -> None:
    for start, length in SPANS:
        expect(attend, *make_qkv(start, length, 6, 2), start, FEATURES[name], lists)  # fp32


@needs_compiler
@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("lists", [None, (2, 128)])
@pytest.mark.parametrize("products", [Bf16Products.BY_PAIRS, Bf16Products.BY_TILES])
def test_other_processors_agree(
    monkeypatch: pytest.MonkeyPatch, name: str, lists: tuple[int, int] | None, products: Bf16Products
) -> None:
    """Vectors of 16 lanes in fp32, and products of bf16, spelled out where they must be."""
    kernels = native.load_library(cpu.SOURCE, "-DFARSPAN_LANES=16", "-DFARSPAN_BRGEMM_BY_LOOPS")
    monkeypatch.setattr(cpu, "library", lambda source: kernels)
    monkeypatch.setattr(cpu, "bf16_products", lambda: products)
    q, k, v = make_qkv(250, 70, 6, 2)
    expect(cpu.attend, q, k, v, 250, FEATURES[name], lists)
    expect(cpu.attend, q.bfloat16(), k.bfloat16(), v.bfloat16(), 250, FEATURES[name], lists, atol=4e-2)


@pytest.mark.parametrize("attend", KERNELS)
def test_what_lies_behind_a_window_is_not_read(attend: Attend) -> None:
    q, k, v = make_qkv(300, 40, 6, 2)
    chunk, features = make_chunk(300, 40), Features(window=50)
    expected = attend(q, make_keys(k, v), chunk, dense(q.device), scale=SCALE, features=features)
    keys = make_keys(k, v)
    keys.pages[:, :3] = -1  # the first key that any row sees stands at 251
    dropped = attend(q, keys, chunk, dense(q.device), scale=SCALE, features=features)
    k[:, :251], v[:, :251] = 1e4, -1e4
    poisoned = attend(q, make_keys(k, v), chunk, dense(q.device), scale=SCALE, features=features)
    torch.testing.assert_close(dropped.out, expected.out, atol=1e-5, rtol=0)
    torch.testing.assert_close(poisoned.out, expected.out, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attend", KERNELS)
def test_a_row_without_keys_gives_its_sink_all_weight(attend: Attend) -> None:
    q, k, v = make_qkv(100, 60, 6, 2)
    keys = make_keys(k, v)
    keys.pages[:] = -1
    got = attend(q, keys, make_chunk(100, 60), dense(q.device), scale=SCALE, features=Features(sinks=SINKS))
    assert torch.equal(got.out, torch.zeros_like(q))
    torch.testing.assert_close(got.lse, SINKS[:, None].expand(6, 60))


@pytest.mark.parametrize("attend", KERNELS)
def test_a_softcap_holds_where_exp_would_overflow(attend: Attend) -> None:
    q, k, v = make_qkv(100, 60, 6, 2)
    expect(attend, 100 * q, k, v, 100, Features(softcap=50.0), None, atol=1e-4)  # logits of thousands


@pytest.mark.parametrize("attend", KERNELS)
@pytest.mark.parametrize("make", [lambda: Features(window=100), lambda: Features(window=30, softcap=2.0)])
def test_rows_do_not_depend_on_chunks(attend: Attend, make: Callable[[], Features]) -> None:
    q, k, v = make_qkv(0, 300, 6, 2)
    keys, nothing = make_keys(k, v), dense(q.device)
    whole = attend(q, keys, make_chunk(0, 300), nothing, scale=SCALE, features=make()).out
    for start, end in ((0, 64), (64, 200), (200, 300)):
        part = attend(
            q[:, start:end], keys, make_chunk(start, end - start), nothing, scale=SCALE, features=make()
        )
        torch.testing.assert_close(part.out, whole[:, start:end], atol=1e-5, rtol=0)
