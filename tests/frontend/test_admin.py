"""Administration over HTTP: each operation, each way it is refused, and who may ask."""

import asyncio
import http.client
import json
import logging
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from administered import KEY, NEXT, SERVING, Administered, StandIn, administered
from deployment import wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

from router.config import ConfigError, RouterConfig
from router.frontend.admin import BODY_MAX_BYTES, UNDER_WAY_MAX
from router.frontend.admin_key import AdminKey
from router.lifecycle.words import LifecycleError, Problem

BASE = "org/base"
SQL = "/adapters/org/base:sql"


@pytest.fixture
def server() -> Iterator[Administered]:
    with administered() as made:
        yield made


# What operators do.

OPERATIONS: list[tuple[str, dict[str, Any] | None, tuple[Any, ...]]] = [
    (f"{SQL}/load", None, ("load", "sql", 1)),
    (f"{SQL}/load", {}, ("load", "sql", 1)),
    (f"{SQL}/load", {"workers": 2}, ("load", "sql", 2)),
    (f"{SQL}/unload", None, ("unload", "sql")),
    (f"{SQL}/warm", None, ("warm", "sql")),
    (f"{SQL}/pin", {}, ("pin", "sql", True)),
    (f"{SQL}/unpin", None, ("pin", "sql", False)),
    (f"{SQL}/refresh", None, ("refresh", "sql")),
    (f"{SQL}/rollout", {"version": NEXT, "weight": 0.25}, ("rollout", "sql", NEXT, 0.25)),
    (f"{SQL}/promote", {"version": NEXT}, ("promote", "sql", NEXT)),
    (f"{SQL}/rollback", None, ("rollback", "sql")),
    ("/refresh", None, ("refresh", None)),
    ("/refresh", {"model": BASE}, ("refresh", None)),
    ("/workers/org/base-0/drain", None, ("drain", "org/base-0", True)),
    ("/workers/org%2Fbase-1/undrain", None, ("drain", "org/base-1", False)),
]


@pytest.mark.parametrize(("path", "body", "done"), OPERATIONS, ids=[one[0] for one in OPERATIONS])
def test_an_operation_reaches_the_lifecycle(
    server: Administered, path: str, body: dict[str, Any] | None, done: tuple[Any, ...]
) -> None:
    reply = server.post(path, body)
    assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
    assert reply.headers["x-request-id"] == "r-1"
    assert server.lifecycles[0].log == [done]


def test_what_was_done_is_told(server: Administered) -> None:
    change = server.post(f"{SQL}/load", {"workers": 2}).json
    assert change == {
        "id": "org/base:sql",
        "message": f"{SERVING} is there",
        "workers": {"org/base-0": "resident", "org/base-1": "resident"},
    }
    shown = server.get(SQL).json
    assert (shown["tier"], shown["rank"]) == ("gpu", 16)
    assert shown["versions"][0]["workers"] == {"org/base-0": "resident", "org/base-1": "resident"}
    (model,) = server.get("/workers").json["models"]
    assert model["model"] == BASE
    assert [worker["adapters"] for worker in model["workers"]] == [["org/base:sql"]] * 2


@pytest.mark.parametrize("path", ["org/base:sql", "org%2Fbase%3Asql", "org%2fbase:sql"])
def test_an_id_may_be_quoted_or_not(server: Administered, path: str) -> None:
    assert server.get(f"/adapters/{path}").json["id"] == "org/base:sql"
    assert server.post(f"/adapters/{path}/warm").status == 200


def test_a_listing_is_had_in_pages_over_all_base_models() -> None:
    names = [f"a{number:03}" for number in range(7)]
    models = [StandIn("b", names), StandIn("a/x", names), StandIn("c", [])]
    with administered(*models) as server:
        found, after, pages = [], "", 0
        while True:
            page = server.get(f"/adapters?limit=4&after={quote(after, safe='')}").json
            found += [one["id"] for one in page["adapters"]]
            pages += 1
            if page["after"] is None:
                break
            after = page["after"]
        assert found == [f"{model}:{name}" for model in ("a/x", "b") for name in names]
        assert pages == 4
        begin_so = server.get("/adapters?prefix=a00&model=b&limit=7").json
        assert [one["name"] for one in begin_so["adapters"]] == names
        assert begin_so["after"] is None
        assert server.get("/adapters?prefix=zz").json == {"adapters": [], "after": None}


