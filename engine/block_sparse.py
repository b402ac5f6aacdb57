"""The static pattern in a model's config.json: `blocksparse_params`, or the keys of Phi-3-small."""

from collections.abc import Mapping
from typing import Any

from configs.errors import ConfigError
from configs.model import BlockSparse

# What each size is called: in `blocksparse_params`, and behind `blocksparse_` in Phi-3-small's config.
NAMES = {
    "block_size": ("block_size",),
    "local_blocks": ("local_blocks", "num_local_blocks"),
    "vert_stride": ("vert_stride",),
    "homo_head": ("homo_head", "homo_head_pattern"),
    "homo_head_group": ("homo_head_group",),
}
OPTIONAL = {"homo_head": False, "homo_head_group": False}
OF_KERNELS = {"kernel_block_size", "triton_kernel_block_size", "max_seqlen", "num_heads", "num_kv_heads"}
DENSE_EVERY = "dense_attention_every_n_layers"


def block_sparse(config: Mapping[str, Any], name: str) -> BlockSparse | None:
    """None if the model reads everything. Raises ConfigError for a pattern that is not understood."""
    given = config.get("blocksparse_params")
    if given is None:
        prefix = "blocksparse_"
        given = {key.removeprefix(prefix): value for key, value in config.items() if key.startswith(prefix)}
        given.pop("params", None)
    if not given:
        return None
    where = f"model: {name}: blocksparse_params"
    unknown = set(given) - {key for keys in NAMES.values() for key in keys} - OF_KERNELS
    if unknown:
        raise ConfigError(f"{where}: {', '.join(sorted(unknown))}: not served")
    found = {}
    for size, keys in NAMES.items():
        values = [given[key] for key in keys if given.get(key) is not None]
        if not values and size not in OPTIONAL:
            raise ConfigError(f"{where}: {size} is missing")
        value = values[0] if values else OPTIONAL[size]
        if not isinstance(value, int) or value < (0 if size in OPTIONAL else 1):
            raise ConfigError(f"{where}: {size} ({value!r}) is not a size")
        found[size] = value
    return BlockSparse(
        block_size=found["block_size"],
        local_blocks=found["local_blocks"],
        vert_stride=found["vert_stride"],
        homo_head=bool(found["homo_head"]),
        homo_head_group=bool(found["homo_head_group"]),
        dense_every=int(config.get(DENSE_EVERY) or 0),
    )
