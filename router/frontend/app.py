"""What is answered here, an aiohttp application: all but what is passed on to a worker.

    GET  /health /ready /metrics     no key needed
    GET  /v1/models /v1/models/{id}  from the catalog
    /admin/v1 and vLLM's two routes  for operators, with their own key, see `admin.py`

It gets requests whole, from `connection.py`, each the last one on its connection.
"""

import time
from collections.abc import Callable
from typing import Final

import msgspec
from aiohttp import web

from router.frontend.access import Access
from router.frontend.admin import VLLM_PATHS, Administration
from router.frontend.auth import Keys
from router.frontend.errors import ApiError, unauthorized
from router.frontend.listing import Listing, card
from router.frontend.models import Models
from router.frontend.stamp import stamped
from router.telemetry.metrics import Metrics

OPEN_PATHS: Final = frozenset({"/health", "/ready", "/metrics"})


def application(
    models: Models,
    metrics: Metrics,
    keys: Keys,
    administration: Administration | None = None,
    *,
    max_body_bytes: int,
    closing: Callable[[], bool],
) -> web.Application:
    """The application over the models that are served. `closing` is whether it takes no more.

    Without `administration` there is none of it.
    """
    pages = _Pages(models, metrics, keys, closing)
    app = web.Application(
        middlewares=[stamped(_admission(keys, administration), max_body_bytes)],
        client_max_size=max_body_bytes,
    )
    app.add_routes(
        [
            web.get("/health", pages.health),
            web.get("/ready", pages.ready),
            web.get("/metrics", pages.metrics),
            web.get("/v1/models", pages.list_models),
            web.get("/v1/models/{id:.+}", pages.show_model),
        ]
    )
    if administration is None:
        app.add_routes([web.post(path, _no_administration) for path in sorted(VLLM_PATHS)])
    else:
        app.add_routes(administration.routes())
    return app


def _admission(keys: Keys, administration: Administration | None) -> Callable[[web.Request], None]:
    """What raises `ApiError` where a request does not carry the key that its path needs."""

    def admit(request: web.Request) -> None:
        if administration is not None and administration.covers(request.path):
            administration.admit(request)
        elif request.path not in OPEN_PATHS:
            _access(keys, request)

    return admit


def _access(keys: Keys, request: web.Request) -> Access:
    """What the request's key gives, or `ApiError` 401."""
    access = keys.find(request.headers.get("authorization"), request.headers.get("x-api-key"))
    if access is None:
        raise unauthorized()
    return access


async def _no_administration(_: web.Request) -> web.Response:
    raise ApiError(
        404,
        "Adapters are loaded when they are asked for; put new ones into the store, or set an admin key "
        "to have them loaded by this route.",
    )


class _Pages:
    """The answers."""

    def __init__(
        self, models: Models, metrics: Metrics, keys: Keys, closing: Callable[[], bool]
    ) -> None:
        self._models = models
        self._keys = keys
        self._closing = closing
        self._metrics = metrics
        self._created = int(time.time())
        self._listing = Listing(models, self._created)

    async def health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def ready(self, _: web.Request) -> web.Response:
        states = {model.model_id: model.ready for model in self._models}
        # Who asks sends requests elsewhere then, while those that run here end.
        ready = all(states.values()) and not self._closing()
        return web.json_response({"ready": ready, "models": states}, status=200 if ready else 503)

    async def metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            body=await self._metrics.scrape(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    async def list_models(self, request: web.Request) -> web.Response:
        return _json(self._listing.body(_access(self._keys, request).scope))

    async def show_model(self, request: web.Request) -> web.Response:
        scope = _access(self._keys, request).scope
        model, adapter = await self._models.resolve(request.match_info["id"], scope)
        shown = card(model, adapter.name if adapter else None, self._created)
        return _json(msgspec.json.encode(shown))


def _json(data: bytes) -> web.Response:
    return web.Response(body=data, content_type="application/json")
