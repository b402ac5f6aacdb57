"""Logprobs of prompts and answers are those of HuggingFace's model, whatever the chunks and the batch."""

import pytest
import torch

from engine import scoring
from engine.messages import Logprobs, TokenOutput
from tests.tiny import greedy, make_prompt, plan, tiny_engine, tiny_model

LENGTH = 300


def outputs_of(
    request_id: str, outputs: list[TokenOutput]
) -> tuple[list[Logprobs], list[Logprobs], list[int]]:
    """Logprobs of the prompt and of the answer, and the answer."""
    mine = [output for output in outputs if output.request_id == request_id]
    of_prompt = [one for output in mine for one in output.prompt_logprobs]
    assert not any(output.prompt_logprobs for output in mine[1:]), "they come with the first token"
    return of_prompt, [one for o in mine for one in o.logprobs], [token for o in mine for token in o.tokens]


@pytest.mark.parametrize("family", ["llama", "granite"])  # granite divides its logits behind the head
def test_logprobs_of_prompt_and_answer_are_huggingfaces(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "SLICE_ELEMENTS", 256 * 7)  # slices of seven rows
    extra = {"logits_scaling": 4.0} if family == "granite" else {}
    model = tiny_model(family, **extra)
    prompt = make_prompt(LENGTH)
    engine = tiny_engine(plan(prefill={"chunk": 128}), network=model, max_num_batched_tokens=160)
    engine.submit("asks", prompt, greedy(4, prompt_logprobs=3, logprobs=2))
    engine.submit("does not", make_prompt(90, seed=1), greedy(4))
    outputs: list[TokenOutput] = []
    while engine.engine.has_work:
        outputs += engine.step()
    of_prompt, of_answer, answer = outputs_of("asks", outputs)
    assert len(of_prompt) == LENGTH - 1 and len(of_answer) == 4
    others = outputs_of("does not", outputs)
    assert others[:2] == ([], [])

    model.set_attn_implementation("sdpa")
    tokens = [*prompt, *answer]
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    for position, one in enumerate([*of_prompt, *of_answer], start=1):
        row = expected[position - 1]
        assert one.logprob == pytest.approx(float(row[tokens[position]]), abs=2e-4)
        assert len(one.top) == (3 if position < LENGTH else 2)
        assert [value for _, value in one.top] == pytest.approx(
            row.topk(len(one.top)).values.tolist(), abs=2e-4
        )
    assert of_answer[0].rank == 1 and of_answer[0].top[0] == (answer[0], of_answer[0].logprob)
    engine.assert_empty()


def test_penalties_hold_over_a_whole_answer() -> None:
    engine = tiny_engine()
    free = engine.answer(make_prompt(100), greedy(40))
    assert len(set(free)) < 40  # a random model repeats itself
    once = engine.answer(make_prompt(100), greedy(40, presence_penalty=2.0, frequency_penalty=2.0))
    banned = greedy(40, logit_bias=tuple((token, -100.0) for token in set(free)))
    assert not set(engine.answer(make_prompt(100), banned)) & set(free)
    counts = [once.count(token) for token in set(once)]
    assert max(counts) < max(free.count(token) for token in set(free))


def test_a_stop_token_ends_an_answer_only_after_min_tokens() -> None:
    engine = tiny_engine()
    free = engine.answer(make_prompt(100), greedy(12))
    stopped = engine.answer(make_prompt(100), greedy(12, stop_token_ids=(free[2],)))
    assert stopped == free[: free.index(free[2]) + 1]
    later = engine.answer(make_prompt(100), greedy(12, stop_token_ids=(free[2],), min_tokens=6))
    assert len(later) > 6 and free[2] not in later[:6]
