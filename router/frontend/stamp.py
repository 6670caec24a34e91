"""The middleware of all that is answered here: who may not ask is told so, and errors become answers.

Every answer carries `x-request-id`, `x-worker` and `x-adapter`.
"""

import logging
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.typedefs import Middleware

from router.core.job import AdapterUse
from router.frontend.errors import ApiError, too_large

log = logging.getLogger("lorayard.frontend")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def stamped(admit: Callable[[web.Request], None], max_body_bytes: int) -> Middleware:
    """The middleware. `admit` raises `ApiError` where the request carries no key that it needs."""

    @web.middleware
    async def stamp(request: web.Request, handler: Handler) -> web.StreamResponse:
        request_id = request.headers.get("x-request-id", "")
        try:
            admit(request)
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

    return stamp


def _answer(error: ApiError) -> web.Response:
    return web.Response(status=error.status, body=error.body(), headers=error.headers())
