"""What the server's tests share: one tokenizer folder."""

from pathlib import Path

import pytest

from server.tokenizer import Tokenizer
from tests.server.builders import save_tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)
