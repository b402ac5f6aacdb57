"""Linear layers on CPU: launches linear.cpp, which reads weights once for a few tokens, on all threads.

A decode step multiplies every weight with one row per sequence; BLAS libraries are made for many rows.
Reading the weights is most of it: in bf16 they are half as long, as codes of 8 bits a quarter
(engine/weights.py makes them so). Chunks of prompts go through linear.cpp where that is the faster
(benchmarks/linear.py compares).
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
GROUP = 64  # inputs that share a scale, of weights that are codes; mirrors linear.h
CODES = torch.uint8  # whole numbers of 8 bits, 128 higher
WEIGHTS = (torch.float32, torch.bfloat16, CODES)


class Weights(IntEnum):
    """What weights are, and what becomes of them; mirrors the enum of linear.h."""

    FLOAT32 = 0
    BF16_WIDENED = 1
    BF16_MULTIPLIED = 2  # with tokens that are rounded likewise
    INT8 = 3  # multiplied with tokens that become codes, too, GROUP by GROUP


class _LinearCall(ctypes.Structure):
    """Mirrors LinearCall of linear.h, where the shapes are."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "gate", "scales", "gate_scales")),
        *((name, ctypes.c_void_p) for name in ("bias", "residual", "out", "prepared")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_inputs", "num_outputs")),
        *((name, ctypes.c_int32) for name in ("num_threads", "weights")),
        ("share", ctypes.c_float),
    ]


class CpuLinear(nn.Linear):
    """torch's linear layer, its weights and its answers: few tokens take linear.cpp, many where it is faster.

    Weights may be bf16: they are widened as they are read.
    """

    in_bf16: ClassVar[bool] = False  # whether tokens may be rounded to it

    @property
    def scales(self) -> Tensor | None:
        """Of weights that are codes: [O, I / GROUP] float32."""
        return None

    def forward(self, input: Tensor) -> Tensor:
        if input.numel() == 0:
            return input.new_empty(*input.shape[:-1], self.out_features)
        few = input.numel() <= MOST_TOKENS * self.in_features
        multiply = linear if few else linear_many
        return multiply(input, self.weight, self.bias, in_bf16=self.in_bf16, scales=self.scales)


class Bf16Linear(CpuLinear):
    """The same with bf16 weights, multiplied in bf16 if the processor can. Sums are float32."""

    in_bf16 = True


class Int8Linear(CpuLinear):
    """The same with codes of 8 bits for weights, multiplied with tokens that become codes, too.

    GROUP inputs of a row, and of a token, share a float32 scale; sums of a group are exact, others float32.
    """

    weight_scales: Tensor

    @property
    def scales(self) -> Tensor:
        return self.weight_scales


def can_be_fast() -> bool:
    """Whether linear.cpp can be had here."""
    return library(SOURCE) is not None


def speed_up_decode(model: nn.Module) -> None:
    """Let float32 linear layers of a model use linear.cpp, where it can be had. Weights stay as they are."""
    for module in model.modules():
        if fits(module) and module.weight.dtype == torch.float32:
            module.__class__ = CpuLinear


def fits(module: Any) -> bool:
    """Whether linear.cpp can multiply with its weights."""
    kernels = library(SOURCE)
    if kernels is None or type(module) is not nn.Linear or module.out_features < 2:
        return False
    return module.in_features % kernels.farspan_lanes() == 0 and module.weight.is_contiguous()


def weights_of(*weights: Tensor, in_bf16: bool) -> Weights:
    """What linear.h does with weights [O, I] of one dtype for a few tokens.

    in_bf16: tokens may be rounded to bf16, where the processor multiplies that. All tokens are, or none: what
    one gets must not depend on its company.
    """
    if weights[0].dtype == torch.float32:
        return Weights.FLOAT32
    if weights[0].dtype == CODES:
        return Weights.INT8
    kernels = library(SOURCE)
    assert kernels is not None and all(one.dtype == torch.bfloat16 for one in weights)
    fits = all(one.shape[1] % (2 * kernels.farspan_lanes()) == 0 for one in weights)
    multiplied = in_bf16 and fits and bf16_products() != Bf16Products.WIDENED
    return Weights.BF16_MULTIPLIED if multiplied else Weights.BF16_WIDENED


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, in_bf16: bool = False, scales: Tensor | None = None
) -> Tensor:
    """x [..., I] @ weight [O, I].T + bias [O] -> [..., O], float32 on CPU; I whole vectors, O at least 2.

    Weights may be bf16, or CODES with their scales [O, I / GROUP]. in_bf16: as in `weights_of`.
    """
    return _launch("farspan_linear", x, weight, bias, weights_of(weight, in_bf16=in_bf16), scales)


def linear_many(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, in_bf16: bool = False, scales: Tensor | None = None
) -> Tensor:
    """The same for many tokens.

    In linear.cpp, what a token gets does not depend on how many come along.
    """
    kernels = library(SOURCE)
    assert kernels is not None, "speed_up_decode has seen to that"
    if weight.dtype == CODES:
        return _launch("farspan_linear_many", x, weight, bias, Weights.INT8, scales)
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


def _launch(
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weights: Weights,
    scales: Tensor | None = None,
) -> Tensor:
    kernels = library(SOURCE)
    assert kernels is not None, "speed_up_decode has seen to that"
    x = x.contiguous()
    num_outputs, num_inputs = weight.shape
    assert num_outputs >= 2 and x.shape[-1] == num_inputs and x.dtype == torch.float32, (
        x.shape,
        weight.shape,
    )
    assert weight.dtype in WEIGHTS and weight.is_contiguous(), weight.dtype
    _check_scales(weight, scales)
    out = x.new_empty(*x.shape[:-1], num_outputs)
    call = _LinearCall(
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        scales=None if scales is None else scales.data_ptr(),
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


def _check_scales(weight: Tensor, scales: Tensor | None) -> None:
    if weight.dtype != CODES:
        assert scales is None
        return
    num_outputs, num_inputs = weight.shape
    assert scales is not None and scales.is_contiguous() and scales.dtype == torch.float32
    assert scales.shape == (num_outputs, num_inputs // GROUP) and num_inputs % GROUP == 0, scales.shape


def gated_linear(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    *,
    in_bf16: bool = False,
    scales: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """silu(x [..., I] @ gate [O, I].T) * (x @ weight [O, I].T) -> [..., O], float32 on CPU.

    Both weights as in `linear`, and their scales.
    """
    kernels = library(SOURCE)
    assert kernels is not None, "fuse_layers has seen to that"
    x = x.contiguous()
    num_outputs, num_inputs = weight.shape
    assert gate.shape == weight.shape and x.shape[-1] == num_inputs and x.dtype == torch.float32
    assert gate.dtype == weight.dtype in WEIGHTS, (gate.dtype, weight.dtype)
    assert gate.is_contiguous() and weight.is_contiguous()
    for one, its in zip((gate, weight), scales, strict=True):
        _check_scales(one, its)
    gate_scales, weight_scales = (None if its is None else its.data_ptr() for its in scales)
    out = x.new_empty(*x.shape[:-1], num_outputs)
    call = _LinearCall(
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        gate=gate.data_ptr(),
        scales=weight_scales,
        gate_scales=gate_scales,
        out=out.data_ptr(),
        num_tokens=x.numel() // num_inputs,
        num_inputs=num_inputs,
        num_outputs=num_outputs,
        num_threads=torch.get_num_threads(),
        weights=weights_of(gate, weight, in_bf16=in_bf16),
    )
    kernels.farspan_linear(ctypes.byref(call))
    return out
