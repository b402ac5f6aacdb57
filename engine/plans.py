"""Plans resolved against a model: names become methods and policies, options and files are checked, before
weights load."""

import dataclasses
import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from configs.errors import ConfigError
from configs.model import ModelInfo
from configs.plan import PlanFile
from engine.cards import layer_runs, options_of
from engine.messages import PlanCard
from engine.plugin_options import build
from kvcache.decode import DecodeMethod, Full
from kvcache.decode_methods import DECODE_METHODS
from kvcache.keep_all import KeepAll
from kvcache.policies import KV_POLICIES
from kvcache.policy import KVPolicy
from kvcache.s2 import S2
from kvcache.state import StateRegistry
from sparse.base import PrefillMethod
from sparse.dense import Dense
from sparse.methods import PREFILL_METHODS

log = logging.getLogger(__name__)

DENSE = Dense()
MIN_WINDOW = 64  # queries that MInference's estimator looks at: no chunk but a whole prompt is shorter


@dataclass(frozen=True)
class ResolvedPlan:
    """A plan that fits a model. One object serves every sequence that names it."""

    name: str
    digest: str  # over everything that changes an answer
    methods: tuple[PrefillMethod, ...]  # [L]
    policy: KVPolicy
    decode: DecodeMethod
    chunk: int  # tokens
    dense_below: int | None  # tokens; None = auto, until it is measured: see engine/break_even.py
    recall_floor: float | None
    delta: int | None  # every so many rows one is read densely and corrects the others
    model_identity: bytes  # what every prefill depends on
    prefill_identity: bytes  # what a prefill that is not dense depends on, beside the model and the policy
    card: PlanCard

    @property
    def window(self) -> int:
        """Tokens that must remain behind a chunk boundary, so that the last chunk can feed estimator and
        policy."""
        return max(MIN_WINDOW, self.policy.query_window)

    @property
    def grid(self) -> bool:
        """Do answers depend on where chunks end?

        A floor on recall does: its sample is one of a chunk. So does choosing among what is held, where pages
        leave between chunks.
        """
        chooses = any(not isinstance(method, Dense) for method in self.methods)
        depends = any(method.grid for method in self.methods) or (self.policy.masks and chooses)
        return depends or self.recall_floor is not None

    @property
    def last_rows(self) -> int:
        """Last rows of a prompt that some layer reads unlike others."""
        return max(method.last_rows for method in self.methods)

    @property
    def keeps_everything(self) -> bool:
        """Are generated tokens' keys and values those that a dense prefill of them would compute?"""
        return isinstance(self.policy, KeepAll) and isinstance(self.decode, Full)

    def is_dense(self, prompt_length: int) -> bool:
        """Does a prompt of this many tokens read everything?"""
        assert self.dense_below is not None, f"the break-even of plan {self.name!r} is not measured yet"
        return prompt_length < self.dense_below or _all_dense(self.methods)

    def with_dense_below(self, tokens: int) -> "ResolvedPlan":
        """The same plan, its break-even known."""
        card = msgspec.structs.replace(self.card, dense_below=tokens)
        return dataclasses.replace(self, dense_below=tokens, card=card)

    def pages_needed(self, prompt: int, total: int) -> int:
        """Pages promised to a sequence at admission (lengths in tokens)."""
        # The last chunk also takes what would be too little for one of its own.
        return self.policy.pages_needed(prompt, total, self.chunk + self.window - 1)


@dataclass(frozen=True, slots=True)
class _Parts:
    """The plug-ins of a plan."""

    main: PrefillMethod
    policy: KVPolicy
    decode: DecodeMethod
    others: dict[str, PrefillMethod]  # by name, that some layers have instead


