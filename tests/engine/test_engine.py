"""The engine around a tiny model: batching, ends, failures, pages given back, plans that read and keep
less."""

import random

import pytest
import torch

from engine.messages import FinishReason, Sampling, Submit
from engine.scheduler import Batch, ChunkPlan
from engine.sequence import Sequence
from tests.tiny import TinyEngine, greedy, make_prompt, plan, tiny_engine, tiny_model

SPARSE = {"method": "minference", "chunk": 128, "vertical": 40, "slash": 100}
SNAP = {"policy": "snapkv", "budget": 100}
EVERYTHING = {"method": "minference", "chunk": 128, "vertical": 100_000, "slash": 100_000}


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    return tiny_model()


def all_plans(network: torch.nn.Module, **options: int) -> TinyEngine:
    return tiny_engine(
        plan("dense"),
        plan("sparse", prefill=SPARSE),
        plan("snap", kv=SNAP),
        plan("both", prefill=SPARSE, kv=SNAP),
        network=network,
        **options,
    )


def costs(tiny: TinyEngine) -> dict[str, object]:
    found = {}
    while tiny.engine.has_work:
        for output in tiny.step():
            if output.cost is not None:
                found[output.request_id] = output.cost
    return found


@pytest.mark.parametrize("name", ["dense", "sparse", "snap", "both"])
def test_a_request_gets_the_same_tokens_alone_and_among_others(network: torch.nn.Module, name: str) -> None:
    tiny = all_plans(network)
    prompts = {f"{i}": make_prompt(length, seed=i) for i, length in enumerate((5, 130, 257, 400, 129))}
    alone = {key: tiny.answer(prompt, greedy(10), name) for key, prompt in prompts.items()}
    for key, prompt in prompts.items():
        tiny.submit(key, prompt, greedy(10), name)
        tiny.submit(f"other {key}", make_prompt(77, seed=9), greedy(30), "dense")
    together = tiny.run()
    assert {key: together[key] for key in prompts} == alone
    tiny.assert_empty()


def test_grid_plans_do_not_depend_on_the_room_in_a_step(network: torch.nn.Module) -> None:
    prompt = make_prompt(700)
    wide = all_plans(network).answer(prompt, greedy(10), "both")
    assert all_plans(network, max_num_batched_tokens=64).answer(prompt, greedy(10), "both") == wide


def test_methods_and_policies_that_cover_everything_equal_dense(network: torch.nn.Module) -> None:
    tiny = tiny_engine(
        plan("dense"),
        plan("all", prefill=EVERYTHING, kv={"policy": "snapkv", "budget": 2000}),
        network=network,
    )
    for length in (1, 63, 64, 65, 500):
        prompt = make_prompt(length, seed=length)
        assert tiny.answer(prompt, greedy(12), "all") == tiny.answer(prompt, greedy(12), "dense")


def test_sparse_plans_read_less_and_compressing_plans_keep_less_and_say_so(network: torch.nn.Module) -> None:
    tiny = all_plans(network)
    prompt = make_prompt(700)
    for name in tiny.plans:
        tiny.submit(name, prompt, greedy(4), name)
    found = costs(tiny)
    page_bytes = tiny.cache.pool.page_bytes
    assert found["dense"].prefill_read_fraction == 1.0
    assert found["dense"].attention_recall is None
    assert found["dense"].kv_tokens_kept == found["dense"].kv_tokens_total == 700
    assert found["dense"].kv_bytes == 3 * 2 * 11 * page_bytes
    for name in ("sparse", "both"):
        assert 0.05 < found[name].prefill_read_fraction < 0.9
        assert 0 < found[name].attention_recall_p5 < found[name].attention_recall < 1.0
        # 16 rows of 6 heads in every chunk of 128 tokens, in a quarter of the layers
        assert found[name].attention_recall_samples > 100
    for name in ("snap", "both"):
        assert found[name].kv_tokens_kept == 100
        assert found[name].kv_bytes == 3 * 2 * 2 * page_bytes


