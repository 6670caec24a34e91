import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.job import LoadError, LoadFault, Outcome, Rejected
from router.frontend.errors import ApiError, load_failed, rejected
from router.frontend.head import for_model, parse_head

BAD = [
    (b"", None, "The body is not valid JSON"),
    (b"{", None, "The body is not valid JSON"),
    (b'{"model": "a"} trailing', None, "The body is not valid JSON"),
    (b'{"messages": [{]}', None, "The body is not valid JSON"),
    (b'{"model": "\xff"}', None, "The body is not valid JSON"),
    (b"[]", None, "The body must be a JSON object"),
    (b'"text"', None, "The body must be a JSON object"),
    (b'{"model": 3}', "model", "`model`: Expected `str"),
    (b'{"model": "' + b"x" * 600 + b'"}', "model", "`model`: Expected `str` of length <= 512"),
    (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", None, "The body is nested too deeply"),
]


@pytest.mark.parametrize(("body", "param", "message"), BAD)
def test_a_bad_body_says_what_to_send(body: bytes, param: str | None, message: str) -> None:
    with pytest.raises(ApiError) as error:
        parse_head(body)
    assert error.value.status == 400
    assert error.value.param == param
    assert str(error.value).startswith(message)


WHO = [
    (b"", ""),
    (b', "user": null', ""),
    (b', "user": ""', ""),
    (b', "user": "a"', '"a"'),
    (b', "user": 3', "3"),
    (b', "user": ' + b"[" * 900 + b"]" * 900, "[" * 900 + "]" * 900),
    (b', "user": "\xff"', '"\ufffd"'),
]


@pytest.mark.parametrize(("field", "who"), WHO)
def test_a_user_is_who_the_client_says_whatever_that_is(field: bytes, who: str) -> None:
    assert parse_head(b'{"model": "a"' + field + b"}").who == who


def test_the_head_is_read_and_the_rest_is_let_be() -> None:
    head = parse_head(
        b'{"messages": [{"a": [1]}], "stream": true, "model": "b:a", "max_tokens": 9}'
    )
    assert (head.model, head.output_tokens) == ("b:a", 9)
    assert parse_head(b"{}").model is None
    assert parse_head(b'{"max_tokens": null, "stream": null}').output_tokens == 0
    assert parse_head(b'{"max_completion_tokens": 7, "max_tokens": 9}').output_tokens == 7
    assert parse_head(b'{"max_tokens": -5}').output_tokens == 0
    assert parse_head(b'{"max_tokens": "8", "stream": "yes"}').output_tokens == 0


def test_of_a_key_that_stands_twice_the_last_counts_as_in_vllm() -> None:
    assert parse_head(b'{"model": "a", "model": "b"}').model == "b"


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (LoadFault.ADAPTER_CHANGED, 503, "adapter_changed"),
        (LoadFault.ADAPTER_INVALID, 400, "adapter_invalid"),
        (LoadFault.STORE_UNAVAILABLE, 503, "adapter_store_unavailable"),
        (LoadFault.WORKER, 502, "adapter_load_failed"),
    ],
)
def test_a_failed_load_has_a_status_by_whose_fault_it_is(
    fault: LoadFault, status: int, code: str
) -> None:
    error = load_failed(LoadError(fault, "why"))
    assert (error.status, error.code, str(error)) == (status, code, "why")
    assert ("retry-after" in error.headers()) == (status == 503)


@pytest.mark.parametrize("outcome", [one for one in Outcome if one.is_rejection])
def test_who_is_turned_away_hears_when_to_come_again(outcome: Outcome) -> None:
    error = rejected(Rejected(outcome, "why", 12.2))
    over_quota = outcome is Outcome.OVER_QUOTA
    assert error.status == (429 if over_quota else 503)
    assert error.kind == ("rate_limit_error" if over_quota else "server_error")
    assert (error.code, str(error)) == (outcome.value, "why")
    assert error.headers()["retry-after"] == "13"


REWRITTEN = [
    (b'{"model": "base:a"}', b'{"model":"m@1"}'),
    # Of other values each byte stays: blanks, escapes, digits.
    (
        b'{"n": 1.50e+2, "model": "base:a", "stop": [ "\\u00e9" , 1.0 ]}',
        b'{"n":1.50e+2,"model":"m@1","stop":[ "\\u00e9" , 1.0 ]}',
    ),
    # Of a key that stands twice the last one counts.
    (b'{"model": "x", "n": 1, "model": "base:a", "n": 2}', b'{"model":"m@1","n":2}'),
    (b'{"mod\\u0065l": "base:a"}', b'{"model":"m@1"}'),
    (b'{"\xff": 1, "model": "base:a"}', b'{"\xff": 1, "model": "base:a"}'),
]


@pytest.mark.parametrize(("body", "sent"), REWRITTEN)
def test_a_body_is_rewritten_in_its_model_alone(body: bytes, sent: bytes) -> None:
    assert parse_head(body).model == "base:a"
    assert for_model(body, "m@1") == sent


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), VALUES), st.text(max_size=20), st.booleans())
def test_what_is_rewritten_says_the_same(
    fields: dict[str, Any], model: str, ascii_only: bool
) -> None:
    fields["model"] = "base:a"
    body = json.dumps(fields, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    try:
        parse_head(body)
    except ApiError:
        return
    assert msgspec.json.decode(for_model(body, model)) == {
        **msgspec.json.decode(body),
        "model": model,
    }
