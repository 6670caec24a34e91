import msgspec
import pytest

from router.config import RouterConfig, TenantConfig
from router.frontend import terms
from router.frontend.access import Access, Scope
from router.frontend.errors import ApiError
from router.frontend.request import Request
from router.frontend.terms import Terms, TermsReader

ALL = Scope()
CONFIG = RouterConfig(
    ttft_deadline_s=9.0,
    tenants=(TenantConfig("gold", weight=2.0, priority=-2), TenantConfig("plain")),
)
GOOD: list[tuple[dict[str, str], Terms]] = [
    ({}, Terms("", 0, 9.0)),
    ({"user-agent": "x"}, Terms("", 0, 9.0)),
    ({"x-tenant": "gold"}, Terms("gold", -2, 9.0)),
    ({"x-tenant": "plain"}, Terms("plain", 0, 9.0)),
    ({"x-tenant": "Gold"}, Terms("", 0, 9.0)),
    ({"x-tenant": "made-up"}, Terms("", 0, 9.0)),
    ({"x-tenant": ""}, Terms("", 0, 9.0)),
    ({"x-tenant": "gold", "x-priority": "3"}, Terms("gold", 3, 9.0)),
    ({"x-priority": "-3"}, Terms("", -3, 9.0)),
    ({"x-priority": "+1"}, Terms("", 1, 9.0)),
    ({"x-ttft-deadline-ms": "1500"}, Terms("", 0, 1.5)),
    ({"x-ttft-deadline-ms": "0.5"}, Terms("", 0, 0.0005)),
    ({"x-ttft-deadline-ms": "86400000"}, Terms("", 0, 86400.0)),
    ({"x-adapter-cold": "reject"}, Terms("", 0, 9.0, refuse_cold=True)),
    ({"x-adapter-cold": "allow"}, Terms("", 0, 9.0)),
]
PRIORITY = "send a whole number from -3 (most urgent) to 3."
DEADLINE = "send milliseconds, above 0 and at most 86400000 (a day)."
COLD = "send `reject` or `allow`."
BAD = [
    ("x-priority", "4", PRIORITY),
    ("x-priority", "-4", PRIORITY),
    ("x-priority", "1.0", PRIORITY),
    ("x-priority", "high", PRIORITY),
    ("x-priority", "", PRIORITY),
    ("x-priority", "9" * 5000, PRIORITY),
    ("x-priority", "\u0663", PRIORITY),
    ("x-ttft-deadline-ms", "0", DEADLINE),
    ("x-ttft-deadline-ms", "-1", DEADLINE),
    ("x-ttft-deadline-ms", "86400001", DEADLINE),
    ("x-ttft-deadline-ms", "inf", DEADLINE),
    ("x-ttft-deadline-ms", "nan", DEADLINE),
    ("x-ttft-deadline-ms", "2s", DEADLINE),
    ("x-ttft-deadline-ms", "", DEADLINE),
    ("x-adapter-cold", "Reject", COLD),
    ("x-adapter-cold", "", COLD),
]


@pytest.mark.parametrize(("headers", "wanted"), GOOD, ids=[str(given) for given, _ in GOOD])
def test_headers_become_terms(headers: dict[str, str], wanted: Terms) -> None:
    assert TermsReader(CONFIG).read(headers) == wanted


KEYED: list[tuple[Access, dict[str, str], tuple[str, int]]] = [
    (Access(ALL, "gold", -2), {}, ("gold", -2)),
    (Access(ALL, "gold", -2), {"x-tenant": "plain"}, ("gold", -2)),
    (Access(ALL, "plain", 0), {"x-tenant": "gold"}, ("plain", 0)),
    (Access(ALL, "plain", 0), {"x-tenant": "made-up"}, ("plain", 0)),
    (Access(ALL, "plain", 0), {"x-priority": "-3"}, ("plain", 0)),
    (Access(ALL, "plain", 0), {"x-priority": "2"}, ("plain", 2)),
    (Access(ALL, "gold", 1), {}, ("gold", 1)),
    (Access(ALL, "", 1), {"x-tenant": "gold"}, ("gold", 1)),
    (Access(ALL, "", 1), {"x-tenant": "gold", "x-priority": "-1"}, ("gold", 1)),
    (Access(ALL), {"x-tenant": "gold", "x-priority": "-3"}, ("gold", -3)),
]


@pytest.mark.parametrize(("access", "headers", "wanted"), KEYED)
def test_a_key_has_the_last_word(
    access: Access, headers: dict[str, str], wanted: tuple[str, int]
) -> None:
    charged = msgspec.structs.replace(access, accounts=("key:a",))
    reader = TermsReader(CONFIG)
    terms = reader.read(headers, charged)
    assert (terms.tenant, terms.priority) == wanted
    assert (terms.deadline_s, terms.accounts) == (9.0, ("key:a",))
    if not headers:
        assert reader.usual(charged) == terms


@pytest.mark.parametrize(("header", "value", "message"), BAD)
def test_what_cannot_be_read_says_what_to_send(header: str, value: str, message: str) -> None:
    with pytest.raises(ApiError) as error:
        TermsReader(CONFIG).read({header: value})
    assert (error.value.status, error.value.param, error.value.code) == (
        400, header, "invalid_value",
    )  # fmt: skip
    assert str(error.value).startswith(f"The header `{header}` is `{value[:40]}")
    assert str(error.value).endswith(message)
    assert len(str(error.value)) < 200


def test_without_tenants_and_deadline_there_are_none() -> None:
    assert TermsReader(RouterConfig()).read({"x-tenant": "gold"}) == Terms()


def test_the_routers_own_headers_reach_no_worker() -> None:
    request = Request()
    request.id = "id"
    ours = ("x-lorayard-adapter", "x-lorayard-adapter-version", "x-lorayard-router")
    for name in (*sorted(terms.HEADERS), *ours, "x-other"):
        request.add(name.title().encode(), b"1")
    head = request.for_worker(b"/v1/x", b"m:a", "", b"host: w\r\n", 2).decode().split("\r\n")
    assert head[0] == "POST /v1/x HTTP/1.1"
    assert sorted(filter(None, head[1:])) == [
        "content-length: 2",
        "host: w",
        "x-lorayard-adapter: m:a",
        "x-other: 1",
        "x-request-id: id",
    ]
