"""From a checked request to a job for the engine: names found, prompt tokenised, lengths and ids checked."""

import asyncio
import hashlib
import secrets
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import msgspec

from engine.errors import BadRequest, NotFound, PromptTooLong
from engine.messages import ModelCard, PlanCard, Reports, Sampling, Submit
from server.bounds import SHOWN
from server.chat_request import ChatCompletionRequest
from server.request import Request
from server.structured import StructuredOutputs, asked_of
from server.text_request import CompletionRequest
from server.tokenizer import Tokenizer

MAX_PROMPT_LOGPROBS = 2**20  # values in one reply


@dataclass(frozen=True, slots=True)
class Job:
    """What is done for one request. Nothing in it can be refused any more."""

    submit: Submit
    stop: tuple[str, ...]
    plan: PlanCard
    arrived: float  # time.monotonic()
    echo: str | None = None  # the prompt's text, where it is to be shown before the answer
    return_token_ids: bool = False
    timeout: float | None = None  # seconds from arrival
    reasoning: Literal["none", "may come", "open"] = "none"  # open: the prompt ends in the middle of it
    echo_only: bool = False  # the one token that the engine must generate is not shown
    client_id: str = ""  # the x-request-id of its reply
    traceparent: str = ""  # the client's span, where it has one

    @property
    def deadline(self) -> float | None:
        """When the request is given up, in the time of time.monotonic()."""
        return None if self.timeout is None else self.arrived + self.timeout


async def prepare_chat(
    request: ChatCompletionRequest,
    card: ModelCard,
    tokenizer: Tokenizer,
    outputs: StructuredOutputs,
    *,
    kind: str = "chatcmpl-",  # how its id begins
) -> Job:
    """The job of a chat. Raises BadRequest or NotFound."""
    arrived = time.monotonic()
    plan = _find_plan(request, card)
    messages = [message.for_template() for message in request.messages]
    if request.may_call and tokenizer.tool_format is None:
        raise BadRequest("This model's chat template has no tools, or none in a known format.", param="tools")
    text = await asyncio.to_thread(
        tokenizer.render_chat,
        messages,
        add_generation_prompt=request.add_generation_prompt is not False,
        continue_final_message=request.continue_final_message,
        extra=request.chat_template_kwargs,
        tools=[tool.model_dump(exclude_none=True) for tool in request.tools] if request.may_call else None,
    )
    # The template writes the special tokens itself.
    tokens = await _encode(text, request, card, tokenizer, add_special_tokens=False, field="messages")
    job = _job(f"{kind}{uuid.uuid4().hex}", request, tokens, plan, card, "messages", arrived)
    [job] = await _structured([job], request, outputs)
    if tokenizer.marks_reasoning and job.submit.sampling.grammar is None:
        job = replace(job, reasoning=_reasoning(text))
    return job


async def prepare_completion(
    request: CompletionRequest, card: ModelCard, tokenizer: Tokenizer, outputs: StructuredOutputs
) -> list[Job]:
    """The jobs of a text completion, one for each prompt. Raises BadRequest or NotFound."""
    arrived = time.monotonic()
    plan = _find_plan(request, card)
    name = f"cmpl-{uuid.uuid4().hex}"
    jobs = []
    for number, prompt in enumerate(request.prompts):
        if isinstance(prompt, str):
            tokens = await _encode(prompt, request, card, tokenizer, add_special_tokens=True, field="prompt")
        else:
            tokens = prompt
        request_id = f"{name}-{number}" if number else name
        job = _job(request_id, request, tokens, plan, card, "prompt", arrived)
        jobs.append(await _echoing(job, prompt, request, tokenizer) if request.echo else job)
    return await _structured(jobs, request, outputs)


async def _echoing(
    job: Job, prompt: str | list[int], request: CompletionRequest, tokenizer: Tokenizer
) -> Job:
    """The job with its prompt's text to be shown before the answer, or alone."""
    if isinstance(prompt, str) and request.truncate_prompt_tokens is None:
        text = prompt
    else:
        text = await asyncio.to_thread(tokenizer.decode, job.submit.tokens)
    return replace(job, echo=text, echo_only=request.max_tokens == 0)


def expect_model(name: str, known: str) -> None:
    """Raises NotFound where a request names another model than the one that is served."""
    if name != known:
        words = f"The model {name[:SHOWN]!r} does not exist; this server has {known!r}."
        raise NotFound(words, param="model")


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
    text: str,
    request: Request,
    card: ModelCard,
    tokenizer: Tokenizer,
    *,
    add_special_tokens: bool,
    field: str,
) -> list[int]:
    limit = card.max_model_len
    if request.truncate_prompt_tokens is not None:
        # What is certainly cut off is not worth tokenising. A second context's worth of characters stays
        # before it, so that the cut does not change how the rest is divided.
        text = text[-2 * limit * tokenizer.longest_token :]
        return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)
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
    tokens = _truncated(tokens, request, card)
    _check_ids(tokens, card, field)
    _check_ids(request.stop_token_ids, card, "stop_token_ids")
    _check_ids(list(request.logit_bias), card, "logit_bias")
    max_tokens = _answer_limit(request, len(tokens), card, field)
    if request.min_tokens > max_tokens:
        words = f"'min_tokens' ({request.min_tokens}) exceeds what the context leaves: {max_tokens} tokens."
        raise BadRequest(words, param="min_tokens")
    sampling = _sampling(request, len(tokens), max_tokens, card)
    _check_choices(request.n, sampling, card)
    reports = Reports(progress=request.farspan.progress, per_head=request.farspan.per_head)
    submit = Submit(
        request_id,
        tuple(tokens),
        len(tokens),
        plan.name,
        sampling,
        choices=request.n,
        reports=reports,
        priority=request.priority,
    )
    return Job(
        submit,
        tuple(request.stop),
        plan,
        arrived,
        return_token_ids=request.return_token_ids,
        timeout=request.timeout,
    )


