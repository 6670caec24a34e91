"""A recording is a trace in order whatever ends when, whatever the disk does, whoever is killed."""

import asyncio
import json
import logging
import os
import resource
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from apart import run_apart
from hypothesis import given, settings
from hypothesis import strategies as st

import router.telemetry.recorder as recorder_module
from router.config import RecordConfig
from router.core.job import AdapterRef, Job, Outcome
from router.telemetry.answer import Answer
from router.telemetry.metrics import Metrics
from router.telemetry.record_file import (
    Appended,
    RecordError,
    RecordFile,
    RowSink,
    Stop,
    check_path,
)
from router.telemetry.recorder import Recorder, Recording
from sim.__main__ import main
from sim.traces import read, scan

ADAPTER = AdapterRef("base", "a")


class Run:
    """A recorder, and requests to it."""

    def __init__(self, recorder: Recorder, metrics: Metrics) -> None:
        self.recorder = recorder
        self._metrics = metrics
        self._count = 0

    def begin(self, *, max_tokens: int = 0, body: bytes = b"{}") -> Recording:
        self._count += 1
        job = Job(f"id-{self._count}", ADAPTER, prompt_tokens=11, max_output_tokens=max_tokens)
        return self.recorder.begin(job, "base", body=body)

    def end(self, recording: Recording, outcome: Outcome = Outcome.COMPLETED) -> None:
        self.recorder.end(recording, outcome)

    def metric(self, name: str, **labels: str) -> float:
        return self._metrics.registry.get_sample_value(f"lorayard_record_{name}_total", labels) or 0

    @property
    def dropped(self) -> float:
        return sum(self.metric("dropped", reason=stop.value) for stop in Stop)


@asynccontextmanager
async def recording(
    path: Path,
    sink: RowSink | None = None,
    clock: Callable[[], float] = time.monotonic,
    **fields: Any,  # noqa: ANN401
) -> AsyncIterator[Run]:
    metrics = Metrics()
    config = RecordConfig(str(path), **fields)
    if sink is None:
        recorder = Recorder.open(config, metrics)
    else:
        recorder = Recorder(sink, config, metrics, clock=clock)
    try:
        yield Run(recorder, metrics)
    finally:
        await recorder.aclose()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ids(path: Path) -> list[str]:
    return [row["extra"]["id"] for row in lines(path)]


