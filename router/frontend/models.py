"""Which model and adapter an id names, `base` or `base:adapter`: no worker is touched for that."""

from collections.abc import Iterator, Sequence

from router.adapters.store import StoreError
from router.core.job import AdapterRef, LoadError, LoadFault
from router.frontend.errors import ApiError, load_failed, model_not_found
from router.model import ModelService


class Models:
    """The models that are served, by their ids."""

    def __init__(self, models: Sequence[ModelService]) -> None:
        self._models = {model.model_id: model for model in models}

    def __iter__(self) -> Iterator[ModelService]:
        return iter(self._models.values())

    async def resolve(
        self, model_id: str | None, user: str = ""
    ) -> tuple[ModelService, AdapterRef | None]:
        """The model and adapter of an id, or `ApiError` 404. Without an id, the only model there is.

        Where two versions of the adapter serve, `user` is who asks.
        """
        if model_id is None:
            if len(self._models) > 1:
                raise ApiError(
                    400,
                    f"`model` is missing; name one of {', '.join(self._models)}.",
                    param="model",
                )
            return next(iter(self._models.values())), None
        base, colon, name = model_id.partition(":")
        model = self._models.get(base)
        if model is None:
            raise model_not_found(model_id)
        if not colon:
            return model, None
        try:
            adapter = await model.find(name, user)
        except StoreError as error:
            raise load_failed(LoadError(LoadFault.STORE_UNAVAILABLE, str(error))) from None
        if adapter is None:
            raise model_not_found(model_id)
        return model, adapter
