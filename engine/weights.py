"""What weights are kept as on a CPU: bf16, or codes of 8 bits; all is computed in float32 around them.

A bf16 model keeps its weights and computes in float32 around them, where all its large weights can be used:
`compute_in_float32`. It is nearer to what its weights mean, and everything written for float32 serves it.

Codes are whole numbers of 8 bits, and GROUP of a row share a scale (Yao et al., 2022, "ZeroQuant", section
4.1; llama.cpp's Q8_0 has groups of 32). Tokens become codes before they are multiplied (engine/linear.h).
Few inputs of a token are many times larger than the others, which codes would lose beside them: groups of
weights and tokens are rotated, which spreads what is large over all (Ashkboos et al., 2024, "QuaRot",
section 3; https://github.com/spcl/QuaRot, whose rotations span all inputs and are folded into other weights).
"""

import math

import torch
from torch import Tensor, nn

from configs.quantised import INT8, dequantise, quantise
from engine.linear import CODES, GROUP, Bf16Linear, CpuLinear, Int8Linear, fits

CODE_ZERO = 128  # processors multiply unsigned bytes with signed ones


def _rotation() -> Tensor:
    """Sylvester's Hadamard matrix [GROUP, GROUP] over its norm: orthogonal, and its own inverse."""
    signs = torch.ones(1, 1)
    while len(signs) < GROUP:
        signs = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), signs)
    return signs / math.sqrt(GROUP)


ROTATION = _rotation()


class _Bf16Embedding(nn.Embedding):
    """Rows of bf16 weights, as float32."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).float()


class _Int8Embedding(nn.Embedding):
    """Rows of codes, as the float32 that they mean."""

    weight_scales: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return decoded(self.weight[input], self.weight_scales[input])


EMBEDDINGS = (nn.Embedding, _Bf16Embedding)
LINEARS = (CpuLinear, Bf16Linear)


def encoded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [O, I] of weights [O, I], rotated, and their scales [O, I / GROUP] float32; I whole groups."""
    codes, scales = quantise(weight.float().view(len(weight), -1, GROUP) @ ROTATION, INT8)
    return (codes.to(torch.int16) + CODE_ZERO).to(CODES).flatten(1), scales.contiguous()


def decoded(codes: Tensor, scales: Tensor) -> Tensor:
    """What codes [..., I] with scales [..., I / GROUP] mean, [..., I] float32."""
    groups = codes.view(*codes.shape[:-1], -1, GROUP).float() - CODE_ZERO
    # Whole numbers are summed up exactly, in whatever order: what is decoded along changes nothing.
    return dequantise(groups @ ROTATION, scales, torch.float32).flatten(-2)


def keep_in_bf16(model: nn.Module) -> None:
    """Round the weights of linear layers and embeddings to bf16.

    After `speed_up_decode`: what that left alone stays as it is, and so do the weights it shares.
    """
    for parameter, modules in _owners(model).items():
        if parameter.dim() == 2 and all(type(module) in (CpuLinear, nn.Embedding) for module in modules):
            parameter.data = parameter.data.bfloat16()
            for module in modules:
                if isinstance(module, nn.Embedding):
                    module.__class__ = _Bf16Embedding


def keep_in_int8(model: nn.Module) -> int:
    """Encode the weights of linear layers and embeddings whose rows are whole groups. Gives their number.

    After `speed_up_decode` or `compute_in_float32`: what these left alone stays as it is.
    """
    encoded_weights = 0
    for parameter, modules in _owners(model).items():
        known = all(type(module) in (*LINEARS, *EMBEDDINGS) for module in modules)
        if parameter.dim() != 2 or not known or parameter.shape[1] % GROUP:
            continue
        codes, scales = (nn.Parameter(part, requires_grad=False) for part in encoded(parameter.data))
        for module in modules:
            module.weight = codes
            module.weight_scales = scales
            module.__class__ = _Int8Embedding if isinstance(module, nn.Embedding) else Int8Linear
        encoded_weights += codes.numel()
    return encoded_weights


def compute_in_float32(model: nn.Module) -> bool:
    """Of a bf16 model, keep linear layers and embeddings in bf16, and compute in float32 around them.

    False where some large weight belongs to something else: nothing is changed, all is computed in bf16.
    """
    owners = _owners(model)
    large = [module for parameter, modules in owners.items() if parameter.dim() > 1 for module in modules]
    if not all(fits(module) or type(module) is nn.Embedding for module in large):
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
