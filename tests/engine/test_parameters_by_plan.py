"""Every sampling parameter goes with every plan and with every other parameter: all pairs, on one engine."""

import random
from itertools import combinations
from typing import Any

import pytest

from configs.grammars import Grammars, regex_grammar
from configs.plan import PlanFile
from engine.messages import FinishReason, Sampling, Submit, TokenOutput
from tests.engine.test_masking_policies import SMALL
from tests.engine.test_prefill_methods import METHODS
from tests.tiny import VOCAB, TinyEngine, make_prompt, plan, save_tiny, tiny_engine

SNAPKV = {"policy": "snapkv", "budget": 64}
SPARSE = {"method": "minference", **METHODS["minference"]}
PLANS: list[PlanFile] = [
    plan("dense"),
    *(plan(name, prefill={"method": name, **METHODS[name]}) for name in METHODS if name != "seerattention"),
    *(plan(name, kv={"policy": name, **SMALL[name]}) for name in SMALL),
    *(plan(name, kv={"policy": name, "budget": 64}) for name in ("snapkv", "ada-snapkv", "pyramidkv")),
    plan("quest", decode={"method": "quest", "read": 128}),
    plan("both", prefill=SPARSE, kv=SNAPKV),
]
# Each parameter with the values that it may take; the first asks for nothing.
VALUES: dict[str, tuple[Any, ...]] = {
    "plan": tuple(file.name for file in PLANS),
    "temperature": (0.0, 1.0),
    "top_p": (1.0, 0.8),
    "top_k": (0, 5),
    "min_p": (0.0, 0.1),
    "repetition_penalty": (1.0, 1.3),
    "presence_penalty": (0.0, -0.5),
    "frequency_penalty": (0.0, 0.7),
    "logit_bias": ((), ((5, 100.0), (6, -100.0))),
    "stop_token_ids": ((), (5,)),
    "min_tokens": (0, 6),
    "logprobs": (None, 0, 3),
    "prompt_logprobs": (None, 2),
    "grammar": (None, regex_grammar("[a-f]{20}")),
    "choices": (1, 2),
}
NEVER = [  # what the server refuses
    {"grammar": VALUES["grammar"][1], "min_tokens": 6},
    {"prompt_logprobs": 2, "choices": 2},
]
LENGTH, ANSWER = 300, 9  # tokens
Case = dict[str, Any]


def may_be(case: Case) -> bool:
    return not any(all(case.get(name) == value for name, value in pair.items()) for pair in NEVER)


def pairs_of(case: Case) -> set[tuple[Any, ...]]:
    return {(a, case[a], b, case[b]) for a, b in combinations(case, 2)}


def all_pairs() -> list[Case]:
    """Few cases that hold every pair of values that may be: each the most useful of thirty random ones."""
    draw = random.Random(0)
    left = {
        pair
        for a, b in combinations(VALUES, 2)
        for one in VALUES[a]
        for other in VALUES[b]
        if may_be({a: one, b: other})
        for pair in [(a, one, b, other)]
    }
    cases = []
    while left:
        a, one, b, other = min(left, key=repr)
        candidates = []
        while len(candidates) < 30:
            case = {name: draw.choice(values) for name, values in VALUES.items()} | {a: one, b: other}
            if may_be(case):
                candidates.append(case)
        best = max(candidates, key=lambda case: len(pairs_of(case) & left))
        left -= pairs_of(best)
        cases.append(best)
    return cases


CASES = all_pairs()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyEngine:
    folder = save_tiny(tmp_path_factory.mktemp("tiny"))
    grammars = Grammars(folder / "tokenizer.json", VOCAB, [0])
    return tiny_engine(*PLANS, grammars=grammars, share_prefixes=True, num_pages=6000)


def submit(tiny: TinyEngine, name: str, case: Case) -> None:
    prompt = make_prompt(LENGTH, seed=1)
    asked = {key: value for key, value in case.items() if key not in ("plan", "choices")}
    sampling = Sampling(max_tokens=ANSWER, seed=7, **asked)
    tiny.engine.submit(Submit(name, prompt, LENGTH, case["plan"], sampling, choices=case["choices"]))


def run(tiny: TinyEngine) -> dict[str, list[TokenOutput]]:
    """All outputs by request, until nothing is left."""
    found: dict[str, list[TokenOutput]] = {}
    while tiny.engine.has_work:
        for output in tiny.step():
            assert output.error is None, output
            found.setdefault(output.request_id, []).append(output)
    tiny.assert_empty()
    return found


def tokens_of(outputs: list[TokenOutput], choice: int) -> tuple[int, ...]:
    return tuple(token for output in outputs if output.choice == choice for token in output.tokens)


def test_every_pair_is_served_together_as_alone(tiny: TinyEngine) -> None:
    for number, case in enumerate(CASES):
        submit(tiny, str(number), case)
    together = run(tiny)
    assert len(together) == len(CASES)
    for number, case in enumerate(CASES):
        outputs = together[str(number)]
        ends = [output for output in outputs if output.finish_reason is not None]
        assert sorted(output.choice for output in ends) == list(range(case["choices"])), case
        for choice in range(case["choices"]):
            tokens = tokens_of(outputs, choice)
            reason = next(output.finish_reason for output in ends if output.choice == choice)
            assert reason is (FinishReason.LENGTH if len(tokens) == ANSWER else reason), case
            assert len(tokens) >= min(case["min_tokens"], ANSWER) and max(tokens) < VOCAB
            if case["grammar"] is not None:
                assert bytes(tokens[:-1]).isascii(), case
        logprobs = [one for output in outputs for one in output.logprobs]
        expected = 0 if case["logprobs"] is None else sum(len(output.tokens) for output in outputs)
        assert len(logprobs) == expected and all(len(one.top) == case["logprobs"] for one in logprobs)
        of_prompt = [one for output in outputs for one in output.prompt_logprobs]
        assert len(of_prompt) == (0 if case["prompt_logprobs"] is None else LENGTH - 1), case
        submit(tiny, "alone", case)
        alone = run(tiny)["alone"]
        for choice in range(case["choices"]):
            assert tokens_of(alone, choice) == tokens_of(outputs, choice), case


def test_all_pairs_are_there() -> None:
    seen = set().union(*map(pairs_of, CASES))
    for a, b in combinations(VALUES, 2):
        for one in VALUES[a]:
            for other in VALUES[b]:
                assert (a, one, b, other) in seen or not may_be({a: one, b: other})
