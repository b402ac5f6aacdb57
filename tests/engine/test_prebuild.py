"""Kernels compiled without a GPU are those that a server finds: rehearsed, kept, and moved to an image."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.loading import load_config
from tests.tiny import save_tiny
from tests.triton_cases import ROOT, run_cases

pytest.importorskip("triton")

from configs.triton_cache import PrebuiltCache
from engine.absent_gpu import AbsentGpu
from engine.prebuild import resolve_for


def test_a_rehearsal_launches_what_serving_launches() -> None:
    run_cases("tests/engine/prebuild_cases.py", interpreted=False)


def launch(cache: Path, *dtypes: str, prebuilt: Path | None = None) -> str:
    """A launch of each by a process of its own: was its kernel compiled, or kept?"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    if prebuilt is not None:
        environment["TRITON_CACHE_MANAGER"] = "configs.triton_cache:PrebuiltCache"
        environment["FARSPAN_PREBUILT"] = str(prebuilt)
    command = [sys.executable, "-m", "tests.engine.prebuilt_launch", *dtypes]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_kernels_that_an_image_brings_are_found_beside_an_empty_volume(tmp_path: Path) -> None:
    assert launch(tmp_path / "built", "bfloat16") == "compiled"
    prebuilt, volume = (tmp_path / "built").rename(tmp_path / "image"), tmp_path / "volume"
    assert launch(volume, "bfloat16", "float32", prebuilt=prebuilt) == "kept compiled", "only of this dtype"
    assert len(list(volume.rglob("*.cubin"))) == len(list(prebuilt.rglob("*.cubin"))) == 1


@pytest.mark.parametrize("lost", ["k.cubin", "__grp__k.json"])
def test_a_kernel_that_an_image_has_not_whole_is_compiled(
    lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "volume"))
    monkeypatch.setenv("FARSPAN_PREBUILT", str(tmp_path / "image"))
    folder = tmp_path / "image" / "KEY"
    folder.mkdir(parents=True)
    (folder / "k.json").write_text("{}")
    (folder / "k.cubin").write_bytes(b"")
    children = {name: f"/elsewhere/KEY/{name}" for name in ("k.json", "k.cubin")}
    (folder / "__grp__k.json").write_text(json.dumps({"child_paths": children}))
    assert PrebuiltCache("KEY").get_group("k.json") == {name: str(folder / name) for name in children}
    (folder / lost).write_text("{")
    if lost == "k.cubin":
        (folder / lost).unlink()
    assert PrebuiltCache("KEY").get_group("k.json") is None


def test_what_cannot_be_prebuilt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="75.*80, 86, 89"):
        AbsentGpu(75)
    model = {"engine.model": str(save_tiny(tmp_path)), "plans": ["dense"]}
    for flags, says in (
        ({"engine.device": "cpu"}, "for GPUs"),
        ({"cache.dtype": "fp8"}, "int8"),
        ({"engine.weights_dtype": "bfloat16"}, "leave it out"),
    ):
        with pytest.raises(ConfigError, match=says):
            resolve_for(load_config(None, model | flags), 80)
    assert resolve_for(load_config(None, model | {"cache.dtype": "fp8"}), 90).dtype == "bfloat16"


def test_a_question_that_the_stand_in_does_not_know_is_named() -> None:
    gpu = AbsentGpu(90)
    for owner in (gpu, gpu.utils):
        with pytest.raises(AttributeError, match="asks its driver for .*tensor_maps"):
            _ = owner.tensor_maps
