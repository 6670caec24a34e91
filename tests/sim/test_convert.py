import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.__main__ import main
from sim.traces import TraceRow, read
from sim.traces.profile import Locality, Profile
from sim.traces.write import write
from sim.workload import AdapterDraw

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:{second // 60:02d}:{second % 60:02d}.1234560,{second + 10},5\n"
    for second in range(200)
)
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,5}", fullmatch=True).filter(
    lambda name: ".." not in name
)
ROWS = st.builds(
    TraceRow,
    st.floats(0, 1e9).map(lambda at: round(at, 3)),
    st.integers(0, 100_000_000),
    st.integers(0, 100_000_000),
    st.none() | NAMES | st.tuples(NAMES, NAMES).map(":".join),
    st.none() | st.text(max_size=5),
    st.text(max_size=5),
    st.integers(-5, 5),
    st.lists(st.integers(0, 1 << 62), max_size=3).map(tuple),
)


@given(rows=st.lists(ROWS, min_size=1, max_size=20))
@settings(max_examples=100, deadline=None)
def test_what_is_written_is_read_again(
    rows: list[TraceRow], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "round" / "trace.jsonl"
    path.parent.mkdir(exist_ok=True)
    rows.sort(key=lambda row: row.timestamp)
    write(path, rows)
    assert list(read(path)) == rows
    assert [entry.name for entry in path.parent.iterdir()] == ["trace.jsonl"]


def test_a_row_holds_the_contracts_fields_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    write(path, [TraceRow(1, 2, 3), TraceRow(1.5, 2, 3, "b:a", "s", "t", 4, (5, 6))])
    assert path.read_text() == (
        '{"timestamp":1,"input_length":2,"output_length":3}\n'
        '{"timestamp":1.5,"input_length":2,"output_length":3,"hash_ids":[5,6],"session_id":"s",'
        '"tenant":"t","priority":4,"extra":{"model":"b:a"}}\n'
    )


@pytest.fixture
def azure(tmp_path: Path) -> Path:
    path = tmp_path / "azure.csv"
    path.write_text(AZURE)
    return path


def converted(tmp_path: Path, *arguments: object) -> list[TraceRow]:
    out = tmp_path / "out.jsonl"
    *inputs, options = arguments
    assert isinstance(options, list)
    assert main(["convert", *map(str, inputs), str(out), *map(str, options)]) == 0
    return list(read(out))


def test_times_and_lengths_stay_and_converting_again_changes_nothing(
    tmp_path: Path, azure: Path
) -> None:
    rows = converted(tmp_path, azure, [])
    assert rows == list(read(azure))
    once = (tmp_path / "out.jsonl").read_bytes()
    again = tmp_path / "again.jsonl"
    assert main(["convert", str(tmp_path / "out.jsonl"), str(again)]) == 0
    assert again.read_bytes() == once


def test_a_converted_trace_replays_as_the_trace_with_drawn_adapters(
    tmp_path: Path, azure: Path
) -> None:
    drawn = ["--adapters", "20", "--seed", "3"]
    converted(tmp_path, azure, drawn)
    digests = []
    for options in ([azure, *drawn], [tmp_path / "out.jsonl", "--seed", "3"]):
        result = tmp_path / "result.json"
        assert main(["replay", *map(str, options), "--json", str(result)]) == 0
        digests.append(json.loads(result.read_text())["digest"])
    assert digests[0] == digests[1]


def test_independent_draws_have_no_locality(tmp_path: Path, azure: Path) -> None:
    options = ["--adapters", "20", "--seed", "3", "--adapters-from"]
    local = converted(tmp_path, azure, [*options, "sessions"])
    zipf = converted(tmp_path, azure, [*options, "zipf"])
    draw = AdapterDraw(20, locality=0.0, zipf=1.0, seed=3)
    assert [row.model for row in zipf] == [f"base:{draw.next()}" for _ in zipf]
    assert hit_rate(local) > 0.7 > hit_rate(zipf)


def hit_rate(rows: list[TraceRow]) -> float:
    locality = Locality()
    for row in rows:
        locality.add(str(row.model))
    return locality.hit_rate(4)


def test_a_session_keeps_its_adapter_and_a_named_one_stays(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    write(
        source,
        [
            *(TraceRow(at, 1, 1, session_id=f"s{at % 7}") for at in range(100)),
            TraceRow(100, 1, 1, "mine:special"),
        ],
    )
    *rows, last = converted(tmp_path, source, ["--adapters", "50"])
    assert len({(row.session_id, row.model) for row in rows}) == 7
    assert last.model == "mine:special"
    *_, last = converted(tmp_path, source, ["--adapters", "50", "--base", "qwen"])
    assert last.model == "qwen:special"


SEQUENCES = [
    ("a\n\nb\nc\n", ["base:a", "base:b", "base:c", "base:a"]),
    ("\ufeffq:a\r\nb\r\n", ["base:a", "base:b", "base:a", "base:b"]),
    (
        '{"timestamp": 0, "input_length": 1, "output_length": 1, "extra": {"model": "x:a"}}\n'
        '{"timestamp": 0, "input_length": 1, "output_length": 1, "extra": {"model": "x"}}\n',
        ["base:a", None, "base:a", None],
    ),
]


@pytest.mark.parametrize(("text", "models"), SEQUENCES)
def test_a_second_files_sequence_is_followed_and_repeated(
    tmp_path: Path,
    azure: Path,
    text: str,
    models: list[str | None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = tmp_path / "names"
    names.write_text(text, newline="")
    rows = converted(tmp_path, azure, ["--adapter-sequence", names, "--limit", 4])
    assert [row.model for row in rows] == models
    assert f"{names} is shorter than the trace: used 2 times" in capsys.readouterr().err


def test_speed_and_limit(tmp_path: Path, azure: Path) -> None:
    rows = converted(tmp_path, azure, ["--speed", 4, "--limit", 5])
    assert [row.timestamp for row in rows] == [0, 250, 500, 750, 1000]


def test_a_timed_trace_in_seconds(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    write(source, [TraceRow(1.5, 1, 1), TraceRow(2.75, 1, 1)])
    rows = converted(tmp_path, source, ["--time-unit", "s"])
    assert [row.timestamp for row in rows] == [0, 1250]


def test_several_traces_lie_over_or_after_one_another(tmp_path: Path) -> None:
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    write(one, [TraceRow(at, 1, 1, hash_ids=(0, 1), session_id="s") for at in (100, 200, 400)])
    write(other, [TraceRow(at, 2, 2, hash_ids=(0, 1), session_id="s") for at in (5, 155)])
    over = converted(tmp_path, one, other, [])
    assert [(row.timestamp, row.input_length) for row in over] == [
        (0, 1),
        (0, 2),
        (100, 1),
        (150, 2),
        (300, 1),
    ]
    assert Counter((row.session_id, row.hash_ids) for row in over) == {
        ("0:s", (0, 2)): 3,
        ("1:s", (1, 3)): 2,
    }
    after = converted(tmp_path, one, other, ["--join", "append"])
    assert [row.timestamp for row in after] == [0, 100, 300, 300, 450]


def test_bad_rows_stop_it_or_are_counted(
    tmp_path: Path, azure: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    azure.write_text(AZURE.replace(",13,", ",?,").replace(",15,", ",,"))
    out = tmp_path / "out.jsonl"
    out.write_text("what was there\n")
    assert main(["convert", str(azure), str(out)]) == 2
    assert "azure.csv:5: ContextTokens is `?`; expected" in capsys.readouterr().err
    assert out.read_text() == "what was there\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["azure.csv", "out.jsonl"]
    assert len(converted(tmp_path, azure, ["--skip-bad"])) == 198
    assert "bad rows left out: 2; the first: " in capsys.readouterr().err


def test_the_summary_shows_the_locality(
    tmp_path: Path, azure: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = tmp_path / "names"
    names.write_text("".join(f"a{number}\n" for number in range(5)))
    converted(tmp_path, azure, ["--adapter-sequence", names])
    shown = " ".join(capsys.readouterr().out.split())
    assert "requests 200 in 199.0 s" in shown
    assert "rate 1 requests/s, gaps with a coefficient of variation of 0.00" in shown
    assert "prompt tokens mean 109.5, p50 109, p99 207" in shown
    assert "adapters 5 in 200 requests; the most asked for, base:a0, in 20.0% of them" in shown
    assert "again after at most 4 others" in shown
    assert "4 slots hit 0.0%, 16 slots hit 97.5%" in shown


@given(st.lists(st.integers(0, 30), max_size=200), st.integers(1, 64))
@settings(max_examples=60, deadline=None)
def test_reuse_distances_give_an_lru_caches_hit_rate(names: list[int], slots: int) -> None:
    locality = Locality()
    cache: dict[int, None] = {}
    hits = 0
    for name in names:
        locality.add(str(name))
        hits += name in cache
        cache.pop(name, None)
        cache[name] = None
        if len(cache) > slots:
            del cache[next(iter(cache))]
    assert locality.hit_rate(slots) == (hits / len(names) if names else 0)


def test_a_trace_of_one_moment_has_no_rate() -> None:
    profile = Profile()
    profile.add(TraceRow(5, 1, 1))
    assert (profile.rate_rps, profile.gap_cv, profile.span_s) == (None, None, 0)


REFUSED = [
    (["in.jsonl", "in.jsonl"], "OUT: in.jsonl is read here; name another file"),
    (["in.jsonl", "nowhere/out.jsonl"], "OUT: there is no folder nowhere"),
    (["in.jsonl", "."], "OUT: . is a folder"),
    (["in.jsonl", "/dev/null"], "OUT: /dev/null is no file"),
    (["none.jsonl", "out.jsonl"], "none.jsonl: No such file"),
    (["in.jsonl", "out.jsonl", "--adapter-sequence", "no"], "no: No such file"),
    (["in.jsonl", "out.jsonl", "--adapter-sequence", "bad"], "bad:2: `../x` is no adapter's name"),
    (["in.jsonl", "out.jsonl", "--adapter-sequence", "in.jsonl"], "in.jsonl: names no adapter"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_cannot_be_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("in.jsonl"), [TraceRow(0, 1, 1)])
    Path("bad").write_text("fine\n../x\n")
    assert main(["convert", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out.jsonl").exists()
