"""The data plane's benchmark: what counts as whole, the arithmetic of the goals, and a small run.

No figure of time is looked at.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.data_plane.__main__ import main, run
from benchmarks.data_plane.cases import Case, Figures, Sizes
from benchmarks.data_plane.clients import Pieces, Reading
from benchmarks.data_plane.loads import Answers, Streams
from benchmarks.data_plane.paired import interval
from benchmarks.data_plane.processes import Cores, client_process, engine_process
from benchmarks.data_plane.profile import summary
from benchmarks.data_plane.verdict import Rounds, Verdict, goals
from benchmarks.data_plane.wire import LAST_CHUNKS, MODELS, STREAM_HEAD, stamp_of, token_chunk

TINY = Sizes(
    seconds=0.2,
    clients=4,
    streams=8,
    tokens=5,
    every_ms=5,
    pace_streams=8,
    pace_every_ms=20,
    crowd=24,
    crowd_tokens=4,
    crowd_every_ms=200,
    crowd_per_s=240,
    warm_up=2,
)


def stream(*steps: int) -> bytes:
    return STREAM_HEAD + b"".join(token_chunk(step) for step in steps) + LAST_CHUNKS


def reading(*pieces: bytes, tokens: int = 3) -> Reading:
    came: Pieces = [(time.monotonic_ns(), piece) for piece in pieces]
    return Reading(came, tokens, (0, 2**63))


def test_a_stream_is_whole_however_it_is_cut() -> None:
    text = stream(7, 8, 9)
    for cut in range(1, len(text)):
        found = reading(text[:cut], text[cut:])
        assert (found.wrong, found.chunks, len(found.late_s)) == ("", 3, 2)


WRONG = [
    (stream(7, 8), "2 tokens"),
    (stream(7, 9, 10), "step 9 after 7"),
    (stream(7, 8, 8), "step 8 after 8"),
    (stream(7, 8, 9)[:-5], "cut off after 3 tokens"),
    (stream(7, 8, 9).replace(b"[DONE]", b"[done]"), "3 tokens, then"),
    (stream(7, 8, 9).replace(b"200 OK", b"503 No"), "503"),
    (b"", "no answer"),
    (b"nonsense\r\n\r\n", "no HTTP"),
]


# A token says when it was sent, and so would an id made of it.
@pytest.mark.parametrize(("text", "wrong"), WRONG, ids=[wrong for _, wrong in WRONG])
def test_what_is_lost_doubled_cut_or_changed_is_told(text: bytes, wrong: str) -> None:
    assert reading(*([text] if text else [])).wrong.startswith(wrong)


def test_a_changed_token_is_none() -> None:
    event = token_chunk(3).partition(b"\r\n")[2][:-2]
    found = stamp_of(event)
    assert found is not None
    assert found[0] == 3
    assert stamp_of(event.replace(b"bench", b"Bench")) is None
    assert stamp_of(event[:-1]) is None


def test_each_goal_is_a_ratio_of_medians_and_unknown_without_them() -> None:
    def contender(cpu_us: float, p50_s: float) -> dict[Case, list[Figures]]:
        return {
            Case.ANSWERS: [{"cpu_us": cpu_us * factor} for factor in (1, 2, 0.5)],
            Case.TOKENS: [{"cpu_us": cpu_us / 10}],
            Case.SINGLE: [{"p50_s": p50_s}],
        }

    rounds: Rounds = {
        "lorayard": contender(60, 0.002),
        "vllm-router": contender(100, 0.001),
        "haproxy": contender(20, 0.001),
    }
    found = {goal.name: goal for goal in goals(rounds, lost=0)}
    assert found["CPU a request, × vllm-router"].found == 0.6
    assert [goal.verdict for goal in found.values()][:5] == [
        Verdict.REACHED,
        Verdict.REACHED,
        Verdict.REACHED,
        Verdict.MISSED,
        Verdict.MISSED,
    ]
    assert {goal.verdict for goal in goals({}, lost=None)} == {Verdict.UNKNOWN}


@pytest.mark.parametrize(
    ("count", "least", "most"),
    [(1, 0, 0), (5, 0, 4), (6, 0, 5), (9, 1, 7), (30, 9, 20), (100, 39, 60)],
)
def test_the_interval_of_a_median_is_the_sign_tests(count: int, least: int, most: int) -> None:
    assert interval([float(value) for value in range(count)]) == (least, most)


def test_a_profile_counts_a_function_once_a_stack() -> None:
    text = summary(["main;run;main;read 3", "main;write 1", "thread;Condition.wait (x) 9"])
    assert "75.0%   75.0%  read" in text
    assert "100.0%  main" in text
    assert "Condition" not in text


@pytest.mark.processes
def test_engines_driven_directly_lose_nothing(tmp_path: Path) -> None:
    cores = Cores.of_this_machine()
    with engine_process(3, cores, tmp_path) as ports, client_process(cores, tmp_path) as client:
        asked = client.run(Answers(ports=tuple(ports), models=MODELS, clients=5, each=7))
        load = Streams(ports=tuple(ports), models=MODELS, clients=6, tokens=9, every_ms=5, each=2)
        streamed = client.run(load)
    assert (asked.asked, asked.good, asked.wrong) == (35, 35, "")
    assert (streamed.asked, streamed.good, streamed.wrong) == (12, 12, "")
    assert (streamed.chunks, streamed.peak_open) == (108, 6)


@pytest.mark.processes
def test_a_run_counts_every_case_of_each_contender_once_a_round(tmp_path: Path) -> None:
    said: list[str] = []
    names = ("direct", "lorayard")
    found = run(names, list(Case), TINY, 1, tmp_path, said.append)
    assert (found.lost, found.absent) == ([], {})
    for name in names:
        assert {
            case: len(of_case) for case, of_case in found.rounds[name].items()
        } == dict.fromkeys(Case, 1)
    assert found.rounds["lorayard"][Case.CROWD][0]["lost"] == 0


@pytest.mark.processes
def test_a_contender_that_does_not_start_is_left_out_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent() -> None:
        from benchmarks.data_plane.contenders import Absent  # noqa: PLC0415

        raise Absent("no such thing here")

    contenders: dict[str, Callable[[], None] | None] = {"direct": None, "haproxy": absent}
    monkeypatch.setattr("benchmarks.data_plane.__main__.CONTENDERS", contenders)
    out = tmp_path / "found.json"
    options = "--rounds 1 --seconds 0.2 --only single --contenders direct,haproxy --crowd 1"
    monkeypatch.setattr(sys, "argv", ["x", *options.split(), "--json", str(out)])
    main()
    written = json.loads(out.read_text())["results"]
    assert written["left_out"] == {"haproxy": "no such thing here"}
    assert "left out: haproxy: no such thing here" in capsys.readouterr().out
