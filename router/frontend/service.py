"""The front end of one process: the connections of its clients, what they ask for, and its end."""

import asyncio
import socket
from random import Random
from typing import cast

from aiohttp import web

from router.config import RouterConfig
from router.frontend.admin import Administration
from router.frontend.admin_key import AdminKey
from router.frontend.app import application
from router.frontend.auth import Keys
from router.frontend.connection import HEAD_MAX_BYTES, ClientConnection
from router.frontend.errors import ApiError
from router.frontend.exchange import Exchange, worker_path
from router.frontend.head import parse_head
from router.frontend.models import Models
from router.frontend.request import Request
from router.frontend.terms import TermsReader
from router.telemetry.metrics import Metrics
from router.telemetry.recorder import Recorder

APPLICATION_SHUTDOWN_S = 1.0
BACKLOG = 4096
SESSION = b"x-session-id"


class Frontend:
    """Serves the models to clients. To be made inside a running loop."""

    def __init__(
        self,
        models: Models,
        config: RouterConfig,
        metrics: Metrics,
        keys: Keys,
        recorder: Recorder | None = None,
        admin_key: AdminKey | None = None,
    ) -> None:
        self.max_body_bytes = config.max_body_bytes
        self.idle_timeout_s = config.idle_timeout_s
        self.closing = False
        self.connections: dict[ClientConnection, None] = {}
        self._models = models
        self._config = config
        self._metrics = metrics
        self._keys = keys
        self._recorder = recorder
        self._terms = TermsReader(config)
        self._loop = asyncio.get_running_loop()
        self._rng = Random()
        self._in_flight = 0
        self._server: asyncio.Server | None = None
        self._fewer = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._administration = (
            Administration([model.lifecycle for model in models], admin_key) if admin_key else None
        )
        app = application(
            models,
            metrics,
            keys,
            self._administration,
            max_body_bytes=config.max_body_bytes,
            closing=lambda: self.closing,
        )
        self._pages = web.AppRunner(
            app,
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=APPLICATION_SHUTDOWN_S,
            # What is longer is refused before it comes there.
            max_line_size=2 * HEAD_MAX_BYTES,
            max_field_size=2 * HEAD_MAX_BYTES,
        )

    async def start(self, listener: socket.socket) -> None:
        """Accept connections."""
        await self._pages.setup()
        self._server = await self._loop.create_server(
            self._connection, sock=listener, backlog=BACKLOG
        )

    def _connection(self) -> asyncio.Protocol:
        return cast("asyncio.Protocol", ClientConnection(self, self._loop, self._rng))

    def application(self) -> asyncio.Protocol:
        """The protocol of one that is the application's."""
        assert self._pages.server is not None
        return self._pages.server()

    @property
    def in_flight(self) -> int:
        """Requests that are being passed on."""
        return self._in_flight

    def accepts(self, request: Request) -> bool:
        """Whether the request carries a key, if one is needed; what it gives is noted on it."""
        access = self._keys.find(request.get(b"authorization"), request.get(b"x-api-key"))
        if access is None:
            return False
        request.access = access
        return True

    def lost(self, connection: ClientConnection) -> None:
        """A connection is gone, or the application's."""
        self.connections.pop(connection, None)
        self._fewer.set()

    async def pass_on(self, request: Request, connection: ClientConnection) -> bool:
        """Have a worker answer a request; whether another may follow on its connection.

        Raises `ApiError` while nothing is sent, and `AnswerCutError` after.
        """
        self._in_flight += 1
        self._idle.clear()
        try:
            route = request.path.removeprefix("/v1/")
            path = worker_path(route, request.query)
            if path is None:
                raise ApiError(404, f"No route {request.path}.")
            access = request.access
            if request.has_terms:
                terms = self._terms.read(request.headers(), access)
            else:
                terms = self._terms.usual(access)
            head = parse_head(request.body)
            user = head.who or request.get(SESSION) or request.id
            model, adapter = await self._models.resolve(head.model, access.scope, user)
            exchange = Exchange(
                request,
                connection,
                path,
                head,
                terms,
                model,
                adapter,
                config=self._config,
                metrics=self._metrics,
                recorder=self._recorder,
                last=self.closing or not request.keep_alive,
            )
            return await exchange.run()
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def drained(self) -> None:
        """Close what is idle; return when no request and no answer is on its way."""
        self.closing = True
        for connection in tuple(self.connections):
            connection.close_when_idle()
        await self._idle.wait()
        leaving = [one for one in tuple(self.connections) if one.close_when_idle()]
        for connection in leaving:
            while connection in self.connections:
                self._fewer.clear()
                await self._fewer.wait()

    async def aclose(self) -> None:
        """Accept no more, and cut off whatever is left."""
        if self._server is not None:
            self._server.close()
        for connection in tuple(self.connections):
            connection.abort()
        await self._idle.wait()
        if self._administration is not None:
            await self._administration.aclose()
        await self._pages.cleanup()
