"""The decode methods that a plan may name."""

from configs.plugins import Plugins
from kvcache.decode import DecodeMethod, Full
from kvcache.hip import HiP
from kvcache.quest import Quest
from kvcache.seerattention_r import SeerAttentionR

DECODE_METHODS = Plugins[DecodeMethod](
    "farspan.decode_methods",
    DecodeMethod,
    {"full": Full, "quest": Quest, "hip": HiP, "seerattention_r": SeerAttentionR},
)
