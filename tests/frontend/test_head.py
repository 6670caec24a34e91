import pytest

from router.core.job import LoadError, LoadFault, Outcome, Rejected
from router.frontend.errors import ApiError, load_failed, rejected
from router.frontend.head import parse_head

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
