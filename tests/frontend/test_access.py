"""What a key gives and what it does not, and that nobody without one leaves anything behind."""

import gc
import hashlib
import logging
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from plane import MODEL, Asked, Plane, WorkerSide, answer, on_uvloop, plane, post, until

from router.config import ConfigError, RouterConfig, TenantConfig
from router.core.quotas import Charge, Quota, Shortage
from router.frontend import gate, listing
from router.frontend.access import FULL, Access, Scope
from router.frontend.admin_key import AdminKey
from router.frontend.auth import Keys
from router.frontend.gate import Gate, accesses
from router.frontend.listing import Listing
from router.frontend.models import Models
from router.keys import KeyConfig

SOME = Access(Scope(adapters=("team-*", "shared")), "team", 1, ("key:some",))
ID = b"x-request-id: one"


def sha256(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


GIVEN: list[tuple[str | None, str | None, Access | None]] = [
    ("Bearer one", None, FULL),
    ("bearer two", None, FULL),
    ("Bearer  some ", None, SOME),
    ("Bearer three", None, None),
    ("Bearer some", "one", SOME),
    ("Bearer three", "one", None),
    ("Basic b25l", "one", FULL),
    (None, "some", SOME),
    ("Bearer ", None, None),
    ("one", None, None),
    ("Bearer \udcff", None, None),
    (None, "", None),
    (None, None, None),
]


@pytest.mark.parametrize(("authorization", "api_key", "wanted"), GIVEN)
def test_keys(authorization: str | None, api_key: str | None, wanted: Access | None) -> None:
    keys = Keys(["one", "two"])
    keys.replace({sha256("some"): SOME})
    assert keys.find(authorization, api_key) is wanted
    assert Keys(anyone=True).find(authorization, api_key) is FULL


def test_what_is_no_longer_listed_gives_nothing_but_full_access_stays() -> None:
    keys = Keys(["one"])
    keys.replace({sha256("some"): SOME, sha256("one"): SOME})
    assert keys.find("Bearer one", None) is FULL
    keys.replace({})
    assert keys.find("Bearer some", None) is None
    assert keys.find("Bearer one", None) is FULL
    assert Keys().find(None, None) is None, "a file without a key lets nobody in"


def test_what_a_key_is_given() -> None:
    digests = [sha256(name).hex() for name in "abc"]
    listed = [
        KeyConfig("a", digests[0], "gold", adapters=("x",), tokens_per_minute=5.0),
        KeyConfig("b", digests[1].upper(), "gold", priority=2),
        KeyConfig("c", digests[2]),
    ]
    given = accesses(listed, (TenantConfig("gold", priority=-1),))
    assert given == {
        sha256("a"): Access(Scope(adapters=("x",)), "gold", -1, ("key:a",)),
        sha256("b"): Access(Scope(), "gold", 2),
        sha256("c"): Access(Scope()),
    }
    assert given[sha256("b")].scope is given[sha256("c")].scope


# Over sockets.


class Remembers:
    """A worker that answers, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []

    async def __call__(self, side: WorkerSide) -> None:
        while True:
            self.asked.append(await side.asked())
            side.send(answer(b'{"usage": {"prompt_tokens": 1, "completion_tokens": 1}}'))


def some_key(made: Plane, access: Access = SOME, key: str = "some") -> bytes:
    """Have it accepted; the header that carries it."""
    made.keys.replace({sha256(key): access})
    return b"authorization: Bearer " + key.encode()


def body_for(model: str) -> bytes:
    return b'{"model": "%b", "prompt": "Hi"}' % model.encode()


def page(path: str, *lines: bytes) -> bytes:
    head = [b"GET %b HTTP/1.1" % path.encode(), b"host: router", *lines]
    return b"\r\n".join((*head, b"", b""))


@on_uvloop
async def test_a_name_it_may_not_use_looks_like_one_that_does_not_exist() -> None:
    worker = Remembers()
    async with plane(worker, keys=["full"]) as made:
        some = some_key(made)
        made.model.absent = {"team-no"}

        async def both(model: str, key: bytes) -> list[tuple[int, dict[str, str], bytes]]:
            replies = []
            for request in (
                post(body_for(model), key, ID),
                page(f"/v1/models/{model}", key, ID),
            ):
                client = await made.client()
                client.send(request)
                reply = await client.reply("POST" if request.startswith(b"POST") else "GET")
                headers = {name: text for name, text in reply.headers.items() if name != "date"}
                replies.append((reply.status, headers, bytes(reply.body)))
                client.close()
            return replies

        absent = await both("base:team-no", some)
        made.model.lookups.clear()
        for name in ("other-1", "team", "Team-1", "sharedx"):
            hidden = await both(f"base:{name}", some)
            for one, other in zip(hidden, absent, strict=True):
                shown = one[2].replace(name.encode(), b"team-no")
                length = len(one[2]) - len(name) + len("team-no")
                headers = {**one[1], "content-length": str(length)}
                assert (one[0], headers, shown) == other
                assert one[0] == 404
        assert made.model.lookups == [], "nothing is looked up for it"
        for name in ("team-1", "shared"):
            assert [status for status, _, _ in await both(f"base:{name}", some)] == [200, 200]
            assert made.model.lookups == [name, name]
            made.model.lookups.clear()
        assert [one[0] for one in await both("base:other-1", b"x-api-key: full")] == [200, 200]
        nothing = Access(Scope(models=("else*",)))
        hidden, absent = (
            await both(MODEL, some_key(made, nothing)),
            await both("bass", some_key(made, nothing)),
        )
        for one, other in zip(hidden, absent, strict=True):
            assert one[2].replace(b"`base`", b"`bass`") == other[2]
            assert one[:2] == other[:2]
    assert len(worker.asked) == 3


@on_uvloop
async def test_without_a_model_it_is_the_only_one_that_the_key_may_use() -> None:
    worker = Remembers()
    async with plane(worker, keys=["full"]) as made:
        reply = await made.ask(post(b'{"prompt": "Hi"}', some_key(made)))
        assert reply.status == 200
        none = Access(Scope(models=("x",)))
        reply = await made.ask(post(b'{"prompt": "Hi"}', some_key(made, none)))
        assert reply.status == 400
        assert MODEL.encode() not in bytes(reply.body)


@on_uvloop
async def test_a_key_speaks_for_its_tenant_alone_and_on_its_own_account() -> None:
    worker = Remembers()
    tenants = (TenantConfig("team"), TenantConfig("gold"))
    async with plane(worker, keys=["full"], tenants=tenants) as made:
        some = some_key(made)
        made.quotas.change({"key:some": Quota(requests_per_minute=2)}, made.router.loop.time())

        async def ask(*lines: bytes) -> tuple[int, str]:
            reply = await made.ask(post(body_for(MODEL), *lines))
            return reply.status, reply.headers.get("retry-after", "")

        assert await ask(some, b"x-tenant: gold") == (200, "")
        assert await ask(some, b"x-tenant: gold", b"x-priority: -3") == (200, "")
        assert await ask(some) == (429, "30")
        assert await ask(b"x-api-key: full", b"x-tenant: gold") == (200, "")
        await made.settled()

        def counted(tenant: str, outcome: str) -> float | None:
            labels = {"model": MODEL, "tenant": tenant, "outcome": outcome}
            return made.metrics.registry.get_sample_value("lorayard_tenant_requests_total", labels)

        assert (counted("team", "completed"), counted("team", "over_quota")) == (2, 1)
        assert counted("gold", "completed") == 1


@on_uvloop
async def test_a_key_that_is_taken_back_is_refused_from_the_next_request_on() -> None:
    worker = Remembers()
    async with plane(worker, keys=["full"]) as made:
        client = await made.client()
        request = post(body_for(MODEL), some_key(made))
        client.send(request)
        assert (await client.reply()).status == 200
        made.keys.replace({})
        client.send(request)
        assert (await client.reply()).status == 401
        client.close()


@on_uvloop
async def test_without_a_key_no_byte_of_a_body_is_taken() -> None:
    async with plane(keys=["full"]) as made:
        for line in (b"authorization: Bearer no", b"x-api-key: no", b"x-a: 1"):
            client = await made.client()
            client.send(
                b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n%b\r\n\r\n"
                % line
            )
            reply = await client.reply()
            assert reply.status == 401
            assert b"invalid_api_key" in bytes(reply.body)
            client.close()


@on_uvloop
async def test_floods_of_keys_and_names_leave_nothing_behind(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each is 8 KiB long: were one in ten of them kept anywhere, it would show."""
    caplog.set_level(logging.DEBUG)
    worker = Remembers()
    async with plane(worker, keys=["full"]) as made:
        some = some_key(made)

        async def flood(count: int, letter: str) -> None:
            client = await made.client()
            for number in range(count):
                long = f"{letter}{number:06}" * 1200
                client.send(post(body_for(f"base:{long[:100]}"), some))
                assert (await client.reply()).status == 404
                client.send(post(body_for(f"{long[:300]}:team-1"), some))
                assert (await client.reply()).status == 404
                client.send(post(body_for(f"base:team-{long}"), some))
                assert (await client.reply()).status == 400  # no model's id is so long
                wrong = await made.ask(post(body_for(MODEL), f"x-api-key: {long}".encode()))
                assert wrong.status == 401
            client.close()
            await until(lambda: not made.frontend.connections, "no connection left")

        await flood(50, "a")
        made.clients.clear()
        gc.collect()
        metrics = await made.metrics.scrape()
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            await flood(300, "b")
            made.clients.clear()
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert after - before < 256 * 1024
        assert made.model.lookups == []
        scraped = await made.metrics.scrape()
        assert labels(scraped) == labels(metrics)
    assert worker.asked == []
    assert "b000001" not in caplog.text


def labels(scraped: bytes) -> set[str]:
    return {line.rpartition(" ")[0] for line in scraped.decode().splitlines() if "{" in line}


# Following the file.


async def test_the_gate_follows_its_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(gate, "POLL_S", 0.001)
    monkeypatch.setenv("LORAYARD_API_KEYS", "full")
    path = tmp_path / "keys.yaml"

    def write(*entries: str) -> None:
        new = tmp_path / "new"
        new.write_text("keys:\n" + "".join(f"  - {{{entry}}}\n" for entry in entries))
        new.replace(path)

    def entry(name: str, more: str = "") -> str:
        return f"name: {name}, sha256: {sha256(name).hex()}{more}"

    write(entry("a", ", requests_per_minute: 4"))
    config = RouterConfig(
        api_keys_file=str(path), tenants=(TenantConfig("t", tokens_per_minute=9),)
    )
    made = Gate(config, share=0.5)
    assert not made.keys.anyone
    await made.open()
    try:
        now = made._loop.time()
        a = made.keys.find("Bearer a", None)
        assert a is not None
        assert a.accounts == ("key:a",)
        for _ in range(2):  # this process has half of the four
            assert isinstance(made.quotas.reserve(a.accounts, 1, now), Charge)
        assert isinstance(made.quotas.reserve(a.accounts, 1, now), Shortage)
        write(entry("b"))
        await until(lambda: made.keys.find("Bearer b", None), "the new key")
        assert made.keys.find("Bearer a", None) is None
        assert made.keys.find("Bearer full", None) is FULL
        write("name: c")
        await until(lambda: "kept as they were" in caplog.text, "the mistake is told")
        assert f"{path}:2: keys[0]: `sha256` is missing" in caplog.text
        assert made.keys.find("Bearer b", None) is not None
        charge = made.quotas.reserve(("t",), 9, made._loop.time())
        assert isinstance(charge, Charge)
        assert len(charge.budgets) == 1, "a tenant's limit stays"
        write(entry("c"))
        await until(lambda: made.keys.find("Bearer c", None), "the file that was mended")
        assert caplog.text.count("kept as they were") == 1
        for secret in ("Bearer", *(sha256(name).hex() for name in "abc")):
            assert secret not in caplog.text
    finally:
        await made.aclose()


async def test_an_operators_key_is_no_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gate, "POLL_S", 0.001)
    path = tmp_path / "keys.yaml"

    def write(name: str, key: str) -> None:
        new = tmp_path / "new"
        new.write_text(f"keys:\n  - {{name: {name}, sha256: {sha256(key).hex().upper()}}}\n")
        new.replace(path)

    config = RouterConfig(api_keys_file=str(path))
    admin_key = AdminKey(["other", "operators"])
    write("mine", "operators")
    with pytest.raises(
        ConfigError, match="the key `mine` of the file of keys is the admin key too"
    ):
        await Gate(config, admin_key=admin_key).open()
    write("a", "a")
    made = Gate(config, admin_key=admin_key)
    await made.open()
    try:
        write("mine", "operators")
        await until(lambda: "the key `mine`" in caplog.text, "it is told")
        assert made.keys.find("Bearer operators", None) is None
        assert made.keys.find("Bearer a", None) is not None
    finally:
        await made.aclose()


