"""The operators' command line, as a process, against the real routes."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from administered import KEY, NEXT, SERVING, Administered, StandIn, adapter, administered

from router.lifecycle.words import Residence


@pytest.fixture
def server() -> Iterator[Administered]:
    with administered() as made:
        yield made


def command(
    url: str, *arguments: str, key: str | None = KEY, columns: int | None = None
) -> "subprocess.CompletedProcess[str]":
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("LORAYARD_") and name != "COLUMNS"
    }
    environment |= {"LORAYARD_URL": url, "http_proxy": "http://127.0.0.1:1"}
    if key is not None:
        environment["LORAYARD_ADMIN_KEY"] = key
    if columns is not None:
        environment["COLUMNS"] = str(columns)
    return subprocess.run(
        [sys.executable, "-m", "router", "adapters", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# Action, status, what is printed, what the lifecycle was asked.
ACTIONS: list[tuple[list[str], int, str, list[tuple[object, ...]]]] = [
    (["warm", "org/base:sql"], 0, "org/base:sql: on this host's disk\n", [("warm", "sql")]),
    (
        ["load", "org/base:sql", "--workers", "2"], 0,
        f"org/base:sql: {SERVING} is there\n  org/base-0: resident\n  org/base-1: resident\n",
        [("load", "sql", 2)],
    ),
    (["pin", "org/base:sql"], 0, "org/base:sql: pinned\n", [("pin", "sql", True)]),
    (["unpin", "org/base:sql"], 0, "org/base:sql: not pinned\n", [("pin", "sql", False)]),
    (["refresh"], 0, "org/base: 2 adapters are in the store\n", [("refresh", None)]),
    (["refresh", "org/base:sql"], 0, f"org/base:sql: {SERVING} serves\n", [("refresh", "sql")]),
    (
        ["rollout", "org/base:sql", NEXT, "0.25"], 0, f"org/base:sql: {NEXT} gets 25%\n",
        [("rollout", "sql", NEXT, 0.25)],
    ),
    (["promote", "org/base:sql"], 0, f"org/base:sql: {NEXT} serves all\n", [("promote", "sql", None)]),
    (["rollback", "org/base:sql"], 0, f"org/base:sql: {SERVING} serves all\n", [("rollback", "sql")]),
    (
        ["unload", "org/base:sql"], 0, "org/base:sql: leaves where it is idle\n",
        [("unload", "sql")],
    ),
    (
        ["drain", "org/base-0"], 0, "org/base-0: gets nothing new\n",
        [("drain", "org/base-0", True)],
    ),
    (
        ["undrain", "org/base-0"], 0, "org/base-0: gets work again\n",
        [("drain", "org/base-0", False)],
    ),
]  # fmt: skip


def test_each_action_is_done_and_told(server: Administered) -> None:
    (lifecycle,) = server.lifecycles
    for arguments, status, printed, asked in ACTIONS:
        lifecycle.log.clear()
        done = command(server.url, *arguments)
        assert (done.returncode, done.stdout, done.stderr) == (status, printed, "")
        assert lifecycle.log == asked


def test_adapters_and_workers_are_shown_in_tables(server: Administered) -> None:
    (lifecycle,) = server.lifecycles
    lifecycle.adapters["tone"] = adapter(
        "org/base", "tone", pinned=True, last_used_s=7300.0, hits=12345
    )
    server.post("/adapters/org/base:sql/load", {"workers": 1})
    listed = command(server.url, "list").stdout.splitlines()
    assert listed[0].split() == [
        "adapter", "tier", "workers", "version", "rank", "size", "requests", "hits", "loads", "last",
        "use",
    ]  # fmt: skip
    assert re.split(r"\s{2,}", listed[1].strip()) == [
        "org/base:sql", "gpu", "org/base-0", SERVING, "16", "8.4 MB", "0", "0", "0", "-",
    ]  # fmt: skip
    assert re.split(r"\s{2,}", listed[2].strip()) == [
        "org/base:tone", "store", "-", SERVING, "-", "8.4 MB", "0", "12,345", "0", "2 h ago", "pinned",
    ]  # fmt: skip
    shown = command(server.url, "show", "org/base:sql").stdout
    assert re.search(rf"{SERVING} +serving +org/base-0 +yes +100% +3 +0", shown)
    workers = command(server.url, "workers").stdout
    assert re.search(r"org/base-1 +accepting +3/64 +1/16 +sql", workers)


def test_a_table_is_as_wide_as_the_terminal(server: Administered) -> None:
    narrow = command(server.url, "list", columns=90).stdout.splitlines()
    assert max(map(len, narrow)) <= 90
    assert any(line.startswith("org/base:sql") for line in narrow)


def test_all_pages_are_read_and_json_is_for_scripts() -> None:
    names = [f"a{number:04}" for number in range(2100)]
    with administered(StandIn("base", names)) as server:
        found = json.loads(command(server.url, "list", "--json").stdout)
        assert [one["name"] for one in found["adapters"]] == names
        few = json.loads(command(server.url, "list", "a000", "--model", "base", "--json").stdout)
        assert len(few["adapters"]) == 10
        change = json.loads(command(server.url, "load", "base:a0001", "--json").stdout)
        assert change["workers"] == {"base-0": Residence.RESIDENT.value}
        # The address of the API will do.
        again = command("", "--json", "--url", f"{server.url}/v1/", "list", "a0001")
        assert again.returncode == 2  # options stand behind the action
        again = command("", "list", "a0001", "--json", "--url", f"{server.url}/v1/")
        assert len(json.loads(again.stdout)["adapters"]) == 1


WRONG: list[tuple[list[str], str]] = [
    (["load", "sql"], "`sql` is no adapter's id; write BASE:NAME, as `list` does"),
    (["load", "base:sql", "--workers", "0"], "`0` is no number above 0"),
    (["rollout", "base:sql", NEXT, "40"], "`40` is no share; write a number from 0 to 1"),
    (["list", "--timeout", "0"], "`0` is no time in seconds above 0"),
    (["list", "--url", "localhost:8000"], "`localhost:8000` is no router's address; write http://"),
    (["list", "--url", "http://h:port"], "`http://h:port` is no router's address"),
    ([], "the following arguments are required: ACTION"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_what_is_wrong_with_the_command_line_is_told(arguments: list[str], message: str) -> None:
    done = command("http://127.0.0.1:1", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_what_the_router_refuses_is_told(server: Administered) -> None:
    done = command(server.url, "load", "org/base:nope")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: no adapter org/base:nope; `list` shows them\n"
    assert command(server.url, "list", "--model", "x").returncode == 1
    assert command(server.url, "promote", "org/base:sql").returncode == 1
    assert command(server.url, "drain", "w9").returncode == 1


def test_who_has_no_key_is_told_so(server: Administered) -> None:
    none = command(server.url, "list", key=None)
    assert none.returncode == 2
    assert "set LORAYARD_ADMIN_KEY to the one that the router has" in none.stderr
    wrong = command(server.url, "list", key="wrong")
    assert wrong.returncode == 2
    assert "LORAYARD_ADMIN_KEY holds another key than the router's" in wrong.stderr
    for bad in ("ké", "a\nb"):
        assert "write it in plain characters" in command(server.url, "list", key=bad).stderr


@contextmanager
def answers(status: int, body: bytes, *headers: tuple[str, str]) -> Iterator[tuple[str, list[str]]]:
    """A server that answers everything so; its address, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            for header in headers:
                self.send_header(*header)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            thread.join()


