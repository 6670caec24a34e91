"""Administration over HTTP: `/admin/v1`, and vLLM's two routes for adapters.

There is none of it unless a key is set, and an API key is not it. Every operation goes on to its end
even if who asked for it leaves, since half of a change would be nobody's; so their number is bounded.
Each is logged when it has ended: its request's id, and what was sent but for the key.
"""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar

import msgspec
from aiohttp import web

from router.frontend.admin_key import AdminKey
from router.frontend.admin_routes import ADAPTER, ROOT, ROUTES, WORKER, Fleet, Route
from router.frontend.errors import ApiError, too_large
from router.frontend.openapi import document
from router.frontend.vllm_routes import VLLM_ROUTES, fault, in_vllm_shape
from router.lifecycle.words import Lifecycle, LifecycleError, Problem

log = logging.getLogger("lorayard.admin")

BODY_MAX_BYTES: Final = 64 * 1024
UNDER_WAY_MAX: Final = 64
LOGGED_MAX: Final = 512
RETRY_AFTER_S: Final = 5.0
JSON: Final = "application/json"
# An id may have slashes, quoted or not: its base model's. An adapter's name has none.
IN_PATH: Final = {ADAPTER: r"{id:(?:.+:)?[^:/]+}", WORKER: r"{id:.+}"}
SERVER_ERROR: Final = "server_error"
STATUS: Final[dict[Problem, tuple[int, str]]] = {
    "unknown": (404, "invalid_request_error"),
    "invalid": (400, "invalid_request_error"),
    "conflict": (409, "invalid_request_error"),
    "unavailable": (503, SERVER_ERROR),
}
# Before the host of an address, and behind its path, may be a credential.
BEFORE_HOST: Final = re.compile(r"//[^/\"`\s]*@")
AFTER_PATH: Final = re.compile(r"\?[^\"`]*")
T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.Response]]


class Administration:
    """The routes for operators, over all base models' lifecycles. To be made in a running loop."""

    def __init__(self, lifecycles: Sequence[Lifecycle], key: AdminKey) -> None:
        self._fleet = Fleet(lifecycles)
        self._key = key
        self._document = document((*ROUTES, *VLLM_ROUTES))
        self._under_way: dict[asyncio.Task[Any], None] = {}
        self._loop = asyncio.get_running_loop()

    def covers(self, path: str) -> bool:
        """Whether a path is for operators; an API key is of no use there."""
        return path == "/admin" or path.startswith("/admin/") or path in VLLM_PATHS

    def admit(self, request: web.Request) -> None:
        """Raise `ApiError` 401 where the request does not carry the key."""
        if not self._key.accepts(request.headers):
            raise ApiError(
                401,
                "No or wrong admin key; send `Authorization: Bearer KEY` with the router's own, which "
                "is no API key.",
                code="invalid_admin_key",
            )

    def routes(self) -> list[web.RouteDef]:
        """All of them, for an aiohttp application whose middleware turns `ApiError` into answers."""
        made = [web.get(f"{ROOT}/openapi.json", self._show_document)]
        made += [
            web.route(route.method, _pattern(route.path), self._handler(route))
            for route in (*ROUTES, *VLLM_ROUTES)
        ]
        return made

    async def aclose(self) -> None:
        """Cut off what is under way."""
        tasks = tuple(self._under_way)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _show_document(self, _: web.Request) -> web.Response:
        return web.Response(body=self._document, content_type=JSON)

    def _handler(self, route: Route[Any]) -> Handler:
        decoder = msgspec.json.Decoder(route.takes)

        async def handle(request: web.Request) -> web.Response:
            target = request.match_info.get("id", "")
            try:
                if not route.changes:
                    taken = _asked(route.takes, request)
                    answer = await _translated(route, route.act(self._fleet, target, taken))
                else:
                    taken = _read(decoder, await _body(request))
                    answer = await self._to_its_end(self._logged(route, request, target, taken))
            except ApiError as error:
                raise (in_vllm_shape(error) if route.as_vllm else error) from None
            if route.answers is str:
                return web.Response(text=answer)
            return web.Response(body=msgspec.json.encode(answer), content_type=JSON)

        return handle

    async def _to_its_end(self, operation: "Awaitable[T]") -> T:
        """Wait for an operation, which goes on if nobody waits for it any more."""
        task: asyncio.Future[T] = asyncio.ensure_future(operation)
        assert isinstance(task, asyncio.Task)
        self._under_way[task] = None
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        del self._under_way[task]
        if not task.cancelled():
            task.exception()  # it is logged; who asked may have left

    async def _logged(
        self, route: Route[Any], request: web.Request, target: str, taken: msgspec.Struct
    ) -> Any:  # noqa: ANN401  (what the route answers)
        """Do it, and say who had it done."""
        began = self._loop.time()
        outcome = "cut off"
        try:
            if len(self._under_way) > UNDER_WAY_MAX:
                raise ApiError(
                    503,
                    f"{UNDER_WAY_MAX} operations are under way; ask again when some have ended.",
                    kind=SERVER_ERROR,
                    code="busy",
                    retry_after_s=RETRY_AFTER_S,
                )
            answer = await _translated(route, route.act(self._fleet, target, taken))
            outcome = "done"
        except ApiError as error:
            outcome = f"{error.status}, {error}"
            raise
        except Exception:
            outcome = "failed by a fault of the router"
            raise
        else:
            return answer
        finally:
            sent = msgspec.json.encode(taken).decode()
            log.info(
                "%s: %s %s %s by %s: %s, in %.3f s",
                request.headers.get("x-request-id", "-"),
                route.name,
                _plain(target),
                _plain(_without_credentials(sent)),
                request.remote,
                _plain(_without_credentials(outcome)),
                self._loop.time() - began,
            )


