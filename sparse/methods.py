"""The prefill methods by the name a plan gives them."""

from sparse.base import PrefillMethod
from sparse.dense import Dense
from sparse.minference import MInference

PREFILL_METHODS: dict[str, type[PrefillMethod]] = {"dense": Dense, "minference": MInference}
