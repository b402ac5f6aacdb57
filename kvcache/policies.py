"""The KV policies that a plan may name."""

from configs.plugins import Plugins
from kvcache.ada_snapkv import AdaSnapKV
from kvcache.keep_all import KeepAll
from kvcache.moa import MoA
from kvcache.policy import KVPolicy
from kvcache.pyramidkv import PyramidKV
from kvcache.s2 import S2
from kvcache.snapkv import SnapKV
from kvcache.streaming import Streaming

KV_POLICIES = Plugins[KVPolicy](
    "farspan.kv_policies",
    KVPolicy,
    {
        "keep_all": KeepAll,
        "snapkv": SnapKV,
        "ada-snapkv": AdaSnapKV,
        "pyramidkv": PyramidKV,
        "streaming": Streaming,
        "moa": MoA,
        "s2": S2,
    },
)
