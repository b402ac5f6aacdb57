"""The pattern of a block-sparse model is read from its config in both forms, or refused with the key."""

from typing import Any

import pytest

from configs.errors import ConfigError
from configs.model import BlockSparse
from engine.block_sparse import block_sparse

PHI_3_SMALL = {
    "blocksparse_block_size": 64,
    "blocksparse_num_local_blocks": 16,
    "blocksparse_vert_stride": 8,
    "blocksparse_homo_head_pattern": False,
    "blocksparse_triton_kernel_block_size": 64,
    "dense_attention_every_n_layers": 2,
}
PARAMS = {"block_size": 32, "local_blocks": 4, "vert_stride": 8, "homo_head_group": True, "max_seqlen": 8192}


def test_the_keys_of_phi_3_small_are_read() -> None:
    expected = BlockSparse(64, 16, 8, homo_head=False, homo_head_group=False, dense_every=2)
    assert block_sparse(PHI_3_SMALL, "phi") == expected


def test_the_parameters_of_kernels_are_read() -> None:
    expected = BlockSparse(32, 4, 8, homo_head=False, homo_head_group=True, dense_every=0)
    assert block_sparse({"blocksparse_params": PARAMS}, "phi") == expected


def test_other_models_have_none() -> None:
    assert block_sparse({"hidden_size": 64, "blocksparse_params": None}, "llama") is None


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"vert_stride": None}, "vert_stride is missing"),
        ({"vert_stride": 0}, r"vert_stride \(0\) is not a size"),
        ({"block_size": "64"}, r"block_size \('64'\) is not a size"),
        ({"relative": True}, "relative: not served"),
    ],
)
def test_a_pattern_that_is_not_understood_is_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"model: phi: blocksparse_params: {words}"):
        block_sparse({"blocksparse_params": PARAMS | changed}, "phi")
