"""Tiny random HuggingFace models, and the parts of an engine around one: real code, no downloads,
milliseconds."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from configs.grammars import Grammars
from configs.plan import PlanFile
from configs.schema import SchedulerConfig
from engine import attention
from engine.engine import Engine
from engine.graph_recording import Recorder, recorded
from engine.graphs import DecodeStep
from engine.kernels import Kernels, kernels_for
from engine.messages import Sampling, Submit, TokenOutput
from engine.models import info_of
from engine.plans import ResolvedPlan, resolve_plans
from engine.rope import Rope
from engine.runner import ModelRunner
from engine.scheduler import Scheduler
from engine.startup import page_dtype_for
from kvcache.cache import CacheSize, KVCache
from kvcache.state import StateRegistry
from sparse.gate_files import Gate, write_gates

VOCAB = 256
GRAPH_BATCH = 6
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=96,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=8192,
    eos_token_id=None,
    initializer_range=0.2,  # large enough that attention is far from uniform
)


OF_FAMILY: dict[str, dict[str, Any]] = {
    "cohere2": {"sliding_window": 50, "sliding_window_pattern": 3, "pad_token_id": 0, "bos_token_id": 1},
    "gemma2": {"sliding_window": 50, "attn_logit_softcapping": 2.0, "tie_word_embeddings": False},
    "gemma3_text": {"sliding_window": 50, "sliding_window_pattern": 3, "tie_word_embeddings": False},
    "glm4": {"pad_token_id": 0},
    "gpt_oss": {
        "sliding_window": 50,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 2.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
    "granite": {"attention_multiplier": 0.25},  # its own scale, not 1 / sqrt(D)
    "mistral": {"sliding_window": None},
    "phi3": {"sliding_window": None, "pad_token_id": 0},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "smollm3": {"no_rope_layers": [1, 0, 1], "pad_token_id": 0, "bos_token_id": 1},
    "starcoder2": {"sliding_window": None, "bos_token_id": 1},
}
EAGER = {"gemma2", "gpt_oss"}  # of HuggingFace's own attentions, the only one that knows their features


def tiny_config(family: str = "llama", **overrides: Any) -> Any:
    """A config of a few thousand parameters of this model type."""
    sizes = {**SIZES, **OF_FAMILY.get(family, {}), **overrides}
    return transformers.AutoConfig.for_model(family, **sizes)


def tiny_model(family: str = "llama", seed: int = 0, **overrides: Any) -> Any:
    """A random float32 model in eval mode, with HuggingFace's own attention."""
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(tiny_config(family, **overrides)).eval()


def save_tiny(folder: Path, family: str = "llama", **overrides: Any) -> Path:
    """A model folder as HuggingFace writes it, with a tokenizer of one token per byte."""
    tiny_model(family, **overrides).save_pretrained(folder)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    return folder


def tiny_gates(folder: Path) -> Path:
    """Random gates of SeerAttention for a tiny model."""
    generator = torch.Generator().manual_seed(0)
    size, heads = SIZES["head_dim"], SIZES["num_attention_heads"]
    gates = [
        Gate(torch.randn(heads, 3 * size, size, generator=generator), None)
        for _ in range(SIZES["num_hidden_layers"])
    ]
    write_gates(folder / "gates.safetensors", gates)
    return folder / "gates.safetensors"


def plan(name: str = "dense", **parts: Any) -> PlanFile:
    """A plan from its parts: plan(prefill={"method": "minference"}, kv={"policy": "snapkv"})."""
    return PlanFile.model_validate({**parts, "name": name, "source": Path(f"{name}.yaml")})


def make_prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Token ids with repetition in them, so that some keys matter more than others."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, VOCAB, (max(1, length // 4),), generator=generator)
    picks = torch.randint(0, len(words), (length,), generator=generator)
    return tuple(words[picks].tolist())


def greedy(max_tokens: int = 8, **options: Any) -> Sampling:
    return Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, **options)


