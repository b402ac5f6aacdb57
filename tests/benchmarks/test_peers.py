"""Other engines beside ours: made-up packages stand in for theirs, in real processes."""

import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.common import CannotRun
from benchmarks.peer_process import PeerProcess
from benchmarks.peers import PEERS, Setting
from benchmarks.ttft import start_peers

# They insist on what they are asked for: a process that ends where an answer is due fails the test.
LLAMA_CPP = """
import ctypes
import os
from pathlib import Path

def llama_model_quantize_default_params():
    class Wanted(ctypes.Structure):
        _fields_ = [("ftype", ctypes.c_int), ("allow_requantize", ctypes.c_bool), ("nthread", ctypes.c_int)]
    return Wanted()

def llama_model_quantize(source, target, wanted):
    wanted = wanted._obj
    if not wanted.allow_requantize or Path(os.fsdecode(source)).read_text() != "four bits":
        return 1
    Path(os.fsdecode(target)).write_text(f"format {wanted.ftype}")
    return 0

class Llama:
    def __init__(self, path, *, n_ctx, type_k, type_v, n_threads, n_threads_batch, flash_attn, use_mmap, **_):
        self.weights, self.cache = int(Path(path).read_text().split()[1]), (type_k, type_v)
        assert n_threads == n_threads_batch == 1 and not use_mmap
        self.room, self.flash, self.tokens = n_ctx, flash_attn, []

    def reset(self):
        self.tokens, self.n_tokens = [], 0

    def eval(self, tokens):
        os.write(1, b"llama_decode: {not for you}\\n")
        print("nor this")
        self.tokens = [*self.tokens[: self.n_tokens], *tokens]
        self.n_tokens = len(self.tokens)
        assert len(self.tokens) < self.room

    def sample(self, temp):
        assert temp == 0 and self.cache == ((30, 30) if self.weights == 32 else (0, 0))
        return sum(self.tokens) + 1000 * self.weights + 100_000 * self.flash
"""
OPENVINO = """
Tensor = list

class Core:
    def get_property(self, device, name):
        return ["FP32"]
"""
OPENVINO_GENAI = """
from types import SimpleNamespace

SchedulerConfig = SparseAttentionConfig = SimpleNamespace
SparseAttentionMode = SimpleNamespace(XATTENTION="xattention")

def TokenizedInputs(ids, mask):
    assert (mask[0] == 1).all()
    return ids

class LLMPipeline:
    def __init__(self, model, device, scheduler_config, **options):
        assert device == "CPU" and options["INFERENCE_NUM_THREADS"] == 1
        assert options["INFERENCE_PRECISION_HINT"] == options["KV_CACHE_PRECISION"] == "f32"
        assert not scheduler_config.enable_prefix_caching
        self.schedule = scheduler_config

    def generate(self, ids, max_new_tokens, do_sample, ignore_eos):
        assert (max_new_tokens, do_sample, ignore_eos) == (1, False, True)
        sparse = getattr(self.schedule, "use_sparse_attention", False)
        assert not sparse or self.schedule.sparse_attention_config == SimpleNamespace(
            mode="xattention", xattention_threshold=0.8, xattention_block_size=64, xattention_stride=8
        )
        return SimpleNamespace(tokens=[[int(ids[0].sum()) + 100_000 * sparse]])
"""


def install(folder: Path, package: str, **modules: str) -> None:
    """Lay a made-up package in a folder of packages."""
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
    about = folder / f"{package.replace('-', '_')}-7.5.dist-info" / "METADATA"
    about.parent.mkdir(exist_ok=True)
    about.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 7.5\n")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    install(tmp_path, "llama-cpp-python", llama_cpp=LLAMA_CPP)
    install(tmp_path, "openvino-genai", openvino=OPENVINO, openvino_genai=OPENVINO_GENAI)
    return tmp_path


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    path = tmp_path / "model.gguf"
    path.write_text("four bits")
    return Setting(str(path), "float32", threads=1, longest=4)


def ask(name: str, setting: Setting, *prompts: list[int]) -> list[int]:
    peer = PeerProcess(name, setting, sys.executable)
    try:
        assert peer.versions == {PEERS[name].package: "7.5"}
        return [peer.first_token(prompt)[0] for prompt in prompts]
    finally:
        peer.close()


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(
    ("name", "extra"),
    [("openvino", 0), ("openvino-xattention", 100_000), ("llama.cpp", 0), ("llama.cpp-flash", 100_000)],
)
def test_a_peer_answers_each_prompt_anew_whatever_it_prints(name: str, extra: int, setting: Setting) -> None:
    assert ask(name, setting, [1, 2, 3, 4], [5, 6]) == [10 + extra, 11 + extra]


@pytest.mark.usefixtures("packages")
def test_peers_compute_in_the_dtype_asked_for_or_not_at_all(setting: Setting) -> None:
    bfloat16 = replace(setting, dtype="bfloat16")
    assert ask("llama.cpp", bfloat16, [7]) == [32_007]
    with pytest.raises(CannotRun, match="openvino: OpenVINO has no bfloat16"):
        PeerProcess("openvino", bfloat16, sys.executable)


@pytest.mark.usefixtures("packages")
def test_steps_go_on_from_the_prompt_whenever_they_are_asked_for(setting: Setting) -> None:
    peer = PeerProcess("llama.cpp", replace(setting, longest=5), sys.executable)
    try:
        assert peer.first_token([1, 2])[0] == 3
        assert [peer.decode(steps)[0] for steps in (1, 3, 1)] == [6, 24, 6]
        assert peer.first_token([5])[0] == 5 and peer.decode(1)[0] == 10
    finally:
        peer.close()


@pytest.mark.usefixtures("packages")
def test_the_time_of_a_peer_is_that_of_its_own_process(setting: Setting) -> None:
    peer = PeerProcess("llama.cpp", setting, sys.executable)
    elapsed = peer.first_token([1])[1]
    peer.close()
    assert elapsed.wall > 0 and 0 <= elapsed.cpu < 1


def test_a_peer_that_is_not_installed_is_left_out_with_the_remedy(
    packages: Path, setting: Setting, capfd: pytest.CaptureFixture[str]
) -> None:
    (packages / "openvino_genai.py").write_text("raise ModuleNotFoundError('No module named openvino_genai')")
    (packages / "llama_cpp.py").write_text("raise RuntimeError('no such instruction')")
    with ExitStack() as stack:
        assert start_peers(list(PEERS)[::2], setting, sys.executable, stack) == []
        assert start_peers(["openvino"], setting, str(packages / "python"), stack) == []
    shown = capfd.readouterr()
    assert "openvino: No module named openvino_genai; pip install openvino-genai" in shown.out
    assert "llama.cpp: it ended while it loaded" in shown.out and "no such instruction" in shown.err
    assert "python: No such file" in shown.out


@pytest.mark.usefixtures("packages")
def test_a_peer_that_ends_in_the_middle_ends_the_benchmark(setting: Setting) -> None:
    with pytest.raises(RuntimeError, match="llama.cpp: it ended"):
        ask("llama.cpp", setting, [1], [1, 2, 3, 4, 5], [1])
