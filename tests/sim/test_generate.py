import json
import math
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import fmean, pstdev

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.__main__ import main
from sim.generate.arrivals import (
    Arrivals,
    Diurnal,
    Flash,
    Gamma,
    Mmpp,
    Poisson,
    State,
    mean_rps,
    times_us,
)
from sim.generate.draws import gamma, normal
from sim.generate.lengths import Fixed, Independent, LogNormal
from sim.generate.workload import Adapters, Sessions, Workload, generate
from sim.traces import TraceRow, read
from sim.traces.profile import Profile

ROOT = Path(__file__).parents[2]
SHORT = Independent(Fixed(10), Fixed(5))


def workload(arrivals: Arrivals = Poisson(5.0), **more: object) -> Workload:  # noqa: B008  (frozen)
    fields: dict[str, object] = {"seed": 1, "requests": 5000, "lengths": SHORT} | more
    return Workload(arrivals=arrivals, **fields)  # type: ignore[arg-type]


def profile(rows: list[TraceRow]) -> Profile:
    found = Profile()
    for row in rows:
        found.add(row)
    return found


rates = st.floats(0.01, 1000)
processes: st.SearchStrategy[Arrivals] = st.one_of(
    st.builds(Poisson, rates),
    st.builds(Gamma, rates, st.floats(0.1, 5)),
    st.builds(
        Mmpp,
        st.lists(st.builds(State, rates, st.floats(0.1, 100)), min_size=2, max_size=4).map(tuple),
    ),
    st.builds(Diurnal, rates, st.floats(0, 1), st.floats(1, 1e5)),
)


@given(
    processes,
    st.lists(st.builds(Flash, st.floats(0, 50), st.floats(0.1, 50), st.floats(1.1, 5)), max_size=2),
    st.integers(),
)
@settings(max_examples=60, deadline=None)
def test_any_workload_is_in_order_and_the_same_again(
    arrivals: Arrivals, flashes: list[Flash], seed: int
) -> None:
    made = workload(
        arrivals,
        seed=seed,
        requests=60,
        flashes=tuple(flashes),
        adapters=Adapters(9),
        sessions=Sessions(3, 4),
        lengths=Independent(LogNormal(100, 2.0, 300), Fixed(7)),
        tenants=(("a", 3.0), ("b", 1.0)),
        priorities=((0, 1.0), (5, 1.0)),
    )
    rows = list(generate(made))
    assert len(rows) == 60
    assert all(one.timestamp <= other.timestamp for one, other in pairwise(rows))
    assert all(round(row.timestamp, 3) == row.timestamp >= 0 for row in rows)
    assert all(1 <= row.input_length <= 300 and row.output_length == 7 for row in rows)
    assert all(row.tenant in {"a", "b"} and row.priority in {0, 5} for row in rows)
    assert rows == list(generate(made))
    # What is recorded is all that the rows depend on.
    again = msgspec.convert(json.loads(json.dumps(made.record())), Workload)
    assert again == made


RATES: list[tuple[Arrivals, float, float]] = [
    (Poisson(5.0), 5.0, 1.0),
    (Gamma(20.0, 3.0), 20.0, 3.0),
    (Gamma(20.0, 0.5), 20.0, 0.5),
    (Mmpp((State(2.0, 20.0), State(20.0, 5.0), State(0.0, 5.0))), 140 / 30, 0.0),
    (Diurnal(20.0, 0.8, 100.0), 20.0, 0.0),
]


@pytest.mark.parametrize(("arrivals", "rate_rps", "cv"), RATES)
def test_rate_and_burstiness_are_those_asked_for(
    arrivals: Arrivals, rate_rps: float, cv: float
) -> None:
    """`cv` 0 is not looked at: those processes have none of their own."""
    assert mean_rps(arrivals) == pytest.approx(rate_rps)
    found = profile(list(generate(workload(arrivals, requests=20_000))))
    assert found.rate_rps == pytest.approx(rate_rps, rel=0.1)
    if cv:
        assert found.gap_cv == pytest.approx(cv, rel=0.07)


@pytest.mark.parametrize("shape", [0.1, 0.5, 1.0, 4.0])
def test_gamma_draws_have_its_mean_and_deviation(shape: float) -> None:
    rng = Random(1)
    drawn = [gamma(rng, shape) for _ in range(20_000)]
    assert fmean(drawn) == pytest.approx(shape, rel=0.05)
    assert pstdev(drawn) == pytest.approx(math.sqrt(shape), rel=0.05)


