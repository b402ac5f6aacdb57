"""SeerAttention-R: a small trained gate tells which pages a generated token reads."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from configs.gate_weights import check_layer, read_layers
from configs.model import PAGE_SIZE, ModelInfo
from configs.rotation import Rotation
from kvcache.decode import Queries, Rows, RowSelection
from kvcache.state import NewKeys, StateRegistry, Upkeep

LARGEST, LEAST, SUM, KEY = range(
    4
)  # page state [4, D]: of a page's keys before RoPE, and the gate's key of it
PREFIX = "model.layers.{layer}.self_attn.attn_gate."
LINEAR_Q, LINEAR_K, NORM_Q, NORM_K = NAMES = tuple(
    f"attngate_{name}" for name in ("linear_q", "linear_k", "qnorm", "knorm")
)
EPSILON = 1e-6  # of the norms, as published


@dataclass(frozen=True, slots=True)
class DecodeGate:
    """The weights of one layer, float32. y = x @ W, KV head by KV head."""

    q: Tensor  # [Hkv, G * D, D] of the queries of a KV head
    k: Tensor  # [Hkv, 3 D, D] of pooled keys: largest | least | mean
    norm_q: Tensor | None  # [D]
    norm_k: Tensor | None

    def to(self, device: torch.device) -> "DecodeGate":
        norms = (None if norm is None else norm.to(device) for norm in (self.norm_q, self.norm_k))
        return DecodeGate(self.q.to(device), self.k.to(device), *norms)


@dataclass(eq=False)  # two are alike only if they are one: what a file holds decides
class SeerAttentionR:
    """Read the pages that a gate over a token's queries chooses, by KV head. https://arxiv.org/abs/2506.08889

    A page's gate key is pooled from its keys before RoPE and rotated to the page's first position. It follows
    every key that is written. The first page and the newest are always read.
    """

    gates: Path | None = None  # weights of every layer's gate, .pth or .safetensors; must be given
    read: int | None = 4096  # tokens that each KV head reads, those that are always read among them
    threshold: float | None = None  # or pages with more of the gate's softmax than this
    dense_layers: int = 0  # first layers that read everything
    layers: list[DecodeGate] = field(init=False, repr=False, default_factory=list)  # [L]

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.read is None):
            raise ValueError(
                f"threshold ({self.threshold}) needs read: null, and one of the two must be given"
            )
        if self.threshold is not None and not 0 <= self.threshold < 1:
            raise ValueError(f"threshold ({self.threshold}) must be at least 0 and below 1")
        if self.read is not None and (self.read % PAGE_SIZE or self.read < 3 * PAGE_SIZE):
            raise ValueError(f"read ({self.read}) must be a multiple of {PAGE_SIZE}, {3 * PAGE_SIZE} or more")
        if self.dense_layers < 0:
            raise ValueError(f"dense_layers ({self.dense_layers}) must be at least 0")

    @property
    def state(self) -> str:
        """The name of its page state: gates differ by file."""
        return f"seerattention_r.{self.gates}"

    def attach(self, model: ModelInfo, files: Path, states: StateRegistry) -> None:
        states.page_state(self.state, (4, model.head_dim), upkeep=Upkeep(self.write))
        if self.gates is None:
            raise ValueError("gates: seerattention_r needs a file of gates that were trained for the model")
        self.layers = read_decode_gates(files / self.gates, model)

    def select(self, layer: int, queries: Queries, rows: Rows, states: StateRegistry) -> RowSelection | None:
        if layer < self.dense_layers or (self.read is not None and rows.max_held <= self.read):
            return None
        pages = rows.pages[layer]
        gate_q = self._queries(layer, queries)  # [Hkv, B, D]
        keys = states.of_pages(self.state)[:, KEY].index_select(0, pages.flatten().clamp_min(0))
        keys = keys.view(pages.shape[0] * pages.shape[1], pages.shape[2], -1)
        scores = torch.bmm(gate_q.transpose(0, 1).reshape(len(keys), 1, -1), keys.mT).view(pages.shape)
        return self._selection(scores / keys.shape[2] ** 0.5, rows.held[layer])

    def _selection(self, scores: Tensor, held: Tensor) -> RowSelection:
        """scores [B, Hkv, P] of the pages of rows that hold `held` [B, Hkv] tokens."""
        place = torch.arange(scores.shape[2], dtype=torch.int32, device=scores.device)
        newest = ((held - 1) // PAGE_SIZE).unsqueeze(-1)
        scores = scores.masked_fill(place >= newest, float("-inf"))
        forced = (place == 0) | (place == newest)
        if self.read is None:
            assert self.threshold is not None
            kept = (scores.softmax(-1) > self.threshold) & (place < newest)
        else:
            wanted = scores.masked_fill(forced, float("-inf")).topk(self.read // PAGE_SIZE - 2, sorted=False)
            kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, wanted.indices, True)
            kept &= place < newest
        kept |= forced & (held > 0).unsqueeze(-1)
        ids = place.expand_as(kept).masked_fill(~kept, len(place)).sort(dim=-1).values
        return RowSelection(ids, kept.sum(-1, dtype=torch.int32), PAGE_SIZE)

    def _queries(self, layer: int, queries: Queries) -> Tensor:
        """The gate's queries, at their own positions: [Hkv, B, D] float32."""
        gate = self._gate(layer, queries.q.device)
        q = queries.pre_rope().float()  # [B, Hq, D]
        q = q.reshape(q.shape[0], gate.q.shape[0], -1).transpose(0, 1)  # [Hkv, B, G * D]
        return gate_queries(gate, q, queries.positions, queries.rotation)

    def write(self, state: Tensor, new: NewKeys) -> None:
        """Pooled keys and gate keys follow new keys. state [num_pages, 4, D]."""
        k = new.pre_rope().float()
        if new.is_chunk:
            pooled, counts = _pool(k)  # [Hkv, P, 3, D], [P]
            pages, starts = new.destinations[:, ::PAGE_SIZE] // PAGE_SIZE, new.positions[::PAGE_SIZE]
            key = self._keys(new, pooled, counts, starts)
        else:
            pages, offset = new.destinations // PAGE_SIZE, new.destinations % PAGE_SIZE  # [B, Hkv]
            pooled = _appended(state[pages], k, offset == 0).transpose(0, 1)  # [Hkv, B, 3, D]
            key = self._keys(new, pooled, offset.T + 1, new.positions - new.positions % PAGE_SIZE)
            pages = pages.T
        state[pages] = torch.cat((pooled, key.unsqueeze(2)), dim=2)

    def _keys(self, new: NewKeys, pooled: Tensor, counts: Tensor, starts: Tensor) -> Tensor:
        """Gate keys [Hkv, n, D] of pooled [Hkv, n, 3, D], `counts` [..., n] keys each, at positions [n]."""
        gate = self._gate(new.layer, pooled.device)
        mean = pooled[:, :, SUM] / counts.unsqueeze(-1)
        features = torch.cat((pooled[:, :, LARGEST], pooled[:, :, LEAST], mean), dim=-1)
        return gate_keys(gate, features, starts, new.rotation)

    def _gate(self, layer: int, device: torch.device) -> DecodeGate:
        """The gate of a layer, moved to the device when it is first used."""
        if self.layers[layer].k.device != device:
            self.layers[layer] = self.layers[layer].to(device)
        return self.layers[layer]


