"""Real against simulated: the figures, the verdict, and a simulation compared with itself."""

import math
from pathlib import Path

import pytest

from router.config import load
from sim.commands.arguments import DEFAULT_CONFIG
from sim.report.validation import cells, markdown
from sim.validate.compare import compare, figures
from sim.validate.record import Served, read_record
from sim.validate.simulate import simulate
from sim.validate.workloads import CASES, rows


def served(number: int, *, use: str = "hit", ttft_s: float | None = 0.5, label: str = "") -> Served:
    completed = ttft_s is not None
    return Served(
        label,
        number * 1000.0,
        100,
        11,
        "base:a",
        "base-0",
        use,
        completed,
        ttft_s,
        ttft_s + 1.0 if ttft_s is not None else None,
    )


def test_the_figures_of_a_run() -> None:
    run = [served(0, use="cold"), served(1), served(2, ttft_s=1.5), served(3, ttft_s=None)]
    found = figures(run, evictions=7)
    assert found["ttft_s", "p50"] == 0.5
    assert found["ttft_s", "p99"] == math.inf, "one was not answered"
    assert found["itl_s", "mean"] == pytest.approx(0.1)
    assert found["throughput", "output tokens/s"] == pytest.approx(3 * 11 / 4.5)
    assert (found["adapters", "hits"], found["adapters", "loads"]) == (3, 1)
    assert found["adapters", "evictions"] == 7


VERDICTS = [
    # real runs, simulated, the goal of ttft p50 -> met
    ((1.0, 1.0), 1.09, True),
    ((1.0, 1.0), 1.11, False),
    ((0.9, 1.1), 1.19, True),  # the real runs differ by 20%
    ((0.9, 1.1), 1.21, False),
    ((0.0, 0.0), 0.0, True),
    ((math.inf, 1.0), 1.0, False),
]


@pytest.mark.parametrize(("real", "simulated", "met"), VERDICTS)
def test_near_enough_is_within_the_goal_or_the_noise(
    real: tuple[float, ...], simulated: float, met: bool
) -> None:
    key = ("ttft_s", "p50")
    [one] = compare("steady", [{key: value} for value in real], [{key: simulated}])
    assert one.met is met
    assert cells(one)[-1] == {True: "met", False: "missed", None: ""}[met]


def test_a_simulation_is_itself() -> None:
    config = load(DEFAULT_CONFIG)
    names = [f"a{number:03d}" for number in range(100)]
    asked: list[Served] = []
    start_ms = 0.0
    for case in CASES[:2]:
        made = rows(case, base="base", names=names, slots=64, rate=20, requests=80, seed=1)
        assert {str(row.model).partition(":")[0] for row in made} == {"base"}
        asked += [
            Served(
                f"{case.name}/0",
                start_ms + row.timestamp,
                row.input_length,
                row.output_length,
                str(row.model),
                "",
                "none",
                completed=False,
                ttft_s=None,
                e2e_s=None,
            )
            for row in made
        ]
        start_ms = asked[-1].timestamp_ms + 10_000
    first, again = (simulate(config, asked, "affinity", 5) for _ in range(2))
    assert first == again
    assert sum(first.evictions.values()) >= 0
    for label in first.evictions:
        runs = [
            figures([one for one in run.served if one.label == label], run.evictions[label])
            for run in (first, again)
        ]
        assert all(one.error == 0 for one in compare(label, runs[:1], runs[1:]))


def test_every_case_asks_for_what_it_says() -> None:
    for case in CASES:
        names = [f"a{number}" for number in range(12)]
        made = rows(case, base="b", names=names, slots=8, rate=2, requests=400, seed=0)
        assert len(made) == round(case.requests * 400)
        assert len({row.model for row in made}) <= round(case.adapters * 8)
        mean = sum(row.input_length for row in made) / len(made)
        assert mean == pytest.approx(case.input_mean, rel=0.15)
        span_s = (made[-1].timestamp - made[0].timestamp) / 1000
        assert len(made) / span_s == pytest.approx(2 * case.share, rel=0.5)


def test_a_recording_is_read(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(
        '{"timestamp":5.0,"input_length":9,"output_length":4,"session_id":"steady/0","extra":'
        '{"model":"b:a","id":"x","outcome":"completed","worker":"b-0","adapter_use":"cold",'
        '"queued_s":0.0,"load_s":0.1,"ttft_s":0.2,"e2e_s":0.5}}\n'
        '{"timestamp":6.0,"input_length":9,"output_length":4,"extra":{"model":"b","id":"y",'
        '"outcome":"queue_full","queued_s":0.0,"load_s":0.0,"e2e_s":0.0}}\n'
    )
    first, second = read_record(path)
    assert (first.label, first.use, first.completed) == ("steady/0", "cold", True)
    assert first.itl_s == pytest.approx(0.1)
    assert not second.completed
    assert second.row.model == "b"


def test_the_report_has_every_case_and_figure() -> None:
    run = figures([served(0), served(1)], 0)
    found = compare(CASES[0].name, [run, run], [run])
    about = {
        "command": "c", "date": "d", "ran_on": "m", "calibrated": "x", "workers": 2,
        "model": "b", "slots": 4,
        "calibration": "x", "runs": 2, "simulations": 1,
    }  # fmt: skip
    text = markdown(found, about, CASES[:1])
    assert "6 of 6 goals met" in text
    assert "| ttft_s p99 |" in text
