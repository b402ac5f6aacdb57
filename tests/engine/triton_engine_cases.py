"""An engine on Triton kernels answers as one on torch does: run by test_kernels.py.

Under TRITON_INTERPRET=1 the kernels run on CPU tensors, and this needs no GPU.
"""

import os

import pytest
import torch

from configs.model import ModelInfo
from configs.quantised import INT8
from engine.kernels import Kernels, triton_kernels
from engine.self_check import checked
from tests.tiny import greedy, make_prompt, plan, tiny_engine, tiny_model

# the interpreter of Triton 3.6, over loop bounds that a kernel has loaded
DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
PARTS = {
    "prefill": {"method": "minference", "chunk": 64, "last_q": 20, "vertical": 40, "slash": 100},
    "kv": {"policy": "snapkv", "budget": 40},
}


@pytest.mark.parametrize("parts", [{}, PARTS], ids=["dense", "sparse and compressed"])
def test_triton_and_torch_give_the_same_tokens(parts: dict[str, dict[str, object]]) -> None:
    network = tiny_model(num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1).to(DEVICE)
    prompt = make_prompt(80)
    answers = [
        tiny_engine(plan("mine", **parts), network=network, kernels=kernels).answer(prompt, greedy(3))
        for kernels in (triton_kernels(), Kernels())
    ]
    assert answers[0] == answers[1]


def test_all_of_them_pass_their_self_check(caplog: pytest.LogCaptureFixture) -> None:
    model = ModelInfo("tiny", 1, 2, 1, 16, vocab_size=100, max_length=4096)
    kernels = triton_kernels()
    assert kernels.attend is not Kernels().attend
    for page_dtype in (None, INT8):
        assert checked(kernels, model, torch.float32, DEVICE, page_dtype) == kernels
    assert not caplog.records