def resolve_plan(
    plan: PlanFile, model: ModelInfo, states: StateRegistry | None = None, *, cache_dtype: str = "auto"
) -> ResolvedPlan:
    """Check a plan against a model and build its parts. Raises ConfigError with the path of the key at
    fault."""
    where = str(plan.source)
    files = plan.source.parent
    prefill = plan.prefill
    parts = _build_parts(plan)
    own = _attach(parts, model, files, where)
    _refuse_what_cannot_work(plan, parts.policy, own, model)
    try:
        (states or StateRegistry()).include(own)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    digest = _digest(plan, files, model)
    methods = _methods_by_layer(parts.main, parts.others, prefill.layers, model, where)
    dense_below = None if prefill.dense_below == "auto" else prefill.dense_below
    if _all_dense(methods):
        dense_below = dense_below or 0  # nothing to measure
        if prefill.delta is not None:
            raise ConfigError(
                f"{where}: prefill.delta: every row of {prefill.method} is read densely; leave it out"
            )
    return ResolvedPlan(
        name=plan.name,
        digest=digest,
        methods=methods,
        policy=parts.policy,
        decode=parts.decode,
        chunk=prefill.chunk,
        dense_below=dense_below,
        recall_floor=prefill.recall_floor,
        delta=prefill.delta,
        model_identity=json.dumps(
            {**dataclasses.asdict(model), "cache_dtype": cache_dtype}, sort_keys=True
        ).encode(),
        prefill_identity=_prefill_identity(plan, files),
        card=PlanCard(
            name=plan.name,
            digest=digest,
            prefill=prefill.method,
            policy=plan.kv.policy,
            decode=plan.decode.method,
            budget=getattr(parts.policy, "budget", None),
            chunk=prefill.chunk,
            dense_below=dense_below,
            recall_floor=prefill.recall_floor,
            delta=prefill.delta,
            layers=layer_runs(methods),
            policy_options=options_of(parts.policy),
            decode_options=options_of(parts.decode),
        ),
    )


def resolve_plans(
    plans: list[PlanFile], model: ModelInfo, states: StateRegistry, *, cache_dtype: str = "auto"
) -> dict[str, ResolvedPlan]:
    """All plans of a server by name; the first is the default."""
    resolved: dict[str, ResolvedPlan] = {}
    for plan in plans:
        if plan.name in resolved:
            raise ConfigError(
                f"{plan.source}: two plans are named {plan.name!r}; a plan's name is its file's name"
            )
        resolved[plan.name] = resolve_plan(plan, model, states, cache_dtype=cache_dtype)
    return resolved


def spelled_out(plan: PlanFile) -> dict[str, Any]:
    """A plan with everything that it leaves to defaults, as it could be written. Raises ConfigError."""
    where, content = str(plan.source), plan.model_dump(mode="json")
    parts: tuple[tuple[str, str, Any, Any], ...] = (
        ("prefill", "method", plan.prefill, PREFILL_METHODS),
        ("kv", "policy", plan.kv, KV_POLICIES),
        ("decode", "method", plan.decode, DECODE_METHODS),
    )
    for part, key, written, kinds in parts:
        built = build(kinds, getattr(written, key), written.options, f"{where}: {part}", key)
        content[part] |= options_of(built)
        content[part] |= {name: value for name, value in written.options.items() if isinstance(value, list)}
    return content


def _all_dense(methods: tuple[PrefillMethod, ...]) -> bool:
    return all(isinstance(method, Dense) for method in methods)


def _build_parts(plan: PlanFile) -> _Parts:
    where, prefill = str(plan.source), plan.prefill
    if "grid" in prefill.options:
        raise ConfigError(f"{where}: prefill.grid: belongs to the method and cannot be set")
    return _Parts(
        main=build(PREFILL_METHODS, prefill.method, prefill.options, f"{where}: prefill", "method"),
        policy=build(KV_POLICIES, plan.kv.policy, plan.kv.options, f"{where}: kv", "policy"),
        decode=build(DECODE_METHODS, plan.decode.method, plan.decode.options, f"{where}: decode", "method"),
        others={
            name: build(PREFILL_METHODS, name, {}, f"{where}: prefill.layers", "method")
            for name in set(prefill.layers.values())
        },
    )


