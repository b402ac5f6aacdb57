"""The Triton kernels of prefill, interpreted and on a GPU."""

import pytest

from tests.triton_cases import run_cases

pytest.importorskip("triton")
CASES = tuple(
    f"tests/sparse/triton_{kernel}_cases.py"
    for kernel in ("attention", "descent", "estimator", "lines", "page")
)


def test_cases_hold_in_the_interpreter() -> None:
    run_cases(*CASES, interpreted=True)


@pytest.mark.gpu
def test_cases_hold_on_the_gpu() -> None:
    run_cases(*CASES, interpreted=False)
