"""The JSON of logprobs: OpenAI's form for chats, the older one of text completions, vLLM's for prompts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.messages import Logprobs
from server.tokenizer import Tokenizer


def chat_logprobs(
    tokens: Sequence[int], logprobs: Sequence[Logprobs], tokenizer: Tokenizer
) -> dict[str, Any]:
    """{"content": [...]}: an entry per token, with its bytes, because half a character is no text."""
    return {
        "content": [
            {
                **_token_json(token, one.logprob, tokenizer),
                "top_logprobs": [_token_json(other, value, tokenizer) for other, value in one.top],
            }
            for token, one in zip(tokens, logprobs, strict=True)
        ],
        "refusal": None,
    }


def prompt_logprobs(
    tokens: Sequence[int], logprobs: Sequence[Logprobs], count: int, tokenizer: Tokenizer
) -> list[dict[str, Any] | None]:
    """vLLM's form: by token id, the prompt's own token among the `count` most likely. None for the first."""
    found: list[dict[str, Any] | None] = [None]
    for token, one in zip(tokens[1:], logprobs, strict=True):
        ranked = {other: (value, rank) for rank, (other, value) in enumerate(one.top[:count], start=1)}
        ranked.setdefault(token, (one.logprob, one.rank))
        found.append(
            {
                str(other): {"logprob": value, "rank": rank, "decoded_token": _text(other, tokenizer)}
                for other, (value, rank) in ranked.items()
            }
        )
    return found


@dataclass(slots=True)
class TextLogprobs:
    """The four columns of a text completion. Follows one answer: offsets are characters of its tokens."""

    tokenizer: Tokenizer
    count: int  # most likely tokens beside each
    _offset: int = field(default=0)

    def prompt(self, tokens: Sequence[int], logprobs: Sequence[Logprobs]) -> dict[str, Any]:
        """Columns of an echoed prompt; nothing comes before its first token, so that has no logprob."""
        return self._columns(tokens, [None, *logprobs])

    def answer(self, tokens: Sequence[int], logprobs: Sequence[Logprobs]) -> dict[str, Any]:
        """Columns of the next tokens of the answer."""
        return self._columns(tokens, logprobs)

    def _columns(self, tokens: Sequence[int], logprobs: Sequence[Logprobs | None]) -> dict[str, Any]:
        texts = [_text(token, self.tokenizer) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [None if one is None else one.logprob for one in logprobs],
            "top_logprobs": [
                None if one is None else self._top(token, one)
                for token, one in zip(tokens, logprobs, strict=True)
            ],
            "text_offset": offsets,
        }

    def _top(self, token: int, one: Logprobs) -> dict[str, float]:
        """By text: where several tokens read alike, the most likely counts. The token itself is always in."""
        pairs = [*one.top[: self.count], (token, one.logprob)]
        top: dict[str, float] = {}
        for other, value in pairs:
            text = _text(other, self.tokenizer)
            top[text] = max(value, top.get(text, value))
        return top


def joined(parts: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """One object from those of several pieces; None if there are none."""
    whole: dict[str, Any] | None = None
    for part in parts:
        if whole is None:
            whole = {name: list(column) if column is not None else None for name, column in part.items()}
            continue
        for name, column in part.items():
            if column is not None:
                whole[name].extend(column)
    return whole


def _token_json(token: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    content = tokenizer.token_bytes(token)
    return {"token": content.decode(errors="replace"), "logprob": logprob, "bytes": list(content)}


def _text(token: int, tokenizer: Tokenizer) -> str:
    return tokenizer.token_bytes(token).decode(errors="replace")
