"""Constraints: gives sequences their grammars, and holds them back until these are compiled."""

from concurrent.futures import ThreadPoolExecutor

from configs.grammars import Grammars
from engine.constraint import Constraint
from engine.sequence import Sequence

WORKERS = 2
IDLE_SECONDS = 0.01  # how long a step without other work waits for a grammar


class Constraints:
    """Owns the threads that compile grammars and work out masks, and the sequences that wait for them."""

    def __init__(self, grammars: Grammars | None) -> None:
        self._grammars = grammars
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="grammar")
        self._waiting: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        return bool(self._waiting)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for their grammars."""
        return len(self._waiting)

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """One of these follows an answer that is complete by its grammar."""
        return () if self._grammars is None else self._grammars.end_tokens

    def prepare(self, sequence: Sequence, grammar: str) -> None:
        """Compile this grammar for a sequence and its siblings; `prepared` returns the sequence then."""
        assert self._grammars is not None, "the server refuses grammars where there are none"
        for choice in sequence.choices:
            answer = choice.tokens[choice.prompt_length :]
            choice.constraint = Constraint(self._grammars, grammar, answer, self._workers)
        self._waiting.append(sequence)

    def prepared(self, *, wait: bool) -> list[Sequence]:
        """Sequences that can go on; a grammar that failed shows when the first token is chosen."""
        if wait and self._waiting:
            for constraint in _constraints(self._waiting[0]):
                constraint.wait(IDLE_SECONDS)
        done = [one for one in self._waiting if all(c.is_prepared for c in _constraints(one))]
        self._waiting = [one for one in self._waiting if one not in done]
        return done

    def forget(self, request_id: str, choice: int | None = None) -> list[Sequence]:
        """The sequences of this request, or of one of its choices, that waited, and wait no more."""
        gone = [one for one in self._waiting if one.request_id == request_id and choice in (None, one.choice)]
        self._waiting = [one for one in self._waiting if one not in gone]
        return gone


def _constraints(sequence: Sequence) -> list[Constraint]:
    return [choice.constraint for choice in sequence.choices if choice.constraint is not None]
