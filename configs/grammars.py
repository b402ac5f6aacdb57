"""Grammars: what an answer may look like, compiled by llguidance against one tokenizer, within limits.

The server compiles to refuse what cannot be served; the engine compiles again to obey. Work is bounded by
counting, not by clocks, and happens without the GIL.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llguidance

# Defaults of llguidance let one mask take seconds. What is left compiles schemas of hundreds of fields.
_LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=400_000,
    step_lexer_fuel=100_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,  # messages reach clients: no dump of the parser
)
# Unbounded whitespace lets a model fill its answer with blank lines.
_JSON_DEFAULTS: Any = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,24}"}


class BadGrammar(ValueError):
    """A grammar that cannot be compiled, or only at too great a cost."""


class Grammars:
    """Compiles grammars for one tokenizer. Making one takes a second and holds the GIL: do it at start."""

    def __init__(
        self, tokenizer_file: Path, vocab: int | None = None, end_tokens: Sequence[int] = ()
    ) -> None:
        """`vocab` is the width of the model's logits, where that matters. Raises ValueError if llguidance
        cannot read the tokenizer."""
        self._tokens = llguidance.LLTokenizer(
            tokenizer_file.read_text(encoding="utf-8"), n_vocab=vocab, eos_token=list(end_tokens) or None
        )
        self.vocab: int = vocab or self._tokens.vocab_size
        self.end_tokens = tuple(self._tokens.eos_tokens)  # one of them follows a complete answer

    def matcher(self, grammar: str) -> llguidance.LLMatcher:
        """A matcher at the start of this grammar. Raises BadGrammar."""
        matcher = llguidance.LLMatcher(self._tokens, grammar, log_level=0, limits=_LIMITS)
        refuse_errors(matcher)
        return matcher

    @classmethod
    def if_possible(
        cls, tokenizer_file: Path, vocab: int | None = None, end_tokens: Sequence[int] = ()
    ) -> "Grammars | None":
        """None for the few kinds of tokenizer that llguidance cannot read."""
        try:
            return cls(tokenizer_file, vocab, end_tokens)
        except ValueError:
            return None

    def check(self, grammar: str) -> None:
        """Compile, and look for a first token. Raises BadGrammar."""
        matcher = self.matcher(grammar)
        possible = any(matcher.compute_bitmask())
        refuse_errors(matcher)
        if not possible:
            raise BadGrammar("no text fits it")


def refuse_errors(matcher: llguidance.LLMatcher) -> None:
    """Raise BadGrammar if a matcher has given up."""
    if matcher.is_error():
        raise BadGrammar(matcher.get_error().partition("\n")[0][:200])


def json_grammar(schema: dict[str, Any]) -> str:
    """Values that a JSON schema allows."""
    return llguidance.LLMatcher.grammar_from_json_schema(schema, _JSON_DEFAULTS)


def regex_grammar(pattern: str) -> str:
    """Texts that match from beginning to end."""
    return llguidance.LLMatcher.grammar_from_regex(pattern)


def choice_grammar(choices: Sequence[str]) -> str:
    """One of these texts."""
    return llguidance.grammar_from("choice", json.dumps(choices))


def written_grammar(text: str) -> str:
    """A grammar in Lark, or in GBNF as llama.cpp reads it. Raises BadGrammar."""
    try:
        return llguidance.grammar_from("grammar", text)
    except ValueError as error:
        raise BadGrammar(str(error)[:200]) from error
