"""Judge figures: who is best in each cell, how far ours is from it, and what the whole says.

Near means within `NEAR` of the best mean over seeds, where the best is taken over all peers, the
contender that the goals are about, and whoever is compared with them; two that are infinite are
equal. How far is paired by seed, since the requests of a seed are the same for all.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from benchmarks.policies.cells import Cell, Setting
from benchmarks.policies.replays import CellRun, Contender, Measured, digest
from sim.report.intervals import estimate, paired

REPORTED_SEEDS: Final = 100  # and above; those below are for tuning
NEAR: Final = 0.02
GOAL_RATIO: Final = 1.5  # of the best single peer's goodput
GOAL_COLD: Final = 0.5  # of its cold loads
# From where on a difference to the best is named as a reason.
MORE_COLD: Final = 1.1
MORE_BUSY: Final = 1.03
MORE_UNANSWERED: Final = 0.01
NO_REASON: Final = "none of these"
DIGITS: Final = 6


class Mean(msgspec.Struct, frozen=True, array_like=True):
    """A mean over seeds and half its 95% interval, None where there is none."""

    mean: float | None
    half: float | None


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """A contender in a cell: by seed what is compared, else means with half their intervals."""

    goodput_rps: tuple[float, ...]
    ttft_p99_s: tuple[float | None, ...]
    cold_loads: Mean
    hit_rate: Mean
    unanswered: Mean
    busiest: Mean
    digest: str


class CellFigures(msgspec.Struct, frozen=True, kw_only=True):
    """A cell under every contender."""

    cell: Cell
    adapters: int
    span_s: float
    offered_rps: float
    by_contender: dict[str, Figures]


class Study(msgspec.Struct, frozen=True, kw_only=True):
    """All that a report is written from. `judged` names the contender that the goals are about."""

    benchmark: str
    command: str
    date: str
    machine: str
    took_s: float
    setting: Setting
    seeds: tuple[int, ...]
    judged: str
    capacities_rps: dict[str, float]
    contenders: tuple[Contender, ...]
    left_out: tuple[str, ...]
    cells: tuple[CellFigures, ...]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """A contender against the best in one cell.

    `short` is how much less goodput than the best, as a share of the best; `short_half` half its
    interval. `ttft_p99_s` None is infinite.
    """

    cell: Cell
    goodput_rps: float
    best_goodput_rps: float
    best_goodput: str
    short: float
    short_half: float | None
    ttft_p99_s: float | None
    best_ttft_p99_s: float | None
    best_ttft: str
    near_goodput: bool
    near_ttft: bool
    why: tuple[str, ...] = ()

    @property
    def near(self) -> bool:
        """Whether it is near the best on both."""
        return self.near_goodput and self.near_ttft


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """A contender over all cells. `goodput_rps` is a geometric mean, `cold_loads` a sum of means."""

    name: str
    goodput_rps: float
    cold_loads: float
    near_goodput: int
    near_ttft: int
    near: int
    best_goodput: int


class Goal(msgspec.Struct, frozen=True):
    """One of the goals: what was asked for, what came out."""

    text: str
    found: str
    met: bool


def figures(run: CellRun, setting: Setting) -> CellFigures:
    """A cell's replays as what is kept of them."""
    first = next(iter(run.runs.values()))
    return CellFigures(
        cell=run.cell,
        adapters=setting.adapters(run.cell.ratio),
        span_s=_short(run.span_s),
        offered_rps=_short(statistics.fmean(one.requests for one in first) / run.span_s),
        by_contender={name: _figures(ones, run.span_s) for name, ones in run.runs.items()},
    )