VLLM_PATHS: Final = frozenset(route.path for route in VLLM_ROUTES)


def _pattern(path: str) -> str:
    """A path as aiohttp writes it."""
    for begin, pattern in IN_PATH.items():
        if path.startswith(begin):
            return path.replace("{id}", pattern)
    return path


async def _translated(route: Route[Any], work: Awaitable[T]) -> T:
    """Turn what an operator did wrong, or cannot have now, into an answer."""
    try:
        return await work
    except LifecycleError as error:
        if route.as_vllm:
            raise fault(error) from None
        status, kind = STATUS[error.kind]
        retry_after_s = RETRY_AFTER_S if error.kind == "unavailable" else None
        code = "not_found" if error.kind == "unknown" else error.kind
        raise ApiError(
            status, str(error), kind=kind, code=code, retry_after_s=retry_after_s
        ) from None


async def _body(request: web.Request) -> bytes:
    if (request.content_length or 0) > BODY_MAX_BYTES:
        raise too_large(BODY_MAX_BYTES)
    data = await request.read()
    if len(data) > BODY_MAX_BYTES:
        raise too_large(BODY_MAX_BYTES)
    return data


def _read(decoder: "msgspec.json.Decoder[Any]", data: bytes) -> msgspec.Struct:
    """What the body says; none says nothing. Raises `ApiError` 400 that says what to send instead."""
    try:
        taken: msgspec.Struct = decoder.decode(data.strip() or b"{}")
    except msgspec.ValidationError as error:
        raise _invalid(error) from None
    except RecursionError:
        raise ApiError(400, "The body is nested too deeply.", code="invalid_json") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(
            400, f"The body is not valid JSON ({error}); send a JSON object.", code="invalid_json"
        ) from None
    return taken


def _asked(takes: type[msgspec.Struct], request: web.Request) -> msgspec.Struct:
    """What the query says. Raises `ApiError` 400 that says what to send instead."""
    query = dict(request.query)
    if len(query) != len(request.query):
        raise ApiError(400, "A parameter stands twice in the query; send it once.")
    try:
        return msgspec.convert(query, takes, strict=False)
    except msgspec.ValidationError as error:
        raise _invalid(error, takes) from None


def _invalid(error: msgspec.ValidationError, takes: type[msgspec.Struct] | None = None) -> ApiError:
    what, _, where = str(error).partition(" - at ")
    field = where.strip("`").removeprefix("$").removeprefix(".")
    if takes is not None and not field and takes.__struct_fields__:
        what = f"{what}; known here: {', '.join(takes.__struct_fields__)}"
    if takes is None and not field and what.startswith("Expected `object`"):
        what = "The body must be a JSON object"
    message = f"`{field}`: {what}." if field else f"{what}."
    return ApiError(400, message, param=field or None, code="invalid_value")


def _without_credentials(text: str) -> str:
    """What was sent, or an answer that repeats it."""
    return AFTER_PATH.sub("?...", BEFORE_HOST.sub("//...@", text))


def _plain(text: str) -> str:
    """Text of an operator's as one line of a log, with nothing in it that a terminal would obey."""
    return text[:LOGGED_MAX].encode("unicode_escape").decode("ascii")
