"""Gates are trained from any text, on what serving sees; what a killed start has done is not done again."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file
from torch import Tensor

from configs.errors import ConfigError
from configs.schema import EngineConfig
from engine.gate_decode import DecodeGates, judged_rows, row_attention
from engine.gate_features import FeatureReader, Features, GateKind, Weights
from engine.gate_prefill import PrefillGates, page_attention
from engine.gate_texts import KINDS, TrainingText, piece, read_text
from engine.gate_training import Recipe, divergence, loss, train_layer
from engine.models import model_info
from engine.train_gates import Task, train_gates
from kvcache.decode import RowSelection
from kvcache.seerattention_r import SeerAttentionR, read_decode_gates
from sparse.gate_files import Gate, read_gates, write_gates
from sparse.seerattention import gate_scores
from tests.tiny import greedy, plan, save_tiny, tiny_engine, tiny_model

PAGE, LENGTH = 64, 512
PAGES = LENGTH // PAGE
PREFILL, DECODE = PrefillGates(), DecodeGates()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "words.txt"
    draw = torch.Generator().manual_seed(0)
    words = [f"w{n}" for n in torch.randint(0, 300, (1500,), generator=draw).tolist()]
    path.write_text(". ".join(words))
    return path


def make_task(model: Path, text: Path, out: Path, **options: Any) -> Task:
    recipe = Recipe(steps=options.pop("steps", 20), **options.pop("recipe", {}))
    engine = EngineConfig(model=str(model), threads=1)
    return Task(engine, (text,), out, pieces=8, length=LENGTH, recipe=recipe, **options)


def quiet(stage: str, done: int, of: int) -> None:
    """Nobody watches."""


def reader_of(model: Path) -> FeatureReader:
    info = model_info(model, EngineConfig(model=str(model)))
    return FeatureReader(model, info, length=LENGTH, device="cpu", dtype="float32")


def tokens_of(number: int) -> list[int]:
    return torch.randint(3, 256, (LENGTH,), generator=torch.Generator().manual_seed(number)).tolist()


def test_targets_are_the_softmax_of_every_row_by_page() -> None:
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(n, 3 * PAGE, 16, generator=draw) for n in (6, 2))
    top, mass = page_attention(q[:, 2 * PAGE :], k, 0.25)
    for head in range(6):
        scores = 0.25 * q[head, 2 * PAGE :].double() @ k[head // 3].double().T
        hidden = torch.ones(PAGE, 3 * PAGE).triu(2 * PAGE + 1).bool()
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).view(PAGE, 3, PAGE)
        torch.testing.assert_close(top[head].double(), weights.amax((0, 2)), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(mass[head].double(), weights.sum(2).mean(0), rtol=1e-5, atol=1e-7)


def test_targets_of_single_rows_are_the_softmax_of_a_kv_heads_queries_by_page() -> None:
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(6, 3, 16, generator=draw), torch.randn(2, 3, PAGE, 16, generator=draw)
    positions = torch.tensor([64, 127, 190])
    top, mass = row_attention(q, k, positions, 0.25)
    for row, position in enumerate(positions.tolist()):
        for head in range(2):
            scores = 0.25 * q[3 * head : 3 * head + 3, row].double() @ k[head].flatten(0, 1).double().T
            scores[:, position + 1 :] = float("-inf")
            weights = scores.softmax(-1).view(3, 3, PAGE)
            torch.testing.assert_close(top[head, row].double(), weights.amax((0, 2)), rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(mass[head, row].double(), weights.sum(2).mean(0), rtol=1e-5, atol=1e-7)


def random_gate(draw: torch.Generator) -> Gate:
    return Gate(torch.randn(2, 48, 16, generator=draw), torch.randn(6, 16, 16, generator=draw))


def test_a_gate_learns_from_what_it_will_see_when_it_serves(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores from recorded features are those that SeerAttention selects by."""
    reader, tokens = reader_of(model), tokens_of(0)
    features = reader.read(tokens, PREFILL)
    draw = torch.Generator().manual_seed(1)
    gates = [random_gate(draw) for _ in range(3)]
    write_gates(tmp_path / "gates.safetensors", gates)
    served: list[Tensor] = []

    def spied(*arguments: Any) -> Tensor:
        served.append(gate_scores(*arguments))
        return served[-1]

    monkeypatch.setattr("sparse.seerattention.gate_scores", spied)
    # Both read everything, or later layers would not see the same.
    everything = {"threshold": None, "ratio": 1.0, "gates": str(tmp_path / "gates.safetensors")}
    prefill = {"method": "seerattention", **everything}
    tiny_engine(plan("gated", prefill=prefill), network=tiny_model()).answer(tokens)
    for layer, rotation in enumerate(reader.rotations):
        q, k = features.q[layer], features.k[layer]
        found = gate_scores(gates[layer], q, k, torch.arange(PAGES), rotation)
        torch.testing.assert_close(found, served[layer], rtol=1e-4, atol=1e-4)
    assert torch.allclose(features.mass.sum(-1), torch.ones(3, 6, PAGES), atol=1e-5)
    assert not features.mass.triu(1).any() and (features.top <= features.mass * PAGE + 1e-6).all()


