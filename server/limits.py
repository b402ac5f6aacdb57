"""Limits: how many requests are open and how many prompt tokens wait, for all and for each API key."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from configs.schema import ServerConfig
from engine.errors import Overloaded
from server.errors import QuotaExceeded


@dataclass(slots=True, eq=False)
class Visit:
    """One request, from its head to the end of its reply."""

    request_id: str  # as the client knows it
    key: str | None = None  # whose API key it came with; None where there are no keys
    waiting_tokens: int = 0  # of its prompts, until the first tokens of their answers


class Limits:
    """Counts visits. Whoever opens one closes it on every path, and that ends all that it counts for."""

    def __init__(self, config: ServerConfig, on_refusal: Callable[[str], None] = lambda reason: None) -> None:
        self._config = config
        self._on_refusal = on_refusal
        self._open = 0
        self._open_of_key: Counter[str] = Counter()
        self.waiting_tokens = 0

    def open(self, visit: Visit) -> None:
        """Raises Overloaded when the server is full, QuotaExceeded when the key has its share."""
        most = self._config.max_requests_per_key
        if visit.key is not None and most is not None and self._open_of_key[visit.key] >= most:
            self._on_refusal("key_quota")
            raise QuotaExceeded(f"This API key has {most} requests open, which is its limit.")
        if self._open >= self._config.max_open_requests:
            self._on_refusal("open_requests")
            raise Overloaded(f"The server has {self._open} requests open, which is its limit.")
        self._open += 1
        if visit.key is not None:
            self._open_of_key[visit.key] += 1

    def close(self, visit: Visit) -> None:
        """The reply has ended, however it did."""
        self.answered(visit, visit.waiting_tokens)
        self._open -= 1
        if visit.key is not None:
            self._open_of_key[visit.key] -= 1
            if not self._open_of_key[visit.key]:
                del self._open_of_key[visit.key]

    def queue(self, visit: Visit, prompt_tokens: int, running: int) -> None:
        """Its prompts wait from now on. One request alone is always let in. Raises Overloaded when too many
        wait.

        running: tokens of as many full contexts as run at once, the limit where none is configured.
        """
        limit = self._config.max_queued_tokens
        limit = running if limit == "auto" else limit
        if self.waiting_tokens and self.waiting_tokens + prompt_tokens > limit:
            self._on_refusal("queued_tokens")
            raise Overloaded(
                f"{self.waiting_tokens} prompt tokens are waiting; with the {prompt_tokens} of this request"
                f" they would pass the limit of {limit}."
            )
        visit.waiting_tokens = prompt_tokens
        self.waiting_tokens += prompt_tokens

    def answered(self, visit: Visit, prompt_tokens: int) -> None:
        """The first token of a prompt's answer is there: it waits no more."""
        self.waiting_tokens -= prompt_tokens
        visit.waiting_tokens -= prompt_tokens

    @property
    def num_open(self) -> int:
        return self._open

    @property
    def is_idle(self) -> bool:
        """Is nothing counted any more?"""
        return not (self._open or self._open_of_key or self.waiting_tokens)