def test_normal_draws_are_standard() -> None:
    rng = Random(1)
    drawn = [normal(rng) for _ in range(20_000)]
    assert (fmean(drawn), pstdev(drawn)) == pytest.approx((0, 1), abs=0.02)


def test_a_day_begins_at_its_lowest_and_peaks_half_way() -> None:
    made = workload(Diurnal(100.0, 0.9, 100.0), requests=None, duration_s=400.0)
    quarters = Counter(int(row.timestamp / 25_000) % 4 for row in generate(made))
    # The mean of 1 - 0.9 cos over a quarter: 1 - 0.9 (2 / pi) at the trough, 1 + as much at the peak.
    low, high = 1 - 1.8 / math.pi, 1 + 1.8 / math.pi
    for quarter, mean in enumerate((low, high, high, low)):
        assert quarters[quarter] / 10_000 == pytest.approx(mean, rel=0.06)


def test_mmpp_dwells_in_its_states() -> None:
    times = times_us(Mmpp((State(0.0, 50.0), State(100.0, 50.0))), (), 3)
    seconds = [next(times)[0] // 1_000_000 for _ in range(20_000)]
    silent = 1 - len(set(seconds)) / (seconds[-1] - seconds[0] + 1)
    assert silent == pytest.approx(0.5, abs=0.25)


@pytest.mark.parametrize("adapter", [None, "hot"])
def test_a_flash_crowd_multiplies_the_rate_while_it_lasts(adapter: str | None) -> None:
    made = workload(
        duration_s=300.0,
        requests=None,
        flashes=(Flash(100.0, 50.0, 10.0, adapter),),
        adapters=Adapters(20, locality=0.0),
    )
    rows = list(generate(made))
    crowd = [row for row in rows if 100_000 <= row.timestamp < 150_000]
    before = [row for row in rows if row.timestamp < 100_000]
    assert len(crowd) / 50 == pytest.approx(50, rel=0.15)
    assert len(before) / 100 == pytest.approx(5, rel=0.15)
    hot = sum(row.model == "base:hot" for row in crowd)
    assert hot / len(crowd) == (pytest.approx(0.9, abs=0.03) if adapter else 0)
    assert not any(row.model == "base:hot" for row in before)


def test_lognormal_lengths_have_their_mean() -> None:
    rows = list(generate(workload(lengths=Independent(LogNormal(500, 1.0), LogNormal(50, 0.0)))))
    assert fmean(row.input_length for row in rows) == pytest.approx(500, rel=0.05)
    assert {row.output_length for row in rows} == {50}


def test_a_session_keeps_its_adapter_and_tenant() -> None:
    made = workload(
        adapters=Adapters(50),
        sessions=Sessions(5.0, 8),
        tenants=(("a", 3.0), ("b", 1.0)),
    )
    rows = list(generate(made))
    sessions = Counter(row.session_id for row in rows)
    assert len(rows) / len(sessions) == pytest.approx(5, rel=0.1)
    assert len({(row.session_id, row.model, row.tenant) for row in rows}) == len(sessions)
    tenants = Counter(row.tenant for row in rows)
    assert tenants["a"] / len(rows) == pytest.approx(0.75, abs=0.05)


def test_another_law_of_lengths_moves_nothing_else() -> None:
    one = generate(workload(adapters=Adapters(50)))
    other = generate(workload(adapters=Adapters(50), lengths=Independent(Fixed(9), Fixed(9))))
    for left, right in zip(one, other, strict=True):
        assert (left.timestamp, left.model) == (right.timestamp, right.model)


EVERYTHING = [
    *("--requests", "400", "--seed", "7", "--arrivals", "gamma", "--cv", "3", "--rate", "8"),
    *("--adapters", "40", "--zipf", "1.1", "--locality", "0.7", "--base", "qwen"),
    *("--sessions", "4", "--open-sessions", "16", "--tenants", "big=3,small=1"),
    *("--priorities", "0=9,1=1", "--flash", "5:5:4", "--flash", "20:5:4:adapter-0007"),
    *("--input-tokens", "lognormal:300:1:2000", "--output-tokens", "64"),
]


def test_the_same_seed_gives_the_same_bytes_in_any_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there, other = (tmp_path / name for name in ("here.jsonl", "there.jsonl", "other.jsonl"))
    assert main(["generate", str(here), *EVERYTHING]) == 0
    command = [sys.executable, "-m", "sim", "generate", str(there), *EVERYTHING]
    environment = os.environ | {"PYTHONHASHSEED": "4711"}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, capture_output=True)
    assert here.read_bytes() == there.read_bytes()
    assert main(["generate", str(other), *EVERYTHING, "--seed", "8"]) == 0
    assert here.read_bytes() != other.read_bytes()
    assert "400 in" in capsys.readouterr().out


