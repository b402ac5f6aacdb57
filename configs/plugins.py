"""Plugins: plug-ins by the name that a plan calls them, ours and those of other distributions."""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar, cast

from configs.errors import ConfigError

_Kind = TypeVar("_Kind")


class Plugins(Mapping[str, type[_Kind]], Generic[_Kind]):
    """Ours come first. Others are entry points of a group, imported when a plan names them.

    What is wrong with one of those is a ConfigError when it is looked up: others are not hurt by it.
    """

    def __init__(self, group: str, owed: type, ours: dict[str, type[_Kind]]) -> None:
        """`owed` is the protocol of such plug-ins: every one has what it names."""
        self._group = group
        self._owed = sorted(name for name in vars(owed) if not name.startswith("_"))
        self._ours = ours
        self._loaded: dict[str, type[_Kind]] = {}

    def __getitem__(self, name: str) -> type[_Kind]:
        found = self._others.get(name, ())
        if name in self._ours and not found:
            return self._ours[name]
        if not found:
            raise KeyError(name)
        if name in self._ours or len(found) > 1:
            sources = ["Farspan itself"] if name in self._ours else []
            sources += [_source(entry) for entry in found]
            raise ConfigError(
                f"{self._group}: {name!r} is what {' and '.join(sources)} call a plug-in;"
                " only one of them can be installed"
            )
        if name not in self._loaded:
            self._loaded[name] = self._load(found[0])
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._ours, *self._others)))

    def __len__(self) -> int:
        return len({*self._ours, *self._others})

    def __contains__(self, name: object) -> bool:
        return name in self._ours or name in self._others

    @contextmanager
    def adding(self, name: str, kind: type[_Kind]) -> Iterator[None]:
        """While it lasts, one that is of no distribution: a benchmark's own."""
        assert name not in self, f"{name!r} is known"
        self._ours[name] = kind
        try:
            yield
        finally:
            del self._ours[name]

    def name_of(self, kind: type) -> str:
        """What plans call a plug-in that one of them has named."""
        return next(name for name, known in {**self._ours, **self._loaded}.items() if known is kind)

    @cached_property
    def _others(self) -> dict[str, list[EntryPoint]]:
        found: dict[str, list[EntryPoint]] = {}
        for entry in sorted(entry_points(group=self._group), key=lambda entry: entry.name):
            found.setdefault(entry.name, []).append(entry)
        return found

    def _load(self, entry: EntryPoint) -> type[_Kind]:
        where = f"{self._group}: {entry.name!r} ({entry.value}) of {_source(entry)}"
        try:
            kind: Any = entry.load()
        except Exception as error:  # it is somebody else's code: whatever it raises
            raise ConfigError(f"{where} cannot be loaded: {type(error).__name__}: {error}") from error
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            raise ConfigError(f"{where} is not a dataclass whose fields are its options, but {kind!r}")
        missing = [name for name in self._owed if not hasattr(kind, name)]
        if missing:
            raise ConfigError(
                f"{where} lacks {', '.join(missing)}: see what a plug-in owes in docs/extending.md"
            )
        return cast(type[_Kind], kind)


def _source(entry: EntryPoint) -> str:
    """The distribution that brought an entry point."""
    return "an unknown distribution" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
