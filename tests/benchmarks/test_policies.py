"""The comparison of policies: what is offered, what is judged, what is written."""

import math
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

from benchmarks.policies.__main__ import main
from benchmarks.policies.cells import (
    CROWD_FACTOR,
    CROWD_SHARE,
    Cell,
    Setting,
    Source,
    all_cells,
    offered,
    why_not,
)
from benchmarks.policies.replays import CONTENDERS, OURS, Contender, run
from benchmarks.policies.report import markdown
from benchmarks.policies.verdict import (
    CellFigures,
    Figures,
    Mean,
    Study,
    figures,
    goals,
    judge,
    load,
    standings,
    write,
)

STEADY = Cell(source=Source.STEADY, load=0.5, ratio=1.0, locality=0.8)
TWO = (
    Contender(name="affinity", policy="affinity", ours=True),
    Contender(name="round_robin", policy="round_robin"),
)
TWO_NAMES = ("affinity", "round_robin")
ONE = (1.0, 1.0)
NO_COLD: Mapping[str, float] = {}


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    lengths = tmp_path / "lengths.csv"
    lines = [
        f"2023-11-16 18:{number // 60:02d}:{number % 60:02d}.0000000,{100 + number},{5 + number % 9}"
        for number in range(120)
    ]
    lengths.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]) + "\n")
    return Setting(
        workers=2, slots=2, duration_s=6.0, azure=lengths, mooncake=tmp_path / "none.jsonl"
    )


def made_up(
    goodput: Mapping[str, tuple[float, ...]],
    p99: Mapping[str, tuple[float | None, ...]],
    cold: Mapping[str, float] = NO_COLD,
) -> CellFigures:
    none = Mean(0.0, 0.0)
    return CellFigures(
        cell=STEADY,
        adapters=4,
        span_s=10.0,
        offered_rps=20.0,
        by_contender={
            name: Figures(
                goodput_rps=goodput[name],
                ttft_p99_s=p99[name],
                cold_loads=Mean(cold.get(name, 1.0), 0.0),
                hit_rate=none,
                unanswered=none,
                busiest=Mean(1.0, 0.0),
                digest="",
            )
            for name in goodput
        },
    )


def study(*cells: CellFigures) -> Study:
    return Study(
        benchmark="made up",
        command="none",
        date="2026-01-01",
        machine="none",
        took_s=0.0,
        setting=Setting(azure=Path("azure.csv"), mooncake=Path("mooncake.jsonl")),
        seeds=(100, 101),
        judged="affinity",
        capacities_rps={"steady": 20.0},
        contenders=TWO,
        left_out=("nothing",),
        cells=cells,
    )


@pytest.mark.parametrize(
    ("mine", "best", "near_goodput", "near_ttft", "short"),
    [
        # goodput and p99 by seed, of ours and of the best peer
        (((9.8, 9.8), (1.02, 1.02)), ((10.0, 10.0), (1.0, 1.0)), True, True, 0.02),
        (((9.7, 9.7), (1.03, 1.03)), ((10.0, 10.0), (1.0, 1.0)), False, False, 0.03),
        (((11.0, 11.0), (0.5, 0.5)), ((10.0, 10.0), (1.0, 1.0)), True, True, 0.0),
        (((9.0, 10.8), (1.0, 1.0)), ((10.0, 10.0), (1.0, 1.0)), True, True, 0.01),
        (((10.0, 10.0), (None, None)), ((10.0, 10.0), (None, None)), True, True, 0.0),
        (((10.0, 10.0), (1.0, None)), ((10.0, 10.0), (1.0, 1.0)), True, False, 0.0),
        (((10.0, 10.0), (9.0, 9.0)), ((10.0, 10.0), (1.0, None)), True, True, 0.0),
        (((0.0, 0.0), (None, None)), ((0.0, 0.0), (None, None)), True, True, 0.0),
    ],
)
def test_near_is_within_two_percent_of_the_best(
    mine: tuple[tuple[float, ...], tuple[float | None, ...]],
    best: tuple[tuple[float, ...], tuple[float | None, ...]],
    near_goodput: bool,
    near_ttft: bool,
    short: float,
) -> None:
    cell = made_up({"affinity": mine[0], "peer": best[0]}, {"affinity": mine[1], "peer": best[1]})
    verdict = judge(cell, "affinity", ["peer"])
    assert (verdict.near_goodput, verdict.near_ttft) == (near_goodput, near_ttft)
    assert verdict.near == (near_goodput and near_ttft)
    assert verdict.short == pytest.approx(short)
    assert bool(verdict.why) == (not verdict.near)


def test_how_far_from_the_best_is_paired_by_seed() -> None:
    goodput = {"affinity": (8.0, 18.0), "peer": (10.0, 20.0)}
    verdict = judge(made_up(goodput, dict.fromkeys(goodput, ONE)), "affinity", ["peer"])
    assert verdict.short == pytest.approx(2.0 / 15.0)
    assert verdict.short_half == pytest.approx(0.0)  # the seeds differ, the difference does not