def _figures(ones: Sequence[Measured], span_s: float) -> Figures:
    return Figures(
        goodput_rps=tuple(_short(one.good / span_s) for one in ones),
        ttft_p99_s=tuple(
            None if one.ttft_p99_s is None else _short(one.ttft_p99_s) for one in ones
        ),
        cold_loads=_mean([one.cold_loads for one in ones]),
        hit_rate=_mean([one.hit_rate for one in ones]),
        unanswered=_mean([one.unanswered for one in ones]),
        busiest=_mean([one.busiest for one in ones]),
        digest=digest(ones),
    )


def _mean(values: Sequence[float | None]) -> Mean:
    one = estimate(values)
    return Mean(
        None if one.mean is None else _short(one.mean),
        None if one.half is None else _short(one.half),
    )


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def peers(contenders: Sequence[Contender]) -> list[str]:
    """The names of those that are not ours."""
    return [one.name for one in contenders if not one.ours]


def judge(one: CellFigures, name: str, others: Sequence[str]) -> Verdict:
    """`name` against the best of itself and the others."""
    names = [name, *(other for other in others if other != name)]  # in a tie it is the best itself
    mine = one.by_contender[name]
    goodput = {each: statistics.fmean(one.by_contender[each].goodput_rps) for each in names}
    ttft = {each: estimate(one.by_contender[each].ttft_p99_s) for each in names}
    best_goodput = max(names, key=goodput.__getitem__)
    best_ttft = min(names, key=lambda each: math.inf if (mean := ttft[each].mean) is None else mean)
    best_rps = goodput[best_goodput]
    less = paired(one.by_contender[best_goodput].goodput_rps, mine.goodput_rps)
    assert less.mean is not None
    near_goodput = goodput[name] >= (1.0 - NEAR) * best_rps
    mine_s, best_s = ttft[name].mean, ttft[best_ttft].mean
    near_ttft = best_s is None or (mine_s is not None and mine_s <= (1.0 + NEAR) * best_s)
    reasons = dict.fromkeys(
        reason
        for best, missed in ((best_goodput, not near_goodput), (best_ttft, not near_ttft))
        if missed
        for reason in why(mine, one.by_contender[best])
    )
    return Verdict(
        cell=one.cell,
        goodput_rps=goodput[name],
        best_goodput_rps=best_rps,
        best_goodput=best_goodput,
        short=less.mean / best_rps if best_rps else 0.0,
        short_half=None if less.half is None or not best_rps else less.half / best_rps,
        ttft_p99_s=mine_s,
        best_ttft_p99_s=best_s,
        best_ttft=best_ttft,
        near_goodput=near_goodput,
        near_ttft=near_ttft,
        why=tuple(reasons) or (() if near_goodput and near_ttft else (NO_REASON,)),
    )


def why(mine: Figures, best: Figures) -> list[str]:
    """In which figures a contender is worse than the best, by the bounds above."""
    found = []
    if (mine.cold_loads.mean or 0.0) > MORE_COLD * (best.cold_loads.mean or 0.0):
        found.append("more cold loads")
    if (mine.busiest.mean or 1.0) > MORE_BUSY * (best.busiest.mean or 1.0):
        found.append("less even")
    if (mine.unanswered.mean or 0.0) > (best.unanswered.mean or 0.0) + MORE_UNANSWERED:
        found.append("more unanswered")
    return found


def geometric_rps(cells: Sequence[CellFigures], name: str) -> float:
    """The geometric mean of a contender's goodput, each replay at least one good request."""
    return statistics.geometric_mean(
        statistics.fmean(max(rps, 1.0 / one.span_s) for rps in one.by_contender[name].goodput_rps)
        for one in cells
    )


def standings(study: Study) -> list[Standing]:
    """Every contender over all cells, the most goodput first.

    Each is near, or best, among all peers, the judged one and itself.
    """
    others = [*peers(study.contenders), study.judged]
    found = []
    for contender in study.contenders:
        name = contender.name
        verdicts = [judge(one, name, others) for one in study.cells]
        found.append(
            Standing(
                name=name,
                goodput_rps=geometric_rps(study.cells, name),
                cold_loads=math.fsum(
                    one.by_contender[name].cold_loads.mean or 0.0 for one in study.cells
                ),
                near_goodput=sum(one.near_goodput for one in verdicts),
                near_ttft=sum(one.near_ttft for one in verdicts),
                near=sum(one.near for one in verdicts),
                best_goodput=sum(one.best_goodput == name for one in verdicts),
            )
        )
    return sorted(found, key=lambda one: -one.goodput_rps)


