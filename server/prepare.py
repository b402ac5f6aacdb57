"""From a checked request to a job for the engine: names found, prompt tokenised, lengths and ids checked."""

import asyncio
import secrets
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import BadRequest, NotFound, PromptTooLong
from engine.messages import ModelCard, PlanCard, Sampling, Submit
from server.protocol import SHOWN, ChatCompletionRequest, CompletionRequest, Request
from server.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Job:
    """What is done for one request. Nothing in it can be refused any more."""

    submit: Submit
    stop: tuple[str, ...]
    plan: PlanCard
    arrived: float  # time.monotonic()


async def prepare_chat(request: ChatCompletionRequest, card: ModelCard, tokenizer: Tokenizer) -> Job:
    """The job of a chat. Raises BadRequest or NotFound."""
    arrived = time.monotonic()
    plan = _find_plan(request, card)
    messages = [message.for_template() for message in request.messages]
    text = await asyncio.to_thread(tokenizer.render_chat, messages)
    # The template writes the special tokens itself.
    tokens = await _encode(text, card, tokenizer, add_special_tokens=False, field="messages")
    return _job(f"chatcmpl-{uuid.uuid4().hex}", request, tokens, plan, card, "messages", arrived)


async def prepare_completion(request: CompletionRequest, card: ModelCard, tokenizer: Tokenizer) -> Job:
    """The job of a text completion. Raises BadRequest or NotFound."""
    arrived = time.monotonic()
    plan = _find_plan(request, card)
    if isinstance(request.prompt, str):
        tokens = await _encode(request.prompt, card, tokenizer, add_special_tokens=True, field="prompt")
    else:
        tokens = request.prompt
    return _job(f"cmpl-{uuid.uuid4().hex}", request, tokens, plan, card, "prompt", arrived)


def _find_plan(request: Request, card: ModelCard) -> PlanCard:
    if request.plan is None:
        return card.plans[0]
    for plan in card.plans:
        if plan.name == request.plan:
            return plan
    names = ", ".join(plan.name for plan in card.plans)
    words = f"The plan {request.plan[:SHOWN]!r} is not loaded; loaded are: {names}."
    raise NotFound(words, param="plan", code="plan_not_found")


async def _encode(
    text: str, card: ModelCard, tokenizer: Tokenizer, *, add_special_tokens: bool, field: str
) -> list[int]:
    limit = card.max_model_len
    if len(text) > limit * tokenizer.longest_token:  # cannot fit: not worth tokenising
        raise PromptTooLong(
            f"This model's maximum context length is {limit} tokens. However, your {field}"
            f" of {len(text)} characters resulted in more. Please reduce the length of the {field}.",
            param=field,
        )
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)


def _job(
    request_id: str,
    request: Request,
    tokens: Sequence[int],
    plan: PlanCard,
    card: ModelCard,
    field: str,
    arrived: float,
) -> Job:
    if not tokens:
        raise BadRequest(f"The {field} must hold at least one token.", param=field)
    _check_ids(tokens, card, field)
    _check_ids(request.stop_token_ids, card, "stop_token_ids")
    sampling = Sampling(
        max_tokens=_answer_limit(request, len(tokens), card, field),
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=min(max(request.top_k, 0), card.vocab_size),
        seed=secrets.randbits(63) if request.seed is None else request.seed,
        ignore_eos=request.ignore_eos,
        stop_token_ids=tuple(request.stop_token_ids),
    )
    submit = Submit(request_id, tuple(tokens), len(tokens), plan.name, sampling)
    return Job(submit, tuple(request.stop), plan, arrived)


def _check_ids(tokens: Sequence[int], card: ModelCard, field: str) -> None:
    wrong = next((token for token in tokens if not 0 <= token < card.vocab_size), None)
    if wrong is not None:
        raise BadRequest(
            f"Invalid value for {field!r}: token ids are 0 to {card.vocab_size - 1} (got {str(wrong)[:40]}).",
            param=field,
        )


def _answer_limit(request: Request, prompt: int, card: ModelCard, field: str) -> int:
    """max_tokens of the answer; OpenAI's words where prompt and answer do not fit."""
    limit = card.max_model_len
    opening = f"This model's maximum context length is {limit} tokens. However, "
    if prompt >= limit:
        raise PromptTooLong(
            f"{opening}your {field} resulted in {prompt} tokens. Please reduce the length of the {field}.",
            param=field,
        )
    answer = limit - prompt if request.answer_limit is None else request.answer_limit
    if prompt + answer > limit:
        raise PromptTooLong(
            f"{opening}you requested {prompt + answer} tokens ({prompt} in the {field},"
            f" {answer} in the completion). Please reduce the length of the {field} or completion.",
            param=field,
        )
    return answer
