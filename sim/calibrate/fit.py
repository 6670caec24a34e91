"""Fit the latency model's coefficients to what was seen, with intervals.

The rule: relative errors, as logarithms, so that short steps count as much as long ones and twice as
long as much as half; a loss that grows linearly for large errors (`soft_l1`, SciPy's `least_squares`),
so that a disturbed measurement pulls little; no coefficient below nothing. That finds what steps cost
in relation to each other. How much in all is their mean: a request's time is a sum of many steps, and
what disturbs a step lengthens it. So at the end all times are scaled to the mean of what was seen, less
the twentieth part on either side. Intervals are percentiles of a bootstrap over points (Efron and
Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13): measurements of one point stay
together.

NumPy and SciPy come with the extra `calibrate`; nothing else of the simulator needs them.
"""

from collections.abc import Sequence
from typing import Any, Final, assert_never

import msgspec
import numpy as np
from scipy.optimize import least_squares

from sim.calibrate.design import Decode, Mixed
from sim.calibrate.measure import PromptSeen, StepSeen

NAMES: Final = (
    "request_overhead_s",
    "step_base_s",
    "step_per_request_s",
    "kv_read_per_token_s",
    "prefill_per_token_s",
    "prefill_per_pair_s",
    "prefill_lora_factor",
    "prefill_floor_s",
    "prefill_floor_lora_factor",
    "lora_factor",
    "lora_factor_per_adapter",
    "host_contention",
)
START: Final = (5e-3, 1e-2, 1e-3, 1e-7, 1e-5, 1e-9, 1.0, 1e-2, 1.0, 1.1, 0.01, 0.1)
# What means nothing is 1 for these, and 0 else.
ONE: Final = ("prefill_lora_factor", "prefill_floor_lora_factor", "lora_factor")
FLOOR: Final = ("prefill_floor_s", "prefill_floor_lora_factor")
WORTH: Final = 0.9  # of the cost without: what a term more has to bring it down to
TIMES: Final = [number for number, name in enumerate(NAMES) if name.endswith("_s")]
LEAST_S: Final = 1e-9
SMALL_ERROR: Final = 0.05
RESAMPLES: Final = 200
LEAST_DISTINCT: Final = 3
LOWER, UPPER = 2.5, 97.5

Matrix = np.ndarray[Any, np.dtype[np.float64]]


class Estimate(msgspec.Struct, frozen=True):
    """One coefficient and its 95% interval; None where the data says nothing about it."""

    value: float
    interval: tuple[float, float] | None


class Fit(msgspec.Struct, frozen=True):
    """The coefficients by name, and how far they are from what was seen."""

    estimates: dict[str, Estimate]
    steps: int
    prompts: int
    step_error: float  # median absolute relative error of steps
    prompt_error: float  # and of prompts


