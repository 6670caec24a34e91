"""Which model and adapter an id names, `base` or `base:adapter`: no worker is touched for that.

What the key may not use is answered as what does not exist, and nothing is looked up for it: neither
the answer nor the time that it takes tells the two apart.
"""

from collections.abc import Iterator, Sequence

from router.adapters.store import StoreError
from router.core.job import AdapterRef, LoadError, LoadFault
from router.frontend.access import Scope
from router.frontend.errors import ApiError, load_failed, model_not_found
from router.lifecycle.adapters import SPLITTER
from router.model import ModelService


class Models:
    """The models that are served, by their ids."""

    def __init__(self, models: Sequence[ModelService]) -> None:
        self._models = {model.model_id: model for model in models}

    def __iter__(self) -> Iterator[ModelService]:
        return iter(self._models.values())

    async def resolve(
        self, model_id: str | None, scope: Scope, user: str = ""
    ) -> tuple[ModelService, AdapterRef | None]:
        """The model and adapter of an id, or `ApiError` 404. Without an id, the only model there is.

        There is what is in `scope`. Where two versions of the adapter serve, `user` is who asks.
        """
        if model_id is None:
            return self._only(scope), None
        base, colon, name = model_id.partition(":")
        model = self._models.get(base)
        if model is None or not scope.has_model(base):
            raise model_not_found(model_id)
        if not colon:
            return model, None
        if not scope.has_adapter(name.partition(SPLITTER)[0]):
            raise model_not_found(model_id)
        try:
            adapter = await model.find(name, user)
        except StoreError as error:
            raise load_failed(LoadError(LoadFault.STORE_UNAVAILABLE, str(error))) from None
        if adapter is None:
            raise model_not_found(model_id)
        return model, adapter

    def _only(self, scope: Scope) -> ModelService:
        found = [model_id for model_id in self._models if scope.has_model(model_id)]
        if len(found) == 1:
            return self._models[found[0]]
        which = f"name one of {', '.join(found)}" if found else "this key may use none"
        raise ApiError(400, f"`model` is missing; {which}.", param="model")
