"""Prompts of real text: a model's folder and tokenizer, a file's tokens, and pieces of any length of them."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from benchmarks.common import CannotRun
from benchmarks.parts import ROOT
from configs.errors import ConfigError
from configs.schema import DEFAULT_MODEL, EngineConfig
from engine.models import packaged_model, prepare_model

SHIPPED_TEXT = ROOT / "examples" / "texts" / "pride-and-prejudice.txt"


@dataclass(frozen=True)
class Text:
    """One file in one model's tokens."""

    name: str  # of the file
    sha256: str
    tokens: tuple[int, ...]

    def ring(self, start: int, length: int) -> tuple[int, ...]:
        """`length` tokens from `start` on, beginning anew at the end of the text: for timing only."""
        start %= len(self.tokens)
        repeats = (start + length) // len(self.tokens) + 1
        return (self.tokens * repeats)[start : start + length]

    def piece(self, number: int, of: int, length: int) -> tuple[int, ...]:
        """Piece `number` of `of`, spread evenly over the text. Nothing is repeated in it."""
        room = len(self.tokens) - length
        if room < 0:
            raise CannotRun(f"{self.name} has {len(self.tokens)} tokens; {length} are needed: a longer text")
        start = room * number // max(1, of - 1)
        return self.tokens[start : start + length]


def model_folder(model: str) -> Path:
    """The local folder of a model, as the server would find it. Raises CannotRun if it cannot be had."""
    try:
        return prepare_model(EngineConfig(model=model))
    except ConfigError as error:
        raise CannotRun(str(error)) from error


def gguf_file(model: str) -> Path | None:
    """The GGUF file that `model_folder` converts; None if the model comes as something else."""
    if model == DEFAULT_MODEL:
        return packaged_model()
    return Path(model).expanduser() if model.endswith(".gguf") else None


def load_tokenizer(folder: Path) -> Any:
    """The model's own tokenizer, as a `tokenizers.Tokenizer`."""
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def load_text(path: Path, tokenizer: Any) -> Text:
    """Read a file whole. Line breaks inside paragraphs become spaces: they are the printer's."""
    content = path.read_text(encoding="utf-8")
    paragraphs = (" ".join(paragraph.split()) for paragraph in content.split("\n\n"))
    flowing = "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
    ids = tokenizer.encode(flowing, add_special_tokens=False).ids
    if not ids:
        raise CannotRun(f"{path.name} is empty")
    return Text(path.name, hashlib.sha256(content.encode()).hexdigest(), tuple(ids))
