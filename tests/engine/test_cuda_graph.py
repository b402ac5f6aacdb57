"""CUDA graphs: what is asked for, and, on a GPU, that answers are those of plain calls."""

from pathlib import Path
from typing import Any

import pytest
import torch

import kvcache.decode
from configs.errors import ConfigError
from configs.loading import load_config
from configs.schema import EngineConfig
from engine.cuda_graph import CudaRecorder, check_graphs, cuda_graphs, graph_bytes
from engine.kernels import Kernels
from engine.messages import Sampling
from kvcache.decode import Full
from tests.engine.test_graphs import HIP, QUEST
from tests.tiny import greedy, make_prompt, plan, tiny_engine, tiny_model

CPU = torch.device("cpu")


def test_graphs_that_cannot_be_are_refused_where_they_were_asked_for() -> None:
    with pytest.raises(ConfigError, match="engine.cuda_graphs: on needs a CUDA device, this is cpu"):
        check_graphs("on", "cpu")
    for asked, device in (("auto", "cpu"), ("off", "cpu"), ("on", "cuda")):
        check_graphs(asked, device)


@pytest.mark.parametrize(("written", "meant"), [("on", "on"), ("off", "off"), ("auto", "auto")])
def test_on_and_off_mean_what_they_say_in_yaml(written: str, meant: str, tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(f"engine: {{cuda_graphs: {written}}}\n")
    assert load_config(file, {}).engine.cuda_graphs == meant
    assert load_config(None, {"engine.cuda_graphs": written}).engine.cuda_graphs == meant


def test_their_memory_is_set_aside_on_a_gpu_alone() -> None:
    asked = EngineConfig(cuda_graph_memory="512MiB")  # type: ignore[arg-type]
    assert graph_bytes(asked, torch.device("cuda")) == 512 << 20
    assert graph_bytes(asked, CPU) == 0
    assert graph_bytes(asked.model_copy(update={"cuda_graphs": "off"}), torch.device("cuda")) == 0


def test_a_cpu_records_nothing() -> None:
    tiny = tiny_engine()
    assert not len(cuda_graphs(EngineConfig(), tiny.network, [Full()], tiny.cache, Kernels()))


@pytest.fixture(scope="module")
def network() -> Any:
    return tiny_model().cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", ["auto", "int8"])
def test_graph_and_plain_answers_are_equal(cache_dtype: str, network: Any) -> None:
    """fp32. Sampled and greedy, of several methods, with forks and with tokens that are forgotten."""
    plans = [
        plan("full"),
        plan("quest", decode=QUEST),
        plan("reused", decode={**QUEST, "reuse": 4}),
        plan("hip", decode=HIP),
        plan("forgets", kv={"policy": "snapkv", "budget": 100}),
    ]
    found = []
    for recorder in (None, CudaRecorder(torch.device("cuda"))):
        tiny = tiny_engine(*plans, network=network, recorder=recorder, cache_dtype=cache_dtype)
        assert recorder is None or len(tiny.engine._runner._graphs) == 4 * 4
        for index, one in enumerate(plans):
            tiny.submit(one.name, make_prompt(300 - 20 * index, seed=index), greedy(30), one.name)
        tiny.submit("several", make_prompt(130), Sampling(20, temperature=0.8, seed=1), "full", choices=2)
        found.append(tiny.run())
        tiny.assert_empty()
    assert found[1] == found[0]


@pytest.mark.gpu
def test_recording_stays_within_its_memory(network: Any, caplog: pytest.LogCaptureFixture) -> None:
    tiny = tiny_engine(network=network)
    assert tiny.engine._runner._kernels.attend_rows is not kvcache.decode.attend_rows
    kernels = tiny.engine._runner._kernels
    none = EngineConfig(cuda_graph_memory=0)
    assert not len(cuda_graphs(none, network, [Full()], tiny.cache, kernels))
    with pytest.raises(ConfigError, match="not one decode step could be recorded"):
        on = none.model_copy(update={"cuda_graphs": "on"})
        cuda_graphs(on, network, [Full()], tiny.cache, kernels)
    some = EngineConfig(cuda_graph_batch=8)
    assert len(cuda_graphs(some, network, [Full()], tiny.cache, kernels)) == 4
    tiny.assert_empty()


@pytest.mark.gpu
def test_a_step_that_waits_for_the_device_is_not_recorded(
    network: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Torch's attention over rows asks for lengths; afterwards everything works, graphs too."""
    waits = tiny_engine(network=network, kernels=Kernels(), recorder=CudaRecorder(torch.device("cuda")))
    assert not len(waits.engine._runner._graphs) and "cannot be recorded" in caplog.text
    answer = waits.answer(make_prompt(100))
    recorder = CudaRecorder(torch.device("cuda"))
    assert tiny_engine(network=network, recorder=recorder).answer(make_prompt(100)) == answer