def _attach(parts: _Parts, model: ModelInfo, files: Path, where: str) -> StateRegistry:
    """The state that these plug-ins keep together."""
    states = StateRegistry()
    plugins: list[tuple[str, PrefillMethod | KVPolicy | DecodeMethod]] = [
        ("prefill", parts.main),
        ("kv", parts.policy),
        ("decode", parts.decode),
        *(("prefill.layers", method) for method in parts.others.values()),
    ]
    for part, plugin in plugins:
        try:
            plugin.attach(model, files, states)
        except (ValueError, OSError) as error:
            raise ConfigError(f"{where}: {part}.{error}") from error
    return states


def _refuse_what_cannot_work(
    plan: PlanFile, policy: KVPolicy, states: StateRegistry, model: ModelInfo
) -> None:
    """Parts that are right by themselves, and not with each other or with this model."""
    where, name = plan.source, plan.kv.policy
    if policy.masks and plan.prefill.recall_floor is not None:
        raise ConfigError(
            f"{where}: prefill.recall_floor: {name} hides keys from every head, whatever they hold;"
            " a head could not be made to read them. Leave the floor out"
        )
    if policy.masks and plan.prefill.delta is not None:
        raise ConfigError(
            f"{where}: prefill.delta: {name} hides keys from every row, and none could be read densely;"
            " leave it out, or use a policy that masks nothing"
        )
    if model.block_sparse is not None and not isinstance(policy, S2):
        log.warning(
            "%s: kv.policy: %s was trained to read blocks of its own, and %s reads others; s2 reads those",
            *(where, model.name, name),
        )
    if policy.compacts and any(model.windows):
        raise ConfigError(
            f"{where}: kv.policy: {name} keeps tokens from anywhere in a prompt, and layers of"
            f" {model.name} read a window of consecutive ones; use keep_all, which gives back what lies"
            " behind a window"
        )
    if policy.compacts and not states.follows_compaction:
        raise ConfigError(
            f"{where}: kv.policy: {name} moves tokens to other pages, and what another part of this plan"
            f" keeps for each page ({states.page_bytes} bytes) cannot be rebuilt there; use a policy that"
            " moves nothing: keep_all, streaming, moa or s2"
        )


def _methods_by_layer(
    main: PrefillMethod,
    others: dict[str, PrefillMethod],
    layers: dict[str, str],
    model: ModelInfo,
    where: str,
) -> tuple[PrefillMethod, ...]:
    # Within a window there is little to skip, and what a method would leave out is near: read all of it.
    methods = [main if model.window(layer) is None else DENSE for layer in range(model.num_layers)]
    for key, name in layers.items():
        first, _, last = key.partition("-")
        span = range(int(first), int(last or first) + 1)
        if not span or span.stop > model.num_layers:
            raise ConfigError(
                f"{where}: prefill.layers.{key}: {model.name} has layers 0 to {model.num_layers - 1}"
            )
        for layer in span:
            if model.window(layer) is not None and not isinstance(others[name], Dense):
                raise ConfigError(
                    f"{where}: prefill.layers.{key}: layer {layer} of {model.name} reads a window of"
                    f" {model.window(layer)} tokens, always densely; give {name} to other layers"
                )
            methods[layer] = others[name]
    return tuple(methods)


def _digest(plan: PlanFile, files: Path, model: ModelInfo) -> str:
    """12 hex digits over the plan, the content of the files it names, and the model."""
    content: dict[str, Any] = {"plan": plan.model_dump(mode="json"), "model": dataclasses.asdict(model)}
    for part in (plan.prefill, plan.kv, plan.decode):
        content |= _contents(part.options, files)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _prefill_identity(plan: PlanFile, files: Path) -> bytes:
    """All of a plan that decides which keys its sparse prefill reads, with the content of files."""
    prefill = plan.prefill.model_dump(mode="json", exclude={"dense_below"})
    return json.dumps(prefill | _contents(plan.prefill.options, files), sort_keys=True).encode()


def _contents(options: dict[str, Any], files: Path) -> dict[str, str]:
    """A hash of each file that an option names."""
    return {
        option: hashlib.sha256((files / value).read_bytes()).hexdigest()
        for option, value in options.items()
        if isinstance(value, str) and (files / value).is_file()
    }
