"""Tokenizer: text to token ids and chats to text, from a model's own files, without torch."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tokenizers

from configs.grammars import Grammars
from engine.errors import BadRequest
from server.template import FAILURES, ChatTemplate

Message = dict[str, Any]  # role, content, and what else the client gave


class Tokenizer:
    """One model's tokenizer and chat template. Shared by all requests; holds no state of any."""

    def __init__(self, folder: Path) -> None:
        self._tokens: Any = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokens.no_truncation()  # files from training may cut prompts silently
        self._tokens.no_padding()
        self.longest_token = max(
            map(len, self._tokens.get_vocab(with_added_tokens=True)), default=1
        )  # characters
        self._special = {
            token_id: token.content for token_id, token in self._tokens.get_added_tokens_decoder().items()
        }
        self._is_byte_level = '"ByteLevel"' in json.dumps(
            _read_json(folder / "tokenizer.json").get("decoder")
        )
        config = _read_json(folder / "tokenizer_config.json")
        self._special_tokens = _special_tokens(config | _read_json(folder / "special_tokens_map.json"))
        self.grammars = Grammars.if_possible(folder / "tokenizer.json")
        self.template_source = source = _chat_template(folder, config)
        # How this model calls tools and marks its reasoning, if it was taught to, shows in its template.
        self.tool_format = _tool_format(source or "")
        self.marks_reasoning = "</think>" in (source or "")
        self.kind = str(config.get("tokenizer_class") or type(self._tokens.model).__name__)
        self._template = None if source is None else ChatTemplate(source)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text. Slow for long texts: async code calls it in a thread."""
        # encode_batch releases the GIL while it works; encode does not. The fast form leaves out offsets.
        (encoding,) = self._tokens.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoding.ids)

    @property
    def special_tokens(self) -> dict[str, str]:
        """bos_token, eos_token and the like, as text."""
        return dict(self._special_tokens)

    def token_string(self, token: int) -> str:
        """A token as the vocabulary writes it."""
        return str(self._tokens.id_to_token(token) or "")

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of these tokens, special ones included."""
        text: str = self._tokens.decode(list(tokens), skip_special_tokens=False)
        return text

    def token_bytes(self, token: int) -> bytes:
        """What one token stands for, which may be part of a character; empty for an id without a token."""
        if token in self._special:
            return self._special[token].encode()
        piece = self._tokens.id_to_token(token) or ""
        if self._is_byte_level:
            return bytes(_BYTE_OF_LETTER[letter] for letter in piece if letter in _BYTE_OF_LETTER)
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):  # SentencePiece's tokens for single bytes
            return bytes([int(piece[3:5], 16)])
        text: str = piece.replace("\u2581", " ")
        return text.encode()

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extra: Mapping[str, Any] | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> str:
        """The text of a chat: up to where the assistant's answer starts, or to the end of the final message.
        `extra` are names that this template knows."""
        if self._template is None:
            raise BadRequest(
                "This model has no chat template; use /v1/completions.",
                param="messages",
                code="no_chat_template",
            )
        try:
            text = self._template.render(
                **(extra or {}),
                messages=list(messages),
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                **self._special_tokens,
            )
        except FAILURES as error:
            # Templates complain about roles and their order this way: words for the caller.
            words = f"The model's chat template refuses these messages: {str(error)[:200]}"
            raise BadRequest(words, param="messages") from error
        return _up_to_the_end_of(messages[-1]["content"], text) if continue_final_message else text

    def detokenizer(self, prompt: Sequence[int]) -> "Detokenizer":
        """For the answer to this prompt."""
        return Detokenizer(self._tokens, prompt)


class Detokenizer:
    """Token ids to text, piece by piece: never half a character, and the same text however the tokens arrive.

        _ids:    last piece handed out | pending
                                       ^ _read

    The text of pending tokens is what decoding all of `_ids` gives beyond decoding the last piece. Alone they
    might read differently: some decoders treat the start of a text specially (SentencePiece strips a space).
    """

    _CONTEXT = 6  # tokens of the prompt to start from
    _PATIENCE = 16  # pending tokens; a character has at most four bytes, so more can only be broken text

    def __init__(self, tokens: Any, prompt: Sequence[int]) -> None:
        self._tokens = tokens
        self._ids = list(prompt[-self._CONTEXT :])
        self._read = len(self._ids)

    def feed(self, token: int) -> str:
        """The text that this token completes; empty while a character is half there."""
        self._ids.append(token)
        return self._take(everything=len(self._ids) - self._read > self._PATIENCE)

    def flush(self) -> str:
        """What is still pending at the end: replacement characters for an unfinished character."""
        return self._take(everything=True)

    def _take(self, *, everything: bool) -> str:
        known = self._tokens.decode(self._ids[: self._read], skip_special_tokens=True)
        text = self._tokens.decode(self._ids, skip_special_tokens=True)
        if text.endswith("\ufffd") and not everything:
            return ""
        new: str = text[len(known) :]
        # The piece becomes the context of the next; tokens without text are forgotten, however many come.
        self._ids = self._ids[self._read :] if new else self._ids[: self._read]
        self._read = len(self._ids)
        return new


def _tool_format(template: str) -> Literal["hermes", "llama3"] | None:
    if "tools" not in template:
        return None
    if "<tool_call>" in template:
        return "hermes"
    return "llama3" if "<|python_tag|>" in template or "ipython" in template else None


def _up_to_the_end_of(content: str, text: str) -> str:
    """What a template wrote, without what it closed the final message with."""
    content = content.strip()  # as many templates do
    start = text.rfind(content)
    if start < 0:
        raise BadRequest(
            "The model's chat template changes the final message, so it cannot be continued.",
            param="continue_final_message",
        )
    return text[: start + len(content)]


def _letters() -> dict[str, int]:
    """GPT-2's letter for each byte: printable ones stand for themselves, the rest for 256 and above."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_LETTER = _letters()


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and the like as text; files hold strings, or objects with their content."""
    tokens = {}
    for key, value in config.items():
        if key.endswith("_token") and isinstance(value, dict):
            value = value.get("content")
        if key.endswith("_token") and isinstance(value, str):
            tokens[key] = value
    return tokens


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