def test_prompts_below_dense_below_run_dense(network: torch.nn.Module) -> None:
    tiny = tiny_engine(plan("late", prefill={**SPARSE, "dense_below": 300}), network=network)
    tiny.submit("short", make_prompt(299), greedy(2))
    tiny.submit("long", make_prompt(300), greedy(2))
    found = costs(tiny)
    assert found["short"].prefill_read_fraction == 1.0
    assert found["long"].prefill_read_fraction < 1.0


def test_dense_layers_of_a_sparse_plan_read_everything(network: torch.nn.Module) -> None:
    tiny = tiny_engine(
        plan("one", prefill={**SPARSE, "layers": {"0-1": "dense"}}),
        plan("none", prefill=SPARSE),
        network=network,
    )
    for name in tiny.plans:
        tiny.submit(name, make_prompt(700), greedy(2), name)
    found = costs(tiny)
    sparse = found["none"].prefill_read_fraction
    assert found["one"].prefill_read_fraction == pytest.approx((2 + sparse) / 3, abs=0.05)


def test_a_recall_floor_makes_heads_read_everything(network: torch.nn.Module) -> None:
    tiny = tiny_engine(
        plan("floor", prefill={**SPARSE, "recall_floor": 1.0}), plan("free", prefill=SPARSE), network=network
    )
    for name in tiny.plans:
        tiny.submit(name, make_prompt(700), greedy(2), name)
    found = costs(tiny)
    assert found["floor"].prefill_read_fraction > found["free"].prefill_read_fraction
    assert found["floor"].attention_recall_samples > 2 * found["free"].attention_recall_samples


def test_freed_pages_let_another_request_in(network: torch.nn.Module) -> None:
    """Two prompts of 11 blocks x 6 rows each do not fit 100 pages at once; one compressed to 2 blocks
    leaves room."""
    tiny = all_plans(network, num_pages=100)
    tiny.submit("first", make_prompt(640), greedy(20), "snap")
    tiny.submit("second", make_prompt(640, seed=1), greedy(20), "snap")
    together = 0
    while tiny.engine.has_work:
        tiny.step()
        together = max(together, tiny.engine.stats().running)
    assert together == 2
    tiny.assert_empty()


def test_without_room_a_request_waits_and_is_then_served(network: torch.nn.Module) -> None:
    tiny = all_plans(network, num_pages=100)
    tiny.submit("first", make_prompt(640), greedy(5), "dense")
    tiny.submit("second", make_prompt(640, seed=1), greedy(5), "dense")
    tiny.step()
    assert (tiny.engine.stats().running, tiny.engine.stats().waiting) == (1, 1)
    found = tiny.run()
    assert len(found["first"]) == 5 - 1 and len(found["second"]) == 5
    tiny.assert_empty()


def test_of_those_that_wait_lower_priorities_go_first_and_equal_ones_by_arrival(
    network: torch.nn.Module,
) -> None:
    tiny = tiny_engine(network=network, max_num_seqs=1)
    for name, priority in (("first", 9), ("a", 0), ("b", 5), ("c", 0), ("d", -3)):
        tiny.submit(name, make_prompt(20), greedy(2), priority=priority)
        if name == "first":
            tiny.step()  # it runs, and is not interrupted
    assert list(tiny.run()) == ["first", "d", "a", "c", "b"]
    tiny.assert_empty()


def test_a_request_that_can_never_fit_ends_at_once_with_the_numbers(network: torch.nn.Module) -> None:
    tiny = all_plans(network, num_pages=50)
    tiny.submit("large", make_prompt(640), greedy(5), "dense")
    (output,) = tiny.step()
    assert output.finish_reason is FinishReason.ERROR
    assert "645 tokens need 66 pages" in str(output.error) and "has 50" in str(output.error)
    assert not tiny.engine.has_work


