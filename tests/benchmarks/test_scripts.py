"""The benchmarks end to end on a tiny model: every number they promise is there, and means what it says."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    concurrency,
    context_extension,
    decode,
    host_tier,
    kv_memory,
    layers,
    live_sequences,
    prefill_attention,
    prefill_pages,
    prefix_cache,
    quantised_pages,
    ttft,
)
from benchmarks.common import CannotRun, Elapsed
from benchmarks.peers import Setting
from benchmarks.prompts import load_text, load_tokenizer
from tests.benchmarks.builders import save_model, save_plan, save_text

THREADS = ("--threads", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models"))


def run(
    main: Callable[[Sequence[str]], None], name: str, folder: Path, model: Path, *flags: str
) -> dict[str, Any]:
    threads = torch.get_num_threads()
    try:
        main(
            ["--model", str(model), "--text", str(save_text(folder)), "--out", str(folder), *THREADS, *flags]
        )
    finally:
        torch.set_num_threads(threads)
    content: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return content


def test_ttft_times_huggingface_beside_each_plan(tmp_path: Path, model: Path) -> None:
    sparse = save_plan(tmp_path, "sparse", "prefill: {method: minference, vertical: 32, slash: 32}")
    flags = ("--lengths", "320", "--plans", "dense", str(sparse), "--repeats", "2")
    name = "ttft-bfloat16-weights"
    content = run(ttft.main, name, tmp_path, model, *flags, "--weights-dtype", "bfloat16")
    rows = {row["candidate"]: row for row in content["rows"]}
    ours = ["dense", "sparse", "dense, bfloat16 weights", "sparse, bfloat16 weights"]
    assert list(rows) == ["hf dynamic", "hf static", *ours]
    assert min(rows["hf dynamic"]["ratio_to_hf"], rows["hf static"]["ratio_to_hf"]) == 1
    for row in rows.values():
        assert row["length"] == 320 and len(row["timing"]["walls_s"]) == 2 and row["timing"]["wall_s"] > 0
    for dense, sparse_too in (ours[:2], ours[2:]):
        assert rows[dense]["prefill_read_fraction"] == 1 > rows[sparse_too]["prefill_read_fraction"]
    assert rows["dense"]["first_token_as_hf"] == rows["hf static"]["first_token_as_hf"] == 1
    assert (content["settings"]["dtype"], content["settings"]["weights_dtype"]) == ("float32", "bfloat16")


def test_ttft_refuses_weights_for_a_server_that_has_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ttft.main(["--server", "http://127.0.0.1:1", "--weights-dtype", "int8"])
    assert "--weights-dtype: a running server has its own" in capsys.readouterr().err


def test_huggingface_and_farspan_start_with_the_same_token(tmp_path: Path, model: Path) -> None:
    prompt = ttft.Prompts(load_text(save_text(tmp_path), load_tokenizer(model)), length=200).at(0)
    peer = ttft.HuggingFace(model, "float32")
    ours = ttft.InProcess(str(model), ["dense"], "float32", threads=torch.get_num_threads())
    found = int(peer.model(torch.tensor([prompt])).logits[0, -1].argmax())
    assert {peer.first_token(prompt, cache).token for cache in ttft.HF_CACHES} == {found}
    for _ in range(2):  # the same again: nothing of it is cached
        answer = ours.first_token(prompt, "dense")
        assert answer.token == found
        assert answer.cost is not None and answer.cost["prefill_read_fraction"] == 1


def test_ttft_asks_another_engine_the_same_and_takes_its_word_for_the_time(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Peer:
        name, versions = "other", {"other": "1.0"}

        def __init__(self) -> None:
            self.prompts: list[Sequence[int]] = []

        def first_token(self, prompt: Sequence[int]) -> tuple[int, Elapsed]:
            self.prompts.append(prompt)
            return -1, Elapsed(wall=1000.0 + len(self.prompts), cpu=500.0)

    peer = Peer()
    monkeypatch.setattr(ttft, "gguf_file", lambda _: tmp_path / "model.gguf")
    monkeypatch.setattr(ttft, "start_peers", lambda *_: [peer])
    content = run(ttft.main, "ttft", tmp_path, model, "--lengths", "96", "--plans", "dense", "--repeats", "2")
    row = next(row for row in content["rows"] if row["candidate"] == "other")
    assert row["timing"] == {"wall_s": 1002.5, "cpu_s_per_thread": 500.0, "walls_s": [1002.0, 1003.0]}
    assert row["ratio_to_hf"] > 1 and row["first_token_as_hf"] == 0 and row["versions"] == peer.versions
    prompts = ttft.Prompts(load_text(tmp_path / "text.txt", load_tokenizer(model)), length=96)
    assert peer.prompts == [prompts.at(index) for index in (-1, 0, 1)]


def test_context_extension_counts_needles_with_each_scaling(tmp_path: Path, model: Path) -> None:
    flags = ("--lengths", "320", "600", "--scalings", "none", "linear:2", "--needles", "2", "--prompts", "1")
    content = run(context_extension.main, "context_extension", tmp_path, model, *flags)
    rows = {(row["scaling"], row["length"]): row for row in content["rows"]}
    assert set(rows) == {(scaling, length) for scaling in ("none", "linear:2") for length in (320, 600)}
    assert all(row["needles"] == 2 and 0 <= row["digit_accuracy"] <= 1 for row in rows.values())
    changed = [rows[scaling, 600]["digit_log_probability"] for scaling in ("none", "linear:2")]
    assert changed[0] != changed[1]


def test_layers_are_timed_fused_and_as_they_are(tmp_path: Path, model: Path) -> None:
    threads = torch.get_num_threads()
    try:
        layers.main(
            ["--model", str(model), "--tokens", "1", "20", "--rounds", "1", "--out", str(tmp_path), *THREADS]
        )
    finally:
        torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "layers.json").read_text())["rows"]
    assert [row["tokens"] for row in rows] == [1, 20]
    for row in rows:
        ratio = row["huggingface"]["wall_s"] / row["farspan"]["wall_s"]
        assert row["speedup"] == pytest.approx(ratio, rel=0.05)


def test_pages_of_every_dtype_are_timed_and_compared(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        quantised_pages.main(
            ["--tokens", "300", "--layers", "2", "--rounds", "1", "--out", str(tmp_path), *THREADS]
        )
    finally:
        torch.set_num_threads(threads)
    rows = {row["pages"]: row for row in json.loads((tmp_path / "quantised_pages.json").read_text())["rows"]}
    sizes = {name: row["bytes_per_token"] for name, row in rows.items()}
    assert sizes == {"float32": 512, "bfloat16": 256, "int8": 136, "fp8": 136}
    assert rows["float32"]["error"] == 0 < rows["int8"]["error"] < 0.02 < rows["fp8"]["error"] < 0.1
    assert all(row["milliseconds"] > 0 for row in rows.values())


def test_no_prompt_of_ttft_starts_like_another(tmp_path: Path, model: Path) -> None:
    text = load_text(save_text(tmp_path), load_tokenizer(model))
    prompts = ttft.Prompts(text, length=256)
    drawn = [prompts.at(index) for index in range(-1, 19)]
    assert all(len(prompt) == 256 for prompt in drawn)
    assert len({prompt[:64] for prompt in drawn}) == 20  # no page of the first block is another's


def test_concurrency_compares_requests_at_once_with_a_row(tmp_path: Path, model: Path) -> None:
    flags = ("--length", "96", "--answer", "8", "--repeats", "1", "--requests", "3")
    content = run(concurrency.main, "concurrency", tmp_path, model, *flags)
    seconds = content["seconds"]
    assert content["ratio"] == pytest.approx(
        seconds["at once"]["wall_s"] / seconds["in a row"]["wall_s"], abs=1e-3
    )
    assert content["settings"]["requests"] == 3


def test_decode_compares_what_is_held_read_and_batched(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--scale", "16", "--steps", "3", "--rounds", "1")
    rows = run(decode.main, "decode", tmp_path, model, *flags)["rows"]
    assert "left out: llama.cpp, which reads a GGUF file" in capsys.readouterr().out
    found = {one: [row for row in rows if row["comparison"] == one] for one in ("huggingface", "batch")}
    found |= {one: [row for row in rows if row["comparison"] == one] for one in ("quest", "kept", "layers")}
    for one in ("batch of int8 pages", "kept with bf16 weights"):
        found[one] = [row for row in rows if row["comparison"] == one]
    assert [len(cases) for cases in found.values()] == [4, 2, 2, 2, 2, 2, 2] and len(rows) == 16
    assert [row["candidate"] for row in found["quest"]] == ["full", "quest:decode.read=128"]
    assert [row["batch"] for row in found["batch"]] == [1, 8]
    for base, *others in found.values():
        other = others[-1]
        assert base["ratio"] == 1 and len(other["timing"]["walls_s"]) == 1
        speed = other["batch"] * 3 / other["timing"]["wall_s"]
        assert other["tokens_per_second"] == pytest.approx(speed, rel=0.01)
        assert other["ratio"] == pytest.approx(speed / base["tokens_per_second"], rel=0.01)


def test_decode_is_compared_with_the_engines_that_are_installed(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []

    class Peer:
        def __init__(self, name: str, setting: Setting, python: str) -> None:
            if name == "llama.cpp-flash":
                raise CannotRun(f"{name}: no such package")
            assert (setting.dtype, setting.longest) == ("bfloat16", 256 + 3)
            self.versions = {"llama-cpp-python": "0.3"}

        def first_token(self, prompt: tuple[int, ...]) -> tuple[int, Elapsed]:
            assert len(prompt) == 256
            return 1, Elapsed(9.0, 9.0)

        def decode(self, steps: int) -> tuple[int, Elapsed]:
            return 1, Elapsed(steps * 1e-9, 0.0)

        def close(self) -> None:
            closed.append("llama.cpp")

    monkeypatch.setattr(decode, "PeerProcess", Peer)
    monkeypatch.setattr(decode, "gguf_file", lambda model: Path("model.gguf"))
    flags = ("--comparisons", "llama.cpp", "--scale", "16", "--steps", "3", "--rounds", "1")
    rows = run(decode.main, "decode", tmp_path, model, *flags)["rows"]
    peer, *ours = [row["candidate"] for row in rows]
    assert (peer, ours[0], len(ours)) == ("llama.cpp", "dense", 3) and closed == ["llama.cpp"]
    assert rows[0]["tokens_per_second"] == pytest.approx(1e9) and rows[1]["ratio"] < 1e-3
    assert [row["versions"] for row in rows] == [{"llama-cpp-python": "0.3"}, None, None, None]


def test_freed_pages_are_seen_in_the_hands_of_another_request(tmp_path: Path, model: Path) -> None:
    # Short chunks, so that the second prompt takes many steps, and is seen between them.
    plan = save_plan(tmp_path, "short", "prefill: {chunk: 64}\nkv: {policy: snapkv, budget: 128}")
    flags = ("--compressed", str(plan), "--length", "1536", "--answer", "256")
    content = run(kv_memory.main, "kv_memory", tmp_path, model, *flags)
    block = 3 * 2 * 2 * 64 * 16 * 4  # bytes of 64 tokens: layers x KV heads x (K, V) x tokens x D x fp32
    dense, short = (content["held_bytes"][name] / block for name in ("dense", "short"))
    # One page behind the prompt for the answer so far; a busy machine may look one page later.
    assert dense in (24 + 1, 24 + 2) and short in (2 + 1, 2 + 2)
    assert content["ratio"] == pytest.approx(short / dense, abs=1e-3)
    together = {pair["plan"]: pair for pair in content["together"]}
    assert not together["dense"]["ran_at_once"] and not together["dense"]["uses_freed_pages"]
    assert together["short"]["ran_at_once"] and together["short"]["uses_freed_pages"]


def test_a_document_asked_again_comes_from_the_cache_with_the_same_answer(
    tmp_path: Path, model: Path
) -> None:
    flags = ("--plans", "dense", "--length", "640", "--answer", "4")
    (row,) = run(prefix_cache.main, "prefix_cache", tmp_path, model, *flags)["rows"]
    assert row["cached_tokens"] == 512  # the whole pages of the document's 544 tokens
    assert row["same_answer"]
    assert row["ratio"] == pytest.approx(row["second_seconds"] / row["first_seconds"], abs=1e-3)


def test_a_document_whose_pages_others_had_comes_back_from_the_host(tmp_path: Path, model: Path) -> None:
    flags = ("--plans", "dense", "--length", "640", "--answer", "4")
    (row,) = run(host_tier.main, "host_tier", tmp_path, model, *flags)["rows"]
    assert row["cached_tokens"] == 512  # the whole pages of the document's 544 tokens
    assert row["host_hits"] >= 448  # the other prompt left one of the pool's eleven columns
    assert row["same_answer"]
    assert row["ratio"] == pytest.approx(row["again_seconds"] / row["first_seconds"], abs=1e-3)


def test_a_policy_that_lets_pages_go_holds_fewer_at_its_widest_moment(tmp_path: Path, model: Path) -> None:
    lean = save_plan(tmp_path, "lean", "prefill: {chunk: 64}\nkv: {policy: streaming, sink: 64, window: 128}")
    flags = ("--plans", "dense", str(lean), "--length", "640")
    dense, short = run(prefill_pages.main, "prefill_pages", tmp_path, model, *flags)["rows"]
    assert dense["pages"] == 3 * 2 * 10
    assert short["pages"] <= 3 * 2 * 5 and short["ratio"] == pytest.approx(
        short["pages"] / dense["pages"], abs=1e-3
    )


def test_more_sequences_live_where_a_policy_forgets(tmp_path: Path, model: Path) -> None:
    short = save_plan(tmp_path, "short", "kv: {policy: snapkv, budget: 64}")
    flags = ("--plans", "dense", str(short), "--length", "512", "--answer", "64", "--requests", "6")
    dense, lean = run(live_sequences.main, "live_sequences", tmp_path, model, *flags)["rows"]
    assert (dense["bound"], dense["requests"]) == (4, 4) and lean["requests"] == 6
    assert lean["bound"] > dense["bound"] >= dense["live"] >= 1


def test_sparse_attention_is_timed_beside_dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        prefill_attention, "gemm_ceiling", lambda dtype: 1.0
    )  # seconds, where bf16 is emulated
    threads = torch.get_num_threads()
    try:
        prefill_attention.main(["--lengths", "1024", "--rounds", "1", "--out", str(tmp_path), *THREADS])
    finally:
        torch.set_num_threads(threads)
    found = json.loads((tmp_path / "prefill_attention.json").read_text())["rows"]
    rows = {row["case"]: row for row in found}
    assert list(rows) == ["sdpa", "dense", "sparse 20%", "sparse 10%", "sparse 5%"]
    assert rows["dense"]["density"] == rows["dense"]["over_own_dense"] == 1
    assert 0.05 < rows["sparse 5%"]["density"] <= rows["sparse 20%"]["density"] < 0.35
