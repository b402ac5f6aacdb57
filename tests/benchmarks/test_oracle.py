"""The oracle reads the units that hold the keys with the most attention."""

import torch

from benchmarks import oracle
from benchmarks.oracle import Oracle
from kvcache.decode import Queries
from kvcache.decode_methods import DECODE_METHODS
from kvcache.state import NewKeys, StateRegistry
from tests.kvcache.builders import make_cache, make_model


def test_the_units_of_the_best_keys_are_read() -> None:
    torch.manual_seed(0)
    method, states = Oracle(read=128, window=20, dense_layers=0), StateRegistry()
    model = make_model(layers=1, query_heads=6, kv_heads=2, head_dim=8)
    method.attach(model, None, states)  # type: ignore[arg-type]
    cache = make_cache(model=model, states=states)
    slot, k = cache.admit(16), torch.randn(1, 2, 400, 8)
    cache.reserve(slot, 400)
    cache.sync()
    at = cache.prefill_destinations(slot, 0, 400)[0]
    cache.write(k[0], k[0], at)
    cache.keep_up(NewKeys(0, k[0], at, torch.arange(400), None, is_chunk=True))
    cache.advance(slot, 399)
    rows, q = cache.decode_rows([slot]), torch.randn(1, 6, 8)
    selection = method.select(0, Queries(q, torch.tensor([399]), None), rows, states)
    assert selection is not None
    for head in range(2):
        attention = (q[0, head * 3 : head * 3 + 3] @ k[0, head].T * 8**-0.5).softmax(-1)  # [G, N]
        worth = attention.view(3, 25, 16).amax(-1).sum(0)[1:22]
        wanted = {0, 22, 23, 24, *(1 + worth.topk(4).indices).tolist()}
        assert selection.ids[0, head].tolist() == sorted(wanted)


def test_plans_may_name_it_while_it_is_offered() -> None:
    with oracle.offered():
        assert DECODE_METHODS["oracle"] is Oracle
    assert "oracle" not in DECODE_METHODS