def test_generated_bytes_are_those_of_every_machine(tmp_path: Path) -> None:
    """A few rows in full: a change of any draw is a change of `GENERATION`."""
    path = tmp_path / "out.jsonl"
    assert main(["generate", str(path), *EVERYTHING]) == 0
    lines = path.read_text().splitlines()
    assert lines[1:4] == PINNED
    first = json.loads(lines[0])
    assert first["extra"]["generated"]["generation"] == 1
    assert first["extra"]["generated"]["arrivals"] == {
        "process": "gamma",
        "rate_rps": 8.0,
        "cv": 3.0,
    }
    assert not any("generated" in line for line in lines[1:])


PINNED = [
    '{"timestamp":0.01,"input_length":400,"output_length":64,"session_id":"s1","tenant":"big","extra":{"model":"qwen:adapter-0000"}}',
    '{"timestamp":810.818,"input_length":111,"output_length":64,"session_id":"s1","tenant":"big","extra":{"model":"qwen:adapter-0000"}}',
    '{"timestamp":810.823,"input_length":1186,"output_length":64,"session_id":"s1","tenant":"big","extra":{"model":"qwen:adapter-0000"}}',
]


def test_lengths_may_be_those_of_a_trace(tmp_path: Path) -> None:
    source, path = tmp_path / "azure.csv", tmp_path / "out.jsonl"
    source.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,374,44\n"
        "2023-11-16 18:15:50,396,109\n"
    )
    assert main(["generate", str(path), "--requests", "50", "--lengths-from", str(source)]) == 0
    rows = list(read(path))
    assert {(row.input_length, row.output_length) for row in rows} == {(374, 44), (396, 109)}
    generated = json.loads(path.read_text().splitlines()[0])["extra"]["generated"]
    assert generated["lengths"]["source"] == "azure.csv"
    assert generated["lengths"]["requests"] == 2


def test_a_generated_trace_replays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.jsonl"
    assert main(["generate", str(path), "--requests", "100", "--adapters", "9"]) == 0
    assert main(["replay", str(path)]) == 0
    assert "100 = 100 completed" in capsys.readouterr().out


REFUSED = [
    (["--cv", "2"], "--cv: says nothing about poisson, which takes --rate"),
    (["--arrivals", "mmpp"], "--states: name mmpp's states"),
    (["--arrivals", "mmpp", "--states", "1:2,3:4", "--rate", "3"], "--rate: says nothing"),
    (["--duration", "0.00001"], "--duration: no request comes in 1e-05 s"),
    (["--open-sessions", "3"], "--open-sessions: say with --sessions"),
    (["--lengths-from", "x", "--input-tokens", "3"], "--lengths-from: leave --input-tokens"),
    (["--lengths-from", "none.csv"], "none.csv: No such file"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_be_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["generate", str(tmp_path / "out.jsonl"), *options]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


SYNTAX = [
    (["--input-tokens", "lognormal:1"], "lognormal:1 is no LAW: write 512 or"),
    (["--output-tokens", "0"], "0 is below 1"),
    (["--states", "1:2"], "name two states or more"),
    (["--states", "1e-9:1,0:1"], "fewer than 0.0001 requests a round of its states"),
    (["--input-tokens", "200000000"], "no trace takes more than 100,000,000 tokens"),
    (["--states", "0:2,0:3"], "one with a rate"),
    (["--states", "1,2"], "1 is no state: write RPS:SECONDS"),
    (["--flash", "1:2"], "1:2 is no CROWD"),
    (["--flash", "1:2:1"], "1 makes no crowd"),
    (["--flash", "1:2:3:../x"], "../x is no adapter's name"),
    (["--tenants", "a"], "a: write NAME=WEIGHT"),
    (["--tenants", "a=1,a=2"], "a=2: write NAME=WEIGHT, each name once"),
    (["--priorities", "high=1"], "high is no priority"),
    (["--base", "a:b"], "a:b is not a base model's name"),
    (["--sessions", "0.5"], "0.5 is not between 1 and"),
]


@pytest.mark.parametrize(("options", "message"), SYNTAX)
def test_an_option_says_what_would_be_right(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "out.jsonl", *options])
    assert message in " ".join(capsys.readouterr().err.split())


def test_equal_tenants_may_be_counted(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    assert main(["generate", str(path), "--requests", "50", "--tenants", "2"]) == 0
    assert {row.tenant for row in read(path)} == {"tenant-1", "tenant-2"}
