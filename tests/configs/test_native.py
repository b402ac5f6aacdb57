"""A C++ source is compiled once; what cannot be compiled is said and replaced, not fatal."""

import logging
from pathlib import Path

import pytest

from configs import native

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler on this machine")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FARSPAN_CACHE", str(tmp_path / "cache"))


def make_source(folder: Path, answer: str) -> Path:
    source = folder / "answer.cpp"
    source.write_text(f'extern "C" int answer() {{ return {answer}; }}\n')
    return source


@needs_compiler
def test_a_source_is_compiled_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.load_library(make_source(tmp_path, "41")).answer() == 41
    built = list(native.cache_folder().glob("*.so"))
    with monkeypatch.context() as patch:
        patch.setattr(native, "_compile", None)  # would fail if called
        assert native.load_library(make_source(tmp_path, "41")).answer() == 41
    assert native.load_library(make_source(tmp_path, "42")).answer() == 42
    assert len(built) == 1 and len(list(native.cache_folder().glob("*.so"))) == 2
    assert not [path for path in native.cache_folder().iterdir() if path.is_dir()]  # no remains of compiling


@needs_compiler
def test_flags_make_another_library(tmp_path: Path) -> None:
    source = make_source(tmp_path, "ANSWER")
    assert [native.load_library(source, f"-DANSWER={i}").answer() for i in (1, 2, 1)] == [1, 2, 1]


@needs_compiler
def test_a_source_that_does_not_compile_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = make_source(tmp_path, "nothing_declared")
    with pytest.raises(native.BuildError, match="nothing_declared"):
        native.load_library(source)
    with caplog.at_level(logging.WARNING):
        assert native.library(source) is None
    assert "nothing_declared" in caplog.text


def test_without_a_compiler_torch_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.WARNING):
        assert native.library(make_source(tmp_path, "1")) is None
    assert "no C++ compiler" in caplog.text


@needs_compiler
def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FARSPAN_CACHE", str(tmp_path / "file"))
    with pytest.raises(native.BuildError, match="file"):
        native.load_library(make_source(tmp_path, "1"))


def test_setup_builds_every_source_of_ours() -> None:
    root = Path(__file__).parents[2]
    (line,) = (line for line in (root / "Makefile").read_text().splitlines() if "-m configs.native" in line)
    built = {path for word in line.split() if word.endswith(".cpp") for path in root.glob(word)}
    there = {
        path
        for package in ("configs", "engine", "kvcache", "sparse")
        for path in (root / package).rglob("*.cpp")
    }
    assert built == there and there
