"""The shape of a model, as every layer of Farspan needs to know it: read from config.json, no weights."""

from dataclasses import dataclass

PAGE_SIZE = 64  # tokens of one row in a page: the block of MInference, SeerAttention, MoA and S2 as published


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

    @property
    def group_size(self) -> int:
        """G = Hq / Hkv."""
        return self.num_query_heads // self.num_kv_heads