def fit(
    steps: Sequence[StepSeen],
    prompts: Sequence[PromptSeen],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Fit:
    """Fit all coefficients at once.

    Raises `ValueError` where there is too little to fit: fewer than three distinct batch sizes or
    prompts.
    """
    batches = {one.point.requests for one in steps if isinstance(one.point, Decode)}
    lengths = {one.point.tokens for one in prompts}
    if min(len(batches), len(lengths)) < LEAST_DISTINCT:
        raise ValueError("at least three batch sizes and three prompt lengths have to be measured")
    table, seen = _table(steps, prompts)
    free = _free(table)
    best = _with_or_without_floor(table, seen, free)
    groups = _groups(steps, prompts)
    random = np.random.default_rng(seed)
    drawn: list[Matrix] = []
    for _ in range(resamples):
        chosen = random.integers(0, len(groups), len(groups))
        rows = np.concatenate([groups[index] for index in chosen])
        drawn.append(_solve(table[rows], seen[rows], free, best))
    spread = np.percentile(np.array(drawn), [LOWER, UPPER], axis=0) if drawn else None
    estimates = {
        name: Estimate(
            float(best[number]),
            (float(spread[0, number]), float(spread[1, number]))
            if free[number] and spread is not None
            else None,
        )
        for number, name in enumerate(NAMES)
    }
    errors = np.abs(_predict(best, table) / seen - 1)
    count = len(steps)
    return Fit(
        estimates,
        count,
        len(prompts),
        float(np.median(errors[:count])),
        float(np.median(errors[count:])),
    )


# The columns of the table: what a step or a prompt was made of.
IS_PROMPT, RUNNING, ADAPTERS, CONTEXT, TOKENS, PAIRS, BESIDE = range(7)


def _table(steps: Sequence[StepSeen], prompts: Sequence[PromptSeen]) -> tuple[Matrix, Matrix]:
    rows: list[tuple[float, ...]] = [_step_row(one.point, one.context) for one in steps]
    rows += [
        (
            1,
            1,
            one.point.adapter,
            0,
            one.point.tokens,
            one.point.tokens * (one.point.tokens + 1) / 2,
            one.point.beside,
        )
        for one in prompts
    ]
    seen = [one.step_s for one in steps] + [one.ttft_s for one in prompts]
    return np.array(rows, dtype=np.float64), np.array(seen, dtype=np.float64)


def _step_row(point: Decode | Mixed, context: float) -> tuple[float, ...]:
    match point:
        case Decode():
            return (0, point.requests, point.adapters, context, 0, 0, point.beside)
        case Mixed():
            pairs = point.tokens * (point.tokens + 1) / 2
            return (0, point.requests + 1, point.adapters, context, point.tokens, pairs, 0)
    assert_never(point)


def _predict(values: Matrix, table: Matrix) -> Matrix:
    """Seconds, by the formula of sim/latency.py."""
    by = dict(zip(NAMES, values, strict=True))
    with_lora = table[:, ADAPTERS] > 0
    lora = np.where(
        with_lora, by["lora_factor"] + by["lora_factor_per_adapter"] * table[:, ADAPTERS], 1.0
    )
    prefill_lora = np.where(with_lora, by["prefill_lora_factor"], 1.0)
    step = (
        (by["step_base_s"] + by["step_per_request_s"] * table[:, RUNNING]) * lora
        + by["kv_read_per_token_s"] * table[:, CONTEXT]
        + (
            by["prefill_per_token_s"] * table[:, TOKENS]
            + by["prefill_per_pair_s"] * table[:, PAIRS]
        )
        * prefill_lora
    )
    floor = by["prefill_floor_s"] * np.where(with_lora, by["prefill_floor_lora_factor"], 1.0)
    step = np.where(table[:, TOKENS] > 0, np.maximum(step, floor), step)
    found: Matrix = (
        step * (1 + by["host_contention"] * table[:, BESIDE])
        + by["request_overhead_s"] * table[:, IS_PROMPT]
    )
    return found


def _free(table: Matrix) -> "np.ndarray[Any, np.dtype[np.bool_]]":
    """Which coefficients the data says something about."""
    free = np.ones(len(NAMES), dtype=bool)
    distinct = len(np.unique(table[:, ADAPTERS]))
    for name, known in (
        ("lora_factor", distinct > 1),
        ("prefill_lora_factor", distinct > 1),
        ("prefill_floor_lora_factor", distinct > 1),
        ("lora_factor_per_adapter", distinct > 2),  # noqa: PLR2004
        ("host_contention", bool(table[:, BESIDE].any())),
    ):
        free[NAMES.index(name)] = known
    return free


def _with_or_without_floor(
    table: Matrix, seen: Matrix, free: "np.ndarray[Any, np.dtype[np.bool_]]"
) -> Matrix:
    """The best coefficients; `free` loses the floor's where it explains next to nothing.

    A floor has no slope where it is not reached, so it begins where the shortest prompts are.
    """
    floor = [NAMES.index(name) for name in FLOOR]
    free_floor = free[floor].copy()
    start = np.array(START)
    alone = table[:, IS_PROMPT] > 0
    shortest = alone & (table[:, TOKENS] == table[alone, TOKENS].min())
    if (plain_too := shortest & (table[:, ADAPTERS] == 0)).any():
        shortest = plain_too
    start[floor[0]] = np.median(seen[shortest])
    start[NAMES.index("request_overhead_s")] = start[floor[0]] / 10
    reached = _solve(table, seen, free, start)
    free[floor] = False
    plain = _solve(table, seen, free, np.array(START))
    if _cost(reached, table, seen) < WORTH * _cost(plain, table, seen):
        free[floor] = free_floor
        return reached
    return plain


def _cost(values: Matrix, table: Matrix, seen: Matrix) -> float:
    """Of `soft_l1`, as the solver counts it."""
    errors = np.log(np.maximum(_predict(values, table), LEAST_S) / seen) / SMALL_ERROR
    return float(np.sum(np.sqrt(1 + errors**2) - 1))


def _solve(
    table: Matrix, seen: Matrix, free: "np.ndarray[Any, np.dtype[np.bool_]]", start: Matrix
) -> Matrix:
    fixed = np.array([1.0 if name in ONE else 0.0 for name in NAMES])
    full = np.where(free, start, fixed)

    def errors(values: Matrix) -> Matrix:
        full[free] = values
        return np.log(np.maximum(_predict(full, table), LEAST_S) / seen)

    solved = least_squares(
        errors,
        np.maximum(start[free], 1e-12),
        bounds=(0.0, np.inf),
        loss="soft_l1",
        f_scale=SMALL_ERROR,
        x_scale=np.array(START)[free],
    )
    found = fixed.copy()
    found[free] = solved.x
    found[TIMES] *= _mean_ratio(seen / np.maximum(_predict(found, table), LEAST_S))
    return found


def _mean_ratio(ratios: Matrix) -> float:
    ordered = np.sort(ratios)
    cut = len(ordered) // 20
    return float(np.mean(ordered[cut : len(ordered) - cut]))


def _groups(steps: Sequence[StepSeen], prompts: Sequence[PromptSeen]) -> "list[Any]":
    """The rows of each point."""
    by_point: dict[object, list[int]] = {}
    points: list[object] = [*(one.point for one in steps), *(one.point for one in prompts)]
    for row, point in enumerate(points):
        by_point.setdefault(point, []).append(row)
    return [np.array(rows) for rows in by_point.values()]