# What is refused.

REFUSED: list[tuple[str, str, Any, int, str]] = [
    ("GET", "/adapters?limit=0", None, 400, "`limit`: Expected `int` >= 1."),
    ("GET", "/adapters?limit=201", None, 400, "`limit`: Expected `int` <= 200."),
    ("GET", "/adapters?limit=ten", None, 400, "`limit`: Expected `int`, got `str`."),
    ("GET", "/adapters?limit=1&limit=2", None, 400, "A parameter stands twice"),
    ("GET", "/adapters?prefx=a", None, 400, "known here: model, prefix, limit, after"),
    ("GET", "/adapters?model=nope", None, 404, "no base model `nope`; served: org/base"),
    ("GET", "/workers?model=nope", None, 404, "no base model `nope`"),
    ("GET", "/adapters/sql", None, 404, "`sql` is no adapter's id; write BASE:NAME"),
    ("GET", "/adapters/org/base:nope", None, 404, "no adapter `org/base:nope`"),
    ("GET", "/adapters/other:sql", None, 404, "no base model `other`"),
    ("POST", "/adapters/org/base:nope/load", None, 404, "no adapter org/base:nope"),
    ("POST", f"{SQL}/load", {"workers": 0}, 400, "`workers`: Expected `int` >= 1."),
    ("POST", f"{SQL}/load", {"worker": 1}, 400, "unknown field `worker`"),
    ("POST", f"{SQL}/load", b'{"workers', 400, "The body is not valid JSON"),
    ("POST", f"{SQL}/load", [1], 400, "The body must be a JSON object."),
    ("POST", f"{SQL}/load", b"\xff\xfe", 400, "The body is not valid JSON"),
    ("POST", f"{SQL}/load", b'{"workers": ' + b"[" * 9000, 400, ""),
    ("POST", f"{SQL}/pin", {"pinned": False}, 400, "unknown field `pinned`"),
    ("POST", f"{SQL}/rollout", None, 400, "missing required field `version`"),
    ("POST", f"{SQL}/rollout", {"version": NEXT, "weight": 1.5}, 400, "`weight`: Expected"),
    ("POST", f"{SQL}/rollout", {"version": "x", "weight": 1}, 409, "has no version `x`"),
    ("POST", f"{SQL}/promote", None, 409, "has no candidate"),
    ("POST", "/refresh", {"model": "nope"}, 404, "no base model `nope`"),
    ("POST", "/workers/w9/drain", None, 404, "there are: org/base-0, org/base-1"),
    ("POST", f"{SQL}/load", b" " * (BODY_MAX_BYTES + 1), 413, "larger than 65,536 bytes"),
    ("GET", f"{SQL}/load", None, 405, "Method Not Allowed"),
    ("DELETE", SQL, None, 405, "Method Not Allowed"),
    ("GET", "/nowhere", None, 404, "Not Found"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "body", "status", "message"), REFUSED)
def test_what_cannot_be_done_is_told_in_openais_shape(
    server: Administered,
    method: str,
    path: str,
    body: Any,  # noqa: ANN401
    status: int,
    message: str,
) -> None:
    reply = server.ask(method, f"/admin/v1{path}", body)
    assert reply.status == status, reply.body
    assert set(reply.json["error"]) == {"message", "type", "param", "code"}
    assert message in reply.message
    assert "Traceback" not in reply.message


@pytest.mark.parametrize(
    ("kind", "status", "retry"),
    [
        ("unknown", 404, None),
        ("invalid", 400, None),
        ("conflict", 409, None),
        ("unavailable", 503, "5"),
    ],
)
def test_what_the_lifecycle_refuses_has_a_status(
    server: Administered, kind: Problem, status: int, retry: str | None
) -> None:
    server.lifecycles[0].fail(kind, "not now")
    reply = server.post(f"{SQL}/load")
    assert (reply.status, reply.message, reply.headers.get("retry-after")) == (
        status, "not now", retry,
    )  # fmt: skip


