"""Flag: one option of a command, and the setting of a server that it sets. Panels of them, for Typer."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import typer

_Command = TypeVar("_Command", bound=Callable[..., None])


@dataclass(frozen=True, slots=True)
class Flag:
    """An option that is None where nobody gave it: what holds then is for the schema to say."""

    setting: str  # of the schema: "cache.dtype"
    help: str
    kind: Any = str  # a type that Typer knows; list[...] where it may be repeated
    shown: str | bool = True  # what help says of the default
    name: str = ""  # "cache_dtype", where it is not the setting's own

    @property
    def parameter(self) -> str:
        """The command's word for it; on the command line it has dashes."""
        return self.name or self.setting.rpartition(".")[2]

    def in_panel(self, panel: str) -> inspect.Parameter:
        """As Typer reads it, below this heading of the help."""
        option = typer.Option(help=self.help, show_default=self.shown, rich_help_panel=panel)
        return inspect.Parameter(
            self.parameter,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[self.kind | None, option],
        )


Panels = Mapping[str, tuple[Flag, ...]]  # by the heading of the help


def takes(panels: Panels) -> Callable[[_Command], _Command]:
    """The command has these flags where it says `**given`."""

    def with_flags(command: _Command) -> _Command:
        *own, given = inspect.signature(command).parameters.values()
        assert given.kind is inspect.Parameter.VAR_KEYWORD, f"{command} ends with {given}"
        flags = [flag.in_panel(panel) for panel, flags in panels.items() for flag in flags]
        vars(command)["__signature__"] = inspect.Signature([*own, *flags], return_annotation=None)
        return command

    return with_flags


def settings_of(panels: Panels, given: Mapping[str, Any]) -> dict[str, Any]:
    """Values by setting, None where a flag was not given."""
    return {flag.setting: given[flag.parameter] for flags in panels.values() for flag in flags}