def test_a_goal_is_judged_by_the_best_single_peer_and_no_goodput_counts_as_one_request() -> None:
    p99 = dict.fromkeys(TWO_NAMES, ONE)
    high = {"affinity": (18.0, 18.0), "round_robin": (8.0, 8.0)}
    low = {"affinity": (0.2, 0.2), "round_robin": (0.0, 0.0)}
    found = study(
        made_up(high, p99, {"affinity": 2.0, "round_robin": 6.0}),
        made_up(low, p99, {"affinity": 1.0, "round_robin": 0.0}),
    )
    ranked = {one.name: one for one in standings(found)}
    assert ranked["affinity"].goodput_rps == pytest.approx(math.sqrt(18.0 * 0.2))
    assert ranked["round_robin"].goodput_rps == pytest.approx(math.sqrt(8.0 * 0.1))
    assert (ranked["affinity"].near, ranked["round_robin"].near) == (2, 0)
    assert [goal.met for goal in goals(found)] == [True, True, True]
    assert goals(found)[2].found == "50.0%"


def test_a_report_names_the_missed_cell_and_is_the_same_from_its_json(tmp_path: Path) -> None:
    p99 = dict.fromkeys(TWO_NAMES, ONE)
    goodput = {"affinity": (5.0, 5.0), "round_robin": (10.0, 10.0)}
    found = study(made_up(goodput, p99, {"affinity": 9.0}))
    text = markdown(found)
    assert f"| {STEADY.name} | 5.00 | 10.00 round_robin | 50.0% ± 0.0% |" in text
    assert "more cold loads" in text
    write(found, tmp_path / "study.json")
    assert markdown(load(tmp_path / "study.json")) == text


def test_the_same_requests_for_every_contender_and_the_same_result_over_processes(
    setting: Setting,
) -> None:
    capacity = {Source.STEADY: 20.0}
    here = run([STEADY], TWO, [100, 101], setting, capacity)
    there = run([STEADY], TWO, [100, 101], setting, capacity, jobs=2)
    assert here == there
    (cell,) = here
    assert [len(ones) for ones in cell.runs.values()] == [2, 2]
    assert [one.requests for one in cell.runs["affinity"]] == [
        one.requests for one in cell.runs["round_robin"]
    ]
    kept = figures(cell, setting)
    assert kept.adapters == 4
    assert kept.by_contender["affinity"].digest != kept.by_contender["round_robin"].digest


@pytest.mark.parametrize("source", [Source.STEADY, Source.BURSTY, Source.FLASH, Source.AZURE])
def test_a_load_is_a_share_of_capacity_whatever_the_arrivals(
    setting: Setting, source: Source
) -> None:
    longer = msgspec.structs.replace(setting, duration_s=6000.0)  # bursts even out
    cell = Cell(source=source, load=0.5, ratio=1.0, locality=0.8)
    found = offered(cell, 100, longer, 20.0)
    assert len(found.rows) / found.span_s == pytest.approx(10.0, rel=0.1)
    assert all(row.model and row.model.startswith("base:adapter-") for row in found.rows)


def test_a_crowd_asks_for_one_adapter(setting: Setting) -> None:
    cell = Cell(source=Source.FLASH, load=0.5, ratio=4.0, locality=0.0)
    found = offered(cell, 100, msgspec.structs.replace(setting, duration_s=600.0), 20.0)
    asked = sum(row.model == "base:adapter-0008" for row in found.rows) / len(found.rows)
    crowd = (CROWD_FACTOR - 1) * CROWD_SHARE
    assert asked == pytest.approx(crowd / (1 + crowd), rel=0.1)


def test_the_grid_has_every_cell_once() -> None:
    cells = list(all_cells())
    assert len(cells) == len(set(cells)) == 3 * 3 * 6 * 3 + 2 * 3 * 2


def test_a_trace_that_is_not_there_is_left_out(setting: Setting) -> None:
    assert "none.jsonl" in (why_not(Source.MOONCAKE, setting) or "")
    named = msgspec.structs.replace(setting, mooncake=setting.azure)
    assert "no hash ids" in (why_not(Source.MOONCAKE, named) or "")


def test_the_command_writes_a_report_and_writes_it_again(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, page, again = tmp_path / "out.json", tmp_path / "out.md", tmp_path / "again.md"
    peer = next(one.name for one in CONTENDERS if not one.ours)
    arguments = [
        *("--azure", str(setting.azure), "--mooncake", str(setting.mooncake), "--jobs", "1"),
        *("--workers", "2", "--slots", "2", "--duration", "3", "--seeds", "2"),
        *("--only", "steady, load 0.5, adapters/slots 1, locality 0.8", "--contenders", peer),
    ]
    assert main([*arguments, "--json", str(data), "--report", str(page)]) == 0
    assert main(["--render", str(data), "--report", str(again)]) == 0
    assert page.read_text() == again.read_text()
    assert {one.name for one in load(data).contenders} == {OURS, peer}
    assert "left out" in capsys.readouterr().err
