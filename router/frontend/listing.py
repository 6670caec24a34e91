"""What `GET /v1/models` answers, as bytes: made once a change of what there is, not once a request.

A model's card is made once for all; who may use what is a choice of cards, joined once for each scope
and kept while nothing changes. What is kept is bounded in bytes, those out first that were not asked
for the longest, so that any number of scopes over any number of adapters takes no more.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

import msgspec

from router.frontend.access import Scope
from router.frontend.models import Models
from router.model import ModelService

KEPT_MAX_BYTES: Final = 32 * 2**20
HEAD: Final = b'{"object":"list","data":['
TAIL: Final = b"]}"


class Card(msgspec.Struct, frozen=True):
    """A model, or an adapter of one, as OpenAI's clients know it, with vLLM's `root` and `parent`."""

    id: str
    created: int
    root: str
    parent: str | None
    object: str = "model"
    owned_by: str = "lorayard"


def card(model: ModelService, adapter: str | None, created: int) -> Card:
    """The card of a base model, or of one of its adapters. `created` is in seconds of the epoch."""
    base = model.model_id
    if adapter is None:
        return Card(base, created, model.llm.model_loading_config.source, None)
    return Card(f"{base}:{adapter}", created, adapter, base)


class _Cards:
    """One model's cards, in JSON, as its catalog is now."""

    def __init__(self, model: ModelService, created: int) -> None:
        self.model = model
        self._created = created
        self._base = msgspec.json.encode(card(model, None, created))
        self._adapters: list[tuple[str, bytes]] = []
        self._as_of: int | None = None

    @property
    def changes(self) -> int:
        catalog = self.model.catalog
        return 0 if catalog is None else catalog.changes

    def within(self, scope: Scope) -> Iterator[bytes]:
        if not scope.has_model(self.model.model_id):
            return
        yield self._base
        catalog = self.model.catalog
        if catalog is None:
            return
        if self._as_of != catalog.changes:
            self._as_of = catalog.changes
            encode = msgspec.json.Encoder().encode
            self._adapters = [
                (name, encode(card(self.model, name, self._created))) for name in catalog.names
            ]
        for name, data in self._adapters:
            if scope.has_adapter(name):
                yield data


class Listing:
    """The bodies of the answers. `created` is in seconds of the epoch."""

    def __init__(self, models: Models, created: int) -> None:
        self._cards = [_Cards(model, created) for model in models]
        self._as_of: tuple[int, ...] = ()
        self._bodies: OrderedDict[Scope, bytes] = OrderedDict()
        self.kept_bytes = 0

    def body(self, scope: Scope) -> bytes:
        """Every model and adapter in the scope, in JSON."""
        as_of = tuple(cards.changes for cards in self._cards)
        if as_of != self._as_of:
            self._as_of = as_of
            self._bodies.clear()
            self.kept_bytes = 0
        body = self._bodies.get(scope)
        if body is None:
            found = (data for cards in self._cards for data in cards.within(scope))
            body = self._bodies[scope] = HEAD + b",".join(found) + TAIL
            self.kept_bytes += len(body)
            while self.kept_bytes > KEPT_MAX_BYTES:
                self.kept_bytes -= len(self._bodies.popitem(last=False)[1])
        else:
            self._bodies.move_to_end(scope)
        return body
