"""Which arguments somebody chose, as against those that have their default."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar

from ..errors import ConfigError

__all__ = ["ExplicitArgs"]

Self = TypeVar("Self", bound="ExplicitArgs")


class ExplicitArgs:
    """Base of an argument dataclass that remembers which of its fields were given.

    A value that equals the default counts as given when somebody wrote it down: "vae_cpu_offload=false" is a
    decision, leaving it out is none.
    """

    _explicit: frozenset[str] = frozenset()

    def __new__(cls: type[Self], *values: Any, **named: Any) -> Self:
        made = object.__new__(cls)
        positional = [f.name for f in dataclasses.fields(cls) if f.init][: len(values)]  # type: ignore[arg-type]
        object.__setattr__(made, "_explicit", frozenset(positional) | frozenset(named))
        return made

    def is_arg_explicitly_set(self, name: str) -> bool:
        """Whether `name` was given on the command line, in a config file, in from_dict or from_kwargs, or to the
        constructor. Raises ConfigError for a name that is no argument."""
        self.require_names([name])
        return name in self._explicit

    def with_defaults(self: Self, **values: Any) -> Self:
        """A copy in which `values` stand where nothing was given. They are defaults: they do not count as given."""
        self.require_names(values)
        return self._copied({k: v for k, v in values.items() if k not in self._explicit}, self._explicit)

    def with_values(self: Self, **values: Any) -> Self:
        """A copy with `values`, which count as given."""
        self.require_names(values)
        return self._copied(values, self._explicit | frozenset(values))

    @classmethod
    def require_names(cls, names: Iterable[str]) -> None:
        known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for name in names:
            if name not in known:
                raise ConfigError(f"there is no argument {name!r}: the arguments are {', '.join(sorted(known))}")

    def _copied(self: Self, changes: dict[str, Any], explicit: frozenset[str]) -> Self:
        current = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        made = type(self)(**{**current, **changes})
        object.__setattr__(made, "_explicit", explicit)
        return made
