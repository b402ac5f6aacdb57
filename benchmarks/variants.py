"""Plans as a benchmark's command line names them: a name or a file, and options changed for this run.

minference    my-plan.yaml    minference:prefill.vertical=500,prefill.slash=150    snapkv:kv.budget=512
"""

import re
from pathlib import Path

import yaml

from configs.errors import ConfigError
from configs.loading import load_plan, shipped_plans
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


def method_plans() -> list[str]:
    """The shipped plans that differ from `dense` in how they read a prompt, and in nothing else."""
    exact = load_plan("dense")
    plans = {name: load_plan(name) for name in shipped_plans()}
    return [
        name
        for name, plan in plans.items()
        if plan.prefill.method != exact.prefill.method and (plan.kv, plan.decode) == (exact.kv, exact.decode)
    ]


def load_method(spec: str) -> PlanFile:
    """The same as `load_variant`, where a method may stand for the plan that ships with it."""
    name, colon, changes = spec.partition(":")
    if name not in shipped_plans():
        name = next((plan for plan in method_plans() if load_plan(plan).prefill.method == name), name)
    return load_variant(f"{name}{colon}{changes}")


def save_variant(spec: str, folder: Path) -> Path:
    """The same as a file of that name, for what loads plans from files. Its paths must not be relative."""
    path = folder / f"{spec}.yaml"
    path.write_text(yaml.safe_dump(load_variant(spec).model_dump(mode="json")), encoding="utf-8")
    return path
