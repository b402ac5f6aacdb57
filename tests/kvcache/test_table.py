"""The page table: host and device say the same."""

import numpy as np
import pytest
import torch

from kvcache.table import PageTable, SlotArray
from tests.kvcache.builders import CPU


def test_a_table_starts_without_pages() -> None:
    table = PageTable(2, 3, 4, 5, CPU)
    assert table.host.shape == (2, 3, 4, 5) and table.host.dtype == np.int32
    assert (table.host == -1).all() and table.device.dtype == torch.int32


def test_on_a_cpu_the_mirror_is_the_same_memory() -> None:
    table = PageTable(2, 1, 1, 4, CPU)
    table.host[1, 0, 0, 2] = 9
    table.touch(1)
    assert table.device[1, 0, 0, 2] == 9 and not table.is_stale
    table.device[0, 0, 0, 0] = 3
    assert table.host[0, 0, 0, 0] == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_elsewhere_touched_slots_are_copied_by_sync() -> None:
    array = SlotArray((3, 4), 0, torch.device("cuda"))
    array.host[1] = 5
    array.touch(1)
    assert array.is_stale and array.device[1].sum() == 0
    array.sync()
    assert not array.is_stale and array.device.cpu().tolist() == [[0] * 4, [5] * 4, [0] * 4]
    array.host[2] = 1  # not touched: the check finds it
    with pytest.raises(AssertionError, match="differs"):
        array.check()