def test_prompts_and_answers_share_steps_and_neither_starves(network: torch.nn.Module) -> None:
    tiny = all_plans(network, max_num_batched_tokens=64)
    tiny.submit("talker", make_prompt(10), greedy(60))
    tiny.step()
    tiny.submit("reader", make_prompt(600), greedy(1))
    said_while_reading, steps = 0, 0
    while True:
        steps += 1
        outputs = tiny.step()
        said_while_reading += sum(output.request_id == "talker" for output in outputs)
        if any(output.request_id == "reader" for output in outputs):
            break
    assert said_while_reading == steps, "every step carries every decode"
    assert steps >= 600 // 64


def test_prompts_are_cut_to_what_a_step_should_take_while_others_generate(network: torch.nn.Module) -> None:
    tiny = all_plans(network, step_seconds=0.5)
    tiny.submit("talker", make_prompt(10), greedy(60))
    tiny.step()
    tiny.submit("reader", make_prompt(1500), greedy(1))
    scheduler = tiny.engine._scheduler
    batch = scheduler.next_batch()
    (part,) = batch.chunks
    alone, beside = Batch(batch.decodes, []), Batch(batch.decodes, [ChunkPlan(part.sequence, 0, 100)])
    scheduler.account(alone, 0.1)
    scheduler.account(beside, 0.1 + 100 * 0.002)  # 0.4 of 0.5 seconds are left, room for 200: 3 pages
    assert [part.length for part in scheduler.next_batch().chunks] == [192]
    scheduler.account(beside, 0.1 + 100 * 0.1)  # room for 4: a prompt moves on by a page all the same
    scheduler.account(alone, 0.1)
    assert not scheduler.next_batch().chunks, "that step owes time"
    scheduler.account(alone, 1000.0)
    scheduler.account(alone, 0.1)
    assert [part.length for part in scheduler.next_batch().chunks] == [64]
    tiny.engine.abort("talker")
    assert [part.length for part in scheduler.next_batch().chunks] == [1500], "no one to leave time to"


def test_a_chunk_that_could_not_be_cut_is_followed_by_steps_for_those_who_generate(
    network: torch.nn.Module,
) -> None:
    tiny = all_plans(network, step_seconds=0.5, prefill_share=0.25)
    tiny.submit("talker", make_prompt(10), greedy(60))
    tiny.step()
    tiny.submit("reader", make_prompt(700), greedy(1), "sparse")
    scheduler = tiny.engine._scheduler
    batch = scheduler.next_batch()
    assert [part.length for part in batch.chunks] == [128], "the grid of the plan"
    scheduler.account(batch, 2.0)
    decode = scheduler.next_batch()
    assert not decode.chunks and decode.decodes
    scheduler.account(decode, 5.9)
    assert not scheduler.next_batch().chunks, "a quarter of the time is 2 of 8 seconds"
    scheduler.account(decode, 0.2)
    assert scheduler.next_batch().chunks


def test_stop_tokens_end_a_request_and_length_ends_the_others(network: torch.nn.Module) -> None:
    tiny = all_plans(network)
    prompt = make_prompt(50)
    said = tiny.answer(prompt, greedy(10))
    stop = said[3]
    tiny.submit("stops", prompt, greedy(10, stop_token_ids=(stop,)))
    outputs = []
    while tiny.engine.has_work:
        outputs += tiny.step()
    assert [token for output in outputs for token in output.tokens] == said[: said.index(stop) + 1]
    assert outputs[-1].finish_reason is FinishReason.STOP


def test_a_replay_goes_on_exactly_where_the_stream_broke(network: torch.nn.Module) -> None:
    """Tokens that were generated before the engine died are fed as decode steps, so compressed rows are the
    same."""
    tiny = all_plans(network)
    prompt = make_prompt(400)
    for sampling in (
        greedy(20),
        Sampling(max_tokens=20, temperature=0.9, top_p=0.9, seed=7, ignore_eos=True),
    ):
        whole = tiny.answer(prompt, sampling, "both")
        tiny.engine.submit(Submit("replay", (*prompt, *whole[:9]), len(prompt), "both", sampling))
        assert tiny.run()["replay"] == whole[9:]


