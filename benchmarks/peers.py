"""Other engines that ours is compared with, and the process that runs one of them.

    python -P peers.py NAME SETTING

Any Python from 3.11 on may run it: it imports the engine and nothing of ours. It answers in lines of JSON:
its version, or why it cannot run; then, for each line of token ids, the first token and what it took, and for
a number, what so many decode steps behind it took.
"""

import ctypes
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol


class Peer(Protocol):
    """An engine with its model loaded. Nothing of one prompt is kept for the next."""

    def first_token(self, prompt: Sequence[int]) -> int:
        """The most likely token behind the prompt."""


@dataclass(frozen=True)
class Setting:
    """What all peers are asked alike."""

    model: str  # a GGUF file
    dtype: str  # float32 | bfloat16: of activations, keys and values
    threads: int
    longest: int  # tokens of the longest prompt, and of what is generated behind it


class CannotServe(Exception):
    """The engine is here, but not for this setting. The message says why."""


class OpenVino:
    """Weights stay in four bits (minima of Q4_1 rounded to whole steps), and are widened as they are used."""

    def __init__(self, setting: Setting, xattention: bool = False) -> None:
        openvino: Any = import_module("openvino")
        genai: Any = import_module("openvino_genai")
        precision = {"float32": "f32", "bfloat16": "bf16"}[setting.dtype]
        able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision == "bf16" and "BF16" not in able:  # it would take float32, and not say so
            raise CannotServe("OpenVINO has no bfloat16 on this processor")
        schedule = genai.SchedulerConfig()
        schedule.max_num_batched_tokens = setting.longest + 1  # a prompt in one piece
        schedule.enable_prefix_caching = False
        if xattention:
            schedule.use_sparse_attention = True
            schedule.sparse_attention_config = genai.SparseAttentionConfig(
                mode=genai.SparseAttentionMode.XATTENTION,
                xattention_threshold=0.8,
                xattention_block_size=64,
                xattention_stride=8,
            )
        self._tensor, self._inputs = openvino.Tensor, genai.TokenizedInputs
        self._pipeline = genai.LLMPipeline(
            setting.model,
            "CPU",
            scheduler_config=schedule,
            INFERENCE_NUM_THREADS=setting.threads,
            INFERENCE_PRECISION_HINT=precision,
            KV_CACHE_PRECISION=precision,  # its own choices are eight bits, here and for activations
            DYNAMIC_QUANTIZATION_GROUP_SIZE="0",
        )

    def first_token(self, prompt: Sequence[int]) -> int:
        import numpy

        ids = numpy.array([prompt], dtype=numpy.int64)
        inputs = self._inputs(self._tensor(ids), self._tensor(numpy.ones_like(ids)))
        found = self._pipeline.generate(inputs, max_new_tokens=1, do_sample=False, ignore_eos=True)
        return int(found.tokens[0][0])


class LlamaCpp:
    """Weights are written anew in the dtype: as they lie in the file, it would round activations to match."""

    FORMATS = {
        "float32": (0, 0),
        "bfloat16": (32, 30),
    }  # llama_ftype of weights, ggml_type of keys and values

    def __init__(self, setting: Setting, flash: bool = False) -> None:
        llama_cpp: Any = import_module("llama_cpp")
        weights, cache = self.FORMATS[setting.dtype]
        wanted = llama_cpp.llama_model_quantize_default_params()
        wanted.ftype, wanted.allow_requantize, wanted.nthread = weights, True, setting.threads
        with TemporaryDirectory() as folder:
            path = Path(folder, "model.gguf")
            failed = llama_cpp.llama_model_quantize(
                setting.model.encode(), str(path).encode(), ctypes.byref(wanted)
            )
            if failed:
                raise CannotServe(f"llama.cpp could not write the weights as {setting.dtype}")
            self._model = llama_cpp.Llama(
                str(path),
                use_mmap=False,  # the file is gone in a moment
                n_ctx=setting.longest + 1,
                n_batch=2048,  # as its own programs take prompts
                n_threads=setting.threads,
                n_threads_batch=setting.threads,
                type_k=cache,
                type_v=cache,
                flash_attn=flash,
                verbose=False,
            )

    def first_token(self, prompt: Sequence[int]) -> int:
        self._model.reset()
        self._model.eval(prompt)
        self._first = int(self._model.sample(temp=0.0))
        return self._first

    def decode(self, steps: int) -> int:
        """So many steps behind the last prompt and its first token: the last of their tokens."""
        prompt_length, token = self._model.n_tokens, self._first
        for _ in range(steps):
            self._model.eval([token])
            token = int(self._model.sample(temp=0.0))
        self._model.n_tokens = prompt_length  # the next step forgets what lies behind
        return token


@dataclass(frozen=True)
class Kind:
    """How a peer is made, and what to install for it."""

    package: str
    load: Callable[[Setting], Peer]


PEERS = {
    "openvino": Kind("openvino-genai", OpenVino),
    "openvino-xattention": Kind("openvino-genai", lambda setting: OpenVino(setting, xattention=True)),
    "llama.cpp": Kind("llama-cpp-python", LlamaCpp),
    "llama.cpp-flash": Kind("llama-cpp-python", lambda setting: LlamaCpp(setting, flash=True)),
}


def main() -> None:
    # Engines write to standard output as they like; the answers have a way of their own.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    kind, setting = PEERS[sys.argv[1]], Setting(**json.loads(sys.argv[2]))
    try:
        peer = kind.load(setting)
    except (ImportError, CannotServe) as error:
        remedy = f"; pip install {kind.package}" if isinstance(error, ImportError) else ""
        return answer({"cannot": f"{error}{remedy}"})
    answer({kind.package: importlib.metadata.version(kind.package)})
    for line in sys.stdin:
        asked = json.loads(line)
        wall, cpu = time.perf_counter(), time.process_time()
        if isinstance(asked, int):
            assert isinstance(peer, LlamaCpp), "others give no time of its own to a step"
            token = peer.decode(asked)
        else:
            token = peer.first_token(asked)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        answer({"token": token, "wall": wall, "cpu": cpu})


if __name__ == "__main__":
    main()