def best_peer(study: Study) -> Standing:
    """The single peer with the most goodput over all cells."""
    others = peers(study.contenders)
    return next(one for one in standings(study) if one.name in others)


def verdicts(study: Study, name: str | None = None) -> list[Verdict]:
    """One contender, the judged one where none is named, in every cell."""
    name = name or study.judged
    return [judge(one, name, peers(study.contenders)) for one in study.cells]


def goals(study: Study) -> list[Goal]:
    """What the comparison was asked to show."""
    name = study.judged
    ranked = {one.name: one for one in standings(study)}
    mine, peer = ranked[name], best_peer(study)
    count = len(study.cells)
    ratio = mine.goodput_rps / peer.goodput_rps
    cold = mine.cold_loads / peer.cold_loads if peer.cold_loads else math.inf
    if not mine.cold_loads:
        cold = 0.0
    return [
        Goal(
            f"in every cell within {NEAR:.0%} of the best on goodput and on p99 time to first token",
            f"in {mine.near} of {count} cells (goodput {mine.near_goodput}, p99 {mine.near_ttft})",
            mine.near == count,
        ),
        Goal(
            f"over all cells at least {GOAL_RATIO:g} times the goodput of the best single peer",
            f"{ratio:.3g} times that of {peer.name}",
            ratio >= GOAL_RATIO,
        ),
        Goal(
            f"at most {GOAL_COLD:.0%} of that peer's cold loads",
            f"{cold:.1%}",
            cold <= GOAL_COLD,
        ),
    ]


def tally(study: Study, key: Callable[[Cell], Any]) -> dict[Any, tuple[float, int, int, int, int]]:
    """By a key of the cell: the judged over the best single peer, and its cells near, and all.

    Near counts those on both figures, on goodput, and on p99.
    """
    name, peer = study.judged, best_peer(study).name
    found: dict[Any, list[tuple[CellFigures, Verdict]]] = {}
    for one, verdict in zip(study.cells, verdicts(study), strict=True):
        found.setdefault(key(one.cell), []).append((one, verdict))
    result = {}
    for value, group in found.items():
        cells = [one for one, _ in group]
        ratio = geometric_rps(cells, name) / geometric_rps(cells, peer)
        result[value] = (
            ratio,
            sum(one.near for _, one in group),
            sum(one.near_goodput for _, one in group),
            sum(one.near_ttft for _, one in group),
            len(group),
        )
    return result


def write(study: Study, path: Path) -> None:
    """As JSON, a line for each cell, with the summary for those who read nothing else."""
    head: Mapping[str, Any] = {
        **_plain(msgspec.structs.asdict(study)),
        "standings": _plain(standings(study)),
        "goals": _plain(goals(study)),
    }
    lines = [f"{_json(key)}: {_json(value)}" for key, value in head.items() if key != "cells"]
    cells = ",\n".join(_json(one) for one in head["cells"])
    path.write_text("{\n" + ",\n".join([*lines, f'"cells": [\n{cells}\n]']) + "\n}\n")


def load(path: Path) -> Study:
    """What `write` wrote. Raises `OSError` and `msgspec.ValidationError`."""
    return msgspec.json.decode(
        path.read_bytes(), type=Study, dec_hook=lambda kind, value: kind(value)
    )


def _plain(value: Any) -> Any:  # noqa: ANN401
    return msgspec.to_builtins(value, enc_hook=str)


def _json(value: Any) -> str:  # noqa: ANN401
    return msgspec.json.encode(value).decode()
