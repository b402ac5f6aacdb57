"""Quality: tasks judge the tokens they mean to, teacher forcing gives the model's own logits, losses show."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import quality
from benchmarks.common import CannotRun
from benchmarks.prompts import Text, load_text, load_tokenizer
from benchmarks.quality import Tally, gate
from benchmarks.scoring import Scorer
from benchmarks.tasks import CUE, needles, plain, repeated
from configs.errors import ConfigError
from configs.schema import EngineConfig
from tests.benchmarks.builders import save_model, save_plan, save_text
from tests.tiny import plan


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models"))


@pytest.fixture
def text(tmp_path: Path, model: Path) -> Text:
    return load_text(save_text(tmp_path), load_tokenizer(model))


def test_forced_tokens_get_the_logits_that_huggingface_gives_them(model: Path, text: Text) -> None:
    import transformers

    tokens = text.tokens[:300]
    positions = [0, 100, 199, 254, 255, 256, 298]
    policy = plan("short", kv={"policy": "snapkv", "budget": 64})
    scorer = Scorer(
        model, EngineConfig(model=str(model)), [plan(), policy], dtype="float32", device="cpu", longest=300
    )
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, attn_implementation="sdpa").eval()
    with torch.inference_mode():
        expected = reference(torch.tensor([tokens])).logits[0, positions]
    exact = scorer.score("dense", tokens, 256, positions)
    torch.testing.assert_close(exact.logits, expected, atol=2e-4, rtol=2e-4)  # fp32
    assert exact.cost.kv_tokens_kept == 256
    lossy = scorer.score("short", tokens, 256, positions)
    in_prompt = [position < 256 for position in positions]
    torch.testing.assert_close(lossy.logits[in_prompt], expected[in_prompt], atol=2e-4, rtol=2e-4)
    assert (lossy.logits[-1] - expected[-1]).abs().max() > 1e-2  # what was forgotten is missed


def test_needles_are_hidden_once_each_and_only_digits_are_judged(model: Path, text: Text) -> None:
    tokenizer = load_tokenizer(model)
    task = needles(text.tokens[:1500], tokenizer, count=4, prompt_length=1200, seed=1)
    judged = tokenizer.decode([task.tokens[position + 1] for position in task.positions])
    assert judged.isdigit() and len(judged) == 20
    assert task.positions[0] == 1199, "the prompt ends where the first digit is asked for"
    assert not any(task.in_prompt)
    prompt = tokenizer.decode(task.tokens[: task.prompt_length])
    for needle in range(4):
        number = "".join(judged[i] for i, group in enumerate(task.groups) if group == needle)
        assert prompt.count(number) == 1
    other = needles(text.tokens[:1500], tokenizer, count=4, prompt_length=1200, seed=2)
    assert other.tokens != task.tokens
    assert needles(text.tokens[:1500], tokenizer, count=4, prompt_length=1200, seed=1) == task


def test_a_repeated_passage_is_judged_on_its_second_coming_only(text: Text) -> None:
    task = repeated(text.tokens[:500], replayed=40, passage=120)
    assert task.tokens[-120:] == task.tokens[:120] and len(task.tokens) == 500
    assert task.prompt_length == 460
    assert task.positions == tuple(range(500 - 120 + CUE - 1, 499))
    assert task.in_prompt.count(False) == 40


def test_a_passage_comes_again_where_the_model_still_copies() -> None:
    task = repeated(tuple(range(6000)), replayed=40, passage=500)
    assert task.tokens[:5500] == tuple(range(5500)) and task.tokens[-500:] == task.tokens[1404:1904]


def test_prose_is_judged_in_the_prompt_and_behind_it(text: Text) -> None:
    task = plain(text.tokens[:300], replayed=44, rows=32)
    assert task.in_prompt.count(True) == 32 and task.in_prompt.count(False) == 44
    assert min(task.positions) >= 64 and max(task.positions) == 298


def test_a_text_that_is_too_short_is_refused_not_repeated(text: Text) -> None:
    with pytest.raises(CannotRun, match="a longer text"):
        text.piece(0, 1, len(text.tokens) + 1)


def tally(right: float, copied: float, count: int = 200) -> Tally:
    hits = round(right * count)
    nll = {f"nll copy {part}": [math.log(copied)] for part in ("prefill", "decode")}
    return Tally(tokens=nll, right_by_needle=[[i < hits] for i in range(count)])


def test_the_gate_passes_fails_or_stays_open_for_the_stated_reasons() -> None:
    dense = tally(0.90, 1.20)
    assert gate(tally(0.88, 1.25), dense) == "passes"
    assert gate(tally(0.86, 1.20), dense) == "fails: digits"
    assert gate(tally(0.90, 1.27), dense) == "fails: copy prefill, copy decode"
    assert gate(tally(0.90, 1.20, count=99), dense) == "open: 99 needles"


def run(folder: Path, model: Path, *flags: str) -> dict[str, Any]:
    threads = torch.get_num_threads()
    sizes = ("--lengths", "512", "--samples", "1", "--needles", "4", "--needles-per-text", "2")
    more = ("--rows", "32", "--replayed", "16", "--threads", "1")
    try:
        quality.main(["--model", str(model), "--out", str(folder), *sizes, *more, *flags])
    finally:
        torch.set_num_threads(threads)
    name = "quality-calibration" if "--calibrate" in flags else "quality"
    content: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return content


@pytest.mark.parametrize("form", ["raw", "chat"])
def test_quality_shows_what_each_part_of_a_plan_loses(tmp_path: Path, model: Path, form: str) -> None:
    sparse = save_plan(tmp_path, "sparse", "prefill: {method: minference, vertical: 16, slash: 16}")
    short = save_plan(tmp_path, "short", "kv: {policy: snapkv, budget: 64}")
    flags = ("--report", str(save_text(tmp_path)), "--plans", str(sparse), str(short), "--form", form)
    rows = {row["plan"]: row for row in run(tmp_path, model, *flags)["rows"]}
    assert list(rows) == ["dense", "sparse", "short"]
    assert rows["dense"]["read_fraction"] == rows["dense"]["kept"] == 1 and "gate" not in rows["dense"]
    assert rows["sparse"]["read_fraction"] < 1 and rows["sparse"]["kept"] == 1
    assert 0 < rows["sparse"]["recall"] < 1
    assert rows["sparse"]["kl_prefill"] > 1e-3
    assert rows["short"]["kl_prefill"] == pytest.approx(0, abs=1e-6), "a policy acts behind the prompt"
    assert rows["short"]["kl_decode"] > 1e-3 and rows["short"]["kept"] < 0.2
    assert rows["short"]["perplexity_prefill"] == pytest.approx(rows["dense"]["perplexity_prefill"])
    assert all(row["needles"] == 4 and row["seconds"] > 0 for row in rows.values())


def test_nothing_is_reported_on_the_text_it_was_chosen_on(tmp_path: Path, model: Path) -> None:
    text = str(save_text(tmp_path))
    short = save_plan(tmp_path, "short", "kv: {policy: snapkv, budget: 64}")
    run(tmp_path, model, "--calibrate", text, "--plans", str(short))
    with pytest.raises(CannotRun, match="report on another"):
        run(tmp_path, model, "--report", text, "--plans", str(short))


# Made up but for its surface: a press that keeps the first tokens.
KVPRESS = """
from contextlib import contextmanager

