"""Structured outputs: what a request wants its answer to look like, as a grammar, checked off the loop."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from configs.grammars import (
    BadGrammar,
    Grammars,
    choice_grammar,
    json_grammar,
    regex_grammar,
    written_grammar,
)
from engine.errors import BadRequest, Overloaded
from server.bounds import SHOWN
from server.chat_request import ChatCompletionRequest
from server.request import Request

MAX_CHARACTERS = 256 * 1024  # of a grammar
SECONDS = 5.0  # to compile one; llguidance counts its own work, so that none takes as long by itself
WORKERS = 2


@dataclass(frozen=True, slots=True)
class Asked:
    """A grammar still to be made, and the field to blame if it is wrong."""

    field: str
    make: Callable[[], str]


class StructuredOutputs:
    """Owns the threads that compile. `grammars` is None where the tokenizer cannot have any."""

    def __init__(self, grammars: Grammars | None) -> None:
        self._grammars = grammars
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="grammar")

    async def grammar(self, asked: Asked | None) -> str | None:
        """The checked grammar of a request, None if it asks for none. Raises BadRequest or Overloaded."""
        if asked is None:
            return None
        if self._grammars is None:
            raise BadRequest("Structured outputs are not possible with this model.", param=asked.field)
        work = self._workers.submit(_checked, asked.make, self._grammars)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(work), SECONDS)
        except BadGrammar as error:
            raise BadRequest(f"Invalid value for {asked.field!r}: {error}.", param=asked.field) from error
        except TimeoutError as error:
            if work.cancelled():  # it was still waiting for the grammars of others
                raise Overloaded("Too many structured outputs are being compiled.") from error
            words = f"Invalid value for {asked.field!r}: it takes more than {SECONDS} seconds to compile."
            raise BadRequest(words, param=asked.field) from error


def asked_of(request: Request) -> Asked | None:
    """What a request's `response_format`, `structured_outputs` or forced `tool_choice` ask for."""
    if isinstance(request, ChatCompletionRequest) and request.must_call:
        schema = _schema_of_calls(request)
        return Asked("tools", lambda: json_grammar(schema))
    form, outputs = request.response_format, request.structured_outputs
    if form is not None and form.type == "json_object":
        return Asked("response_format", lambda: json_grammar({"type": "object"}))
    if form is not None and form.json_schema is not None:
        schema = form.json_schema.schema_
        return Asked("response_format", lambda: json_grammar(schema))
    if outputs is None:
        return None
    if outputs.json_schema is not None:
        of_json = outputs.json_schema
        return Asked("structured_outputs", lambda: json_grammar(of_json))
    if outputs.regex is not None:
        pattern = outputs.regex
        return Asked("structured_outputs", lambda: regex_grammar(pattern))
    if outputs.choice is not None:
        choices = outputs.choice
        return Asked("structured_outputs", lambda: choice_grammar(choices))
    if outputs.grammar is not None:
        text = outputs.grammar
        return Asked("structured_outputs", lambda: written_grammar(text))
    return Asked("structured_outputs", lambda: json_grammar({"type": "object"}))


def _schema_of_calls(request: ChatCompletionRequest) -> dict[str, Any]:
    """The arguments of the named function, or a list of calls. Definitions move to the root, where references
    look for them."""
    if request.named_tool is not None:
        return next(
            tool.function.parameters for tool in request.tools if tool.function.name == request.named_tool
        )
    definitions: dict[str, Any] = {}
    calls = []
    for tool in request.tools:
        parameters = dict(tool.function.parameters)
        for name, definition in dict(parameters.pop("$defs", {})).items():
            if definitions.setdefault(name, definition) != definition:
                words = f"Two of the tools define {name[:SHOWN]!r} differently under '$defs'."
                raise BadRequest(words, param="tools")
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, "parameters": parameters},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    calls_schema = {"type": "array", "minItems": 1, "items": {"anyOf": calls}, "$defs": definitions}
    return calls_schema if request.parallel_tool_calls else calls_schema | {"maxItems": 1}


def _checked(make: Callable[[], str], grammars: Grammars) -> str:
    grammar = make()
    if len(grammar) > MAX_CHARACTERS:
        raise BadGrammar(f"{len(grammar)} characters are more than the limit of {MAX_CHARACTERS}")
    grammars.check(grammar)
    return grammar