def gate_queries(gate: DecodeGate, q: Tensor, positions: Tensor, rotation: Rotation | None) -> Tensor:
    """[..., Hkv, n, D] of n tokens' queries before RoPE, those of a KV head side by side [..., G * D]."""
    return _rotated(_normed(q @ gate.q, gate.norm_q), positions, rotation)


def gate_keys(gate: DecodeGate, pooled: Tensor, starts: Tensor, rotation: Rotation | None) -> Tensor:
    """[..., Hkv, n, D] of n pages that begin at `starts`: largest, least and mean key, side by side."""
    return _rotated(_normed(pooled @ gate.k, gate.norm_k), starts, rotation)


def _pool(k: Tensor) -> tuple[Tensor, Tensor]:
    """Largest, least and sum of the keys of each page [Hkv, P, 3, D], and their number [P]. k [Hkv, T, D]."""
    heads, length, head_dim = k.shape
    missing = -length % PAGE_SIZE
    padded = torch.cat((k, k[:, -1:].expand(-1, missing, -1)), dim=1).view(heads, -1, PAGE_SIZE, head_dim)
    sums = pad(k, (0, 0, 0, missing)).view(padded.shape).sum(2)
    counts = torch.full(sums.shape[1:2], PAGE_SIZE, device=k.device)
    counts[-1] -= missing
    return torch.stack((padded.amax(2), padded.amin(2), sums), dim=2), counts


def _appended(before: Tensor, k: Tensor, starts: Tensor) -> Tensor:
    """The pooled keys [..., 3, D] of pages that one key was added to: before [..., 4, D], k [..., D]."""
    starts = starts.unsqueeze(-1)
    return torch.stack(
        (
            torch.where(starts, k, torch.maximum(before[..., LARGEST, :], k)),
            torch.where(starts, k, torch.minimum(before[..., LEAST, :], k)),
            torch.where(starts, k, before[..., SUM, :] + k),
        ),
        dim=-2,
    )


def _normed(x: Tensor, weight: Tensor | None) -> Tensor:
    """RMS norm over the last axis, where the gate has one."""
    return x if weight is None else x * (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * weight


def _rotated(x: Tensor, positions: Tensor, rotation: Rotation | None) -> Tensor:
    return x if rotation is None else rotation.apply(x, positions)


def read_decode_gates(path: Path, model: ModelInfo) -> list[DecodeGate]:
    """The gate of every layer, in the form of published checkpoints. ValueError says what does not fit."""
    size, heads = model.head_dim, model.num_kv_heads
    shapes = {LINEAR_Q: (heads, model.group_size, size, size), LINEAR_K: (heads, 3 * size, size)}
    gates = []
    for layer, weights in enumerate(read_layers(path, NAMES, model)):
        norms = {name: (size,) for name in (NORM_Q, NORM_K) if name in weights}
        check_layer(weights, shapes | norms, layer, path, model)
        numbers = {name: tensor.float() for name, tensor in weights.items()}
        gates.append(
            DecodeGate(
                numbers[LINEAR_Q].flatten(1, 2), numbers[LINEAR_K], numbers.get(NORM_Q), numbers.get(NORM_K)
            )
        )
    return gates


def write_decode_gates(path: Path, gates: list[DecodeGate]) -> None:
    """A .safetensors file that read_decode_gates reads."""
    weights: dict[str, Tensor] = {}
    for layer, gate in enumerate(gates):
        heads, size = gate.k.shape[0], gate.k.shape[2]
        tensors = (gate.q.view(heads, -1, size, size), gate.k, gate.norm_q, gate.norm_k)
        prefix = PREFIX.format(layer=layer)
        for name, tensor in zip(NAMES, tensors, strict=True):
            if tensor is not None:
                weights[f"{prefix}{name}.weight"] = tensor
    save_file(weights, path)