def test_a_fault_is_told_without_its_words(
    server: Administered, caplog: pytest.LogCaptureFixture
) -> None:
    server.lifecycles[0].fails = RuntimeError("secret inside")
    reply = server.post(f"{SQL}/load")
    assert reply.status == 500
    assert b"secret inside" not in reply.body
    assert "r-1: a fault of the router" in caplog.text


# Who may ask.


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer "},
        {"authorization": f"Basic {KEY}"},
        {"authorization": KEY},
        {"x-api-key": KEY + "x"},
        {"authorization": "Bearer \xff"},
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/admin/v1/adapters"),
        ("GET", "/admin/v1/openapi.json"),
        ("POST", f"/admin/v1{SQL}/load"),
        ("POST", "/v1/load_lora_adapter"),
        ("GET", "/admin/v1/nowhere"),
    ],
)
def test_without_the_key_nothing_is_told(
    server: Administered, headers: dict[str, str], method: str, path: str
) -> None:
    reply = server.ask(method, path, key=None, headers=headers)
    assert (reply.status, reply.json["error"]["code"]) == (401, "invalid_admin_key")
    assert server.lifecycles[0].log == []


def test_the_key_may_come_in_either_header(server: Administered) -> None:
    reply = server.ask("GET", "/admin/v1/workers", key=None, headers={"x-api-key": KEY})
    assert reply.status == 200


def test_the_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RouterConfig(admin_key_env="MINE", api_keys_env="THEIRS")
    monkeypatch.delenv("MINE", raising=False)
    assert AdminKey.from_environment(config) is None
    monkeypatch.setenv("MINE", " , ")
    assert AdminKey.from_environment(config) is None
    monkeypatch.setenv("MINE", "one, two")
    monkeypatch.setenv("THEIRS", "three")
    key = AdminKey.from_environment(config)
    assert key is not None
    given = [f"Bearer {one}" for one in ("one", "two", "three", "", "one, two")]
    assert [key.accepts({"authorization": one}) for one in given] == [
        True,
        True,
        False,
        False,
        False,
    ]
    monkeypatch.setenv("THEIRS", "three,two")
    with pytest.raises(ConfigError, match="a key is both in MINE and in THEIRS"):
        AdminKey.from_environment(config)


# What is logged, and that it goes on.