@dataclass
class TinyEngine:
    """An engine around one model, with what tests look at within reach."""

    engine: Engine
    cache: KVCache
    plans: dict[str, ResolvedPlan]
    network: Any

    def submit(
        self,
        request_id: str,
        prompt: Iterable[int],
        sampling: Sampling | None = None,
        plan: str | None = None,
        **options: Any,
    ) -> None:
        tokens = tuple(prompt)
        name = plan or next(iter(self.plans))
        self.engine.submit(Submit(request_id, tokens, len(tokens), name, sampling or greedy(), **options))

    def step(self) -> list[TokenOutput]:
        return list(self.engine.step().outputs)

    def run(self) -> dict[str, list[int]]:
        """Step until nothing is left; tokens by request, and by "request/n" for choices but the first.

        Everything must end once, and without error.
        """
        tokens: dict[str, list[int]] = {}
        ended: set[str] = set()
        while self.engine.has_work:
            for output in self.step():
                name = output.request_id + (f"/{output.choice}" if output.choice else "")
                assert name not in ended, f"{name} ended twice"
                assert output.error is None, output.error
                tokens.setdefault(name, []).extend(output.tokens)
                if output.finish_reason is not None:
                    ended.add(name)
        assert ended == set(tokens)
        return {name: found for name, found in tokens.items()}

    def answer(
        self, prompt: Iterable[int], sampling: Sampling | None = None, plan: str | None = None
    ) -> list[int]:
        """Tokens generated for one request, alone."""
        self.submit("only", prompt, sampling, plan)
        return self.run()["only"]

    def assert_empty(self) -> None:
        self.cache.check()
        usage = self.cache.usage()
        assert usage.free + usage.cached == self.cache.pool.num_pages
        assert self.cache.promises.total == self.cache.promises.covered == 0


def tiny_engine(
    *plans: PlanFile,
    network: Any = None,
    num_pages: int = 3000,
    max_length: int = 2048,
    kernels: Kernels | None = None,
    grammars: Grammars | None = None,
    share_prefixes: bool = False,
    cache_dtype: str = "auto",
    host_pages: int = 0,
    host_columns: int = 0,
    recorder: Recorder | None = None,
    **scheduling: Any,
) -> TinyEngine:
    """An engine in this process, around a tiny model, on its device, with room for a few sequences.

    recorder: decode steps of up to GRAPH_BATCH sequences are recorded by it.
    """
    attention.register()
    network = network or tiny_model()
    network.set_attn_implementation(attention.IMPLEMENTATION)
    model = info_of(network.config, "tiny", network.config.max_position_embeddings)
    states = StateRegistry()
    resolved = resolve_plans(list(plans) or [plan()], model, states, cache_dtype=cache_dtype)
    config = SchedulerConfig(**scheduling)
    device = network.device
    page_dtype = page_dtype_for(cache_dtype, device.type)
    kernels = kernels or kernels_for(device, page_dtype)
    cache = KVCache(
        model,
        CacheSize(num_pages, config.max_num_seqs, max_length, host_pages, host_columns),
        dtype=torch.float32,
        device=device,
        states=states,
        moves=kernels.moves,
        page_dtype=page_dtype,
    )
    graphs = None
    if recorder is not None:
        make = partial(DecodeStep, network, cache, kernels, Rope.of(network))
        methods = [one.decode for one in resolved.values()]
        graphs = recorded(make, methods, cache, recorder, largest=GRAPH_BATCH, memory=1 << 30)
    runner = ModelRunner(network, cache, kernels, device, graphs)
    scheduler = Scheduler(config, cache)
    engine = Engine(resolved, scheduler, runner, cache, (), share_prefixes=share_prefixes, grammars=grammars)
    return TinyEngine(engine, cache, resolved, network)


def hf_greedy(model: Any, prompt: Iterable[int], max_tokens: int) -> list[int]:
    """What HuggingFace's own generate answers, greedily, ignoring end tokens as `greedy` does."""
    tokens = torch.tensor([list(prompt)])
    model.generation_config.eos_token_id = None
    model.set_attn_implementation("eager" if model.config.model_type in EAGER else "sdpa")
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=max_tokens,
        min_new_tokens=max_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return out[0, tokens.shape[1] :].tolist()
