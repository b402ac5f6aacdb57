"""Checks a plan and serves a prompt under a method of another distribution, in a process that finds it.

The argument is its name; the working folder has a model, a plan that fits and one that does not.
"""

import json
import sys

from typer.testing import CliRunner

from server.cli import app
from tests.tiny import greedy, make_prompt, plan, tiny_engine


def main(name: str) -> None:
    """What covers everything equals dense; what does not reads less."""
    check = ["plan", "check", "--model", "./tiny", "--json"]
    assert json.loads(CliRunner().invoke(app, [*check, "mine.yaml"]).stdout)["plan"]["prefill"] == name
    refused = CliRunner().invoke(app, [*check, "wrong.yaml"])
    assert refused.exit_code == 2 and "window (0) must be at least 1" in refused.stderr, refused.output
    near = plan("near", prefill={"method": name, "window": 64})
    everything = plan("everything", prefill={"method": name, "window": 1000})
    tiny = tiny_engine(near, everything, plan("dense"))
    prompt = make_prompt(500)
    assert tiny.answer(prompt, greedy(6), "everything") == tiny.answer(prompt, greedy(6), "dense")
    tiny.submit("costs", prompt, greedy(1), "near")
    outputs = []
    while tiny.engine.has_work:
        outputs += tiny.step()
    (cost,) = [output.cost for output in outputs if output.cost]
    assert 0.1 < cost.prefill_read_fraction < 0.8, cost
    print("served")


if __name__ == "__main__":
    main(sys.argv[1])
