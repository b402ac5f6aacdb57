"""The KV policies that a plan may name."""

from kvcache.keep_all import KeepAll
from kvcache.policy import KVPolicy
from kvcache.snapkv import SnapKV

KV_POLICIES: dict[str, type[KVPolicy]] = {"keep_all": KeepAll, "snapkv": SnapKV}
