"""One question to a router's `/admin/v1`, and its answer as structs; blocking, one connection each.

It goes to the address that is given and to no other: no proxy of the environment and no redirect gets
the key. What can go wrong is one of two errors, by who has to mend it.
"""

import http.client
import ssl
from typing import Final, TypeVar
from urllib.parse import urlsplit

import msgspec

from router.lifecycle.wire import Error

ROOT: Final = "/admin/v1"
ANSWER_MAX_BYTES: Final = 64 * 2**20
OK: Final = 200
UNAUTHORIZED: Final = 401
NOT_FOUND: Final = 404
NO_ADMINISTRATION: Final = (
    "no admin key is set on that router: start it with LORAYARD_ADMIN_KEY=KEY in its environment "
    "(or the variable that its router.admin_key_env names)"
)
Answer = TypeVar("Answer")


class AskError(Exception):
    """It cannot be asked so; the message says what to do instead."""


class RefusedError(Exception):
    """The router did not do it, or was not reached."""


class AdminClient:
    """Asks the router at `url`. Raises `AskError` where there is no key, or no such address."""

    def __init__(self, url: str, key: str, timeout_s: float) -> None:
        if not key:
            raise AskError("no key; set LORAYARD_ADMIN_KEY to the one that the router has")
        if not (key.isascii() and key.isprintable()):
            raise AskError("LORAYARD_ADMIN_KEY holds what no key can: write it in plain characters")
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query:
            raise AskError(f"`{url}` is no router's address; write http://HOST:PORT")
        self._url = url
        self._secure = parts.scheme == "https"
        self._address = (parts.hostname, port)
        # Whoever has the address of the API at hand gives that.
        self._root = parts.path.rstrip("/").removesuffix("/v1") + ROOT
        self._key = key
        self._timeout_s = timeout_s

    def ask(
        self, method: str, path: str, answers: type[Answer], body: msgspec.Struct | None = None
    ) -> Answer:
        """Ask, and wait for the answer. Raises `AskError` and `RefusedError`."""
        status, data = self._exchange(method, path, msgspec.json.encode(body) if body else None)
        if status != OK:
            raise self._fault(status, data)
        try:
            return msgspec.json.decode(data, type=answers)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise RefusedError(f"what {self._url} answers is no router's answer: {error}") from None

    def _exchange(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        host, port = self._address
        connection = (
            http.client.HTTPSConnection(
                host, port, timeout=self._timeout_s, context=ssl.create_default_context()
            )
            if self._secure
            else http.client.HTTPConnection(host, port, timeout=self._timeout_s)
        )
        headers = {"authorization": f"Bearer {self._key}"}
        if body is not None:
            headers["content-type"] = "application/json"
        try:
            connection.request(method, self._root + path, body, headers)
            answer = connection.getresponse()
            data = answer.read(ANSWER_MAX_BYTES + 1)
        except TimeoutError:
            raise RefusedError(
                f"{self._url} did not answer within {self._timeout_s:g} s; it goes on with what was "
                "asked, and `show` tells how far it is"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise RefusedError(
                f"{self._url} cannot be reached: {reason}; name the router with --url or LORAYARD_URL"
            ) from None
        finally:
            connection.close()
        if len(data) > ANSWER_MAX_BYTES:
            raise RefusedError(
                f"the answer is larger than {ANSWER_MAX_BYTES:,} bytes; ask for less"
            )
        return answer.status, data

    def _fault(self, status: int, data: bytes) -> Exception:
        try:
            said = msgspec.json.decode(data, type=Error).error
        except (msgspec.DecodeError, UnicodeDecodeError):
            return RefusedError(f"{self._url} answers {status}, and not as a router does")
        if status == UNAUTHORIZED and said.code == "invalid_admin_key":
            return AskError("LORAYARD_ADMIN_KEY holds another key than the router's")
        # Administration's own 404 says what is not found; and without a key it is not there, or is
        # any other path, for which clients' keys are asked.
        if status == UNAUTHORIZED or (status == NOT_FOUND and said.code is None):
            return AskError(NO_ADMINISTRATION)
        return RefusedError(said.message)
