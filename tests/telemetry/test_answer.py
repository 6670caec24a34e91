"""Times and lengths are read off an answer, however its bytes are cut."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.telemetry.answer import TAIL_BYTES, Answer
from router.telemetry.usage import Usage

EVENT = (
    b'data: {"choices": [{"delta": {"content": "data: \\n\\n \\"usage\\":{}"}}], "usage": null}\n\n'
)
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}\n\n'
DONE = b"data: [DONE]\n\n"


def streamed(*chunks: bytes, content_type: str = "text/event-stream; charset=utf-8") -> Answer:
    clock = itertools.count(1)
    answer = Answer(lambda: float(next(clock)))
    answer.begins(content_type)
    for chunk in chunks:
        answer.passes(chunk)
    return answer


@given(cuts=st.lists(st.integers(0, len(EVENT * 3 + USAGE + DONE))), with_usage=st.booleans())
def test_a_stream_is_counted_wherever_it_is_cut(cuts: list[int], with_usage: bool) -> None:
    data = EVENT * 3 + USAGE * with_usage + DONE
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    answer = streamed(*(data[a:b] for a, b in itertools.pairwise(places)))
    assert answer.events == 3 + with_usage
    assert answer.usage() == (Usage(7, 3) if with_usage else None)
    assert answer.streamed
    assert answer.first_byte_at == 1.0


def test_a_long_stream_keeps_its_end_alone() -> None:
    answer = streamed(*([EVENT] * 10_000), USAGE, DONE)
    assert (answer.events, answer.usage()) == (10_001, Usage(7, 3))
    assert len(answer._tail) <= 4 * TAIL_BYTES


def test_a_stream_that_is_cut_off_counts_what_came() -> None:
    answer = streamed(EVENT, EVENT, EVENT[:9])
    assert (answer.events, answer.usage()) == (2, None)
    assert (streamed().events, streamed().first_byte_at) == (0, None)


WHOLE = [
    (b'{"usage":{"prompt_tokens":5,"completion_tokens":6,"total_tokens":11}}', Usage(5, 6)),
    (b'{"usage": {"prompt_tokens": 5, "total_tokens": 5}, "data": []}', Usage(5, 0)),
    (b'{"usage":{"input_tokens":5,"output_tokens":6,"details":{"cached":1}},"a":1}', Usage(5, 6)),
    (b'{"choices":[{"text":"\\"usage\\":{\\"prompt_tokens\\":1}"}]}', None),
    (b'{"usage":{"prompt_tokens":-1,"completion_tokens":"6"}}', Usage(None, None)),
    (b'{"usage":{"prompt_tokens":true,"completion_tokens":1e3}}', Usage(None, None)),
    (b'{"usage":{"prompt_tokens":5,"compl', None),
    (b'{"usage":' + b'{"a":' * 100_000, None),
    (b'{"usage":[1]}', None),
    (b'{"usage":null}', None),
    (b"\xff\xfe", None),
    (b"", None),
]


@pytest.mark.parametrize(("body", "usage"), WHOLE, ids=[str(body[:50]) for body, _ in WHOLE])
def test_usage_of_an_answer_in_one_piece(body: bytes, usage: Usage | None) -> None:
    answer = Answer(lambda: 2.0)
    answer.whole(body)
    assert answer.usage() == usage
    assert (answer.events, answer.streamed, answer.first_byte_at) == (0, False, 2.0)
    # The same in parts, as a large answer comes.
    parts = streamed(body[:20], body[20:], content_type="application/json")
    assert len(body) > TAIL_BYTES or parts.usage() == usage
    assert (parts.events, parts.streamed, parts.first_byte_at) == (0, False, 1.0)
