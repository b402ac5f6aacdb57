"""What a request may hold at most; `INT64` and `INT31` bound numbers themselves."""

INT64 = 2**63
INT31 = 2**31
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 1024  # what may be held back of a stream
MAX_STOP_TOKENS = 128
MAX_BIASES = 1024
MAX_LOGPROBS = 20  # OpenAI's and vLLM's most
MAX_CHOICES = 1024
MAX_TOOLS = 128
MAX_TOOL_BYTES = 512 * 1024  # of JSON, all together
MAX_DETOKENIZED = 2**21  # token ids
MAX_N = 128  # choices of one request, as OpenAI has it
MAX_TEMPLATE_KEYS = 32
MAX_TEMPLATE_BYTES = 16 * 1024  # of JSON
MAX_TIMEOUT = 86_400.0  # seconds
MAX_MESSAGES = 4096
MAX_PROMPTS = 256
SHOWN = 200  # characters of the caller's own input in an error
