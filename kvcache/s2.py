"""S2: every head reads the nearest blocks and a shard of the far ones. https://arxiv.org/abs/2407.17678"""

import logging
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from configs.model import PAGE_SIZE, ModelInfo
from kvcache.pool import pages_for
from kvcache.reach import FOREVER
from kvcache.shards import Shards, pages_of_blocks
from kvcache.state import StateRegistry
from kvcache.static_policy import StaticPolicy, by_kv_head, density

MOST_SHARDS = 8  # what a stride that is not given comes to at most

log = logging.getLogger(__name__)


@dataclass
class S2(StaticPolicy):
    """Shards lie at fixed places of the text, so a block that a query skips is skipped by all later ones.

    A model that was trained so says it in its config; then no option of the pattern may be given.
    """

    local_blocks: int = 16  # nearest blocks, the query's own among them
    vert_stride: int | None = None  # a shard is one block in so many; none = as many as shards, up to 8
    local_stride: int = 1  # the same among the nearest blocks: 1 = all of them
    block_size: int = 64  # tokens: 16, 32 or 64; smaller ones are widened to pages
    convention: Literal["dkernel", "phi3small"] = "dkernel"  # a shard per KV head, or per query head
    homo_head: bool = False  # all heads have one shard, and what it skips nobody reads
    homo_head_group: bool = False  # of phi3small: a shard per KV head
    num_dense_heads: int = 0  # last KV heads that read everything
    dense_every: int = 0  # every so many layers, the last of them reads everything; 0 = none
    _shards: Shards = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        least = {"local_blocks": 1, "local_stride": 1, "num_dense_heads": 0, "dense_every": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least {value}")
        if self.vert_stride is not None and self.vert_stride < 1:
            raise ValueError(f"vert_stride ({self.vert_stride}) must be at least 1 (1 = every block)")
        if self.block_size not in (16, 32, 64):
            raise ValueError(f"block_size ({self.block_size}) must be 16, 32 or 64 tokens")
        if self.homo_head_group and (self.convention == "dkernel" or self.homo_head):
            raise ValueError(
                "homo_head_group (True) has no effect: groups share a shard anyway; leave it out"
            )

    def attach(self, model: ModelInfo, files: Path, states: StateRegistry) -> None:
        super().attach(model, files, states)
        if model.block_sparse is not None:
            self._follow(model)
        if self.num_dense_heads > model.num_kv_heads:
            raise ValueError(
                f"num_dense_heads ({self.num_dense_heads}) must be at most {model.num_kv_heads},"
                f" the KV heads of {model.name}"
            )
        self._shards = self._make_shards(model)
        self.vert_stride = self._shards.vert_stride  # what none came to
        self._shards.refuse_unless_monotone()
        if not (self.homo_head or self.num_dense_heads):
            self._shards.refuse_unless_complete()
        self._warn_of_groups()

    def prefill_key(self, total_length: int) -> bytes:
        return f"s2 {self!r}".encode()

    def page_reach(self, total_length: int) -> NDArray[np.int32]:
        by_head = self._by_head(total_length)
        if by_head.shape[1] != self.model.num_kv_heads:
            by_head = by_kv_head(by_head, self.model)
        if self.num_dense_heads:
            by_head[:, -self.num_dense_heads :] = FOREVER
        return by_head

    def _make_shards(self, model: ModelInfo) -> Shards:
        """The step between heads as published: vert_stride by the number of heads, at least 1, cut."""
        if self.convention == "dkernel":
            num_heads, divisor, offset = model.num_kv_heads, model.num_query_heads, 0
        else:
            num_heads = model.num_kv_heads if self.homo_head_group else model.num_query_heads
            divisor, offset = num_heads, 1
        stride = self.vert_stride or min(MOST_SHARDS, num_heads)
        step = 0 if self.homo_head else max(1, stride // divisor)
        shifts = tuple(head * step + offset for head in range(num_heads))
        return Shards(shifts, self.local_blocks, stride, self.local_stride)

    def _by_head(self, total_length: int) -> NDArray[np.int32]:
        """Of every head that may have a shard, KV or query: [L, H, P]."""
        num_blocks = pages_for(total_length) * (PAGE_SIZE // self.block_size)
        reach = pages_of_blocks(self._shards.reach(num_blocks), self.block_size)
        layers = np.repeat(reach[None], self.model.num_layers, axis=0)
        if self.dense_every:
            layers[self.dense_every - 1 :: self.dense_every] = FOREVER
        return layers

    def _follow(self, model: ModelInfo) -> None:
        """Take the pattern that the model was trained with."""
        for option in fields(self):
            if option.init and getattr(self, option.name) != option.default:
                raise ValueError(
                    f"{option.name} ({getattr(self, option.name)}) is not for a plan to say: {model.name} was"
                    " trained with a pattern of its own; leave it out"
                )
        assert model.block_sparse is not None
        for name, value in asdict(model.block_sparse).items():
            setattr(self, name, value)
        self.convention = "phi3small"

    def _warn_of_groups(self) -> None:
        """Query heads with shards of their own share a KV head, which keeps all of them."""
        length = self.model.max_length
        own, kept = density(self._by_head(length), length), density(self.page_reach(length), length)
        if kept > 1.01 * own:
            log.warning(
                "s2: KV heads keep what any query head reads: %.0f%% of %d tokens instead of %.0f%%",
                100 * kept,
                length,
                100 * own,
            )
