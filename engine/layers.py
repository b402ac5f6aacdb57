"""What stands between the matrix products of a layer on CPU: launches layers.cpp from HuggingFace's modules.

Norms and gated MLPs change their class, attentions the one function that rotates; weights stay as they are. A
part is taken over only if it gives on random input what HuggingFace's own code gives.
"""

import ctypes
import functools
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from configs.native import library
from engine.linear import MOST_TOKENS, CpuLinear, gated_linear

SOURCE = Path(__file__).with_name("layers.cpp")
ROTATE = "apply_rotary_pos_emb"  # what HuggingFace calls it in every model


class _Rotated(ctypes.Structure):
    """Mirrors Rotated of layers.cpp, where the shapes are."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "out")),
        *((name, ctypes.c_int64) for name in ("num_heads", "head_stride", "token_stride")),
    ]


@functools.cache
def _kernels() -> Any:
    """The compiled layers.cpp, or None where it cannot be had."""
    kernels = library(SOURCE)
    if kernels is not None:
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        kernels.farspan_rms_norm.argtypes = (pointer, pointer, pointer, size, size, ctypes.c_float, size)
        kernels.farspan_silu_mul.argtypes = (pointer, pointer, pointer, size, size)
        kernels.farspan_rotate.argtypes = (pointer, size, pointer, pointer, size, size, size, size)
    return kernels


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., W] / sqrt(mean(x^2) + eps) * weight [W], float32 on CPU; W whole vectors."""
    x = x.contiguous()
    width = x.shape[-1]
    assert x.dtype == weight.dtype == torch.float32 and weight.shape == (width,), (x.shape, weight.shape)
    out = torch.empty_like(x)
    threads = torch.get_num_threads()
    _kernels().farspan_rms_norm(
        x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // width, width, eps, threads
    )
    return out


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, in the memory of gate. Both [..., W] contiguous float32 on CPU; W whole vectors."""
    assert gate.is_contiguous() and up.is_contiguous() and gate.shape == up.shape
    assert gate.dtype == up.dtype == torch.float32, (gate.dtype, up.dtype)
    _kernels().farspan_silu_mul(
        gate.data_ptr(), up.data_ptr(), gate.data_ptr(), gate.numel(), torch.get_num_threads()
    )
    return gate


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q (1, Hq, T, D) and k (1, Hkv, T, D), of any strides, turned by cos and sin (1, T, R), float32 on CPU.

    The first R dims turn, in pairs of halves; R / 2 whole vectors.
    """
    num_tokens, head_dim = q.shape[2:]
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    cos, sin = cos.contiguous(), sin.contiguous()
    assert q.dtype == k.dtype == cos.dtype == torch.float32 and q.shape[0] == k.shape[0] == 1
    assert cos.shape[:2] == sin.shape[:2] == (1, num_tokens), (q.shape, cos.shape)
    outs = (q.new_empty(q.shape), k.new_empty(k.shape))
    parts = (_Rotated * 2)(
        *(
            _Rotated(x.data_ptr(), out.data_ptr(), x.shape[1], x.stride(1), x.stride(2))
            for x, out in zip((q, k), outs, strict=True)
        )
    )
    _kernels().farspan_rotate(
        ctypes.addressof(parts),
        2,
        cos.data_ptr(),
        sin.data_ptr(),
        num_tokens,
        head_dim,
        cos.shape[-1],
        torch.get_num_threads(),
    )
    return outs


class Norm(nn.Module):
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class GatedMLP(nn.Module):
    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def forward(self, x: Tensor) -> Any:
        if x.numel() > MOST_TOKENS * self.gate_proj.in_features:
            return self.down_proj(silu_mul(self.gate_proj(x), self.up_proj(x)))
        gate, up = self.gate_proj, self.up_proj
        if isinstance(gate, CpuLinear) and isinstance(up, CpuLinear):
            options: Any = {"in_bf16": gate.in_bf16, "scales": (gate.scales, up.scales)}
        else:
            options = {}
        return self.down_proj(gated_linear(x, gate.weight, up.weight, **options))