def _sampling(request: Request, prompt: int, max_tokens: int, card: ModelCard) -> Sampling:
    """How the tokens behind a prompt of so many are chosen."""
    return Sampling(
        max_tokens=max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=min(max(request.top_k, 0), card.vocab_size),
        seed=secrets.randbits(63) if request.seed is None else request.seed,
        ignore_eos=request.ignore_eos,
        stop_token_ids=tuple(request.stop_token_ids),
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=tuple(request.logit_bias.items()),
        min_tokens=request.min_tokens,
        logprobs=request.num_logprobs,
        prompt_logprobs=_prompt_logprobs(request, prompt),
    )


def _check_choices(n: int, sampling: Sampling, card: ModelCard) -> None:
    if n > card.max_num_seqs:
        words = f"'n' is {n}; this server runs at most {card.max_num_seqs} answers at once."
        raise BadRequest(words, param="n")
    if n > 1 and sampling.prompt_logprobs is not None:
        raise BadRequest("The prompt's log-probabilities go with one answer: 'n' must be 1.", param="n")


async def _structured(jobs: list[Job], request: Request, outputs: StructuredOutputs) -> list[Job]:
    """The jobs with the grammar that their answers must obey; last, because it costs the most to refuse."""
    grammar = await outputs.grammar(asked_of(request))
    if grammar is None:
        return jobs
    return [
        replace(
            job,
            submit=msgspec.structs.replace(
                job.submit, sampling=msgspec.structs.replace(job.submit.sampling, grammar=grammar)
            ),
        )
        for job in jobs
    ]


def _reasoning(text: str) -> Literal["none", "may come", "open"]:
    """What a model's answer to this prompt begins with. Templates open its reasoning, or close it unused."""
    end = text.rstrip()
    if end.endswith("<think>"):
        return "open"
    return "none" if end.endswith("</think>") else "may come"


def salted(job: Job, request: Request, key: str | None) -> Job:
    """The job with what its prompt may be shared under: prompts of other API keys, or of other salts, tell
    nothing about themselves by being in the prefix cache."""
    if key is None and request.cache_salt is None:
        return job
    parts = [part.encode() for part in (key or "", request.cache_salt or "")]
    framed = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    salt = hashlib.sha256(framed).hexdigest()
    return replace(job, submit=msgspec.structs.replace(job.submit, cache_salt=salt))


def _truncated(tokens: Sequence[int], request: Request, card: ModelCard) -> Sequence[int]:
    """The last tokens of the prompt, where the client asked for that."""
    count = request.truncate_prompt_tokens
    if count is None:
        return tokens
    if count == -1:
        count = max(1, card.max_model_len - max(request.answer_limit or 1, 1))
    return tokens[-count:]


def _prompt_logprobs(request: Request, prompt: int) -> int | None:
    """How many most likely tokens to report beside each of the prompt; an echo with logprobs shows them."""
    counts = [request.prompt_logprobs]
    if isinstance(request, CompletionRequest) and request.echo:
        counts.append(request.logprobs)
    asked = [count for count in counts if count is not None]
    if not asked:
        return None
    if prompt * (max(asked) + 1) > MAX_PROMPT_LOGPROBS:
        field = "prompt_logprobs" if request.prompt_logprobs is not None else "logprobs"
        words = (
            f"{max(asked)} logprobs for each of {prompt} prompt tokens are more than the"
            f" {MAX_PROMPT_LOGPROBS} values that one reply may hold."
        )
        raise BadRequest(words, param=field)
    return max(asked)


def _check_ids(tokens: Sequence[int], card: ModelCard, field: str) -> None:
    # min and max take milliseconds for a million ids, which is as long as the loop may wait.
    low, high = min(tokens, default=0), max(tokens, default=0)
    if low < 0 or high >= card.vocab_size:
        wrong = low if low < 0 else high
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
    answer = limit - prompt if request.answer_limit is None else max(request.answer_limit, 1)
    if prompt + answer > limit:
        raise PromptTooLong(
            f"{opening}you requested {prompt + answer} tokens ({prompt} in the {field},"
            f" {answer} in the completion). Please reduce the length of the {field} or completion.",
            param=field,
        )
    return answer
