"""Answers obey their grammar, whatever the model would rather say, and nobody else notices."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from configs.grammars import (
    BadGrammar,
    Grammars,
    choice_grammar,
    json_grammar,
    regex_grammar,
    written_grammar,
)
from engine import constraint
from engine.messages import FinishReason, Sampling, Submit, TokenOutput
from server.tokenizer import Tokenizer
from tests.tiny import VOCAB, TinyEngine, greedy, make_prompt, plan, save_tiny, tiny_engine

END = 0  # the token that ends an answer in these tests
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "maximum": 9, "minimum": 0}, "on": {"type": "boolean"}},
    "required": ["x", "on"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def grammars(folder: Path) -> Grammars:
    return Grammars(folder / "tokenizer.json", VOCAB, [END])


@pytest.fixture(scope="module")
def engine(grammars: Grammars) -> TinyEngine:
    return tiny_engine(plan(), plan("snapkv", kv={"policy": "snapkv", "budget": 64}), grammars=grammars)


@pytest.fixture(scope="module")
def text_of(folder: Path) -> Callable[[list[int]], str]:
    return Tokenizer(folder).decode


def asked(grammar: str, **options: object) -> Sampling:
    return Sampling(**{"max_tokens": 80, "seed": 5, "grammar": grammar, **options})  # type: ignore[arg-type]


CASES: dict[str, tuple[str, Callable[[str], object]]] = {
    "a schema": (json_grammar(POINT), lambda text: {"x", "on"} == set(json.loads(text))),
    "a regex": (regex_grammar("(ab){2,4}-[0-9]{3}"), re.compile("(ab){2,4}-[0-9]{3}").fullmatch),
    "a choice": (choice_grammar(["naïve", "no way"]), lambda text: text in ("naïve", "no way")),
    "Lark": (written_grammar('start: "x" n ("," n)*\nn: /[0-9]/\n'), re.compile("x[0-9](,[0-9])*").match),
    "GBNF": (written_grammar('root ::= "up" | "down"'), lambda text: text in ("up", "down")),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_matches_its_grammar_and_ends_when_it_is_complete(
    engine: TinyEngine, text_of: Callable[[list[int]], str], case: str, temperature: float
) -> None:
    grammar, fits = CASES[case]
    for name in ("dense", "snapkv"):
        answer = engine.answer(make_prompt(90), asked(grammar, temperature=temperature), plan=name)
        if case != "Lark":  # a list may go on to the limit
            assert answer[-1] == END and len(answer) < 80
        assert fits(text_of([token for token in answer if token != END])), answer
    engine.assert_empty()


def test_batch_mates_neither_help_nor_hinder(engine: TinyEngine) -> None:
    mates = {
        "schema": asked(json_grammar(POINT)),
        "regex": asked(regex_grammar("[a-f]{20}"), temperature=0.0),
        "free": Sampling(max_tokens=30, seed=9),
    }
    alone = {name: engine.answer(make_prompt(70), sampling) for name, sampling in mates.items()}
    for name, sampling in mates.items():
        engine.submit(name, make_prompt(70), sampling)
    assert engine.run() == alone


def test_every_choice_of_a_request_has_a_grammar_of_its_own(
    engine: TinyEngine, text_of: Callable[[list[int]], str]
) -> None:
    prompt = make_prompt(70)
    engine.engine.submit(Submit("three", prompt, 70, "dense", asked(regex_grammar("[a-z]{9}")), choices=3))
    answers: dict[int, list[int]] = {}
    while engine.engine.has_work:
        for output in engine.step():
            answers.setdefault(output.choice, []).extend(output.tokens)
    texts = {text_of(answer[:-1]) for answer in answers.values()}
    assert len(texts) == 3 and all(re.fullmatch("[a-z]{9}", text) for text in texts)


def test_a_replayed_answer_goes_on_where_it_was(engine: TinyEngine) -> None:
    sampling = asked(regex_grammar("[a-f]{6}[0-9]{6}"))
    whole = engine.answer(make_prompt(70), sampling)
    begun = (*make_prompt(70), *whole[:8])
    engine.engine.submit(Submit("again", begun, 70, "dense", sampling))
    assert engine.run()["again"] == whole[8:]


def test_others_go_on_while_a_grammar_compiles(engine: TinyEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = []
    monkeypatch.setattr(constraint.Constraint, "is_prepared", property(lambda self: bool(ready)))
    engine.submit("slow", make_prompt(70), asked(regex_grammar("[a-z]{3}")))
    engine.submit("gone", make_prompt(70), asked(regex_grammar("[a-z]{3}")))
    engine.submit("free", make_prompt(70), greedy(5))
    assert engine.engine.stats().waiting == 3
    outputs: list[TokenOutput] = []
    while not any(output.finish_reason for output in outputs):
        outputs += engine.step()
    assert {output.request_id for output in outputs} == {"free"}
    assert engine.engine.stats().waiting == 2
    engine.engine.abort("gone")
    ready.append(True)
    while engine.engine.has_work:
        outputs += engine.step()
    ends = {output.request_id: output.finish_reason for output in outputs if output.finish_reason}
    assert ends == {"free": FinishReason.LENGTH, "gone": FinishReason.ABORT, "slow": FinishReason.STOP}


def test_a_mask_that_never_comes_ends_its_request_only(
    engine: TinyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = constraint.Constraint.allowed
    calls = 0

    def fails_at_the_third(self: constraint.Constraint) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise BadGrammar("too slow")
        return allowed(self)

    monkeypatch.setattr(constraint.Constraint, "allowed", fails_at_the_third)
    engine.submit("bad", make_prompt(70), asked(regex_grammar("[a-z]{30}")))
    engine.submit("good", make_prompt(70), greedy(12))
    outputs: list[TokenOutput] = []
    while engine.engine.has_work:
        outputs += engine.step()
    (failed,) = [output for output in outputs if output.error]
    assert failed.request_id == "bad" and "too slow" in str(failed.error)
    assert sum(len(output.tokens) for output in outputs if output.request_id == "good") == 12
    engine.assert_empty()


def test_a_compiler_that_panics_ends_its_request_only(
    engine: TinyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panic(BaseException):
        """As Rust's are in Python."""

    def panics(self: constraint.Constraint, token: int) -> torch.Tensor:
        raise Panic("index out of bounds: the length is 3")

    monkeypatch.setattr(constraint.Constraint, "_advance", panics)
    engine.submit("bad", make_prompt(70), asked(regex_grammar("[a-z]{30}")))
    engine.submit("good", make_prompt(70), greedy(4))
    outputs: list[TokenOutput] = []
    while engine.engine.has_work:
        outputs += engine.step()
    (failed,) = [output for output in outputs if output.error]
    assert failed.request_id == "bad" and "index" not in str(failed.error)
    assert sum(len(output.tokens) for output in outputs if output.request_id == "good") == 4
    engine.assert_empty()


@pytest.mark.parametrize(
    "grammar",
    [
        regex_grammar("(a"),
        json_grammar({"type": "wrong"}),
        json_grammar({"$ref": "http://localhost/schema.json"}),
        json_grammar({"$ref": "#"}),
        "start: nowhere",
        json_grammar({"enum": [f"value {n}" * 20 for n in range(20_000)]}),
    ],
    ids=["regex", "type", "remote reference", "endless reference", "rule", "size"],
)
def test_bad_grammars_are_refused_in_a_few_words(grammars: Grammars, grammar: str) -> None:
    with pytest.raises(BadGrammar) as refusal:
        grammars.check(grammar)
    assert 0 < len(str(refusal.value)) <= 200