def test_every_change_is_logged_with_its_request_and_never_the_key(
    server: Administered, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lorayard.admin")
    server.get("/adapters")
    server.post(f"{SQL}/load", {"workers": 2})
    server.post("/adapters/org%2Fbase:a%0A%1b[2Jb/load")
    path = "https://host/sql?signature=hidden"
    server.ask("POST", "/v1/load_lora_adapter", {"lora_name": "new", "lora_path": path})
    lines = [record.getMessage() for record in caplog.records if record.name == "lorayard.admin"]
    assert [line.partition(", in ")[0] for line in lines] == [
        'r-1: load_adapter org/base:sql {"workers":2} by 127.0.0.1: done',
        'r-1: load_adapter org/base:a\\n\\x1b[2Jb {"workers":1} by 127.0.0.1: 404, no adapter '
        "org/base:a\\n\\x1b[2Jb; `list` shows them",
        'r-1: vllm_load_lora_adapter  {"lora_name":"new","lora_path":"https://host/sql?...",'
        '"load_inplace":false,"is_3d_lora_weight":false} by 127.0.0.1: done',
    ]
    assert KEY not in caplog.text


def test_no_credential_of_an_address_is_logged(
    server: Administered, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lorayard.admin")
    path = "https://me:hidden@host/sql?signature=hid den"
    (lifecycle,) = server.lifecycles
    lifecycle.fails = LifecycleError("invalid", f"`{path}` is no adapter's place; write it")
    server.ask("POST", "/v1/load_lora_adapter", {"lora_name": "new", "lora_path": path})
    lines = [record.getMessage() for record in caplog.records if record.name == "lorayard.admin"]
    assert "`https://...@host/sql?...` is no adapter's place; write it" in lines[-1]
    assert "hid" not in "".join(lines)


def test_who_leaves_does_not_undo_what_was_begun(
    server: Administered, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lorayard.admin")
    (lifecycle,) = server.lifecycles
    lifecycle.gate = asyncio.Event()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    headers = {"authorization": f"Bearer {KEY}"}
    connection.request("POST", f"/admin/v1{SQL}/pin", headers=headers)
    assert lifecycle.waiting.wait(20)
    connection.close()
    # The server has seen that it left once it has answered another that came after.
    assert server.get("/workers").status == 200
    server.loop.call_soon_threadsafe(lifecycle.gate.set)
    lifecycle.gate = None
    done = "pin_adapter org/base:sql {} by 127.0.0.1: done"
    wait_until(lambda: done in caplog.text, "the operation has ended")
    assert server.get(SQL).json["pinned"]


def test_operations_under_way_are_bounded(server: Administered) -> None:
    (lifecycle,) = server.lifecycles
    lifecycle.gate = asyncio.Event()
    connections = []
    headers = {"authorization": f"Bearer {KEY}"}
    for _ in range(UNDER_WAY_MAX):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        connection.request("POST", f"/admin/v1{SQL}/warm", headers=headers)
        connections.append(connection)
    wait_until(lambda: len(lifecycle.log) == UNDER_WAY_MAX, "all are under way")
    reply = server.post(f"{SQL}/warm")
    assert (reply.status, reply.json["error"]["code"]) == (503, "busy")
    assert reply.headers["retry-after"] == "5"
    server.loop.call_soon_threadsafe(lifecycle.gate.set)
    for connection in connections:
        answer = connection.getresponse()
        assert answer.status == 200
        answer.read()
        connection.close()
    lifecycle.gate = None
    assert server.post(f"{SQL}/warm").status == 200


def test_what_is_under_way_ends_with_the_server() -> None:
    with administered() as server:
        (lifecycle,) = server.lifecycles
        lifecycle.gate = asyncio.Event()
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        headers = {"authorization": f"Bearer {KEY}"}
        connection.request("POST", f"/admin/v1{SQL}/warm", headers=headers)
        assert lifecycle.waiting.wait(20)
    connection.close()


# vLLM's routes.


def vllm(server: Administered, route: str, **body: Any) -> tuple[int, str]:  # noqa: ANN401
    """The status, and the text or the error's message."""
    reply = server.ask("POST", f"/v1/{route}_lora_adapter", body)
    if reply.status == 200:
        assert reply.headers["content-type"].startswith("text/plain")
        return 200, reply.body.decode()
    error = reply.json["error"]
    assert error["code"] == reply.status
    return reply.status, f"{error['type']}: {error['message']}"


LOADED = "Success: LoRA adapter 'sql' added successfully."
REMOVED = "Success: LoRA adapter 'sql' removed successfully."


def test_vllms_routes_answer_as_vllm_does(server: Administered) -> None:
    (lifecycle,) = server.lifecycles
    steps: list[tuple[str, dict[str, Any], int, str, list[tuple[Any, ...]]]] = [
        ("load", {"lora_name": "sql"}, 200, LOADED, [("load", "sql", None)]),
        (
            "load", {"lora_name": "sql", "lora_path": "s3://bucket/adapters/sql/"}, 400,
            "InvalidUserInput: The lora adapter 'sql' has already been loaded. If you want to load the "
            "adapter in place, set 'load_inplace' to True.", [],
        ),
        (
            "load",
            {"lora_name": "sql", "lora_path": "s3://bucket/adapters/sql", "load_inplace": True},
            200, LOADED, [("refresh", "sql"), ("load", "sql", None)],
        ),
        ("unload", {"lora_name": "org/base:sql"}, 200, REMOVED.replace("sql", "org/base:sql"),
         [("unregister", "sql"), ("unload", "sql")]),
        (
            "load", {"lora_name": "mine", "lora_path": "/adapters/mine"}, 200,
            LOADED.replace("sql", "mine"),
            [("register", "mine", "/adapters/mine"), ("load", "mine", None)],
        ),
        ("unload", {"lora_name": "mine", "lora_int_id": None}, 200, REMOVED.replace("sql", "mine"),
         [("unregister", "mine")]),
        ("unload", {"lora_name": "mine"}, 404,
         "NotFoundError: The lora adapter 'mine' cannot be found.", []),
        ("load", {"lora_name": "nope"}, 404,
         "NotFoundError: no adapter org/base:nope; `list` shows them", [("load", "nope", None)]),
        ("load", {"lora_name": "org/base", "lora_path": "/a/b"}, 400,
         "InvalidUserInput: The lora adapter 'org/base' conflicts with a served base model.", []),
        ("load", {"lora_name": ""}, 400, "InvalidUserInput: 'lora_name' must be provided.", []),
        ("unload", {"lora_name": ""}, 400,
         "InvalidUserInput: 'lora_name' needs to be provided to unload a LoRA adapter.", []),
        ("unload", {}, 400,
         "InvalidUserInput: Object missing required field `lora_name`.", []),
        ("load", {"lora_name": "sql", "is_3d_lora_weight": True}, 400,
         "InvalidUserInput: 'is_3d_lora_weight' is not supported; adapters are two-dimensional here.",
         []),
        ("load", {"lora_name": "a:b:c"}, 404,
         "NotFoundError: no base model `a`; served: org/base", []),
    ]  # fmt: skip
    for route, body, status, text, done in steps:
        lifecycle.log.clear()
        assert vllm(server, route, **body) == (status, text)
        assert lifecycle.log == done


def test_of_several_base_models_vllms_routes_want_the_whole_id() -> None:
    with administered(StandIn("a"), StandIn("b")) as server:
        status, text = vllm(server, "load", lora_name="sql")
        assert status == 400
        assert text.endswith(
            "Several base models are served: 'lora_name' must be 'a:sql' or 'b:sql'."
        )
        assert vllm(server, "load", lora_name="b:sql")[0] == 200
        assert [one.log for one in server.lifecycles] == [[], [("load", "sql", None)]]


def test_a_store_that_is_away_is_told_in_vllms_shape(server: Administered) -> None:
    server.lifecycles[0].fail("unavailable", "the store is away")
    assert vllm(server, "load", lora_name="x", lora_path="s3://away/x") == (
        503, "ServiceUnavailableError: the store is away",
    )  # fmt: skip


# Whatever is sent.

segments = st.text(
    st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=12
) | st.sampled_from(["adapters", "workers", "load", "rollout", "..", "org/base:sql", "%00", ""])
paths = st.lists(segments, max_size=5).map(lambda parts: quote("/".join(parts), safe="/%:?&="))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
fields = st.sampled_from(
    ["version", "weight", "workers", "model", "lora_name", "lora_path", "load_inplace"]
)
bodies = st.binary(max_size=64) | st.dictionaries(fields, values, max_size=4).map(
    lambda body: json.dumps(body).encode()
)


def test_nothing_that_is_sent_is_a_fault_of_the_router() -> None:
    with administered() as server:

        @settings(max_examples=200, deadline=None)
        @given(
            method=st.sampled_from(["GET", "POST", "PUT", "HEAD", "OPTIONS"]),
            root=st.sampled_from(
                ["/admin/v1/", f"/admin/v1{SQL}/", "/admin/v1/workers/org/base-0/", "/v1/"]
            ),
            path=paths
            | st.sampled_from(["load", "rollout", "promote", "drain", "load_lora_adapter"]),
            body=bodies,
        )
        def send(method: str, root: str, path: str, body: bytes) -> None:
            reply = server.ask(method, root + path, body)
            assert reply.status < 500, reply.body
            if reply.status != 200 and method != "HEAD":
                assert reply.json["error"]["message"]

        send()
