"""The example that makes a plan file for MoA: its file fits the model, and its spans cost what was asked."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from configs.schema import EngineConfig
from engine.models import model_info
from kvcache.moa import MoA
from kvcache.state import StateRegistry
from kvcache.static_policy import density
from tests.tiny import save_tiny

EXAMPLE = Path(__file__).parents[2] / "examples" / "moa_spans.py"


@pytest.fixture(scope="module")
def moa_spans() -> ModuleType:
    spec = importlib.util.spec_from_file_location("moa_spans", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_file_fits_the_model_and_costs_what_was_asked(
    moa_spans: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny(tmp_path / "model")
    (tmp_path / "text").write_text("It is a truth universally acknowledged. " * 40)
    arguments = [
        "moa_spans",
        str(folder),
        "--text",
        str(tmp_path / "text"),
        "--out",
        str(tmp_path / "spans.json"),
    ]
    monkeypatch.setattr("sys.argv", [*arguments, "--tokens", "640", "--mean", "0.4"])
    moa_spans.main()
    policy = MoA(spans=Path("spans.json"))
    policy.attach(model_info(folder, EngineConfig(model=str(folder))), tmp_path, StateRegistry())
    assert 0.3 < density(policy.page_reach(8192), 8192) <= 0.4 + 1 / 128
    assert "of the text" in capsys.readouterr().out


def test_heads_that_look_far_get_the_spans(moa_spans: ModuleType) -> None:
    """Of two heads, one looks at its own page alone, and one at all pages alike."""
    pages = 16
    near = torch.zeros(pages, 64, pages, 64)
    near[np.arange(pages), :, np.arange(pages)] = 1 / 64
    far = torch.tril(torch.ones(pages * 64, pages * 64))
    far /= far.sum(1, keepdim=True)
    lost = torch.stack(
        [moa_spans._lost_beyond(weights.reshape(1, 64 * pages, -1)) for weights in (near, far)]
    )
    assert lost[0, 1] == 0 and lost[1, 1] > 0.5 and lost[1, pages] == 0
    assert moa_spans.choose(lost, 0.5).tolist() == [1, 15]


@pytest.mark.parametrize("pages", [8, 32, 124])
def test_spans_are_cut_to_pages_as_the_policy_does(moa_spans: ModuleType, pages: int) -> None:
    for step in range(1, 17):
        policy = MoA(beta=step / 16)
        policy._alphas, policy._betas = np.zeros((1, 1)), np.full((1, 1), step / 16)
        expected = int(policy._pages_of_spans(64 * pages)[0, 0])
        assert int(moa_spans.near_pages(torch.tensor([step]), pages)) == expected
