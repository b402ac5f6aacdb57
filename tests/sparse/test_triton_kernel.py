"""The Triton kernels of prefill, interpreted and on a GPU."""

import pytest

from tests.triton_cases import run_cases

pytest.importorskip("triton")
CASES = ("tests/sparse/triton_attention_cases.py", "tests/sparse/triton_estimator_cases.py")


def test_cases_hold_in_the_interpreter() -> None:
    run_cases(*CASES, interpreted=True)


@pytest.mark.gpu
def test_cases_hold_on_the_gpu() -> None:
    run_cases(*CASES, interpreted=False)
