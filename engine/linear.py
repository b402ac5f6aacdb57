"""Linear layers on CPU: launches linear.cpp, which reads weights once for a few tokens, on all threads.

A decode step multiplies every weight with one row per sequence; BLAS libraries are made for many rows.
Reading the weights is most of it: in bf16 they are half as long. Chunks of prompts go through linear.cpp
where that is the faster (benchmarks/linear.py compares).

A bf16 model keeps its weights and computes in float32 around them, where all its large weights can be used:
`compute_in_float32`. It is nearer to what its weights mean, and everything written for float32 serves it.
"""

import ctypes
from enum import IntEnum
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from configs.bf16_products import Bf16Products, bf16_products
from configs.native import library

SOURCE = Path(__file__).with_name("linear.cpp")
MOST_TOKENS = 16  # that count as few
# AVX2 and AVX-512: with other vectors nobody has compared, and torch multiplies many tokens.
MANY_WITH_LANES = (8, 16)
WEIGHTS = (torch.float32, torch.bfloat16)


class Weights(IntEnum):
    """What weights are, and what becomes of them; mirrors the enum of linear.h."""

    FLOAT32 = 0
    BF16_WIDENED = 1
    BF16_MULTIPLIED = 2  # with tokens that are rounded likewise


class _LinearCall(ctypes.Structure):
    """Mirrors LinearCall of linear.h, where the shapes are."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "gate", "bias", "residual", "out", "rounded")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_inputs", "num_outputs")),
        *((name, ctypes.c_int32) for name in ("num_threads", "weights")),
        ("share", ctypes.c_float),
    ]


class CpuLinear(nn.Linear):
    """torch's linear layer, its weights and its answers: few tokens take linear.cpp, many where it is faster.

    Weights may be bf16: they are widened as they are read.
    """

    in_bf16: ClassVar[bool] = False  # whether tokens may be rounded to it

    def forward(self, input: Tensor) -> Tensor:
        if input.numel() == 0:
            return nn.functional.linear(input, self.weight.float(), self.bias)
        if input.numel() <= MOST_TOKENS * self.in_features:
            return linear(input, self.weight, self.bias, in_bf16=self.in_bf16)
        return linear_many(input, self.weight, self.bias, in_bf16=self.in_bf16)


class Bf16Linear(CpuLinear):
    """The same with bf16 weights, multiplied in bf16 if the processor can. Sums are float32."""

    in_bf16 = True


def can_be_fast() -> bool:
    """Whether linear.cpp can be had here."""
    return library(SOURCE) is not None


def speed_up_decode(model: nn.Module) -> None:
    """Let float32 linear layers of a model use linear.cpp, where it can be had. Weights stay as they are."""
    for module in model.modules():
        if _fits(module) and module.weight.dtype == torch.float32:
            module.__class__ = CpuLinear


def _fits(module: Any) -> bool:
    """Whether linear.cpp can multiply with its weights."""
    kernels = library(SOURCE)
    if kernels is None or type(module) is not nn.Linear or module.out_features < 2:
        return False
    return module.in_features % kernels.farspan_lanes() == 0 and module.weight.is_contiguous()


class _Bf16Embedding(nn.Embedding):
    """Rows of bf16 weights, as float32."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).float()


def keep_in_bf16(model: nn.Module) -> None:
    """Round the weights of linear layers and embeddings to bf16; everything is still computed in float32.

    After `speed_up_decode`: what that left alone stays as it is, and so do the weights it shares.
    """
    for parameter, modules in _owners(model).items():
        if parameter.dim() == 2 and all(type(module) in (CpuLinear, nn.Embedding) for module in modules):
            parameter.data = parameter.data.bfloat16()
            for module in modules:
                if isinstance(module, nn.Embedding):
                    module.__class__ = _Bf16Embedding


def compute_in_float32(model: nn.Module) -> bool:
    """Of a bf16 model, keep linear layers and embeddings in bf16, and compute in float32 around them.

    False where some large weight belongs to something else: nothing is changed, all is computed in bf16.
    """
    owners = _owners(model)
    large = [module for parameter, modules in owners.items() if parameter.dim() > 1 for module in modules]
    if not all(_fits(module) or type(module) is nn.Embedding for module in large):
        return False
    for tensor in (*owners, *model.buffers()):
        if tensor.dim() <= 1 and tensor.dtype == torch.bfloat16:
            tensor.data = tensor.data.float()
    for module in large:
        module.__class__ = _Bf16Embedding if isinstance(module, nn.Embedding) else Bf16Linear
    return True


