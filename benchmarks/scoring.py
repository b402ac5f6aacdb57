"""Teacher forcing through the engine: given tokens go in under a plan, next-token logits come out.

tokens   [ prompt: prefilled under the plan's method | forced: replayed one by one, from the plan's cache ]
logits     at any positions of either part; those at position i judge token i + 1
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.model import PAGE_SIZE, ModelInfo
from configs.plan import PlanFile
from configs.schema import EngineConfig, SchedulerConfig
from engine.engine import Engine
from engine.kernels import kernels_for
from engine.messages import Cost, Sampling, Submit
from engine.models import model_info
from engine.plans import ResolvedPlan, resolve_plans
from engine.runner import ModelRunner
from engine.scheduler import Scheduler
from engine.self_check import checked
from engine.startup import check_weights_dtype, network_as_served, page_dtype_for
from kvcache.cache import CacheSize, KVCache
from kvcache.state import StateRegistry


@dataclass(frozen=True)
class Scored:
    """One sequence under one plan."""

    logits: Tensor  # [R, V] float32, at the positions asked for, in their order
    cost: Cost


class _Recorder:
    """Two hooks on a model: they ask it for the logits of more rows, and keep them from the engine's eyes."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.wanted: set[int] = set()
        self.found: dict[int, Tensor] = {}  # position -> [V]
        self._now: list[int] = []  # wanted positions of the forward that runs
        network.register_forward_pre_hook(self._ask, with_kwargs=True)
        network.register_forward_hook(self._take)

    def _ask(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        positions: list[int] = kwargs["position_ids"][0].tolist()
        rows = [row for row, position in enumerate(positions) if position in self.wanted]
        self._now = [positions[row] for row in rows]
        theirs: Tensor = kwargs["logits_to_keep"]
        return args, {**kwargs, "logits_to_keep": torch.cat([theirs.new_tensor(rows), theirs])}

    def _take(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        ours = output.logits[0, : len(self._now)].float().cpu()
        self.found.update(zip(self._now, ours, strict=True))
        output.logits = output.logits[:, len(self._now) :]
        return output


class Scorer:
    """An engine around one model for one sequence at a time, under any of some plans."""

    def __init__(
        self,
        folder: Path,
        model: EngineConfig,
        plans: Sequence[PlanFile],
        *,
        dtype: str,
        device: str,
        longest: int,
        cache_dtype: str = "auto",
    ) -> None:
        """`longest`: tokens of the longest sequence to score. Raises ConfigError, as a start would."""
        check_weights_dtype(model.weights_dtype, dtype, device)
        network = network_as_served(folder, model, dtype=dtype, device=device)
        info = model_info(folder, model)
        states = StateRegistry()
        self.plans: dict[str, ResolvedPlan] = resolve_plans(
            list(plans), info, states, cache_dtype=cache_dtype
        )
        config = SchedulerConfig(max_num_seqs=1)
        on = torch.device(device)
        page_dtype = page_dtype_for(cache_dtype, device)
        self.kernels = checked(kernels_for(on, page_dtype), info, getattr(torch, dtype), on, page_dtype)
        self._cache = KVCache(
            info,
            CacheSize(self._pages(info, longest), config.max_num_seqs, longest + PAGE_SIZE),
            dtype=getattr(torch, dtype),
            device=on,
            states=states,
            moves=self.kernels.moves,
            page_dtype=page_dtype,
        )
        runner = ModelRunner(network, self._cache, self.kernels, on)
        self._engine = Engine(self.plans, Scheduler(config, self._cache), runner, self._cache, ())
        self._recorder = _Recorder(network)

    def _pages(self, info: ModelInfo, longest: int) -> int:
        """Enough for the longest sequence under the plan that promises most, beside a prompt to share."""
        rows = info.num_layers * info.num_kv_heads
        keep_all = rows * (-(-(longest + 1) // PAGE_SIZE) + 1)
        return keep_all + max(
            keep_all, *(plan.pages_needed(longest, longest + 1) for plan in self.plans.values())
        )

    def score(self, plan: str, tokens: Sequence[int], prompt_length: int, positions: Sequence[int]) -> Scored:
        """Logits at these positions of `tokens`, whose first `prompt_length` are the prompt."""
        recorder = self._recorder
        recorder.wanted, recorder.found = set(positions), {}
        forced = len(tokens) - prompt_length
        sampling = Sampling(max_tokens=forced + 1, temperature=0.0, ignore_eos=True)
        # Plans that read a prompt alike need it computed once, unless rows of it are judged.
        share = min(positions) >= prompt_length - PAGE_SIZE
        self._engine.submit(Submit("score", tuple(tokens), prompt_length, plan, sampling, share=share))
        cost: Cost | None = None
        while self._engine.has_work:
            for output in self._engine.step().outputs:
                if output.error is not None:
                    raise RuntimeError(f"plan {plan}: {output.error}")
                cost = cost or output.cost
        assert cost is not None and recorder.wanted == set(recorder.found), "a position was never computed"
        return Scored(torch.stack([recorder.found[position] for position in positions]), cost)
