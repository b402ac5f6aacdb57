"""The most pages a prompt holds while it is computed, under policies that let pages go as they go.

    python -m benchmarks.prefill_pages --length 7936 --plans dense moa streaming

Counted behind every forward, before anything leaves: the widest moment.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.asking import add_subject, command_line, parsed, subject_of
from benchmarks.common import exit_with, print_table, write_results
from configs.schema import CacheConfig, EngineConfig, SchedulerConfig, ServeConfig
from engine.messages import Sampling, Submit
from engine.runner import StepResult
from engine.scheduler import Batch
from engine.startup import load, resolve

SEQUENCES = 1


@dataclass(frozen=True)
class Peak:
    """One plan's prompt."""

    plan: str
    pages: int
    ratio: float  # to the first plan's


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    add_subject(parser)
    parser.add_argument("--plans", nargs="+", default=["dense", "moa", "streaming"], help="names or files")
    parser.add_argument("--length", type=int, default=7936, help="prompt tokens")
    asked = parsed(parser, arguments)
    subject = subject_of(asked)
    prompt = subject.text.ring(0, asked.length)
    config = ServeConfig(
        engine=EngineConfig(model=asked.model, dtype=asked.dtype, device="cpu", threads=asked.threads),
        cache=CacheConfig(enable_prefix_caching=False),
        scheduler=SchedulerConfig(max_num_seqs=SEQUENCES),
        plans=tuple(Path(plan) for plan in asked.plans),
    )
    engine, _ = load(resolve(config))
    runner, cache = engine._runner, engine._cache
    forward = runner.run
    held: list[int] = []

    def watched(batch: Batch) -> StepResult:
        result = forward(batch)
        usage = cache.usage()
        held.append(usage.private + usage.borrowed)
        return result

    runner.run = watched  # type: ignore[method-assign]  # between the forward and what leaves behind it
    peaks: list[Peak] = []
    for plan in (Path(plan).stem for plan in asked.plans):
        engine.submit(Submit("prompt", prompt, len(prompt), plan, Sampling(max_tokens=1, ignore_eos=True)))
        held.clear()
        while engine.has_work:
            engine.step()
        pages = max(held)
        peaks.append(Peak(plan, pages, round(pages / (peaks[0].pages if peaks else pages), 4)))
    settings = {**subject.settings, "prompt_tokens": asked.length}
    path = write_results(
        "prefill_pages", {"settings": settings, "rows": [asdict(peak) for peak in peaks]}, folder=asked.out
    )
    print_table(
        f"Most pages held while {asked.length} prompt tokens are computed",
        ("plan", "pages", f"of {peaks[0].plan}"),
        [(peak.plan, peak.pages, peak.ratio) for peak in peaks],
    )
    print(f"written: {path.name}")


if __name__ == "__main__":
    exit_with(main)