# The order.


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.sampled_from(["begin", "end first", "end last", "end middle", "flush"])),
    fail_after=st.none() | st.integers(0, 5),
    late=st.booleans(),
)
def test_rows_stand_in_order_of_arrival_and_counts_add_up(
    steps: list[str], fail_after: int | None, late: bool
) -> None:
    """Ended = written + dropped, and the file is the first of those that came."""
    sink = Memory(fail_after)

    async def run() -> None:
        running: list[Recording] = []
        ended = 0
        window_s = 1e-9 if late else 1e9
        async with recording(Path("x"), sink, window_s=window_s) as run:
            for step in steps:
                if step == "begin":
                    running.append(run.begin())
                elif step == "flush":
                    await run.recorder.flush()
                elif running:
                    index = {"first": 0, "last": -1, "middle": len(running) // 2}[step.split()[1]]
                    run.end(running.pop(index))
                    ended += 1
        for left in running:
            run.end(left)
        assert run.metric("rows") == len(sink.rows)
        assert run.metric("rows") + run.dropped == ended + len(running)

    run_apart(run())
    rows = [json.loads(row) for row in sink.rows]
    assert [row["extra"]["id"] for row in rows] == [f"id-{n + 1}" for n in range(len(rows))]
    times = [row["timestamp"] for row in rows]
    assert times == sorted(times)


class Memory:
    """A sink in memory, that fails after so many rows."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.rows: list[bytes] = []
        self._fail_after = fail_after

    def append(self, rows: Sequence[bytes]) -> Appended:
        fitting = len(rows)
        if self._fail_after is not None:
            fitting = min(fitting, self._fail_after - len(self.rows))
        self.rows += rows[:fitting]
        if fitting == len(rows):
            return Appended(fitting)
        return Appended(fitting, Stop.DISK_FAILED, "it broke")

    def close(self) -> None:
        pass


async def test_a_row_waits_for_the_requests_that_came_before(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    async with recording(path) as run:
        first, second = run.begin(), run.begin()
        run.end(second)
        await run.recorder.flush()
        assert ids(path) == []
        run.end(first)
        await run.recorder.flush()
        assert ids(path) == ["id-1", "id-2"]


async def test_what_runs_longer_than_the_window_is_written_as_it_stands() -> None:
    sink, now_s = Memory(), [100.0]
    async with recording(Path("x"), sink, clock=lambda: now_s[0], window_s=30) as run:
        now_s[0] = 101.5
        long = run.begin(max_tokens=50)
        now_s[0] = 131.25
        run.end(run.begin())
        await run.recorder.flush()
        assert sink.rows == []
        now_s[0] = 132.0
        await run.recorder.flush()
        assert len(sink.rows) == 2
        run.end(long)
    first, second = (json.loads(row) for row in sink.rows)
    assert first == {
        "timestamp": 1500,
        "input_length": 11,
        "output_length": 50,
        "extra": {
            "model": "base:a",
            "id": "id-1",
            "queued_s": 0,
            "load_s": 0,
            "e2e_s": 30.5,
            "max_tokens": 50,
            "estimated": True,
        },
    }
    assert (second["timestamp"], second["extra"]["outcome"]) == (31250, "completed")


async def test_a_full_window_loses_no_row(tmp_path: Path) -> None:
    """Rows that take too much memory behind a long request do not wait for it any longer."""
    path = tmp_path / "t.jsonl"
    body = json.dumps({"prompt": "x" * 100_000}).encode()
    async with recording(path, buffer_mib=1, prompts=True) as run:
        long = run.begin()
        for _ in range(8):
            run.end(run.begin(body=body))
            await run.recorder.flush()
        assert len(lines(path)) == 9
        run.end(long)
        assert run.dropped == 0
    assert "outcome" not in lines(path)[0]["extra"]


async def test_closing_writes_what_still_runs(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    async with recording(path) as run:
        run.begin()
        run.end(run.begin())
    assert ids(path) == ["id-1", "id-2"]


# The disk.


async def test_a_slow_disk_costs_rows_and_no_request(tmp_path: Path) -> None:
    class Slow(Memory):
        reached = threading.Event()
        go_on = threading.Event()

        def append(self, rows: Sequence[bytes]) -> Appended:
            self.reached.set()
            assert self.go_on.wait(20)
            return super().append(rows)

    sink = Slow()
    body = json.dumps({"prompt": "x" * 50_000}).encode()
    async with recording(tmp_path / "x", sink, buffer_mib=1, prompts=True) as run:
        run.end(run.begin(body=body))
        writing = asyncio.create_task(run.recorder.flush())
        assert await asyncio.to_thread(Slow.reached.wait, 20)
        for _ in range(99):  # 5 MB, of which a MiB may wait
            run.end(run.begin(body=body))
        assert 70 < run.metric("dropped", reason="disk_slow") < 99
        Slow.go_on.set()
        await writing
        run.end(run.begin())
    kept = [json.loads(row)["extra"]["id"] for row in sink.rows]
    assert kept[0] == "id-1"
    assert kept[-1] == "id-101"
    assert len(kept) + run.dropped == 101


async def test_a_disk_that_hangs_does_not_keep_the_router_from_stopping(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Hung(Memory):
        go_on = threading.Event()
        closed = False

        def append(self, rows: Sequence[bytes]) -> Appended:
            assert self.go_on.wait(20)
            return super().append(rows)

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(recorder_module, "CLOSE_TIMEOUT_S", 0.05)
    sink = Hung()
    try:
        async with recording(Path("x"), sink) as run:
            run.end(run.begin())
        assert not sink.closed, "the thread may yet write into it"
        assert "the disk takes nothing any more" in caplog.text
    finally:
        Hung.go_on.set()


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Let no file of this process grow further: the kernel then refuses as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_whole_rows(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    file = RecordFile.open(path, max_mib=1)
    row = b'{"timestamp":0,"input_length":1,"output_length":1}\n'
    with disk_of(len(row) * 3 + 20):
        appended = file.append([row] * 5)
    assert appended == Appended(3, Stop.DISK_FAILED, f"{path}: File too large")
    assert path.read_bytes() == row * 3
    file.close()


async def test_a_disk_that_fails_ends_the_recording_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sink = Memory(fail_after=1)
    async with recording(tmp_path / "x", sink) as run:
        runs_on = run.begin()
        for _ in range(3):
            run.end(run.begin())
        run.end(runs_on)
        await run.recorder.flush()
        run.end(run.begin())
        await run.recorder.flush()
    assert (run.metric("rows"), run.metric("dropped", reason="disk_failed")) == (1, 4)
    warnings = [entry.message for entry in caplog.records if entry.levelno >= logging.WARNING]
    assert warnings == ["recording has stopped: it broke; requests are served as before"]


async def test_the_file_stays_below_its_limit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "t.jsonl"
    body = json.dumps({"prompt": "x" * 100_000}).encode()
    async with recording(path, max_mib=1, prompts=True) as run:
        for _ in range(15):
            run.end(run.begin(body=body))
            await run.recorder.flush()
    assert path.stat().st_size <= 2**20
    assert scan(path).requests == run.metric("rows") == 10
    assert run.metric("dropped", reason="max_mib") == 5
    assert [entry.message for entry in caplog.records if entry.levelno >= logging.WARNING] == [
        f"recording has stopped: {path} has reached max_mib, 1 MiB; requests are served as before"
    ]


# The file.


async def test_a_recording_is_continued_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    async with recording(path) as run:
        for _ in range(2):
            run.end(run.begin())
    last_ms = lines(path)[-1]["timestamp"]
    with path.open("ab") as file:
        file.write(b'{"timestamp":12.5,"input_le')
    assert scan(path).requests == 2, "half a row at the end is let be"
    hour_ago = path.stat().st_mtime - 3600
    os.utime(path, (hour_ago, hour_ago))
    check_path(path)
    async with recording(path) as run:
        run.end(run.begin())
    rows = list(read(path))
    assert len(rows) == 3
    assert 3_600_000 <= rows[-1].timestamp - last_ms < 3_700_000, "the pause is in the trace"


@pytest.mark.parametrize("left", [b"", b'{"timestamp":12.5,"input_length":3,"outp'])
async def test_a_file_without_a_whole_row_is_begun_again(tmp_path: Path, left: bytes) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(left)
    async with recording(path) as run:
        run.end(run.begin())
    assert ids(path) == ["id-1"]


def test_a_long_row_is_found_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    row = '{"timestamp":%d,"input_length":1,"output_length":1,"extra":{"e2e_s":1,"body":"%s"}}\n'
    path.write_text(row % (1, "") + row % (7, "x" * 1_000_000))
    file = RecordFile.open(path, max_mib=8)
    assert 7 <= file.begins_ms < 60_000
    file.close()


FOREIGN = [
    b"notes, and no end of line",
    b"notes\n",
    b'{"timestamp": 0, "input_length": 10, "output_length": 5}\n',
    b'{"timestamp": 0, "input_length": 10, "output_length": 5}',
    b'{"timestamp":0,"input_length":10,"output_length":5}',
    b'{"timestamp":0,"input_length":10,"output_length":5,"extra":{"model":"base"}}\n',
    b"\xff\x00\n" * 9,
]


@pytest.mark.parametrize("content", FOREIGN)
def test_another_file_is_refused_and_let_be(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes"
    path.write_bytes(content)
    for use in (check_path, lambda path: RecordFile.open(path, max_mib=1)):
        with pytest.raises(RecordError, match="is no recording, so it is let be; name a file that"):
            use(path)
    assert path.read_bytes() == content


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, message in (
        (tmp_path, "it is no file; name one"),
        (tmp_path / "no" / "t", f"there is no folder {tmp_path / 'no'}; make it"),
        (tmp_path / "file" / "t", "there is no folder"),
        (Path("/dev/full"), "it is no file"),
    ):
        with pytest.raises(RecordError, match=message):
            check_path(path)
        with pytest.raises(RecordError, match=message):
            RecordFile.open(path, max_mib=1)


def test_one_router_a_file(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    first = RecordFile.open(path, max_mib=1)
    with pytest.raises(RecordError, match="another router records into"):
        RecordFile.open(path, max_mib=1)
    first.close()
    RecordFile.open(path, max_mib=1).close()


# The row.

USAGE = b'{"usage":{"prompt_tokens":7,"completion_tokens":3}}'
HUGE = b'{"usage":{"prompt_tokens":7,"completion_tokens":%d}}' % 10**40


def answer(body: bytes | None, events: int = 0) -> Answer | None:
    """An answer in one piece, or the events of a stream."""
    if body is None and not events:
        return None
    made = Answer(time.monotonic)
    if body is not None:
        made.whole(body)
    else:
        made.begins("text/event-stream")
        made.passes(b"data: {}\n\n" * events)
    return made


# outcome, whole body, events of a stream, max_tokens -> input, output, estimated.
# Before each, two requests have generated 20 and 40 tokens.
LENGTHS: list[tuple[Outcome, bytes | None, int, int, tuple[int, int, bool]]] = [
    (Outcome.COMPLETED, USAGE, 0, 99, (7, 3, False)),
    (Outcome.COMPLETED, None, 5, 99, (11, 5, True)),
    (Outcome.COMPLETED, b"{}", 0, 99, (11, 0, True)),
    (Outcome.COMPLETED, HUGE, 0, 0, (7, 100_000_000, False)),
    (Outcome.CLIENT_GONE, None, 5, 99, (11, 5, True)),
    (Outcome.CLIENT_GONE, None, 0, 99, (11, 30, True)),
    (Outcome.WORKER_FAILED, None, 5, 99, (11, 30, True)),
    (Outcome.WORKER_FAILED, None, 35, 99, (11, 35, True)),
    (Outcome.QUEUE_FULL, None, 0, 8, (11, 8, True)),
    (Outcome.QUEUE_TIMEOUT, None, 0, 0, (11, 30, True)),
    (Outcome.REFUSED, b"{}", 0, 10**30, (11, 30, True)),
]


@pytest.mark.parametrize(("outcome", "body", "events", "max_tokens", "expected"), LENGTHS)
async def test_the_lengths_are_what_a_replay_should_offer(
    tmp_path: Path,
    outcome: Outcome,
    body: bytes | None,
    events: int,
    max_tokens: int,
    expected: tuple[int, int, bool],
) -> None:
    path = tmp_path / "t.jsonl"
    async with recording(path) as run:
        for count in (20, 40):
            before = run.begin()
            before.answer = answer(None, count)
            run.end(before)
        request = run.begin(max_tokens=max_tokens)
        request.answer = answer(body, events)
        run.end(request, outcome)
    row = lines(path)[-1]
    got = (row["input_length"], row["output_length"], row["extra"].get("estimated", False))
    assert got == expected
    assert row["extra"].get("max_tokens", 0) == min(max_tokens, 100_000_000)
    assert row["extra"]["outcome"] == outcome
    assert scan(path).requests == 3


async def test_before_anything_has_ended_max_tokens_is_all_that_is_known(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    async with recording(path) as run:
        run.end(run.begin(max_tokens=77), Outcome.QUEUE_FULL)
        run.end(run.begin(), Outcome.QUEUE_FULL)
    assert [row["output_length"] for row in lines(path)] == [77, 16]


SECRET = b'{"model": "base:a",\n "prompt": "a \\n secret"}'


@pytest.mark.parametrize(
    ("prompts", "body", "kept"),
    [
        (False, SECRET, None),
        (True, SECRET, SECRET.decode()),
        (True, b"[" * 100_000, "[" * 100_000),
        (True, b'{"prompt": "\xff"}', None),
    ],
)
async def test_prompts_are_kept_only_if_asked_for(
    tmp_path: Path, prompts: bool, body: bytes, kept: str | None
) -> None:
    path = tmp_path / "t.jsonl"
    async with recording(path, prompts=prompts) as run:
        run.end(run.begin(body=body))
    [row] = lines(path)
    assert row["extra"].get("body") == kept
    assert scan(path).models == {"base:a": 1}
    assert path.stat().st_mode & 0o077 == 0, "it is its owner's alone"


def test_a_recording_replays(tmp_path: Path) -> None:
    path, out = tmp_path / "t.jsonl", tmp_path / "out.json"

    async def record() -> None:
        async with recording(path) as run:
            for outcome in Outcome:
                run.end(run.begin(), outcome)

    run_apart(record())
    assert main(["replay", str(path), "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["requests"] == result["completed"] == len(Outcome)
