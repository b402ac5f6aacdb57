"""RequestSeries: what is counted and timed of requests. RequestMeter feeds it, one request at a time."""

from server.series import Series

# Prefill of a long prompt takes minutes, so the tails reach further than usual (vLLM's do, too).
_TTFT_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
TOKEN_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
_PHASE_SECONDS = (
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60),
    *(120, 240, 480, 960, 1920, 7680),
)
_LENGTHS = tuple(factor * 10**power for power in range(6) for factor in (1, 2, 5)) + (1_000_000,)
_FRACTIONS = (0.01, 0.02, 0.05, *(step / 10 for step in range(1, 11)))
_COUNTS = (1, 2, 5, 10, 20)
_RECALLS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99, 0.995, 1)


class RequestSeries:
    """Histograms in three groups, and how often what happened."""

    def __init__(self, series: Series) -> None:
        self.times = Times(series)
        self.sizes = Sizes(series)
        self.quality = Quality(series)
        self.opened = series.counter("requests", "Requests by plan.", "plan")
        self.ended = series.counter("request_success", "Ended requests by reason.", "finished_reason")
        self.refused = series.counter("admission_rejections", "Requests refused for lack of room.", "reason")
        self.fallbacks = series.counter(
            "dense_fallbacks", "Prompts that a sparse plan read densely.", "reason"
        )


class Times:
    """How long requests took, and what of them."""

    def __init__(self, series: Series) -> None:
        make = series.histogram
        self.ttft = make("time_to_first_token_seconds", "From arrival to the first token.", _TTFT_SECONDS)
        self.between = make("inter_token_latency_seconds", "Between two tokens of an answer.", TOKEN_SECONDS)
        self.latency = make("e2e_request_latency_seconds", "From arrival to the end.", _PHASE_SECONDS)
        self.queued = make("request_queue_time_seconds", "Waiting for admission.", _PHASE_SECONDS)
        self.prefilled = make("request_prefill_time_seconds", "Computing the prompt.", _PHASE_SECONDS)
        self.decoded = make("request_decode_time_seconds", "First to last token.", _PHASE_SECONDS)
        self.inferred = make(
            "request_inference_time_seconds", "From admission to the last token.", _PHASE_SECONDS
        )
        self.per_token = make(
            "request_time_per_output_token_seconds", "Mean time between tokens, by request.", TOKEN_SECONDS
        )


class Sizes:
    """How many tokens, and how many were asked for."""

    def __init__(self, series: Series) -> None:
        make = series.histogram
        self.prompt = make("request_prompt_tokens", "Prompt tokens of a request.", _LENGTHS)
        self.answer = make("request_generation_tokens", "Generated tokens of a request.", _LENGTHS)
        self.computed = make(
            "request_prefill_kv_computed_tokens", "Prompt tokens not taken from the prefix cache.", _LENGTHS
        )
        self.choices = make("request_params_n", "Choices that a request asks for.", _COUNTS)
        self.answer_limit = make("request_params_max_tokens", "Longest answer allowed.", _LENGTHS)


class Quality:
    """What plans left out, and what that missed."""

    def __init__(self, series: Series) -> None:
        make = series.histogram
        self.read_fraction = make(
            "prefill_read_fraction", "Keys read x query rows over causal cells, of a prompt.", _FRACTIONS
        )
        self.kept_fraction = make(
            "kept_fraction", "Prompt tokens kept per row at the end of prefill, over all.", _FRACTIONS
        )
        self.recall = make("attention_recall", "Mean sampled attention recall of a prompt.", _RECALLS)
        self.recall_p5 = make(
            "attention_recall_p5", "5th percentile of a prompt's sampled attention recall.", _RECALLS
        )