class SnapKVPress:
    def __init__(self, compression_ratio):
        self.ratio = compression_ratio

    @contextmanager
    def __call__(self, model):
        def crop(module, args, kwargs, output):
            cache = kwargs["past_key_values"]
            leaving = round(cache.get_seq_length() * self.ratio)
            if leaving:
                cache.crop(-leaving)
        hook = model.register_forward_hook(crop, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
"""


def test_kvpress_is_judged_beside_ours_on_the_same_tokens(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "packages"
    (package / "kvpress-9.8.dist-info").mkdir(parents=True)
    (package / "kvpress-9.8.dist-info" / "METADATA").write_text("Name: kvpress\nVersion: 9.8\n")
    (package / "kvpress.py").write_text(KVPRESS)
    monkeypatch.setenv("PYTHONPATH", str(package))
    flags = ("--report", str(save_text(tmp_path)), "--plans", "dense", "--decode-only")
    peer = ("--kvpress-python", sys.executable, "--kvpress-budgets", "512", "128")
    rows = {row["plan"]: row for row in run(tmp_path, model, *flags, *peer)["rows"]}
    whole, part = rows["kvpress 9.8: snapkv 512"], rows["kvpress 9.8: snapkv 128"]
    assert whole["kept"] == 1 and abs(whole["kl_decode"]) < 1e-5, "what keeps all is dense, in float32"
    assert part["kept"] == pytest.approx(0.25, abs=0.01) and part["kl_decode"] > 1e-3
    with pytest.raises(CannotRun, match="decode-only"):
        run(tmp_path, model, *flags[:-1], *peer)
    monkeypatch.delenv("PYTHONPATH")
    with pytest.raises(CannotRun, match="pip install kvpress"):
        run(tmp_path, model, *flags, *peer)


def test_narrower_pages_and_weights_are_judged_beside_what_they_narrow(tmp_path: Path, model: Path) -> None:
    flags = ("--report", str(save_text(tmp_path)), "--plans", "dense", "--decode-only")
    both = ("--cache-dtype", "int8", "--weights-dtype", "bfloat16")
    content = run(tmp_path, model, *flags, *both)
    rows = {row["plan"]: row for row in content["rows"]}
    assert list(rows) == ["dense", "dense over int8, bfloat16 weights"]
    assert rows["dense over int8, bfloat16 weights"]["kl_decode"] > 1e-6, "rounded, so not quite the same"
    assert content["settings"]["weights_dtype"] == "bfloat16"


def test_weights_that_would_stay_as_they_are_are_refused(tmp_path: Path, model: Path) -> None:
    flags = ("--report", str(save_text(tmp_path)), "--plans", "dense", "--dtype", "bfloat16")
    with pytest.raises(ConfigError, match="weights_dtype: bfloat16 is for .* float32; here is bfloat16"):
        run(tmp_path, model, *flags, "--weights-dtype", "bfloat16")
