"""Prefill methods by the name that a plan calls them."""

from configs.plugins import Plugins
from sparse.base import PrefillMethod
from sparse.dense import Dense
from sparse.flashprefill import FlashPrefill
from sparse.flexprefill import FlexPrefill
from sparse.hip import HiP
from sparse.mean_pool import MeanPool
from sparse.minference import MInference
from sparse.seerattention import SeerAttention
from sparse.xattention import XAttention

PREFILL_METHODS = Plugins[PrefillMethod](
    "farspan.prefill_methods",
    PrefillMethod,
    {
        "dense": Dense,
        "minference": MInference,
        "mean_pool": MeanPool,
        "xattention": XAttention,
        "flashprefill": FlashPrefill,
        "flexprefill": FlexPrefill,
        "hip": HiP,
        "seerattention": SeerAttention,
    },
)
