"""padded_step: where a decode step of fixed size writes and what it reads, worked out on the device."""

from torch import Tensor

from configs.model import PAGE_SIZE
from kvcache.decode import Rows, StoredKeys
from kvcache.holdings import Holdings
from kvcache.pool import pages_for


def padded_step(cache: Holdings, slots: Tensor, bound: int) -> tuple[Tensor, Rows]:
    """Destinations int64 [L, B, Hkv] and the rows of one new token for each of B slots; slots int64 [B].

    What `decode_destinations` and `decode_rows` give, from tensors at fixed addresses alone: it may be
    recorded. A slot beyond the last one is padding: it writes to the scratch page and reads nothing.
    bound: tokens that no row passes, its new one included.
    """
    num_slots = cache.table.device.shape[0]
    is_live = (slots < num_slots)[:, None]
    index = slots.clamp_max(num_slots - 1)
    held = cache.held.device.transpose(0, 1).index_select(1, index)  # [L, B, Hkv]
    held = held.masked_fill(~is_live, 0)
    pages = cache.table.device[..., : pages_for(bound)].transpose(0, 1).index_select(1, index)
    page = pages.gather(3, (held // PAGE_SIZE).long().unsqueeze(3)).squeeze(3)
    page = page.masked_fill(~is_live | (page < 0), cache.pool.scratch_page)
    destinations = page.long() * PAGE_SIZE + held % PAGE_SIZE
    keys = StoredKeys(cache.pool.k, cache.pool.k_scales)
    return destinations, Rows(slots, pages, held + is_live, bound, keys)
