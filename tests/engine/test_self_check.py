"""A kernel that errs or fails on this device is replaced by torch, alone, and the log names it."""

from collections.abc import Callable
from dataclasses import is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.features import NO_FEATURES, Features
from configs.model import ModelInfo
from engine import self_check
from engine.kernels import Kernels, kernels_for
from engine.self_check import checked
from kvcache.decode import attend_rows
from kvcache.pool import PagePool
from kvcache.quest import best_units
from sparse.antidiagonals import antidiagonal_mass
from sparse.attention import Attended, attend
from sparse.base import KeyView
from sparse.descent import pruned_pieces
from sparse.estimator import Estimate, estimate
from sparse.lines import LineLists, line_lists
from sparse.page_scores import log_energy, mean_pages, pool_pages

CPU = torch.device("cpu")
MODEL = ModelInfo("tiny", 3, 6, 2, 16, vocab_size=100, max_length=4096)


def almost(*arguments: Any, **options: Any) -> Attended:
    attended = attend(*arguments, **options)
    return replace(attended, out=attended.out * 1.001)


def not_a_number(*arguments: Any, **options: Any) -> Tensor:
    out = attend_rows(*arguments, **options)
    out[0, 0, 0] = float("nan")
    return out


def off_by_one(*arguments: Any, **options: Any) -> Estimate:
    seen = estimate(*arguments, **options)
    return replace(seen, diagonals=seen.diagonals.roll(1, dims=1))


def keys_only(pool: PagePool, k: Tensor, v: Tensor, destinations: Tensor) -> None:
    pool.k.flatten(0, 1)[destinations] = k


def the_next_ones(*arguments: Any) -> Tensor:
    return best_units(*arguments) + 1


def own_page_alone(*arguments: Any) -> LineLists:
    lists = line_lists(*arguments)
    return replace(lists, pages=replace(lists.pages, counts=lists.pages.counts.clamp_max(1)))


def means_of_keys(*arguments: Any, values: bool = False) -> Tensor:
    return mean_pages(*arguments)


def of_half_the_rows(*arguments: Any, **options: Any) -> Tensor:
    return log_energy(*arguments, **options) - 0.7


def of_diagonals(q: Tensor, *arguments: Any, **options: Any) -> Tensor:
    return antidiagonal_mass(q.flip(1), *arguments, **options)


def of_other_queries(q: Tensor, *arguments: Any) -> Tensor:
    return pruned_pieces(q.roll(1, dims=2), *arguments)


def still_rotated(keys: KeyView, num_tokens: int, rotation: object) -> Tensor:
    return pool_pages(keys, num_tokens, None)


def does_not_compile(*arguments: Any) -> None:
    raise RuntimeError("ptxas died\nwith a long story")


WRONG: dict[str, Callable[..., Any]] = {
    "attend": almost,
    "attend_rows": not_a_number,
    "index.estimate": off_by_one,
    "moves.store": keys_only,
    "moves.move_kept": does_not_compile,
    "best_units": the_next_ones,
    "index.line_lists": own_page_alone,
    "index.mean_pages": means_of_keys,
    "index.log_energy": of_half_the_rows,
    "index.antidiagonal_mass": of_diagonals,
    "index.pruned_pieces": of_other_queries,
    "index.pool_pages": still_rotated,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_replaced_and_named(name: str, caplog: pytest.LogCaptureFixture) -> None:
    kernels = checked(Kernels().with_kernel(name, WRONG[name]), MODEL, torch.float32, CPU)
    assert kernels == Kernels()
    [record] = caplog.records
    assert f"kernel {name} is not used on cpu, torch serves in its place" in record.getMessage()


def test_the_reason_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    checked(Kernels().with_kernel("moves.move_kept", does_not_compile), MODEL, torch.float32, CPU)
    assert caplog.records[0].getMessage().endswith("RuntimeError: ptxas died")


def test_right_kernels_stay_beside_a_wrong_one(caplog: pytest.LogCaptureFixture) -> None:
    mine = kernels_for(CPU).with_kernel("moves.store", keys_only)
    assert checked(mine, MODEL, torch.float32, CPU) == kernels_for(CPU)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_of_this_machine_pass(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    assert checked(kernels_for(CPU), MODEL, dtype, CPU) == kernels_for(CPU)
    assert not caplog.records


def test_windows_of_the_model_are_tried() -> None:
    model = replace(MODEL, windows=(4096, None, 4096))

    def ignores_windows(*arguments: Any, features: Features = NO_FEATURES, **options: Any) -> Attended:
        return attend(*arguments, **options, features=NO_FEATURES)

    mine = replace(Kernels(), attend=ignores_windows)
    assert checked(mine, model, torch.float32, CPU) == Kernels()
    assert checked(mine, MODEL, torch.float32, CPU) == mine


def test_every_kernel_is_tried() -> None:
    kernels = Kernels()
    groups = [name for name in Kernels.__dataclass_fields__ if is_dataclass(getattr(kernels, name))]
    grouped = {f"{group}.{name}" for group in groups for name in getattr(kernels, group).__dataclass_fields__}
    assert set(self_check.TRIALS) == (set(Kernels.__dataclass_fields__) - set(groups)) | grouped
