"""A decoder layer over a few tokens on CPU, a call on either side of attention: launches decode_layers.cpp.

Layers change their class and keep their weights where they are. Many tokens run HuggingFace's code, and so do
layers that give anything else on random input.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.native import library
from engine.attention import Layer
from engine.layers import ROTATE, GatedMLP, Norm, rotate
from engine.linear import MOST_TOKENS, CpuLinear, Weights, weights_of
from engine.models import rotates_layer

SOURCE = Path(__file__).with_name("decode_layers.cpp")
# Of the largest number; more where a last bit of float32 may round a token to another bf16, or another code.
TOLERANCE = {Weights.BF16_MULTIPLIED: 2e-3, Weights.INT8: 1e-2}
TOLERANCE_IN_FLOAT32 = 1e-4
TRIED_AT = [0, 5, 700]  # positions of the random input


class _Projection(ctypes.Structure):
    """Mirrors Projection of decode_layers.cpp, where the shapes are."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "scales", "bias")),
        ("num_outputs", ctypes.c_int64),
    ]


class _DecoderLayer(ctypes.Structure):
    """Mirrors DecoderLayer of decode_layers.cpp, where the shapes are."""

    _fields_ = [
        *((name, _Projection) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("input_norm", "mlp_norm", "q_norm", "k_norm")),
        *((name, ctypes.c_int64) for name in ("width", "head_dim", "rotary")),
        *((name, ctypes.c_float) for name in ("input_eps", "mlp_eps", "q_eps", "k_eps", "share")),
        ("weights", ctypes.c_int32),
    ]


@functools.cache
def _kernels() -> Any:
    """The compiled decode_layers.cpp, or None where it cannot be had."""
    kernels = library(SOURCE)
    if kernels is not None:
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        kernels.farspan_before_attention.argtypes = (pointer,) * 7 + (size, size)
        kernels.farspan_behind_attention.argtypes = (pointer,) * 4 + (size, size)
    return kernels


