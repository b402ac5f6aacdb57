"""What the server and the engine say to each other: small frozen structs, msgpack on the wire, never
pickle."""

from enum import StrEnum

import msgspec


class FinishReason(StrEnum):
    """Why a request ended. Every request ends exactly once."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base of all: the class name is the tag."""


class Sampling(msgspec.Struct, frozen=True):
    """How tokens of one request are chosen. Checked by the server; the engine trusts it."""

    max_tokens: int  # >= 1
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0  # (0, 1]
    top_k: int = 0  # 0 = off
    seed: int = 0  # always set: drawn by the server where the client gave none, so that a replay repeats it
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()  # beside the model's own end tokens
    min_p: float = 0.0  # [0, 1]: of the most likely token's probability
    repetition_penalty: float = 1.0  # > 0; tokens of prompt and answer
    presence_penalty: float = 0.0  # tokens of the answer, as the next
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # token id, what is added to its logit
    min_tokens: int = 0  # no stop token before the answer has so many
    logprobs: int | None = None  # most likely tokens to report beside each sampled one
    prompt_logprobs: int | None = None  # the same beside each token of the prompt but the first
    grammar: str | None = None  # of llguidance: what the answer must look like


class Reports(msgspec.Struct, frozen=True):
    """What a client wants to know beside the answer. Nothing of it changes the answer."""

    progress: bool = False  # an output after each chunk of the prompt
    per_head: bool = False  # the cost of each layer and KV head


# --- to the engine ---


class Submit(Message, frozen=True):
    """Serve this request. `tokens` beyond `prompt_length` were generated before: they are replayed, not
    sampled. Choices of one request that each have such tokens come one by one."""

    request_id: str
    tokens: tuple[int, ...]
    prompt_length: int
    plan: str
    sampling: Sampling
    choices: int = 1  # answers to this one prompt ...
    first_choice: int = 0  # ... counted from here
    cache_salt: str = ""  # only prompts of the same salt share keys and values; ...
    share: bool = True  # ... none do where this is off
    reports: Reports = Reports()
    priority: int = 0  # lower ones are admitted first


class Abort(Message, frozen=True):
    """Forget this request, or one of its choices; each end (FinishReason.ABORT) is still reported, once."""

    request_id: str
    choice: int | None = None  # None = all


class Shutdown(Message, frozen=True):
    """Leave at once: open requests are lost."""


class ClearCache(Message, frozen=True):
    """Forget the beginnings of prompts that no live sequence counts on. The answer is CacheCleared."""


ToEngine = Submit | Abort | Shutdown | ClearCache

# --- from the engine ---


Option = str | int | float | bool | None


class LayerRun(msgspec.Struct, frozen=True):
    """Neighbouring layers that prefill by the same method."""

    first: int
    last: int  # included
    prefill: str  # method
    options: dict[str, Option]


class PlanCard(msgspec.Struct, frozen=True):
    """What clients may know of a loaded plan."""

    name: str
    digest: str  # 12 hex digits over everything that changes an answer
    prefill: str  # method
    policy: str
    decode: str
    budget: int | None  # tokens kept per KV head, None = no fixed number
    chunk: int = 0  # tokens
    dense_below: int | None = 0  # prompts with fewer tokens read everything; None = not measured yet
    recall_floor: float | None = None
    delta: int | None = None  # every so many rows one is read densely and corrects the others
    layers: tuple[LayerRun, ...] = ()
    policy_options: dict[str, Option] = {}
    decode_options: dict[str, Option] = {}


class ModelCard(msgspec.Struct, frozen=True):
    """What the server must know of the model. Sizes of the pool are 0 until weights are loaded."""

    name: str
    max_model_len: int
    vocab_size: int
    max_num_seqs: int  # answers at once
    plans: tuple[PlanCard, ...]  # the first is the default
    device: str
    dtype: str
    cache_dtype: str = "auto"  # of keys and values in pages; auto = as dtype says
    num_pages: int = 0
    page_bytes: int = 0


class Resolved(Message, frozen=True):
    """Plans and options fit the model; weights load next."""

    card: ModelCard


class Loading(Message, frozen=True):
    """What an engine that does not serve yet is doing."""

    phase: str
    fraction: float  # of the whole start, roughly
    reason: str | None = None  # why it is started again, where it is

    @property
    def words(self) -> str:
        again = "" if self.reason is None else f" again, because {self.reason}"
        return f"The model is loading{again}: {self.phase}, {self.fraction:.0%} done."


