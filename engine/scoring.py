"""Scorer: how likely the tokens of a prompt are, by HuggingFace's own code behind the decoder, in slices."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from engine.messages import Logprobs
from engine.sampler import logprobs_of

SLICE_ELEMENTS = 2**23  # logits at once: 32 MiB in float32, whatever the length of a chunk


@dataclass(slots=True)
class Heard:
    """What the decoder returned in one forward; `last_hidden_state` [1, T, hidden] is in it."""

    output: Any = None


class Scorer:
    """Borrows the model. Logits of all rows of a chunk at once would take gigabytes."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._decoder = model.get_decoder()
        self._vocab = model.config.get_text_config().vocab_size

    @contextmanager
    def listening(self) -> Iterator[Heard]:
        """Keeps what the decoder returns in a forward made meanwhile."""
        heard = Heard()

        def keep(module: Any, inputs: Any, output: Any) -> None:
            heard.output = output

        hook = self._decoder.register_forward_hook(keep)
        try:
            yield heard
        finally:
            hook.remove()

    def score(self, heard: Heard, first: int, targets: list[int], count: int) -> list[Logprobs]:
        """How likely `targets[i]` is after row `first + i`, with the `count` most likely tokens."""
        rows = max(1, SLICE_ELEMENTS // self._vocab)
        found = []
        with self._repeating(heard.output):
            for start in range(0, len(targets), rows):
                wanted = targets[start : start + rows]
                at = first + start
                logits = self._model(
                    # Not looked at: the decoder has run. Scales and soft caps behind it apply as ever.
                    input_ids=torch.zeros((1, 1), dtype=torch.int64, device=self._model.device),
                    logits_to_keep=torch.arange(at, at + len(wanted), device=self._model.device),
                    use_cache=False,
                ).logits[0]
                found += logprobs_of(logits, wanted, [count] * len(wanted))
        return found

    @contextmanager
    def _repeating(self, output: Any) -> Iterator[None]:
        """The decoder returns this, without computing."""
        self._decoder.forward = lambda *args, **kwargs: output
        try:
            yield
        finally:
            del self._decoder.forward  # the class's own again
