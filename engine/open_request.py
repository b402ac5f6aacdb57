"""OpenRequest: what the engine said of a request so far, and how another engine goes on with it."""

import asyncio
from dataclasses import dataclass, field

import msgspec

from engine.messages import FinishReason, Reports, Submit, TokenOutput


@dataclass(slots=True)
class OpenRequest:
    """Owned by the client. Tokens count as delivered once they are in `outputs`, read or not."""

    submit: Submit
    outputs: asyncio.Queue[TokenOutput] = field(default_factory=asyncio.Queue)
    unread: set[int] = field(default_factory=set)  # choices whose readers have left
    _answers: dict[int, list[int]] = field(init=False)  # tokens so far, of the choices that go on
    _has_begun: bool = False  # choices begin together, and what comes with the first tokens has come
    _is_replayed: bool = False  # from behind the first tokens

    def __post_init__(self) -> None:
        self._answers = {choice: [] for choice in range(self.submit.choices)}

    @property
    def goes_on(self) -> bool:
        return bool(self._answers)

    def take(self, output: TokenOutput) -> None:
        """Hand this to the reader."""
        if self._is_replayed:  # what the prompt cost has been said
            output = msgspec.structs.replace(output, cost=None, prompt_logprobs=())
        self.outputs.put_nowait(output)
        self._has_begun |= bool(output.tokens)
        if output.finish_reason is None:
            self._answers[output.choice] += output.tokens
        else:
            del self._answers[output.choice]

    def fail(self, words: str) -> None:
        """End it, whatever it has said."""
        error = TokenOutput(self.submit.request_id, finish_reason=FinishReason.ERROR, error=words)
        self.outputs.put_nowait(error)
        self._answers.clear()

    def replay(self) -> list[Submit]:
        """What another engine is told: all of it again, or each choice from behind what was delivered. What
        nobody reads ends here."""
        if not self._has_begun:
            return [self.submit]
        self._is_replayed = True
        for choice in self.unread & set(self._answers):
            self.take(TokenOutput(self.submit.request_id, finish_reason=FinishReason.ABORT, choice=choice))
        submit = self.submit
        sampling = msgspec.structs.replace(submit.sampling, prompt_logprobs=None)
        silent = msgspec.structs.replace(submit, sampling=sampling, choices=1, reports=Reports())
        return [
            msgspec.structs.replace(silent, tokens=(*submit.tokens, *answer), first_choice=choice)
            for choice, answer in self._answers.items()
        ]