def _owners(model: nn.Module) -> dict[nn.Parameter, list[nn.Module]]:
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(module)
    return owners


def weights_of(*weights: Tensor, in_bf16: bool) -> Weights:
    """What linear.h does with weights [O, I] of one dtype for a few tokens.

    in_bf16: tokens may be rounded to bf16, where the processor multiplies that. All tokens are, or none: what
    one gets must not depend on its company.
    """
    if weights[0].dtype == torch.float32:
        return Weights.FLOAT32
    kernels = library(SOURCE)
    assert kernels is not None and all(one.dtype == torch.bfloat16 for one in weights)
    fits = all(one.shape[1] % (2 * kernels.farspan_lanes()) == 0 for one in weights)
    multiplied = in_bf16 and fits and bf16_products() != Bf16Products.WIDENED
    return Weights.BF16_MULTIPLIED if multiplied else Weights.BF16_WIDENED


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, in_bf16: bool = False) -> Tensor:
    """x [..., I] @ weight [O, I].T + bias [O] -> [..., O], float32 on CPU, weights perhaps bf16; I whole
    vectors, O at least 2. in_bf16: as in `weights_of`."""
    return _launch("farspan_linear", x, weight, bias, weights_of(weight, in_bf16=in_bf16))


def linear_many(x: Tensor, weight: Tensor, bias: Tensor | None, *, in_bf16: bool = False) -> Tensor:
    """The same for many tokens.

    In linear.cpp, what a token gets does not depend on how many come along.
    """
    kernels = library(SOURCE)
    assert kernels is not None, "speed_up_decode has seen to that"
    if weight.dtype == torch.bfloat16 and in_bf16:
        if bf16_products() == Bf16Products.BY_PAIRS:
            return _launch("farspan_linear_many", x, weight, bias, Weights.BF16_MULTIPLIED)
        if bf16_products() == Bf16Products.BY_TILES:
            bias = None if bias is None else bias.bfloat16()
            return nn.functional.linear(x.bfloat16(), weight, bias).float()
    if kernels.farspan_lanes() not in MANY_WITH_LANES:
        return nn.functional.linear(x, weight.float(), bias)  # float32 stays as it is
    widened = Weights.BF16_WIDENED if weight.dtype == torch.bfloat16 else Weights.FLOAT32
    return _launch("farspan_linear_many", x, weight, bias, widened)


def _launch(name: str, x: Tensor, weight: Tensor, bias: Tensor | None, weights: Weights) -> Tensor:
    kernels = library(SOURCE)
    assert kernels is not None, "speed_up_decode has seen to that"
    x = x.contiguous()
    num_outputs, num_inputs = weight.shape
    assert num_outputs >= 2 and x.shape[-1] == num_inputs and x.dtype == torch.float32, (
        x.shape,
        weight.shape,
    )
    assert weight.dtype in WEIGHTS and weight.is_contiguous(), weight.dtype
    out = x.new_empty(*x.shape[:-1], num_outputs)
    call = _LinearCall(
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        out=out.data_ptr(),
        num_tokens=x.numel() // num_inputs,
        num_inputs=num_inputs,
        num_outputs=num_outputs,
        num_threads=torch.get_num_threads(),
        weights=weights,
    )
    getattr(kernels, name)(ctypes.byref(call))
    return out


def gated_linear(x: Tensor, gate: Tensor, weight: Tensor, *, in_bf16: bool = False) -> Tensor:
    """silu(x [..., I] @ gate [O, I].T) * (x @ weight [O, I].T) -> [..., O], float32 on CPU, both weights
    perhaps bf16; I whole vectors."""
    kernels = library(SOURCE)
    assert kernels is not None, "fuse_layers has seen to that"
    x = x.contiguous()
    num_outputs, num_inputs = weight.shape
    assert gate.shape == weight.shape and x.shape[-1] == num_inputs and x.dtype == torch.float32
    assert gate.dtype == weight.dtype in WEIGHTS, (gate.dtype, weight.dtype)
    assert gate.is_contiguous() and weight.is_contiguous()
    out = x.new_empty(*x.shape[:-1], num_outputs)
    call = _LinearCall(
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        gate=gate.data_ptr(),
        out=out.data_ptr(),
        num_tokens=x.numel() // num_inputs,
        num_inputs=num_inputs,
        num_outputs=num_outputs,
        num_threads=torch.get_num_threads(),
        weights=weights_of(gate, weight, in_bf16=in_bf16),
    )
    kernels.farspan_linear(ctypes.byref(call))
    return out