def error(code: str | None) -> bytes:
    detail = {"message": "No.", "type": "invalid_request_error", "param": None, "code": code}
    return json.dumps({"error": detail}).encode()


@pytest.mark.parametrize(
    ("status", "body", "exit_status", "message"),
    [
        # A router without administration, without and with clients' keys.
        (
            404,
            error(None),
            2,
            "no admin key is set on that router: start it with LORAYARD_ADMIN_KEY=",
        ),
        (401, error("invalid_api_key"), 2, "no admin key is set on that router"),
        (404, b"<html>", 1, "answers 404, and not as a router does"),
        (302, b"", 1, "answers 302, and not as a router does"),
        (200, b"{}", 1, "is no router's answer: Object missing required field `adapters`"),
        (500, error(None), 1, "No."),
    ],
)
def test_other_servers_are_told_apart(
    status: int, body: bytes, exit_status: int, message: str
) -> None:
    with answers(status, body, ("location", "/elsewhere")) as (url, asked):
        done = command(url, "list")
        assert done.returncode == exit_status
        assert message in done.stderr
        assert len(asked) == 1, "the key goes nowhere else"


def test_a_router_that_is_not_there_is_told() -> None:
    done = command("http://127.0.0.1:1", "list")
    assert done.returncode == 1
    assert "http://127.0.0.1:1 cannot be reached: " in done.stderr
    assert "name the router with --url or LORAYARD_URL" in done.stderr


def test_help_teaches() -> None:
    done = command("", "--help")
    assert done.returncode == 0
    for action in (*{arguments[0] for arguments, *_ in ACTIONS}, "list", "show", "workers"):
        assert re.search(rf"^    {action} ", done.stdout, re.MULTILINE), action
    assert "python -m router adapters rollout base:sql 0123456789abcdef 0.1" in done.stdout
