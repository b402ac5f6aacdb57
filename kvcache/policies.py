"""The KV policies that a plan may name."""

from kvcache.ada_snapkv import AdaSnapKV
from kvcache.keep_all import KeepAll
from kvcache.policy import KVPolicy
from kvcache.pyramidkv import PyramidKV
from kvcache.snapkv import SnapKV

KV_POLICIES: dict[str, type[KVPolicy]] = {
    "keep_all": KeepAll,
    "snapkv": SnapKV,
    "ada-snapkv": AdaSnapKV,
    "pyramidkv": PyramidKV,
}