def test_a_decode_gate_learns_from_what_it_will_see_when_it_serves(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores from the features of a row are those that a token generated there is read by."""
    reader, tokens = reader_of(model), tokens_of(0)
    draw = torch.Generator().manual_seed(1)
    gates = [
        Weights(*(0.1 * torch.randn(2, 48, 16, generator=draw) for _ in ("k", "q")))  # no page gets nothing
        for _ in range(3)
    ]
    DECODE.write(tmp_path / "gates.safetensors", gates)
    served: list[Tensor] = []
    select = SeerAttentionR._selection

    def spied(method: SeerAttentionR, scores: Tensor, held: Tensor) -> RowSelection:
        served.append(scores)
        return select(method, scores, held)

    monkeypatch.setattr(SeerAttentionR, "_selection", spied)
    row = 150
    position = int(judged_rows(LENGTH)[row])
    everything = {"read": None, "threshold": 0.0, "gates": str(tmp_path / "gates.safetensors")}
    engine = tiny_engine(
        plan("gated", decode={"method": "seerattention_r", **everything}), network=tiny_model()
    )
    first = engine.answer(tokens[:position], greedy(2))[0]
    tokens[position] = first  # which was read at this position
    features = reader.read(tokens, DECODE)
    own = position // PAGE
    for layer, rotation in enumerate(reader.rotations):
        pieces = Features(*(tensor[layer : layer + 1] for tensor in vars(features).values()))
        found = DECODE.scores(gates[layer], pieces, rotation)[0, :, row, :own]
        torch.testing.assert_close(found, served[layer][0, :, :own], rtol=1e-2, atol=1e-3)  # float16
    assert torch.allclose(features.mass.sum(-1), torch.ones(3, 2, len(judged_rows(LENGTH))), atol=1e-5)


def test_pieces_side_by_side_score_as_they_do_alone() -> None:
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(3, 6, PAGES, 16, generator=draw), torch.randn(3, 2, PAGES, 48, generator=draw)
    gate, pages = random_gate(draw), torch.arange(PAGES)
    together = gate_scores(gate, q, k, pages, None)
    for number in range(3):
        torch.testing.assert_close(together[number], gate_scores(gate, q[number], k[number], pages, None))


def features_of_a_rule(count: int, seed: int, kind: GateKind = PREFILL) -> Features:
    """Attention that a gate can express, and means cannot: of the largest key, not of the mean."""
    draw = torch.Generator().manual_seed(seed)
    if kind is DECODE:
        k = torch.randn(count, 2, 16, 48, generator=draw)
        q = torch.randn(count, 2, len(judged_rows(16 * PAGE)), 32, generator=draw)
        attention = (q.unflatten(3, (2, 16)).sum(3) @ k[..., :16].mT / 4).softmax(-1)
        return Features(q, k, attention, attention)
    q, k = torch.randn(count, 4, 16, 16, generator=draw), torch.randn(count, 2, 16, 48, generator=draw)
    largest, future = k[..., :16].repeat_interleave(2, 1), torch.ones(16, 16).triu(1).bool()
    attention = (q @ largest.mT / 4).masked_fill(future, float("-inf")).softmax(-1)
    return Features(q, k, attention, attention)


@pytest.mark.parametrize(("kind", "target"), [(PREFILL, "max"), (PREFILL, "sum"), (DECODE, "sum")])
def test_a_gate_learns_a_rule_and_knows_it_on_other_text(kind: GateKind, target: str) -> None:
    recipe = Recipe(steps=300, rate=1e-2, target=target)
    seen, unseen = (features_of_a_rule(count, seed, kind) for count, seed in ((64, 0), (4, 1)))
    trained = train_layer(kind, seen, unseen, None, recipe, 0)
    assert trained.after < 0.1 < 0.5 < trained.before


def test_a_gate_starts_as_mean_query_times_mean_key() -> None:
    features = features_of_a_rule(1, 0)
    scores = gate_scores(Gate(*PREFILL.start(features)), features.q[0], features.k[0], torch.arange(16), None)
    means = features.k[0, :, :, 32:].repeat_interleave(2, 0)
    torch.testing.assert_close(scores, features.q[0] @ means.mT / 4)


def test_a_decode_gate_starts_as_the_mean_query_of_a_kv_head_times_mean_key() -> None:
    features = features_of_a_rule(1, 0, DECODE)
    scores = DECODE.scores(DECODE.start(features), features, None)
    mean_q = features.q.unflatten(3, (2, 16)).mean(3)
    torch.testing.assert_close(scores, mean_q @ features.k[..., 32:].mT / 4)


def test_saying_what_is_wanted_diverges_by_nothing() -> None:
    features = features_of_a_rule(2, 0)
    scores = gate_scores(Gate(*PREFILL.start(features)), features.q, features.k, torch.arange(16), None)
    said = scores.masked_fill(torch.ones(16, 16).triu(1).bool(), float("-inf")).softmax(-1)
    gate, right = PREFILL.start(features), replace(features, top=said)
    assert divergence(PREFILL, gate, right, None, "max") == pytest.approx(0, abs=1e-6)
    assert divergence(PREFILL, gate, features, None, "max") > 0.1


def test_what_is_read_anyway_costs_only_its_divergence() -> None:
    features = features_of_a_rule(2, 0)
    gate = PREFILL.start(features)
    said = gate_scores(Gate(*gate), features.q, features.k, torch.arange(16), None)
    right = said.masked_fill(torch.ones(16, 16).triu(1).bool(), float("-inf")).softmax(-1)
    forced, free = right.clone(), right.clone()
    block = torch.arange(4, 16)
    forced[..., block, 0], forced[..., block, block] = right[..., block, block], right[..., block, 0]
    free[..., block, 1], free[..., block, 2] = right[..., block, 2], right[..., block, 1]
    costs = []
    for wanted in (right, forced, free):
        given = replace(features, top=wanted)
        costs.append(
            float(loss(PREFILL, gate, given, None, "max")) - divergence(PREFILL, gate, given, None, "max")
        )
    assert costs[:2] == pytest.approx([0, 0], abs=1e-5) and costs[2] > 0.01


def test_a_start_that_was_killed_ends_with_the_same_gates(tmp_path: Path, model: Path, text: Path) -> None:
    whole = train_gates(make_task(model, text, tmp_path / "whole"), quiet)

    class Killed(Exception):
        pass

    for last in (("reading", 3), ("training", 2)):

        def kill(stage: str, done: int, of: int, last: tuple[str, int] = last) -> None:
            if (stage, done) == last:
                raise Killed

        with pytest.raises(Killed):
            train_gates(make_task(model, text, tmp_path / "cut"), kill)
        assert not (tmp_path / "cut" / "gates.safetensors").exists()
    read_before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").rglob("0*.safetensors")}
    assert len(read_before) == 8 + 2
    again = train_gates(make_task(model, text, tmp_path / "cut"), quiet)
    assert {path: path.stat().st_mtime_ns for path in read_before} == read_before, "nothing is made twice"
    assert again == whole and whole["kl"] < whole["kl_as_mean_pool"]
    weights = [load_file(tmp_path / name / "gates.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert json.loads((tmp_path / "whole" / "gates.json").read_text()) == whole
    info = model_info(model, EngineConfig(model=str(model)))
    assert len(read_gates(tmp_path / "whole" / "gates.safetensors", info)) == info.num_layers

    other = train_gates(make_task(model, text, tmp_path / "cut", steps=5), quiet)
    assert other["kl"] != whole["kl"], "another recipe trains again, on the same features"


def test_the_gates_of_a_decode_method_are_what_it_reads(tmp_path: Path, model: Path, text: Path) -> None:
    said = train_gates(make_task(model, text, tmp_path, steps=5, method="seerattention_r"), quiet)
    info = model_info(model, EngineConfig(model=str(model)))
    assert len(read_decode_gates(tmp_path / "gates.safetensors", info)) == info.num_layers
    assert said["kl"] < said["kl_as_mean_pool"] and "--method seerattention_r" in said["command"]


def test_a_piece_is_the_same_however_many_there_are() -> None:
    text = TrainingText("t", "", tuple(range(1000, 9000)))
    length = 2048

    def encode(words: str) -> list[int]:
        return list(words.encode())

    for number in range(12):
        found = piece([text], encode, number, length, seed=0)
        assert len(found) == length and found == piece([text], encode, number, length, seed=0)
        assert found != piece([text], encode, number + len(KINDS), length, seed=0)
        kind = KINDS[number % len(KINDS)]
        from_text = [token for token in found if token >= 1000]
        if kind == "copy":
            assert length // 8 <= len(from_text) - len(set(from_text)) <= 2 * length // 5
        else:
            assert len(from_text) == len(set(from_text))
        if kind in ("pairs", "needles"):
            words = bytes(token for token in found if token < 256).decode()
            names = words.count("code of the ") if kind == "needles" else words.count(": ")
            assert names >= 12 and len(from_text) < length
        elif kind == "prose":
            assert from_text == found == list(range(found[0], found[0] + length))


def test_what_cannot_be_trained_is_refused_with_the_remedy(tmp_path: Path, model: Path, text: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    windowed = save_tiny(tmp_path / "windowed", "mistral", sliding_window=100)
    task = make_task(model, text, tmp_path / "out")
    file = tmp_path / "file"
    file.write_text("")
    cases = [
        (lambda: train_gates(replace(task, texts=(short,)), quiet), ["short.txt", "11 tokens", "512"]),
        (lambda: train_gates(replace(task, texts=(tmp_path / "none",)), quiet), ["none", "cannot be read"]),
        (lambda: train_gates(make_task(windowed, text, tmp_path / "w"), quiet), ["window of 100", "3 of"]),
        (lambda: train_gates(replace(task, out=file), quiet), ["--out", "cannot be a folder"]),
        (lambda: train_gates(replace(task, length=8192), quiet), ["--length: 8192", "8192 tokens"]),
        (lambda: replace(task, length=500), ["--length: 500", "64"]),
        (lambda: replace(task, pieces=3), ["--pieces: 3", "8"]),
        (lambda: replace(task, method="quest"), ["--method: 'quest'", "seerattention or seerattention_r"]),
        (lambda: replace(task, recipe=Recipe(target="mean")), ["--target: 'mean'", "max or sum"]),
        (lambda: replace(task, recipe=Recipe(steps=0)), ["--steps (0)"]),
    ]
    for act, words in cases:
        with pytest.raises(ConfigError) as refusal:
            act()
        for word in words:
            assert word in str(refusal.value), (word, str(refusal.value))


def test_features_of_another_text_or_model_are_refused(tmp_path: Path, model: Path, text: Path) -> None:
    train_gates(make_task(model, text, tmp_path / "out", steps=1), quiet)
    other_text = tmp_path / "other.txt"
    other_text.write_text(text.read_text() + " More.")
    other_model = save_tiny(tmp_path / "other", hidden_size=48)
    for wrong, word in (
        (make_task(model, other_text, tmp_path / "out"), "other texts"),
        (make_task(other_model, text, tmp_path / "out"), "other model"),
        (make_task(model, text, tmp_path / "out", recipe={"seed": 1}), "other seed"),
        (make_task(model, text, tmp_path / "out", method="seerattention_r"), "other method"),
    ):
        with pytest.raises(ConfigError, match=word):
            train_gates(wrong, quiet)


def test_line_breaks_of_a_text_are_the_printers(tmp_path: Path, model: Path) -> None:
    (tmp_path / "t.txt").write_text("one\ntwo\n\n\nthree")
    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    assert tokenizer.decode(list(read_text(tmp_path / "t.txt", tokenizer, 4).tokens)) == "one two\n\nthree"
