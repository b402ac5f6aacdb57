"""Readers of requests: what they were told, and waiting for what they will be told."""

import asyncio
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from engine.client import EngineClient
from engine.messages import Cost, FinishReason, Submit, TokenOutput


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


@dataclass
class Heard:
    """What the reader of one request was told."""

    tokens: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))  # by choice
    logprobs: list[Any] = field(default_factory=list)
    prompt_logprobs: list[Any] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    reasons: dict[int, FinishReason] = field(default_factory=dict)

    def take(self, output: TokenOutput) -> None:
        assert output.choice not in self.reasons, "it ended twice"
        self.tokens[output.choice] += output.tokens
        self.logprobs += output.logprobs
        self.prompt_logprobs += output.prompt_logprobs
        self.costs += [output.cost] if output.cost is not None else []
        if output.finish_reason is not None:
            self.reasons[output.choice] = output.finish_reason


async def read(client: EngineClient, submit: Submit, heard: Heard) -> Heard:
    async for output in client.generate(submit):
        heard.take(output)
    return heard
