"""What benchmarks run on in tests: a tiny model folder, and a text of words that come again."""

import random
from pathlib import Path

from tests.tiny import save_tiny


def save_text(folder: Path, words: int = 1500) -> Path:
    draw = random.Random(0)
    path = folder / "text.txt"
    path.write_text(
        " ".join(draw.choice(["river", "stone.", "cloud", "tree", "bird."]) for _ in range(words))
    )
    return path


def save_model(folder: Path) -> Path:
    return save_tiny(folder / "tiny", max_position_embeddings=4096)


def save_plan(folder: Path, name: str, content: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(content)
    return path
