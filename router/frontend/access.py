"""What whoever asks may use: models and adapters by patterns, as whom, and on whose account.

A name that may not be used is to look like one that does not exist. So it is looked at here, before
anything is looked up, and whoever finds `False` answers as for a name that is nowhere.
"""

import re
from collections.abc import Sequence
from fnmatch import translate
from functools import cached_property
from typing import Final

import msgspec

from router.keys import ALL, GLOB, is_name_or_prefix


class Patterns:
    """Names that match one of some patterns. Names and beginnings cost no regular expression."""

    def __init__(self, patterns: Sequence[str]) -> None:
        simple = [one for one in patterns if is_name_or_prefix(one)]
        self._names = frozenset(one for one in simple if GLOB.isdisjoint(one))
        self._beginnings = tuple(one[:-1] for one in simple if one.endswith("*"))
        globs = [translate(one) for one in patterns if not is_name_or_prefix(one)]
        self._globs = re.compile("|".join(globs)) if globs else None

    def match(self, name: str) -> bool:
        """Whether one of them matches the whole name."""
        if name in self._names or name.startswith(self._beginnings):
            return True
        return self._globs is not None and self._globs.match(name) is not None


class Scope:
    """The models and adapters that a key may use. Two of the same patterns are equal."""

    def __init__(self, models: Sequence[str] = ALL, adapters: Sequence[str] = ALL) -> None:
        self._key = (tuple(models), tuple(adapters))
        self._hash = hash(self._key)

    # Made when they are first needed: ten thousand keys come at once, while requests run.
    @cached_property
    def _models(self) -> Patterns:
        return Patterns(self._key[0])

    @cached_property
    def _adapters(self) -> Patterns:
        return Patterns(self._key[1])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scope) and self._key == other._key

    def __hash__(self) -> int:
        return self._hash

    def has_model(self, model_id: str) -> bool:
        """Whether it may use that base model."""
        return self._models.match(model_id)

    def has_adapter(self, name: str) -> bool:
        """Whether it may use the adapter, whatever its version: `name`, or `name@version`."""
        return self._adapters.match(name.partition("@")[0])


class Access(msgspec.Struct, frozen=True):
    """What one key gives: `tenant` is whom it makes of its holder, who is free to say if it is empty.

    `priority` is that of its requests and the most urgent that they may ask for; None: theirs to say.
    `accounts` are those that its requests are charged to, beside their tenant's.
    """

    scope: Scope
    tenant: str = ""
    priority: int | None = None
    accounts: tuple[str, ...] = ()


FULL: Final = Access(Scope())
