"""How long pages are read: mask, leaving and promises say one thing, and never more than once."""

import numpy as np
import pytest
import torch

from configs.model import PAGE_SIZE, ModelInfo
from kvcache.keep_all import KeepAll
from kvcache.moa import MoA
from kvcache.policy import KVPolicy
from kvcache.pool import pages_for
from kvcache.reach import FOREVER, Reach, pages_of_window
from kvcache.s2 import S2
from kvcache.state import StateRegistry
from kvcache.static_policy import by_kv_head, density
from kvcache.streaming import Streaming
from tests.kvcache.builders import make_model

MODEL = make_model(layers=2, query_heads=4, kv_heads=2)


def random_reach(pages: int, seed: int = 0) -> Reach:
    generator = np.random.default_rng(seed)
    reach = generator.integers(1, 6, (2, 2, pages))
    reach[generator.random(reach.shape) < 0.2] = FOREVER
    return Reach(torch.from_numpy(reach.astype(np.int32)), (True, True))


def test_a_page_that_left_is_read_by_no_later_query_and_all_others_are() -> None:
    reach = random_reach(12)
    for layer in range(2):
        read = reach.read_by(layer, 0, 12 * PAGE_SIZE).numpy()  # [Hkv, i, j]
        for page in range(13):
            left = reach.left(page)[layer]
            assert not read[:, page:][:, :, :page][np.broadcast_to(left[:, None], (2, 12 - page, page))].any()
            if page < 12:
                assert np.array_equal(read[:, page, :page], ~left), "of the past, what is held is read"


@pytest.mark.parametrize(("start", "length"), [(0, 1), (64, 64), (128, 200), (0, 700)])
def test_a_chunk_has_the_rows_of_the_whole_mask(start: int, length: int) -> None:
    reach = random_reach(12)
    whole = reach.read_by(1, 0, 12 * PAGE_SIZE)
    rows = reach.read_by(1, start, length)
    first, last = start // PAGE_SIZE, pages_for(start + length)
    assert torch.equal(rows, whole[:, first:last, :last])


def held(reach: Reach, page: int) -> int:
    return int((~reach.left(page)).sum())


@pytest.mark.parametrize("chunk", [64, 127, 128, 300, 10_000])
def test_promises_are_the_peak_of_any_run(chunk: int) -> None:
    """Every chunk that may be, from any page; then the answer, token by token. Reaches of all kinds."""
    for prompt, total in [(1, 2), (64, 65), (65, 200), (500, 501), (513, 700), (640, 768)]:
        reach = random_reach(pages_for(total), seed=prompt)
        computing = []
        for page in range(pages_for(prompt)):
            written = pages_for(min(prompt, 64 * page + chunk)) - page
            computing.append(held(reach, page) + 4 * written)
        answering = [held(reach, n // PAGE_SIZE) + 4 for n in range(prompt, total)]
        assert reach.pages_needed(prompt, total, chunk) == max(computing + answering)
        assert reach.pages_after_prefill(prompt, total) == max(answering)


def test_windows_of_the_model_hold_whatever_the_policy_says_and_need_no_mask() -> None:
    model = ModelInfo("slides", 2, 4, 2, 4, 16, 4096, windows=(None, 65))
    keep, stream = KeepAll(), Streaming(sink=64, window=64)
    for policy in (keep, stream):
        policy.attach(model, files=None, states=StateRegistry())  # type: ignore[arg-type]
        reach = policy.reach(640)
        assert reach is not None and (reach.pages[1] == 2).all()
        assert not reach.masks[1], "its attention knows the window"
        assert reach.masks[0] is (policy is stream)
    assert keep.pages_after_prefill(600, 640) == 2 * 10 + 2 * 2


@pytest.mark.parametrize("window", [1, 2, 64, 65, 66, 128, 129, 130])
def test_pages_of_a_window_hold_its_keys_and_no_page_more_than_needed(window: int) -> None:
    read = {i // 64 - j // 64 for i in range(256, 320) for j in range(i - window + 1, i + 1)}
    assert pages_of_window(window) == max(read) + 1


def test_a_kv_head_keeps_what_any_of_its_query_heads_reads() -> None:
    reach = np.arange(8, dtype=np.int32).reshape(1, 4, 2)
    assert by_kv_head(reach, MODEL).tolist() == [[[2, 3], [6, 7]]]


def test_density_counts_what_the_last_queries_read() -> None:
    reach = np.array([[FOREVER, 1, 2, 2]], dtype=np.int32)
    assert density(reach, 256) == 3 / 4


@pytest.mark.parametrize("policy", [KeepAll(), Streaming(), MoA(), S2()])
def test_what_covers_the_text_masks_nothing_and_costs_everything(policy: KVPolicy) -> None:
    policy.attach(MODEL, files=None, states=StateRegistry())  # type: ignore[arg-type]
    assert policy.reach(100) is None
    assert policy.pages_needed(90, 100, 64) == policy.pages_after_prefill(90, 100) == 4 * 2


def test_the_key_of_a_prefill_says_what_changes_it() -> None:
    def key(policy: KVPolicy, total: int = 4096) -> bytes:
        policy.attach(MODEL, files=None, states=StateRegistry())  # type: ignore[arg-type]
        return policy.prefill_key(total)

    assert key(Streaming(sink=1)) == key(Streaming(sink=64)) != key(Streaming(sink=65))
    assert key(Streaming(window=1000)) == key(Streaming(window=1024)) != key(Streaming(window=1025))
    assert key(Streaming(), 200) == key(Streaming(), 4000)
    assert key(MoA(), 4096) == key(MoA(), 4096 - 100) != key(MoA(), 4096 - 300), "spans of the same pages"
    keys = [key(S2()), key(S2(local_blocks=3)), key(S2(vert_stride=1)), key(KeepAll()), key(Streaming())]
    assert len(set(keys)) == 5
