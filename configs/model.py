"""The shape of a model, as every layer of Farspan needs to know it: read from config.json, no weights."""

from dataclasses import dataclass

PAGE_SIZE = 64  # tokens of one row in a page: the block of MInference, SeerAttention, MoA and S2 as published


@dataclass(frozen=True)
class BlockSparse:
    """The static pattern that a model was trained with, in the form of Phi-3-small: see kvcache/s2.py."""

    block_size: int  # tokens
    local_blocks: int  # nearest blocks that every head reads
    vert_stride: int  # of the others, a head reads one in so many
    homo_head: bool  # the same ones in all heads
    homo_head_group: bool  # the same ones in the query heads of a KV head
    dense_every: int  # of so many layers, the last reads everything; 0 = none


@dataclass(frozen=True)
class ModelInfo:
    """Sizes of one model. `Hq % Hkv == 0` always holds; G query heads read the same KV head."""

    name: str
    num_layers: int  # L
    num_query_heads: int  # Hq
    num_kv_heads: int  # Hkv
    head_dim: int  # D
    vocab_size: int
    max_length: int  # tokens of context the model was made for (after any RoPE override)
    rope_scaling: str | None = None  # what RoPE was stretched by at load, such as yarn:2
    windows: tuple[int | None, ...] = ()  # by layer: a query reads this many keys, its own the last; () = all
    block_sparse: BlockSparse | None = None  # None = made for reading everything

    def window(self, layer: int) -> int | None:
        """How many keys a query of this layer reads at most, its own the last; None = all."""
        return self.windows[layer] if self.windows else None

    @property
    def group_size(self) -> int:
        """G = Hq / Hkv."""
        return self.num_query_heads // self.num_kv_heads