class _Parts:
    """The modules of a decoder layer that decode_layers.cpp takes the place of."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.projections = {name: getattr(attention, f"{name}_proj") for name in ("q", "k", "v", "o")}
        self.projections |= {name: getattr(mlp, f"{name}_proj") for name in ("gate", "up", "down")}
        self.norms = {"input": layer.input_layernorm, "mlp": layer.post_attention_layernorm}
        self.head_norms = {name: getattr(attention, f"{name}_norm", None) for name in ("q", "k")}
        self.head_dim: int = attention.head_dim
        self.width: int = self.projections["q"].in_features
        self.share: float = getattr(layer, "residual_multiplier", 1.0)

    @classmethod
    def of(cls, layer: Any, lanes: int) -> "_Parts | None":
        """None where a part is missing, or is none of those that layers.cpp and linear.cpp know."""
        attention = getattr(layer, "self_attn", None)
        rotation = getattr(type(attention).forward, "__globals__", {}).get(ROTATE) if attention else None
        if rotation is not rotate or not isinstance(getattr(layer, "mlp", None), GatedMLP):
            return None
        try:
            parts = cls(layer)
        except AttributeError:
            return None
        return parts if parts._fit(lanes) else None

    def _fit(self, lanes: int) -> bool:
        linears, heads = self.projections.values(), [one for one in self.head_norms.values() if one]
        return (
            all(isinstance(one, CpuLinear) and one.out_features % 2 == 0 for one in linears)
            and len({one.weight.dtype for one in linears}) == 1
            and all(isinstance(one, Norm) for one in (*self.norms.values(), *heads))
            and all(one.weight.shape == (self.head_dim,) for one in heads)
            and self.head_dim % lanes == 0
        )

    def described(self, rotary: int) -> _DecoderLayer:
        """rotary: dims of a head that turn."""
        layer = _DecoderLayer(width=self.width, head_dim=self.head_dim, rotary=rotary)
        for name, one in self.projections.items():
            scales, bias = (None if part is None else part.data_ptr() for part in (one.scales, one.bias))
            setattr(layer, name, _Projection(one.weight.data_ptr(), scales, bias, one.out_features))
        for name, norm in (self.norms | self.head_norms).items():
            if norm is not None:
                setattr(layer, f"{name}_norm", norm.weight.data_ptr())
                setattr(layer, f"{name}_eps", norm.variance_epsilon)
        layer.share = self.share
        linears = self.projections.values()
        layer.weights = weights_of(
            *(one.weight for one in linears), in_bf16=all(one.in_bf16 for one in linears)
        )
        return layer


class _FewTokens:
    """Computes a decoder layer for up to MOST_TOKENS tokens."""

    def __init__(self, parts: _Parts, asked: Layer, rotary: int) -> None:
        self._kernels = _kernels()
        self._asked = asked
        self.most = MOST_TOKENS * parts.width  # elements of x
        self._rotary = rotary
        self._layer = parts.described(rotary)
        self.tolerance = TOLERANCE.get(Weights(self._layer.weights), TOLERANCE_IN_FLOAT32)
        self._address = ctypes.addressof(self._layer)
        # The memory that it points into lives as long as it does.
        modules = (*parts.projections.values(), *parts.norms.values(), *parts.head_norms.values())
        self._kept = [weight.detach() for module in modules if module for weight in module.parameters()]
        self._head_dim = parts.head_dim
        self._num_heads, self._num_kv_heads = (
            parts.projections[name].out_features // parts.head_dim for name in ("q", "k")
        )

    def __call__(self, x: Tensor, angles: tuple[Tensor, Tensor], batch: Any) -> Tensor:
        """x (1, T, W) -> (1, T, W), float32. angles: cos and sin (1, T, R). batch: of this forward."""
        cos, sin = angles
        num_tokens, threads = x.shape[1], torch.get_num_threads()
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        assert x.dtype == cos.dtype == torch.float32, (x.dtype, cos.dtype)
        assert self._rotary in (0, cos.shape[-1]), (self._rotary, cos.shape)
        q = x.new_empty((num_tokens, self._num_heads, self._head_dim))
        k = x.new_empty((num_tokens, self._num_kv_heads, self._head_dim))
        v = torch.empty_like(k)
        self._kernels.farspan_before_attention(
            self._address,
            x.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            num_tokens,
            threads,
        )
        attended = batch.attend_by_token(self._asked, q, k, v)
        assert attended.is_contiguous() and attended.shape == q.shape, attended.shape
        out = torch.empty_like(x)
        self._kernels.farspan_behind_attention(
            self._address, x.data_ptr(), attended.data_ptr(), out.data_ptr(), num_tokens, threads
        )
        return out


class _Trial:
    """Stands for a forward: hears what a layer asks of attention, and gives it something of q, k and v."""

    asked: Layer | None = None

    def attend(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [Hq, T, D], k and v [Hkv, T, D] -> [T, Hq, D]."""
        self.asked = layer
        mixed = (k - 2 * v).repeat_interleave(q.shape[0] // k.shape[0], dim=0)
        return (q + mixed).transpose(0, 1).contiguous()

    def attend_by_token(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, Hq, D], k and v [T, Hkv, D] -> [T, Hq, D]."""
        return self.attend(layer, q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1))


class _Layers(nn.ModuleList):
    """A list whose whole is itself: HuggingFace takes that slice in every forward, and torch would register
    each layer again."""

    def __getitem__(self, index: Any) -> Any:
        return self if index == slice(None, len(self)) else super().__getitem__(index)


def fuse_decode(model: Any) -> None:
    """Let the decoder layers of a model on CPU use decode_layers.cpp for few tokens, where it can be had.

    After `fuse_layers` and whatever becomes of its weights, which must not move then. Its attention is ours.
    """
    kernels, decoder = _kernels(), model.get_decoder()
    if kernels is None:
        return
    with torch.inference_mode():
        for index, layer in enumerate(decoder.layers):
            parts = _Parts.of(layer, kernels.farspan_lanes())
            if parts is None:
                continue
            x = torch.randn(1, len(TRIED_AT), parts.width)
            angles = decoder.rotary_emb(x, torch.tensor([TRIED_AT]))
            rotary = angles[0].shape[-1] if rotates_layer(model.config, index) else 0
            few = _few_tokens(layer, parts, x, angles, rotary)
            if few is not None:
                layer.__class__ = _switched(layer, few)
    if type(decoder.layers) is nn.ModuleList:
        decoder.layers.__class__ = _Layers


def _few_tokens(
    layer: Any, parts: _Parts, x: Tensor, angles: tuple[Tensor, Tensor], rotary: int
) -> _FewTokens | None:
    """What computes the same as this layer does by itself, if it does on x (1, T, W)."""
    trial = _Trial()
    expected = layer(x, position_embeddings=angles, attention_mask=None, batch=trial)
    if trial.asked is None:  # its attention is not ours
        return None
    few = _FewTokens(parts, trial.asked, rotary)
    differs = (few(x, angles, trial) - expected).abs().max()
    return few if differs <= few.tolerance * expected.abs().max() else None


def _switched(layer: nn.Module, few: _FewTokens) -> Any:
    """The class of this one layer: a copy of it has weights elsewhere, and keeps to its own code."""
    own: Any = type(layer)
    theirs: Callable[..., Any] = own.forward

    def forward(self: Any, hidden_states: Tensor, *arguments: Any, **options: Any) -> Any:
        batch, angles = options.get("batch"), options.get("position_embeddings")
        if self is not layer or batch is None or angles is None or hidden_states.numel() > few.most:
            return theirs(self, hidden_states, *arguments, **options)
        return few(hidden_states, angles, batch)

    return type(own.__name__, (own,), {"forward": forward})
