"""`farspan train-gates`: from a model and a text to a file of gates, resumable.

DIR/features.json                what the features depend on: another model or text is refused here
DIR/features/00000.safetensors   a piece of text each, whole or not there
DIR/layers/00.safetensors        a trained layer each, with what it was trained on
DIR/gates.safetensors, .json     the gates of all layers, and how they came about
"""

import hashlib
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from configs.errors import ConfigError
from configs.machine import cores
from configs.model import PAGE_SIZE, ModelInfo
from configs.schema import EngineConfig
from engine.gate_decode import DecodeGates
from engine.gate_features import FeatureReader, Features, GateKind, Weights
from engine.gate_prefill import PrefillGates
from engine.gate_texts import TrainingText, piece, read_text
from engine.gate_training import TARGETS, Recipe, Trained, train_layer
from engine.models import model_info, prepare_model
from engine.startup import device_for, dtype_for

JUDGED = 8  # every eighth piece is not learnt from: it judges
SHORTEST = 8 * PAGE_SIZE  # a piece needs pages to choose among

KINDS: dict[str, GateKind] = {"seerattention": PrefillGates(), "seerattention_r": DecodeGates()}

Report = Callable[[str, int, int], None]  # what is done, how many of them, of how many


@dataclass(frozen=True)
class Task:
    """What to train, on what, and where to keep it."""

    engine: EngineConfig
    texts: tuple[Path, ...]
    out: Path
    pieces: int = 96
    length: int = 2048  # tokens of a piece
    recipe: Recipe = field(default_factory=Recipe)
    method: str = "seerattention"  # that reads by the gates

    def __post_init__(self) -> None:
        if self.length % PAGE_SIZE or self.length < SHORTEST:
            raise ConfigError(
                f"--length: {self.length} must be whole pages of {PAGE_SIZE} tokens, and at least {SHORTEST}"
            )
        if self.pieces < JUDGED:
            raise ConfigError(
                f"--pieces: {self.pieces} are too few; {JUDGED} is the least: one of them judges"
            )
        if self.method not in KINDS:
            raise ConfigError(f"--method: {self.method!r} must be {' or '.join(KINDS)}")
        if self.recipe.target not in TARGETS:
            raise ConfigError(f"--target: {self.recipe.target!r} must be {' or '.join(TARGETS)}")
        if self.recipe.steps < 1 or not 0 < self.recipe.rate < 1:
            raise ConfigError(
                f"--steps ({self.recipe.steps}) must be at least 1, and --learning-rate ({self.recipe.rate})"
                " between 0 and 1"
            )


def train_gates(task: Task, report: Report) -> dict[str, Any]:
    """Train, or go on where an earlier start ended; the same gates either way. Gives what gates.json says."""
    torch.set_num_threads(task.engine.threads or cores())
    folder = prepare_model(task.engine)
    model = model_info(folder, task.engine)
    _refuse_what_has_no_gates(model, task.length)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [read_text(path, tokenizer, task.length) for path in task.texts]
    device = device_for(task.engine.device)
    source = {
        "method": task.method,
        "model": model.name,
        "weights": _digest_of_weights(folder),
        "texts": [{"name": text.name, "sha256": text.sha256} for text in texts],
        "length": task.length,
        "seed": task.recipe.seed,
    }
    _claim(task.out, source)
    reader = FeatureReader(
        folder, model, length=task.length, device=device, dtype=dtype_for(task.engine.dtype, device)
    )
    paths = _read_pieces(task, reader, texts, tokenizer, report)
    trained = _train_layers(task, reader, paths, source, report)
    KINDS[task.method].write(task.out / "gates.safetensors", [done.gate for done in trained])
    said = source | {
        "pieces": task.pieces,
        **asdict(task.recipe),
        "page": PAGE_SIZE,
        "kl_as_mean_pool": statistics.fmean(done.before for done in trained),
        "kl": statistics.fmean(done.after for done in trained),
        "command": _command(task),
    }
    _write(task.out / "gates.json", said)
    return said