def test_an_abort_in_any_state_ends_the_request_once_and_frees_its_pages(network: torch.nn.Module) -> None:
    tiny = all_plans(network, max_num_seqs=2)
    for name in ("decoding", "prefilling", "waiting"):
        tiny.submit(name, make_prompt(10 if name == "decoding" else 700), greedy(50), "both")
    tiny.step()
    for name in ("decoding", "prefilling", "waiting", "unknown"):
        tiny.engine.abort(name)
        tiny.engine.abort(name)
    ends = [output for output in tiny.step() if output.finish_reason is not None]
    assert [output.request_id for output in ends] == ["decoding", "prefilling", "waiting"]
    assert {output.finish_reason for output in ends} == {FinishReason.ABORT}
    tiny.assert_empty()


def test_a_step_that_fails_loses_its_requests_and_nothing_else(
    network: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = all_plans(network)
    prompt = make_prompt(200)
    before = tiny.answer(prompt)
    tiny.submit("victim", prompt)
    with monkeypatch.context() as patch:
        patch.setattr(tiny.network, "forward", lambda *args, **kwargs: 1 / 0)
        (output,) = tiny.step()
    assert output.finish_reason is FinishReason.ERROR
    assert "ZeroDivision" not in str(output.error), "clients learn no internals"
    tiny.assert_empty()
    assert tiny.answer(prompt) == before


def test_who_ended_before_a_step_failed_is_told_and_choices_fail_together(
    network: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    should_stop = Sequence.should_stop

    def fails(sequence: Sequence) -> FinishReason | None:
        return should_stop(sequence) if sequence.request_id != "victim" else FinishReason(1 / 0)

    tiny = all_plans(network)
    tiny.submit("done", make_prompt(20), greedy(1))
    tiny.submit("victim", make_prompt(20, seed=1), greedy(5), choices=3)
    with monkeypatch.context() as patch:
        patch.setattr(Sequence, "should_stop", fails)
        outputs = tiny.step()
    ends = [(output.request_id, output.choice, output.finish_reason) for output in outputs]
    failed = [("victim", choice, FinishReason.ERROR) for choice in range(3)]
    assert ends == [("done", 0, FinishReason.LENGTH), *failed]
    assert len(outputs[0].tokens) == 1 and not tiny.engine.has_work
    tiny.assert_empty()


def test_after_a_hundred_mixed_requests_a_third_aborted_every_page_is_free(network: torch.nn.Module) -> None:
    tiny = all_plans(network, num_pages=400, max_num_seqs=8, max_num_batched_tokens=256)
    chance = random.Random(0)
    names = list(tiny.plans)
    open_requests: set[str] = set()
    ended: dict[str, FinishReason] = {}
    for number in range(100):
        name = str(number)
        tiny.submit(
            name,
            make_prompt(chance.randint(1, 600), seed=number),
            greedy(chance.randint(1, 20)),
            chance.choice(names),
        )
        open_requests.add(name)
        for _ in range(chance.randint(0, 4)):
            for output in tiny.step():
                if output.finish_reason is not None:
                    assert output.request_id not in ended
                    ended[output.request_id] = output.finish_reason
            tiny.cache.check()
        if number % 3 == 0:
            tiny.engine.abort(chance.choice(sorted(open_requests - ended.keys()) or [name]))
    while tiny.engine.has_work:
        for output in tiny.step():
            if output.finish_reason is not None:
                assert output.request_id not in ended
                ended[output.request_id] = output.finish_reason
    assert len(ended) == 100
    assert sum(reason is FinishReason.ABORT for reason in ended.values()) > 25
    tiny.assert_empty()
