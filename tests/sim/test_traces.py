import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.__main__ import main
from sim.traces import Reading, TimeUnit, TraceError, TraceFormat, TraceRow, format_of, read, scan
from sim.traces.row import TOKENS
from sim.workload import AdapterDraw

GOOD = '{"timestamp": 0, "input_length": 10, "output_length": 5}\n'
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"

BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
BURST_SESSIONS = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
)
SERVEGEN = "request_id,timestamp,input_tokens,output_tokens\n"
SERVEGEN_MIXED = "request_id,timestamp,text_tokens,image_tokens,output_tokens\n"


def line(**fields: object) -> str:
    row: dict[str, object] = {"timestamp": 0, "input_length": 10, "output_length": 5, **fields}
    return json.dumps({name: value for name, value in row.items() if value is not ...}) + "\n"


BAD = [
    ("", "trace:1: the file is empty"),
    (" \n\n", "trace:1: the file is empty"),
    ("hello\n", "trace:1: it begins with `hello`; expected JSON lines"),
    (GOOD + "{broken\n" + GOOD, "trace:2: row is `{broken`; expected one JSON object a line"),
    (GOOD + "[1]\n", "trace:2: row is `[1]`; expected one JSON object a line"),
    (GOOD + '{"a": ' + "[" * 50_000 + "\n", "trace:2: row is `{"),
    (line(timestamp=...), "trace:1: timestamp is missing; expected a number, 0 to 1e+14"),
    (line(output_length=...), "trace:1: output_length is missing; expected a whole number of tok"),
    (line(input_length="x"), 'trace:1: input_length is `"x"`; expected a whole number of tokens'),
    (line(input_length=-1), "trace:1: input_length is `-1`; expected a whole number of tokens"),
    (line(input_length=1.5), "trace:1: input_length is `1.5`; expected a whole number"),
    (line(output_length=10**9), "trace:1: output_length is `1000000000`; expected a whole number"),
    (
        '{"timestamp": 0, "input_length": ' + "9" * 5000 + ', "output_length": 1}\n',
        "trace:1: row is `{",
    ),
    (line(hash_ids=[1, "x"]), 'trace:1: hash_ids is `[1, "x"]`; expected a list of whole numbers'),
    (line(session_id=[]), "trace:1: session_id is `[]`; expected a string or a whole number"),
    (line(tenant=3), "trace:1: tenant is `3`; expected a string"),
    (line(priority="high"), 'trace:1: priority is `"high"`; expected a whole number'),
    (line(extra="base"), 'trace:1: extra is `"base"`; expected an object such as {"model"'),
    (line(extra={"model": 7}), "trace:1: extra.model is `7`; expected base or base:adapter"),
    (line(extra={"model": "b:../x"}), "trace:1: extra.model is `b:../x`; expected base or"),
    (line(timestamp=-1), "trace:1: timestamp is `-1`; expected a number, 0 to 1e+14"),
    (line(timestamp=1e300), "trace:1: timestamp is `1e+300`; expected a number, 0 to 1e+14"),
    (
        line(timestamp=...) + GOOD,
        "trace:1: timestamp is missing; expected a number, 0 to 1e+14",
    ),
    (
        GOOD + line(timestamp=..., session_id="a", delay=2),
        "trace:2: timestamp is missing; expected a number, 0 to 1e+14; a `delay` counts from an",
    ),
    (
        line(input_length=..., text_input="Hello"),
        f"trace:1: input_length is missing; expected {TOKENS}; a prompt as `text_input` would need",
    ),
    (
        line(input_length=..., messages=[]),
        f"trace:1: input_length is missing; expected {TOKENS}; a prompt as `messages` would need",
    ),
    (
        line(timestamp=9) + GOOD,
        "trace:2: timestamp is `0 ms`; expected 9 ms or later, as in the row before; sort",
    ),
    (line(chat_id="x", parent_chat_id=-1), 'trace:1: chat_id is `"x"`; expected a whole number'),
    (line(parent_chat_id=-1), "trace:1: chat_id is missing; expected a whole number"),
    (AZURE, "trace:1: no rows"),
    (AZURE.replace("Context", "Prompt"), "trace:1: it begins with `TIMESTAMP,PromptTokens"),
    (
        AZURE + "2023-11-16 18:15:46.68,374\n",
        "trace:2: row is `2023-11-16 18:15:46.68,374`; expected 3 fields (TIMESTAMP,Context",
    ),
    (AZURE + "yesterday,1,2\n", "trace:2: TIMESTAMP is `yesterday`; expected a time such as 2023"),
    (
        AZURE + "2023-11-16 18:15:46.6805900,many,2\n",
        "trace:2: ContextTokens is `many`; expected a whole number of tokens",
    ),
    (AZURE + "2023-11-16 18:15:46,1," + "9" * 5000 + "\n", "trace:2: GeneratedTokens is `9"),
    (
        AZURE + "2023-11-16 18:15:46,1,2\n2023-11-16 18:15:45,1,2\n",
        "trace:3: timestamp is `-1000 ms`; expected 0 ms or later",
    ),
    (BURST + "5,ChatGPT,472\n", "trace:2: row is `5,ChatGPT,472`; expected 6 fields"),
    (BURST + "soon,GPT-4,1,2,3,x\n", "trace:2: Timestamp is `soon`; expected a number of seconds"),
    (BURST + "nan,GPT-4,1,2,3,x\n", "trace:2: Timestamp is `nan`; expected a number of seconds"),
    (BURST + "5,GPT-4,1.5,2,3,x\n", "trace:2: Request tokens is `1.5`; expected a whole number"),
    (BURST + "5,GPT-4,1,,3,x\n", "trace:2: Response tokens is ``; expected a whole number"),
    (SERVEGEN + "0,-0.5,10,20\n", "trace:2: timestamp is `-0.5`; expected a number of seconds"),
    (SERVEGEN + "0,0.5,10,-\n", "trace:2: output_tokens is `-`; expected a whole number"),
    (SERVEGEN + '0,0.5,"' + "1" * 200_000 + '",2\n', "trace:2: row is `0,0.5,"),
    (
        SERVEGEN_MIXED + '0,0.5,10,"[712, many]",20\n',
        "trace:2: image_tokens is `[712, many]`; expected a list of tokens such as [712, 689]",
    ),
    ("0,1.33,8.59,Weibull,0.37,0.39\n", "trace:1: this is ServeGen's data about one client, not"),
    ("request_id,timestamp,output_tokens\n", "trace:1: it begins with `request_id,timestamp"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[message[:50] for _, message in BAD])
def test_a_bad_row_is_named_with_its_line_field_and_what_was_expected(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(TraceError) as error:
        scan(path)
    assert str(error.value).removeprefix(f"{tmp_path}/").startswith(message)


@pytest.mark.parametrize(
    "end", ['{"timestamp": 9, "input_le', '{"timestamp": 9, "tenant": "x', "{"]
)
def test_half_a_row_at_the_very_end_is_let_be(tmp_path: Path, end: str) -> None:
    path = tmp_path / "trace"
    path.write_text(line() * 2 + end)
    assert scan(path).requests == 2
    path.write_text(end)
    with pytest.raises(TraceError, match="trace:1: row is `"):
        scan(path)


# The file, its format, and each row: milliseconds, prompt tokens, output tokens, session.
FORMATS: list[tuple[str, TraceFormat, list[tuple[float, int, int, str | None]]]] = [
    (
        line() + line(timestamp=1500.5, session_id="s", delay=3, text_input="x", type="text"),
        TraceFormat.JSON_LINES,
        [(0.0, 10, 5, None), (1500.5, 10, 5, "s")],
    ),
    (
        # Bailian: seconds, and chats that go on from one another.
        line(timestamp=61.114, chat_id=1, parent_chat_id=-1, turn=1, type="text", hash_ids=[8])
        + line(timestamp=62, chat_id=2, parent_chat_id=1, turn=2)
        + line(timestamp=63, chat_id=3, parent_chat_id=2, turn=3)
        + line(timestamp=64, chat_id=4, parent_chat_id=-1, turn=1),
        TraceFormat.CHATS,
        [(61114, 10, 5, "1"), (62000, 10, 5, "1"), (63000, 10, 5, "1"), (64000, 10, 5, "4")],
    ),
    (
        AZURE + "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n",
        TraceFormat.AZURE,
        [(0.0, 374, 44, None), (4314.579, 396, 109, None)],
    ),
    (
        # 2024: a zone, and no fraction on the full second.
        AZURE + "2024-05-12 00:00:00+00:00,1,2\n2024-05-12 02:00:01.009930+02:00,3,4\n",
        TraceFormat.AZURE,
        [(0.0, 1, 2, None), (1009.93, 3, 4, None)],
    ),
    (
        "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n2024-10-15 00:00:00,2,900,120\n",
        TraceFormat.AZURE,
        [(0.0, 900, 120, None)],
    ),
    (
        BURST + "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,417,0,417,API log\n",
        TraceFormat.BURSTGPT,
        [(5000, 472, 18, None), (45000, 417, 0, None)],
    ),
    (
        BURST_SESSIONS + "19440110.0,1722ac82-0a46,43,GPT-4,906,446,1352,Conversation log\r\n"
        "19440161.5,,2,ChatGPT,36,29,65,API log\r\n",
        TraceFormat.BURSTGPT,
        [(19440110000, 906, 446, "1722ac82-0a46"), (19440161500, 36, 29, None)],
    ),
    (
        SERVEGEN.replace("\n", "\r\n") + "0,0.5,10,20\r\n\r\n1,1.2,15,25\r\n",
        TraceFormat.SERVEGEN,
        [(500, 10, 20, None), (1200, 15, 25, None)],
    ),
    (
        "request_id,timestamp,input_tokens,output_tokens,reason_ratio\n0,0.5,10,20,0.7\n",
        TraceFormat.SERVEGEN,
        [(500, 10, 20, None)],
    ),
    (
        SERVEGEN_MIXED + '0,0.5,10,"[712, 689]",20\n1,0.6,10,[],20\n2,0.7,10,[5],20\n',
        TraceFormat.SERVEGEN,
        [(500, 1411, 20, None), (600, 10, 20, None), (700, 15, 20, None)],
    ),
]


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize(("text", "kind", "expected"), FORMATS, ids=range(len(FORMATS)))
def test_each_format_is_told_by_its_beginning_and_read(
    tmp_path: Path,
    text: str,
    kind: TraceFormat,
    expected: list[tuple[float, int, int, str | None]],
    mark: str,
) -> None:
    path = tmp_path / "trace"
    path.write_text(mark + text, newline="")
    assert format_of(path) is kind
    assert [
        (row.timestamp, row.input_length, row.output_length, row.session_id) for row in read(path)
    ] == expected


def test_all_fields_of_a_json_row_are_read(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(
        '{"timestamp": 27.5, "input_length": 10, "output_length": 5, "hash_ids": [1, 2], '
        '"session_id": 7, "tenant": "t", "priority": 2, "extra": {"model": "b:a"}, "more": []}\n\n'
        '{"timestamp": 28, "input_length": 1, "output_length": 1, "hash_ids": null, "extra": null}'
    )
    row, bare = read(path)
    assert (row.timestamp, row.input_length, row.output_length) == (27.5, 10, 5)
    assert (row.hash_ids, row.session_id, row.tenant, row.priority) == ((1, 2), "7", "t", 2)
    assert row.model == "b:a"
    assert bare == TraceRow(28, 1, 1)


def test_a_timed_trace_may_count_seconds(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(line(timestamp=1.1) + line(timestamp=12.4))
    assert [row.timestamp for row in read(path)] == [1.1, 12.4]
    seconds = Reading(unit=TimeUnit.SECONDS)
    assert [row.timestamp for row in read(path, seconds)] == [1100, 12400]
    assert scan(path, reading=seconds).span_s == pytest.approx(11.3)


def test_bad_rows_may_be_left_out_and_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(line(timestamp=5) + "{\n" + line(timestamp=3) + line(timestamp=7))
    summary = scan(path, reading=Reading(skip_bad=True))
    assert (summary.requests, summary.bad.count) == (2, 2)
    assert summary.bad.first.startswith(f"{path}:2: row is `{{`")
    path.write_text(AZURE + "x,1,2\n")
    with pytest.raises(TraceError, match=r"no good row, 1 bad; the first: .*:2: TIMESTAMP is"):
        scan(path, reading=Reading(skip_bad=True))


STARTS = ["", "{", GOOD, AZURE, BURST, BURST_SESSIONS, SERVEGEN, SERVEGEN_MIXED]
CELLS = st.sampled_from([*'{}[]":,\n\r\ufeff', "0", "5", "1e999", "nan", "\\ud800", "timestamp"])


@given(
    start=st.sampled_from(STARTS),
    rest=st.lists(CELLS | st.text(max_size=3), max_size=30).map("".join) | st.binary(max_size=60),
)
@settings(max_examples=300, deadline=None)
def test_whatever_a_file_holds_is_rows_or_a_trace_error(
    start: str, rest: str | bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    tail = rest if isinstance(rest, bytes) else rest.encode("utf-8", errors="replace")
    path.write_bytes(start.encode() + tail)
    for reading in (Reading(), Reading(skip_bad=True)):
        with contextlib.suppress(TraceError):
            scan(path, reading=reading)


def test_replay_says_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace"
    path.write_text(GOOD + "{\n" + GOOD)
    assert main(["replay", str(path)]) == 2
    assert "row is `{`" in capsys.readouterr().err
    assert main(["replay", str(path), "--skip-bad"]) == 0
    assert f"bad rows left out: 1; the first: {path}:2: row" in capsys.readouterr().err


def lru_hit_rate(names: list[str], slots: int) -> float:
    cache: dict[str, None] = {}
    hits = 0
    for name in names:
        if name in cache:
            hits += 1
            del cache[name]
        elif len(cache) >= slots:
            del cache[next(iter(cache))]
        cache[name] = None
    return hits / len(names)


def drawn(count: int, locality: float, seed: int = 1) -> list[str]:
    draw = AdapterDraw(864, locality=locality, zipf=1.0, seed=seed)
    return [draw.next() for _ in range(count)]


def test_locality_is_that_of_a_production_trace() -> None:
    """One cache of 4 slots hits 77% and of 16 slots 85% in the trace that the default follows."""
    local = drawn(15202, 0.8)
    assert lru_hit_rate(local, 4) == pytest.approx(0.77, abs=0.04)
    assert lru_hit_rate(local, 16) == pytest.approx(0.85, abs=0.04)
    assert lru_hit_rate(drawn(15202, 0.0), 4) < 0.2


def test_draws_are_reproducible() -> None:
    assert drawn(1000, 0.8) == drawn(1000, 0.8)
    assert drawn(1000, 0.8) != drawn(1000, 0.8, seed=2)
