"""Tiny random HuggingFace models, and the parts of an engine around one: real code, no downloads,
milliseconds."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from configs.model import ModelInfo
from configs.plan import PlanFile
from configs.schema import SchedulerConfig
from engine import attention
from engine.engine import Engine
from engine.kernels import Kernels, kernels_for
from engine.messages import Sampling, Submit, TokenOutput
from engine.plans import ResolvedPlan, resolve_plans
from engine.runner import ModelRunner
from engine.scheduler import Scheduler
from kvcache.cache import CacheSize, KVCache
from kvcache.state import StateRegistry

VOCAB = 256
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


OF_FAMILY = {
    "granite": {"attention_multiplier": 0.25},  # its own scale, not 1 / sqrt(D)
    "mistral": {"sliding_window": None},
    "phi3": {"sliding_window": None, "pad_token_id": 0},
    "starcoder2": {"sliding_window": None, "bos_token_id": 1},
}


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


def info_of(model: Any) -> ModelInfo:
    config = model.config
    return ModelInfo(
        name="tiny",
        num_layers=config.num_hidden_layers,
        num_query_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        max_length=config.max_position_embeddings,
    )


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
    ) -> None:
        tokens = tuple(prompt)
        name = plan or next(iter(self.plans))
        self.engine.submit(Submit(request_id, tokens, len(tokens), name, sampling or greedy()))

    def step(self) -> list[TokenOutput]:
        return list(self.engine.step().outputs)

    def run(self) -> dict[str, list[int]]:
        """Step until nothing is left; tokens by request. Every request must end once, and without error."""
        tokens: dict[str, list[int]] = {}
        ended: set[str] = set()
        while self.engine.has_work:
            for output in self.step():
                assert output.request_id not in ended, f"{output.request_id} ended twice"
                assert output.error is None, output.error
                tokens.setdefault(output.request_id, []).extend(output.tokens)
                if output.finish_reason is not None:
                    ended.add(output.request_id)
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
        assert self.cache.usage().free == self.cache.pool.num_pages


def tiny_engine(
    *plans: PlanFile,
    network: Any = None,
    num_pages: int = 3000,
    max_length: int = 2048,
    kernels: Kernels | None = None,
    **scheduling: Any,
) -> TinyEngine:
    """An engine in this process, around a tiny model, with room for a few sequences."""
    attention.register()
    network = network or tiny_model()
    network.set_attn_implementation(attention.IMPLEMENTATION)
    model = info_of(network)
    states = StateRegistry()
    resolved = resolve_plans(list(plans) or [plan()], model, states)
    config = SchedulerConfig(**scheduling)
    cache = KVCache(
        model,
        CacheSize(num_pages, config.max_num_seqs, max_length),
        dtype=torch.float32,
        device=torch.device("cpu"),
        states=states,
    )
    device = torch.device("cpu")
    runner = ModelRunner(network, cache, kernels or kernels_for(device), device)
    return TinyEngine(Engine(resolved, Scheduler(config, cache), runner, cache, ()), cache, resolved, network)


def hf_greedy(model: Any, prompt: Iterable[int], max_tokens: int) -> list[int]:
    """What HuggingFace's own generate answers, greedily, ignoring end tokens as `greedy` does."""
    tokens = torch.tensor([list(prompt)])
    model.generation_config.eos_token_id = None
    model.set_attn_implementation("sdpa")
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=max_tokens,
        min_new_tokens=max_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return out[0, tokens.shape[1] :].tolist()
