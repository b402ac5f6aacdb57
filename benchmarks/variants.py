"""Plans as a benchmark's command line names them: a name or a file, and options changed for this run.

minference    my-plan.yaml    minference:prefill.vertical=500,prefill.slash=150    snapkv:kv.budget=512
"""

import re
from pathlib import Path

import yaml

from configs.errors import ConfigError
from configs.loading import load_plan
from configs.plan import PlanFile

_CHANGE = re.compile(r"(prefill|kv|decode)\.(\w+)=(.+)")
_NEXT_CHANGE = re.compile(r",(?=(?:prefill|kv|decode)\.)")  # values may hold commas: [1024, 512]


def load_variant(spec: str) -> PlanFile:
    """The plan of this spec, which is its name, too. Options are checked when the plan is resolved."""
    source, _, changes = spec.partition(":")
    plan = load_plan(source)
    if not changes:
        return plan
    content = plan.model_dump()
    for change in _NEXT_CHANGE.split(changes):
        match = _CHANGE.fullmatch(change)
        if match is None:
            raise ConfigError(f"{spec}: {change!r} is not a change such as kv.budget=512")
        part, option, value = match.groups()
        content[part][option] = yaml.safe_load(value)
    return PlanFile(**content, name=spec, source=plan.source)


def save_variant(spec: str, folder: Path) -> Path:
    """The same as a file of that name, for what loads plans from files. Its paths must not be relative."""
    path = folder / f"{spec}.yaml"
    path.write_text(yaml.safe_dump(load_variant(spec).model_dump(mode="json")), encoding="utf-8")
    return path
