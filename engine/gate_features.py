"""What a gate learns from: queries and pooled keys of a text, and the attention that each page then got.

All depend on the model alone, so a text runs through it once, read densely, with a recorder in the place of
a prefill method: what it records is what a gate sees when it serves.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

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
from engine.rope import Rope, Rotation
from engine.runner import ModelRunner
from engine.scheduler import Scheduler
from engine.self_check import checked
from kvcache.cache import CacheSize, KVCache
from kvcache.state import StateRegistry
from sparse.base import PrefillMethod
from sparse.base import StateRegistry as States


@dataclass(frozen=True)
class Features:
    """Text of P whole pages, seen by H gates at R rows. [...]: layers of a piece, or pieces of a layer."""

    q: Tensor  # [..., H, R, E] what a gate sees of the queries of a row, before RoPE
    k: Tensor  # [..., Hkv, P, 3 D] largest, smallest and mean key of each page before RoPE
    top: Tensor  # [..., H, R, P] largest probability between a row and the keys of a page
    mass: Tensor  # [..., H, R, P] probability that a row puts on a page of keys, in the mean

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


class Recorder(PrefillMethod):
    """Reads everything, and keeps what a gate would see and what it should say."""

    grid = False
    last_rows = 0

    def __init__(
        self, model: ModelInfo, length: int, *, heads: int, rows: int, seen: int, device: torch.device
    ) -> None:
        """For one piece of `length` tokens: gates of so many heads see `seen` numbers of each row."""
        pages = length // PAGE_SIZE
        shapes = {
            "q": (heads, rows, seen),
            "k": (model.num_kv_heads, pages, 3 * model.head_dim),
            "top": (heads, rows, pages),
            "mass": (heads, rows, pages),
        }
        self.found = Features(  # in every layer
            **{name: torch.zeros(model.num_layers, *shape, device=device) for name, shape in shapes.items()}
        )

    def attach(self, model: ModelInfo, files: Path, states: States) -> None:
        """Nothing to read and no state."""


class Weights(NamedTuple):
    """A gate of one layer while it learns. y = x @ W, head by head."""

    k: Tensor  # [H, 3 D, D] of pooled keys
    q: Tensor  # [H, E, D] of queries


def mean_key_weights(features: Features) -> Tensor:
    """[Hkv, 3 D, D] that take the mean key of a page as it is."""
    size = features.k.shape[-1] // 3
    own = torch.eye(size, device=features.k.device)
    return torch.cat((own.new_zeros(2 * size, size), own)).repeat(features.k.shape[-3], 1, 1)


class GateKind(Protocol):
    """What tells the gates of one method from those of another. Rows are the last ones of features."""

    def recorder(self, model: ModelInfo, length: int, device: torch.device) -> Recorder:
        """For one piece of `length` tokens."""

    def start(self, features: Features) -> Weights:
        """A gate that multiplies mean queries and mean keys: the baseline that it has to beat."""

    def scores(self, weights: Weights, features: Features, rotation: Rotation | None) -> Tensor:
        """What the gate says: logits [S, H, R, P]."""

    def pages(self, features: Features) -> tuple[Tensor, Tensor]:
        """Bool [R, P] each: pages that the gate speaks of, and those of them that are not read anyway."""

    def write(self, path: Path, layers: Sequence[Weights]) -> None:
        """The file that the method reads."""


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

    def read(self, tokens: Sequence[int], kind: GateKind) -> Features:
        """Features of one piece, in every layer."""
        assert len(tokens) == self._length, (len(tokens), self._length)
        recorder = kind.recorder(self._model, self._length, self.device)
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
