"""The Triton kernels of the cache and of decode, interpreted and on a GPU."""

import pytest

from tests.triton_cases import run_cases

pytest.importorskip("triton")
CASES = ("tests/kvcache/triton_decode_cases.py", "tests/kvcache/triton_pages_cases.py")


def test_cases_hold_in_the_interpreter() -> None:
    run_cases(*CASES, interpreted=True)


@pytest.mark.gpu
def test_cases_hold_on_the_gpu() -> None:
    run_cases(*CASES, interpreted=False)
