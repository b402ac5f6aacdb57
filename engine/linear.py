"""Linear layers over a few tokens on CPU: launches linear.cpp, which reads weights once, on all threads.

A decode step multiplies every weight with one row per sequence; BLAS libraries are made for many rows
(benchmarks/linear.py compares).
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor, nn

from configs.native import library

SOURCE = Path(__file__).with_name("linear.cpp")
MOST_TOKENS = 16  # beyond, a matrix product is as fast


class _LinearCall(ctypes.Structure):
    """Mirrors LinearCall of linear.cpp, where the shapes are."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "gate", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_inputs", "num_outputs")),
        ("num_threads", ctypes.c_int32),
    ]


class FewTokensLinear(nn.Linear):
    """torch's linear layer, with its weights and its answers; few tokens go through linear.cpp."""

    def forward(self, input: Tensor) -> Tensor:
        if input.numel() > MOST_TOKENS * self.in_features or input.numel() == 0:
            return nn.functional.linear(input, self.weight, self.bias)
        return linear(input, self.weight, self.bias)


def speed_up_decode(model: nn.Module) -> None:
    """Let float32 linear layers of a model use linear.cpp, where it can be had. Weights stay as they are."""
    kernels = library(SOURCE)
    if kernels is None:
        return
    for module in model.modules():
        if type(module) is not nn.Linear or module.out_features < 2:
            continue
        fits = module.in_features % kernels.farspan_lanes() == 0
        if fits and module.weight.dtype == torch.float32 and module.weight.is_contiguous():
            module.__class__ = FewTokensLinear


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., I] @ weight [O, I].T + bias [O] -> [..., O], all float32 on CPU; I whole vectors, O at least
    2."""
    kernels = library(SOURCE)
    assert kernels is not None, "speed_up_decode has seen to that"
    x = x.contiguous()
    num_outputs, num_inputs = weight.shape
    assert num_outputs >= 2 and x.shape[-1] == num_inputs and x.dtype == weight.dtype == torch.float32, (
        x.shape,
        weight.shape,
    )
    out = x.new_empty(*x.shape[:-1], num_outputs)
    call = _LinearCall(
        x.data_ptr(),
        weight.data_ptr(),
        None,
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        *(x.numel() // num_inputs, num_inputs, num_outputs),
        torch.get_num_threads(),
    )
    kernels.farspan_linear(ctypes.byref(call))
    return out


def gated_linear(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """silu(x [..., I] @ gate [O, I].T) * (x @ weight [O, I].T) -> [..., O], all float32 on CPU; I whole
    vectors."""
    kernels = library(SOURCE)
    assert kernels is not None, "fuse_layers has seen to that"
    x = x.contiguous()
    num_outputs, num_inputs = weight.shape
    assert gate.shape == weight.shape and x.shape[-1] == num_inputs and x.dtype == gate.dtype == torch.float32
    assert gate.is_contiguous() and weight.is_contiguous()
    out = x.new_empty(*x.shape[:-1], num_outputs)
    call = _LinearCall(
        *(tensor.data_ptr() for tensor in (x, weight, gate)),
        None,
        out.data_ptr(),
        *(x.numel() // num_inputs, num_inputs, num_outputs),
        torch.get_num_threads(),
    )
    kernels.farspan_linear(ctypes.byref(call))
    return out
