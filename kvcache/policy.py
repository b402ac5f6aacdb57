"""What a KV policy is given and what it owes: it proposes which tokens to keep, the cache disposes."""

from pathlib import Path
from typing import Protocol

from torch import Tensor

from configs.model import ModelInfo
from kvcache.reach import Reach
from kvcache.state import StateRegistry
from kvcache.view import KeyView


class KVPolicy(Protocol):
    """A dataclass whose fields are its YAML options. Holds no state of a sequence: it serves all at once."""

    @property
    def query_window(self) -> int:
        """Last prompt queries it must see in one chunk; 0 = none."""

    @property
    def masks(self) -> bool:
        """Does it hide keys from the queries of a prompt?"""

    @property
    def compacts(self) -> bool:
        """Does it choose among the tokens of a computed prompt? What stays is then never shared."""

    def attach(self, model: ModelInfo, files: Path, states: StateRegistry) -> None:
        """Once, before weights load: read files, check shapes, declare state. Refuses with ValueError."""

    def prefill_key(self, total_length: int) -> bytes:
        """What of this policy changes the KV that prefill computes: part of the seed of the prefix cache."""

    def reach(self, total_length: int) -> Reach | None:
        """How long each page is read, if that is known in advance; None = for ever.

        It is the mask of prompt and answer, and says which pages leave while they are computed: one thing, so
        that a page never leaves before the mask hides it from all later queries. The total length (prompt and
        the most that may be generated) is frozen at admission.
        """

    def pages_needed(self, prompt: int, total: int, chunk: int) -> int:
        """The most pages one sequence will hold at once, over all layers and heads.

        Lengths in tokens; no forward takes more than `chunk` of the prompt.
        """

    def pages_after_prefill(self, prompt: int, total: int) -> int:
        """The most pages it will hold once its prompt is computed: what stays promised then."""

    def after_prefill(self, layer: int, q_tail: Tensor, keys: KeyView, *, scale: float) -> Tensor | None:
        """Tokens to keep, bool [Hkv, N], or None for all. q_tail [Hq, query_window, D]: last queries."""
