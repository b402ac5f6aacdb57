"""Reading YAML into the schema: unknown keys are refused with their path and the nearest right name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from configs.errors import ConfigError, nearest
from configs.plan import PlanFile
from configs.schema import ServeConfig

SHIPPED_PLANS = Path(__file__).parent / "plans"
DEFAULT_PLAN = "minference-snapkv"

_Model = TypeVar("_Model", bound=BaseModel)


def load_config(file: Path | None, flags: Mapping[str, Any]) -> ServeConfig:
    """The configuration of a server: flags over file over defaults.

    `flags` maps dotted paths ("engine.dtype") to values; None means the flag was not given.
    """
    content = _read_yaml(file) if file else {}
    for path, value in flags.items():
        if value is None:
            continue
        *sections, key = path.split(".")
        place = content
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{file}: {section} must be a mapping, not {place!r}")
        place[key] = value
    return _validate(ServeConfig, content, str(file) if file else "command line")


def load_plan(reference: str | Path) -> PlanFile:
    """The plan of a file, or a shipped plan by its name ("dense")."""
    path = Path(reference)
    if not path.suffix and not path.exists():
        shipped = SHIPPED_PLANS / f"{reference}.yaml"
        if not shipped.exists():
            raise ConfigError(f"no plan {str(reference)!r}: {nearest(str(reference), shipped_plans())}")
        path = shipped
    content = _read_yaml(path)
    for key in ("name", "source"):
        if key in content:
            raise ConfigError(f"{path}: unknown key {key!r}; a plan's name is its file's name")
    return _validate(PlanFile, {**content, "name": path.stem, "source": path}, str(path))


def shipped_plans() -> list[str]:
    """Names of the plans that come with Farspan."""
    return sorted(path.stem for path in SHIPPED_PLANS.glob("*.yaml"))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{path}: must be a mapping of names to values")
    return content


def _validate(model: type[_Model], content: dict[str, Any], where: str) -> _Model:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        lines: dict[tuple[str, ...], str] = {}
        for item in error.errors():
            path = _path(model, item["loc"])
            lines.setdefault(path, _explain(model, path, item, where))  # of a union, the first form speaks
        raise ConfigError("\n".join(lines.values())) from error


def _path(model: type[BaseModel], location: tuple[Any, ...]) -> tuple[str, ...]:
    """The keys of a pydantic location, without what it says of its own validators."""
    path: tuple[str, ...] = ()
    for part in map(str, location):
        path += (part,)
        fields = _fields_at(model, path[:-1])
        if part not in fields or not _is_section(model, path):
            break
    return path


def _explain(model: type[BaseModel], path: tuple[str, ...], item: Any, where: str) -> str:
    """One line for one wrong key: where it stands, what is wrong, what would be right."""
    name = ".".join(path)
    if item["type"] == "extra_forbidden":
        return f"{where}: {name}: unknown key; {nearest(path[-1], _fields_at(model, path[:-1]))}"
    message = item["msg"].removeprefix("Value error, ")
    return f"{where}: {name}: {message} (got {str(item['input'])[:80]!r})"


def _is_section(model: type[BaseModel], path: tuple[str, ...]) -> bool:
    """Does the schema go on below this path?"""
    for part in path:
        annotation = model.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return False
        model = annotation
    return True


def _fields_at(model: type[BaseModel], path: tuple[str, ...]) -> list[str]:
    """Names of the keys that may stand below a section of the schema."""
    for part in path:
        annotation = model.model_fields[part].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel), annotation
        model = annotation
    return [name for name, field in model.model_fields.items() if not field.exclude]
