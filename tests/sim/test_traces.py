from pathlib import Path

import pytest

from sim.traces import TraceError, read, scan
from sim.workload import AdapterDraw

GOOD = '{"timestamp": 0, "input_length": 10, "output_length": 5}\n'
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"

BAD = [
    ("", "trace:1: the file is empty"),
    ("hello\n", "trace:1: neither JSON lines"),
    (GOOD + "{broken\n" + GOOD, "trace:2: not valid JSON"),
    (
        GOOD + '{"timestamp": 1, "input_length": 3}\n',
        "trace:2: `output_length` is missing; a row needs",
    ),
    (
        GOOD + '{"timestamp": 1, "input_length": "x", "output_length": 1}\n',
        "trace:2: input_length: Expected",
    ),
    (
        GOOD + '{"timestamp": 1, "input_length": -1, "output_length": 1}\n',
        "trace:2: input_length: Expected",
    ),
    (
        '{"timestamp": 9, "input_length": 1, "output_length": 1}\n' + GOOD,
        "trace:2: timestamp 0 ms is earlier than the row before (9 ms); sort",
    ),
    (AZURE.replace("Context", "Prompt"), "trace:1: the header is"),
    (AZURE + "2023-11-16 18:15:46.68,374\n", "trace:2: 2 fields, expected 3"),
    (AZURE + "yesterday,1,2\n", "trace:2: TIMESTAMP `yesterday` is no time"),
    (AZURE + "2023-11-16 18:15:46.6805900,many,2\n", "trace:2: ContextTokens `many` is no number"),
    (AZURE, "trace:1: no rows"),
    (
        GOOD + '{"timestamp": 1, "input_length": 1.5, "output_length": 1}\n',
        "trace:2: input_length: Exp",
    ),
    (GOOD + '{"a": ' + "[" * 50_000 + "\n", "trace:2: not valid JSON"),
    (
        '{"timestamp": 0, "input_length": 1, "output_length": 1, "extra": {"model": "b:../x"}}\n',
        "trace:1: extra.model: `b:../x` is no model id",
    ),
    (AZURE + "2023-11-16 18:15:46,1," + "9" * 5000 + "\n", "trace:2: GeneratedTokens `9"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[message[:50] for _, message in BAD])
def test_a_bad_row_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(TraceError) as error:
        scan(path)
    assert str(error.value).removeprefix(f"{tmp_path}/").startswith(message)


def test_all_fields_of_a_json_row_are_read(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(
        '{"timestamp": 27.5, "input_length": 10, "output_length": 5, "hash_ids": [1, 2], '
        '"session_id": 7, "tenant": "t", "priority": 2, "extra": {"model": "b:a"}, "more": []}\n\n'
    )
    [row] = read(path)
    assert (row.timestamp, row.input_length, row.output_length) == (27.5, 10, 5)
    assert (row.hash_ids, row.session_id, row.tenant, row.priority) == ((1, 2), "7", "t", 2)
    assert row.model == "b:a"


def test_azures_times_count_from_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(
        AZURE
        + "2023-11-16 18:15:46.6805900,374,44\n2024-01-01 00:00:00+00:00,1,2\n".replace(
            "2024-01-01 00:00:00+00:00", "2023-11-16 18:15:50.9951690"
        )
    )
    first, second = read(path)
    assert (first.timestamp, first.input_length, first.output_length) == (0.0, 374, 44)
    assert second.timestamp == pytest.approx(4314.579)
    assert scan(path).requests == 2


def test_a_byte_order_mark_and_zones_are_read(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert scan(path).requests == 1
    path.write_text(
        AZURE + "2024-05-10 00:00:00.009930+00:00,1,2\n2024-05-10T02:00:01.0099301+02:00,1,2\n"
    )
    assert [row.timestamp for row in read(path)] == [0.0, 1000.0]


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
