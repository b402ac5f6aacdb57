"""Clients see what a plan does in each layer, and nothing of the server's files."""

from configs.model import ModelInfo
from engine.messages import LayerRun
from engine.plans import resolve_plan
from tests.tiny import plan

MODEL = ModelInfo("small", 6, 2, 1, 64, 1000, 8192)


def test_neighbouring_layers_with_one_method_are_one_run() -> None:
    written = plan(
        "mixed",
        prefill={"method": "minference", "layers": {"0-1": "dense"}},
        kv={"policy": "snapkv", "budget": 512},
    )
    card = resolve_plan(written, MODEL).card
    first, second = card.layers
    assert first == LayerRun(0, 1, "dense", {})
    assert (second.first, second.last, second.prefill) == (2, 5, "minference")
    assert second.options and not any("/" in str(value) for value in second.options.values())
    assert card.policy_options["budget"] == card.budget == 512
    assert card.chunk > 0


def test_a_plan_of_one_method_is_one_run() -> None:
    assert resolve_plan(plan("all"), MODEL).card.layers == (LayerRun(0, 5, "dense", {}),)
