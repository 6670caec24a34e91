"""A decision in words: where a job went and why, and what everywhere else would have cost.

Pure: reads the decision as it was made. Nothing is computed again, so what is said is what was weighed.
"""

from typing import Final

from router.core.job import AdapterRef, Job
from router.core.placement import Considered, Decision, Drop, Reason

REASONS: Final[dict[Reason, str]] = {
    Reason.HOLDER: "it holds the adapter, or is loading it",
    Reason.SPILL: "others hold the adapter, but going there would cost more, or they are overloaded",
    Reason.COLD: "no worker that could be used holds the adapter",
    Reason.BASE: "no adapter was asked for",
    Reason.ROTATION: "it was its turn",
    Reason.ALL_OVERLOADED: "every worker is overloaded",
    Reason.NO_SLOT: "workers are free, but all their adapter slots are in use or loading",
    Reason.SATURATED: "those that could take it have work enough for the moment",
    Reason.NO_WORKER: "no worker accepts requests",
}
DROPS: Final[dict[Drop, str]] = {
    Drop.OVERLOADED: "overloaded",
    Drop.NOT_ACCEPTING: "accepts no requests",
    Drop.AVOIDED: "has failed this request before",
    Drop.SATURATED: "has prompts enough ahead",
    Drop.NO_MEMORY: "has no memory for its context now",
    Drop.NO_SLOT: "every adapter slot is in use or loading, or kept for other tenants",
    Drop.LAST_SLOT: "its last slot is kept for an adapter that nobody holds",
}
TERMS: Final = ("wait", "load", "prefill", "decode", "others", "harm", "stay")
COLUMN: Final = 10


def explain(job: Job, decision: Decision) -> list[str]:
    """Lines of text: the choice, the workers considered with each term in ms, those left out."""
    who = f"request {job.id} for {_wanted(job)}"
    worker = decision.worker
    if worker is None:
        lines = [f"{who} waits: {REASONS[decision.reason]} ({decision.reason})"]
    else:
        lines = [f"{who} goes to {worker.id}: {REASONS[decision.reason]} ({decision.reason})"]
    if decision.first_token_s is not None:
        lines.append(f"its first token is expected after {_ms(decision.first_token_s)} ms")
    lines += _table(decision)
    lines += [f"left out: {name}: {DROPS[drop]} ({drop})" for name, drop in decision.dropped]
    return lines


def in_one_line(job: Job, decision: Decision, evicting: AdapterRef | None = None) -> str:
    """The same for a log: `key=value`, times in ms, the worker that was chosen first."""
    worker = decision.worker
    chosen = "-" if worker is None else worker.id
    parts = [
        f"id={job.id}",
        f"adapter={job.adapter.name if job.adapter else '-'}",
        f"worker={chosen}",
        f"reason={decision.reason}",
    ]
    if evicting is not None:
        parts.append(f"evicting={evicting.name}")
    for cost in sorted(decision.considered, key=lambda cost: cost.worker != chosen):
        terms = ",".join(f"{name}:{_ms(value)}" for name, value in _terms(cost))
        parts.append(f"{cost.worker}={_ms(cost.total_s)}({terms})")
    parts += [f"{name}={drop}" for name, drop in decision.dropped]
    return " ".join(parts)


def _wanted(job: Job) -> str:
    return "the base model" if job.adapter is None else job.adapter.model_id


def _table(decision: Decision) -> list[str]:
    """The workers considered, the cheapest first; the one that was chosen is marked."""
    rows = sorted(decision.considered, key=lambda cost: cost.total_s)
    if not rows:
        return []
    width = max(len("ms"), *(len(cost.worker) for cost in rows))
    heads = "".join(f"{name:>{COLUMN}}" for name in (*TERMS, "total"))
    lines = [f"  {'ms':<{width}}{heads}"]
    chosen = None if decision.worker is None else decision.worker.id
    for cost in rows:
        mark = ">" if cost.worker == chosen else " "
        values = [value for _, value in _terms(cost)]
        cells = "".join(f"{_ms(value):>{COLUMN}}" for value in (*values, cost.total_s))
        lines.append(f"{mark} {cost.worker:<{width}}{cells}")
    return lines


def _terms(cost: Considered) -> list[tuple[str, float]]:
    return [(name, getattr(cost, f"{name}_s")) for name in TERMS]


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f}"
