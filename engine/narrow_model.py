"""narrow_model: a model whose attention has the sizes of another's, and hardly any weights around it."""

from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from configs.model import ModelInfo
from configs.rope import RopeScaling
from engine.models import read_config, stretch

WIDTH = 64  # of the hidden state and of MLPs
WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")


def narrow_model(folder: Path, model: ModelInfo, *, dtype: str, attention: str) -> Any:
    """A random model of this folder's class, in eval mode on the CPU: heads, layers and vocabulary are its
    own. Only config.json is read. Raises ConfigError if its class cannot have our attention."""
    import torch
    import transformers

    hf = read_config(folder)
    if model.rope_scaling is not None:
        stretch(hf, folder.name, RopeScaling.parse(model.rope_scaling))
    hf.head_dim = model.head_dim  # no longer what the width says
    for name in WIDTHS:
        if getattr(hf, name, None) is not None:
            setattr(hf, name, WIDTH)
    hf.__dict__.pop("quantization_config", None)
    network = transformers.AutoModelForCausalLM.from_config(
        hf, dtype=getattr(torch, dtype), attn_implementation=attention
    )
    if not type(network)._can_set_attn_implementation():
        raise ConfigError(f"model: {folder.name}: {type(network).__name__} cannot switch its attention")
    if network._can_set_experts_implementation():
        network.set_experts_implementation("grouped_mm")
    return network.eval()