def fuse_layers(model: nn.Module) -> None:
    """Let a model on CPU that computes in float32 use layers.cpp, where it can be had and fits."""
    kernels = _kernels()
    small = (parameter for parameter in model.parameters() if parameter.dim() == 1)
    if kernels is None or any(parameter.dtype != torch.float32 for parameter in small):
        return
    lanes = kernels.farspan_lanes()
    classes: dict[type[nn.Module], Any] = {}  # HuggingFace's, and what takes its place
    with torch.inference_mode():
        for module in model.modules():
            own = type(module)
            if not _fits_norm(module, lanes) and not _fits_mlp(module, lanes):
                continue
            if own not in classes:
                classes[own] = _in_place_of(module)
            module.__class__ = classes[own]
        _fuse_rotations(model, lanes)


def _fits_norm(module: Any, lanes: int) -> bool:
    known = type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
    return known and module.weight.shape[0] % lanes == 0


def _fits_mlp(module: Any, lanes: int) -> bool:
    parts: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(part, nn.Linear) for part in parts) or parts[0].bias is not None:
        return False
    gate, up, _ = parts
    fits = gate.in_features % lanes == 0 and gate.out_features % lanes == 0
    return fits and up.bias is None and up.weight.shape == gate.weight.shape


def _in_place_of(module: Any) -> Any:
    """The class of a norm or MLP with our forward, if that computes the same; else its own."""
    own = type(module)
    is_norm = hasattr(module, "variance_epsilon")
    width = module.weight.shape[0] if is_norm else module.gate_proj.in_features
    ours: Any = type(own.__name__, (Norm if is_norm else GatedMLP, own), {})
    for num_tokens in (3, MOST_TOKENS + 1):
        example = torch.randn(num_tokens, width)
        expected = own.forward(module, example)
        if not torch.allclose(ours.forward(module, example), expected, atol=1e-4, rtol=1e-4):
            return own
    return ours


def _fuse_rotations(model: Any, lanes: int) -> None:
    """Attentions run HuggingFace's code as it is, in which one name means our function."""
    attentions = [module for module in model.modules() if _calls_rotation(type(module))]
    embedding: Any = getattr(model.get_decoder(), "rotary_emb", None)
    if not attentions or not hasattr(embedding, "inv_freq"):
        return
    theirs = type(attentions[0]).forward.__globals__[ROTATE]
    head_dim = attentions[0].head_dim
    q, k = torch.randn(1, 3, 5, head_dim), torch.randn(1, 2, 5, head_dim)
    cos, sin = embedding(q, torch.tensor([[0, 1, 5, 70, 800]]))
    pairs_halves = 2 * embedding.inv_freq.shape[0] == cos.shape[-1]  # else they are stored in another way
    if not pairs_halves or cos.shape[-1] % (2 * lanes):
        return
    both = zip(rotate(q, k, cos, sin), theirs(q, k, cos, sin), strict=True)
    if all(torch.allclose(ours, expected, atol=1e-5) for ours, expected in both):
        classes = {own: _with_rotation(own) for own in {type(module) for module in attentions}}
        for module in attentions:
            module.__class__ = classes[type(module)]


def _calls_rotation(kind: Any) -> bool:
    return isinstance(kind.forward, FunctionType) and ROTATE in kind.forward.__code__.co_names


def _with_rotation(own: Any) -> Any:
    """A class of attention whose forward is the same code, with another meaning of ROTATE."""
    theirs = own.forward
    names = {**theirs.__globals__, ROTATE: rotate}
    ours = FunctionType(theirs.__code__, names, "forward", theirs.__defaults__, theirs.__closure__)
    ours.__kwdefaults__ = theirs.__kwdefaults__
    return type(own.__name__, (own,), {"forward": ours})
