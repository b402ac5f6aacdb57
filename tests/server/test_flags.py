"""Flags of commands: each sets one setting of the schema, and only where it was given."""

from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from configs.loading import load_config
from configs.schema import ServeConfig
from server.commands.flags import Flag, settings_of, takes
from server.commands.serve import FLAGS

PANELS = {
    "Size": (Flag("cache.dtype", "Of pages.", name="cache_dtype"), Flag("engine.threads", "CPUs.", int)),
    "Others": (
        Flag("server.api_keys", "Keys.", list[str], name="api_key"),
        Flag("server.log_requests", "Log them.", bool, shown="off"),
    ),
}


def ran(*arguments: str) -> dict[str, Any]:
    """The settings of a command that has these flags."""
    found: dict[str, Any] = {}

    @takes(PANELS)
    def command(model: str = "tiny", **given: Any) -> None:
        found.update(settings_of(PANELS, given), model=model)

    app = typer.Typer()
    app.command()(command)
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 0, ended.output
    return found


def test_flags_become_the_settings_that_they_name() -> None:
    given = ran("--cache-dtype", "int8", "--threads", "3", "--api-key", "a", "--api-key", "b", "--model", "m")
    assert given == {
        "cache.dtype": "int8",
        "engine.threads": 3,
        "server.api_keys": ["a", "b"],
        "server.log_requests": None,
        "model": "m",
    }


def test_a_flag_that_was_not_given_sets_nothing() -> None:
    settings = [flag.setting for flags in PANELS.values() for flag in flags]
    assert ran() == dict.fromkeys(settings) | {"model": "tiny"}
    assert ran("--no-log-requests")["server.log_requests"] is False


def test_a_command_without_room_for_flags_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="model"):
        takes(PANELS)(lambda model: None)


def test_every_flag_of_serve_sets_a_setting_of_the_schema() -> None:
    flags = [flag for flags in FLAGS.values() for flag in flags]
    assert len({flag.setting for flag in flags}) == len({flag.parameter for flag in flags}) == len(flags)
    for flag in flags:
        section, name = flag.setting.split(".")
        fields = ServeConfig.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
        assert name in fields, flag
    assert load_config(None, settings_of(FLAGS, {flag.parameter: None for flag in flags})) == ServeConfig()
