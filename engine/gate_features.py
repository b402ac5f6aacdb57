"""What a gate learns from: pooled queries and keys of a text, and the attention that each page then got.

Both depend on the model alone, so a text runs through it once, read densely, with a recorder in the place of
a prefill method: what it records is what SeerAttention sees when it serves.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from configs.model import PAGE_SIZE, ModelInfo
from configs.plan import PlanFile
from configs.schema import SchedulerConfig
from engine import attention
from engine.engine import Engine
from engine.kernels import kernels_for
from engine.messages import Sampling, Submit
from engine.models import load_model
from engine.plans import resolve_plan
from engine.rope import Rope
from engine.runner import ModelRunner
from engine.scheduler import Scheduler
from engine.self_check import checked
from kvcache.cache import CacheSize, KVCache
from kvcache.state import StateRegistry
from sparse.base import Chunk, KeyView, PrefillMethod
from sparse.base import StateRegistry as States
from sparse.page_scores import key_pages
from sparse.pattern_masks import page_means
from sparse.seerattention import pooled_keys
from sparse.selection import Selection, dense


@dataclass(frozen=True)
class Features:
    """Text of P whole pages. [...] is one axis: the layers of a piece, or the pieces of a layer."""

    q: Tensor  # [..., Hq, P, D] mean query of each page before RoPE
    k: Tensor  # [..., Hkv, P, 3 D] largest, smallest and mean key of each page before RoPE
    top: Tensor  # [..., Hq, P, P] largest probability between a page of queries and a page of keys
    mass: Tensor  # [..., Hq, P, P] probability that falls on a page of keys, mean over a page of queries

    def write(self, path: Path) -> None:
        """One file of float16, there whole or not at all."""
        part = path.with_suffix(".part")
        save_file({name: tensor.half().cpu() for name, tensor in vars(self).items()}, part)
        part.replace(path)

    @classmethod
    def read(cls, paths: Sequence[Path], layer: int, device: torch.device) -> "Features":
        """One layer of several pieces, stacked: float32."""
        found: dict[str, list[Tensor]] = {field.name: [] for field in dataclasses.fields(cls)}
        for path in paths:
            with safe_open(path, framework="pt") as file:
                for name, tensors in found.items():
                    tensors.append(file.get_slice(name)[layer])
        return cls(**{name: torch.stack(tensors).to(device).float() for name, tensors in found.items()})


class _Recorder:
    """A prefill method that reads everything, and keeps what a gate would see and what it should say."""

    grid = False
    last_rows = 0

    def __init__(self, model: ModelInfo, length: int, device: torch.device) -> None:
        heads, size, pages = model.num_query_heads, model.head_dim, length // PAGE_SIZE
        shapes = {
            "q": (heads, pages, size),
            "k": (model.num_kv_heads, pages, 3 * size),
            "top": (heads, pages, pages),
            "mass": (heads, pages, pages),
        }
        self.found = Features(
            **{name: torch.zeros(model.num_layers, *shape, device=device) for name, shape in shapes.items()}
        )

    def attach(self, model: ModelInfo, files: Path, states: States) -> None:
        """Nothing to read and no state."""

    def select(self, layer: int, q: Tensor, keys: KeyView, chunk: Chunk, *, scale: float) -> Selection:
        num_tokens = chunk.start + chunk.length
        assert chunk.start % PAGE_SIZE == num_tokens % PAGE_SIZE == 0, chunk
        blocks = slice(chunk.start // PAGE_SIZE, num_tokens // PAGE_SIZE)
        self.found.q[layer, :, blocks] = page_means(chunk.pre_rope()[0], 0).float()
        by_page = key_pages(keys, num_tokens)
        self.found.k[layer, :, : blocks.stop] = pooled_keys(by_page, num_tokens, chunk.rotation)
        k = by_page.flatten(1, 2)
        for block in range(blocks.start, blocks.stop):
            first = block * PAGE_SIZE - chunk.start
            top, mass = page_attention(
                q[:, first : first + PAGE_SIZE], k[:, : (block + 1) * PAGE_SIZE], scale
            )
            self.found.top[layer, :, block, : block + 1] = top
            self.found.mass[layer, :, block, : block + 1] = mass
        return dense(q.device)


def page_attention(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What the 64 rows of the last page pay to each page: the largest probability, and the mean of the sums.

    q [Hq, 64, D], k [Hkv, 64 P, D] after RoPE -> [Hq, P] float32 each.
    """
    num_kv_heads, num_tokens, head_dim = k.shape
    rows = (q.float() * scale).reshape(num_kv_heads, -1, head_dim)  # [Hkv, G * 64, D]
    scores = rows @ k.float().mT
    own = scores.view(num_kv_heads, -1, PAGE_SIZE, num_tokens)[..., -PAGE_SIZE:]
    own.masked_fill_(
        torch.ones(PAGE_SIZE, PAGE_SIZE, dtype=torch.bool, device=q.device).triu(1), float("-inf")
    )
    weights = scores.softmax(-1).view(q.shape[0], PAGE_SIZE, -1, PAGE_SIZE)
    return weights.amax((1, 3)), weights.sum(3).mean(1)


class FeatureReader:
    """A model, read densely piece by piece, and what its gates would learn from each."""

    def __init__(self, folder: Path, model: ModelInfo, *, length: int, device: str, dtype: str) -> None:
        """`length`: tokens of a piece, whole pages."""
        assert length % PAGE_SIZE == 0, length
        attention.register()
        network: Any = load_model(folder, dtype=dtype, device=device, attention=attention.IMPLEMENTATION)
        on, kind = torch.device(device), getattr(torch, dtype)
        self.device = on
        self.rotations = Rope.of(network).rotations
        self._model, self._length = model, length
        plan = resolve_plan(PlanFile.model_validate({"name": "dense", "source": Path("dense.yaml")}), model)
        self._plan = dataclasses.replace(plan, dense_below=0)
        kernels = checked(kernels_for(on), model, kind, on)
        cache = KVCache(
            model,
            CacheSize(plan.pages_needed(length, length + 1), 1, length + PAGE_SIZE),
            dtype=kind,
            device=on,
            states=StateRegistry(),
            moves=kernels.moves,
        )
        scheduler = Scheduler(SchedulerConfig(max_num_seqs=1), cache)
        self._plans = {"dense": self._plan}
        self._engine = Engine(self._plans, scheduler, ModelRunner(network, cache, kernels, on), cache, ())

    def read(self, tokens: Sequence[int]) -> Features:
        """Features of one piece, in every layer."""
        assert len(tokens) == self._length, (len(tokens), self._length)
        recorder = _Recorder(self._model, self._length, self.device)
        self.run(tokens, recorder)
        return recorder.found

    def run(self, tokens: Sequence[int], method: PrefillMethod) -> None:
        """Let a method of prefill see one piece, in every layer."""
        methods = (method,) * self._model.num_layers
        self._plans["dense"] = dataclasses.replace(self._plan, methods=methods)
        sampling = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True)
        self._engine.submit(Submit("piece", tuple(tokens), len(tokens), "dense", sampling, share=False))
        while self._engine.has_work:
            for output in self._engine.step().outputs:
                if output.error is not None:
                    raise RuntimeError(output.error)