class Refused(Message, frozen=True):
    """Something a person configured is wrong: the words for them. The engine exits after this."""

    message: str


class Ready(Message, frozen=True):
    """Requests are served from now on."""

    card: ModelCard


class HeadCosts(msgspec.Struct, frozen=True):
    """What one request's prompt cost by layer and KV head: [L][Hkv]."""

    read_fraction: tuple[tuple[float, ...], ...]  # in prefill, mean of the group's query heads
    kept: tuple[tuple[int, ...], ...]  # tokens held at the end of prefill


class Cost(msgspec.Struct, frozen=True):
    """What one request cost (design: read fraction, recall, kept). The prompt's part is known first."""

    plan: str
    prefill_read_fraction: float
    attention_recall: float | None  # mean over the samples; None where nothing was sampled
    attention_recall_p5: float | None
    attention_recall_samples: int
    kv_tokens_total: int  # of the prompt
    kv_tokens_kept: float  # per row, mean, at the end of prefill
    kv_bytes: int  # pages held at the end of prefill
    cached_tokens: int  # of the prompt, taken from the prefix cache
    queue_seconds: float
    prefill_seconds: float
    heads: HeadCosts | None = None  # where asked for
    floored_chunks: int = 0  # chunks in which the plan's recall floor made heads read everything
    decode_read_fraction: float | None = None  # of the answer so far; None where it read all that was held


class Logprobs(msgspec.Struct, frozen=True):
    """How likely one token was by the model's own logits, before temperature, penalties and masks."""

    logprob: float
    rank: int  # 1 = the most likely token
    top: tuple[tuple[int, float], ...]  # the most likely tokens and their logprobs, best first


class TokenOutput(msgspec.Struct, frozen=True):
    """New tokens of one request. The last output of a request carries `finish_reason`."""

    request_id: str
    tokens: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    cost: Cost | None = None  # with the first token
    error: str | None = None  # with FinishReason.ERROR: what to tell the client
    refused: bool = False  # with an error that is the client's: asked like this, it can never be served
    logprobs: tuple[Logprobs, ...] = ()  # one per token, where the request asked
    prompt_logprobs: tuple[Logprobs, ...] = ()  # with the first token, where the request asked
    choice: int = 0  # which of the answers; each has an end of its own
    computed: int | None = None  # tokens of the prompt so far: an output of its own, where asked for
    decode_read_fraction: float | None = None  # of the answer so far, where a decode method chooses


class Stats(msgspec.Struct, frozen=True):
    """A look at the engine after a step: levels are as of now, counts are since the engine started."""

    running: int = 0
    waiting: int = 0
    pages_free: int = 0
    pages_cached: int = 0
    pages_borrowed: int = 0
    pages_private: int = 0
    kv_bytes: int = 0  # of the pages that sequences hold
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0  # prompt tokens that were looked up in the prefix cache ...
    prefix_hits: int = 0  # ... and found there
    steps: int = 0
    step_tokens: int = 0  # in the last step
    step_seconds: float = 0.0  # of the last step
    step_context: int = (
        0  # tokens before the end of the prompt chunk in it that ends last; 0 = there was none
    )
    swapped: int = 0  # sequences that are out: on the host, neither running nor waiting
    swaps_out: int = 0
    swaps_in: int = 0
    pages_host: int = 0  # of the host tier, taken
    host_hits: int = 0  # prompt tokens whose keys and values were copied back from there

    def at_rest(self) -> "Stats":
        """The counts, where nothing runs, waits or is held."""
        pages = ("pages_free", "pages_cached", "pages_borrowed", "pages_private", "pages_host")
        levels = ("running", "waiting", "swapped", *pages)
        return msgspec.structs.replace(
            self, **dict.fromkeys(levels, 0), kv_bytes=0, step_tokens=0, step_seconds=0.0
        )


class Outputs(Message, frozen=True):
    """What one step brought."""

    outputs: tuple[TokenOutput, ...]
    stats: Stats


class CacheCleared(Message, frozen=True):
    """What one ClearCache freed: pages of the pool, and of the host."""

    pages: int
    host_pages: int
    stats: Stats


FromEngine = Resolved | Loading | Refused | Ready | Outputs | CacheCleared

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