async def test_without_a_file_and_a_variable_everyone_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORAYARD_API_KEYS", raising=False)
    made = Gate(RouterConfig())
    await made.open()
    assert made.keys.find(None, None) is FULL
    await made.aclose()
    monkeypatch.setenv("LORAYARD_API_KEYS", " one, two,")
    keys = Gate(RouterConfig()).keys
    assert keys.find("Bearer two", None) is FULL
    assert keys.find(None, None) is None


# The listing.


class Catalog:
    """Some names, and how often they changed."""

    def __init__(self, *names: str) -> None:
        self._names = list(names)
        self.changes = 0
        self.read = 0

    @property
    def names(self) -> list[str]:
        self.read += 1
        return self._names

    def change(self, *names: str) -> None:
        self._names = list(names)
        self.changes += 1


def model(model_id: str, catalog: Catalog | None) -> Any:  # noqa: ANN401
    llm = SimpleNamespace(model_loading_config=SimpleNamespace(source=f"org/{model_id}"))
    return SimpleNamespace(model_id=model_id, catalog=catalog, llm=llm)


def ids(body: bytes) -> list[str]:
    return [one["id"] for one in msgspec.json.decode(body)["data"]]


def test_the_listing_is_of_what_may_be_used_and_made_once() -> None:
    catalog = Catalog("a", "b-1", "b-2")
    models = Models(cast("Any", [model("m", catalog), model("n", None)]))
    listed = Listing(models, created=7)
    everything = listed.body(Scope())
    assert ids(everything) == ["m", "m:a", "m:b-1", "m:b-2", "n"]
    assert ids(listed.body(Scope(adapters=("b-*",)))) == ["m", "m:b-1", "m:b-2", "n"]
    assert ids(listed.body(Scope(models=("n",)))) == ["n"]
    assert ids(listed.body(Scope(models=()))) == []
    assert listed.body(Scope()) is everything
    assert catalog.read == 1
    catalog.change("c")
    assert ids(listed.body(Scope())) == ["m", "m:c", "n"]
    assert ids(listed.body(Scope(adapters=()))) == ["m", "n"]
    assert catalog.read == 2


def test_what_the_listing_keeps_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "KEPT_MAX_BYTES", 2000)
    catalog = Catalog("a", "b")
    listed = Listing(Models(cast("Any", [model("m", catalog)])), created=7)
    first = listed.body(Scope())
    for number in range(50):
        listed.body(Scope(adapters=(f"x{number}", "a")))
        assert listed.body(Scope()) is first, "who is asked for stays"
        kept = listed._bodies.values()
        assert listed.kept_bytes == sum(map(len, kept)) <= 2000
    monkeypatch.setattr(listing, "KEPT_MAX_BYTES", 10)
    assert ids(listed.body(Scope(adapters=("b",)))) == ["m", "m:b"]
    assert listed.kept_bytes == 0