def _refuse_what_has_no_gates(model: ModelInfo, length: int) -> None:
    windowed = [layer for layer in range(model.num_layers) if model.window(layer) is not None]
    if windowed:
        raise ConfigError(
            f"model: {model.name}: {len(windowed)} of its {model.num_layers} layers read a window of"
            f" {model.window(windowed[0])} tokens, densely: there is nothing for a gate to choose"
        )
    if length >= model.max_length:
        raise ConfigError(
            f"--length: {length} must be below the {model.max_length} tokens that {model.name} was made for"
        )


def _digest_of_weights(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _claim(out: Path, source: dict[str, Any]) -> None:
    """Make the folder, or see that what it holds came from the same method, model, text, length and seed."""
    try:
        (out / "features").mkdir(parents=True, exist_ok=True)
        (out / "layers").mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {out} cannot be a folder: {error.strerror}") from error
    claim = out / "features.json"
    if not claim.exists():
        if any((out / "features").iterdir()):
            raise ConfigError(
                f"--out: {out} holds features, and no features.json says of what; use another one"
            )
        _write(claim, source)
        return
    found = json.loads(claim.read_text(encoding="utf-8"))
    for name, value in source.items():
        if found.get(name) != value:
            raise ConfigError(
                f"--out: {out} holds features of other {name} ({found.get(name)}, not {value});"
                " use another folder"
            )


def _read_pieces(
    task: Task,
    reader: FeatureReader,
    texts: list[TrainingText],
    tokenizer: tokenizers.Tokenizer,
    report: Report,
) -> list[Path]:
    """The features of every piece, on disk."""

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    paths = [task.out / "features" / f"{number:05}.safetensors" for number in range(task.pieces)]
    for number, path in enumerate(paths):
        report("reading", number, task.pieces)
        if not path.exists():
            tokens = piece(texts, encode, number, task.length, task.recipe.seed)
            reader.read(tokens, KINDS[task.method]).write(path)
    report("reading", task.pieces, task.pieces)
    return paths


def _train_layers(
    task: Task, reader: FeatureReader, paths: list[Path], source: dict[str, Any], report: Report
) -> list[Trained]:
    judges = [path for number, path in enumerate(paths) if number % JUDGED == JUDGED - 1]
    others = [path for path in paths if path not in judges]
    made_from = json.dumps(source | {"pieces": task.pieces, **asdict(task.recipe)}, sort_keys=True)
    found: list[Trained] = []
    for layer, rotation in enumerate(reader.rotations):
        report("training", layer, len(reader.rotations))
        path = task.out / "layers" / f"{layer:02}.safetensors"
        trained = _layer_from(path, made_from)
        if trained is None:
            seen = Features.read(others, layer, reader.device)
            unseen = Features.read(judges, layer, reader.device)
            trained = train_layer(KINDS[task.method], seen, unseen, rotation, task.recipe, layer)
            if not math.isfinite(trained.after):
                raise ConfigError(
                    f"--learning-rate: layer {layer} did not converge at {task.recipe.rate}; try a lower one"
                )
            _keep_layer(path, trained, made_from)
        found.append(trained)
    report("training", len(found), len(found))
    return found


def _layer_from(path: Path, made_from: str) -> Trained | None:
    """A layer that an earlier start trained on the same; None if there is none."""
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        words = file.metadata() or {}
        if words.get("made_from") != made_from:
            return None
        gate = Weights(file.get_tensor("k"), file.get_tensor("q"))
        return Trained(gate, float(words["before"]), float(words["after"]))


def _keep_layer(path: Path, trained: Trained, made_from: str) -> None:
    words = {"made_from": made_from, "before": repr(trained.before), "after": repr(trained.after)}
    part = path.with_suffix(".part")
    save_file({"k": trained.gate.k.cpu(), "q": trained.gate.q.cpu()}, part, metadata=words)
    part.replace(path)


def _write(path: Path, content: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def _command(task: Task) -> str:
    """The command that makes the same gates; folders are the caller's own affair."""
    texts = " ".join(f"--text {path.name}" for path in task.texts)
    recipe = task.recipe
    return (
        f"farspan train-gates {Path(task.engine.model).name} --method {task.method} {texts} --out DIR"
        f" --pieces {task.pieces}"
        f" --length {task.length} --steps {recipe.steps} --learning-rate {recipe.rate}"
        f" --target {recipe.target} --seed {recipe.seed}"
    )
