"""What is answered here, an aiohttp application: all but what is passed on to a worker.

    GET  /health /ready /metrics     no key needed
    GET  /v1/models /v1/models/{id}  from the catalog

It gets requests whole, from `connection.py`, each the last one on its connection. Every answer carries
`x-request-id`, `x-worker` and `x-adapter`.
"""

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
from aiohttp import web
from aiohttp.typedefs import Middleware

from router.core.job import AdapterUse
from router.frontend.access import Access
from router.frontend.auth import Keys
from router.frontend.errors import ApiError, too_large, unauthorized
from router.frontend.listing import Listing, card
from router.frontend.models import Models
from router.telemetry.metrics import Metrics

log = logging.getLogger("lorayard.frontend")

OPEN_PATHS: Final = frozenset({"/health", "/ready", "/metrics"})
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def application(
    models: Models,
    metrics: Metrics,
    keys: Keys,
    *,
    max_body_bytes: int,
    closing: Callable[[], bool],
) -> web.Application:
    """The application over the models that are served. `closing` is whether it takes no more."""
    pages = _Pages(models, metrics, keys, closing)
    app = web.Application(
        middlewares=[_stamped(keys, max_body_bytes)], client_max_size=max_body_bytes
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
    return app


def _stamped(keys: Keys, max_body_bytes: int) -> Middleware:
    """Check the key, turn errors into answers, and put the three headers on all of them."""

    @web.middleware
    async def stamped(request: web.Request, handler: Handler) -> web.StreamResponse:
        request_id = request.headers.get("x-request-id", "")
        try:
            if request.path not in OPEN_PATHS:
                _access(keys, request)
            response = await handler(request)
        except ApiError as error:
            response = _answer(error)
        except web.HTTPRequestEntityTooLarge:
            response = _answer(too_large(max_body_bytes))
        except web.HTTPException as error:
            message = f"{request.method} {request.path}: {error.reason}."
            response = _answer(ApiError(error.status, message))
            if "Allow" in error.headers:
                response.headers["Allow"] = error.headers["Allow"]
        except Exception:
            log.exception("%s: a fault of the router", request_id)
            message = "The router failed; its log has this request's id."
            response = _answer(ApiError(500, message, kind="server_error"))
        if not response.prepared:
            response.headers.update(
                {
                    "x-request-id": request_id,
                    "x-worker": "none",
                    "x-adapter": AdapterUse.NONE.value,
                }
            )
        return response

    return stamped


def _access(keys: Keys, request: web.Request) -> Access:
    """What the request's key gives, or `ApiError` 401."""
    access = keys.find(request.headers.get("authorization"), request.headers.get("x-api-key"))
    if access is None:
        raise unauthorized()
    return access


def _answer(error: ApiError) -> web.Response:
    return web.Response(status=error.status, body=error.body(), headers=error.headers())


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
