"""Measure points: each a choice of values, replayed with several seeds, all of them at once.

Every point is replayed with the same seeds, so that two points differ by their values alone and can
be compared seed by seed.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from sim.pool import Pool, Run, Task
from sim.replay import Options
from sim.report.intervals import Estimate, estimate
from sim.report.metrics import Metric
from sim.report.timeline import Timeline
from sim.slo import Target, verdict
from sim.variants import Base, Choice, Value

SEEDS_MAX: Final = 100


class Point(msgspec.Struct, frozen=True):
    """What a choice of values gave: each figure by seed. The curves and timeline are of the first.

    `offered_rps` is the load in requests a second, None for a trace without a span. `refused` says
    why the engine model has no such point; it has no figures then.
    """

    choice: dict[str, Value]
    values: dict[Metric, tuple[float | None, ...]]
    offered_rps: float | None
    counts: tuple[dict[str, int], ...]
    digests: tuple[str, ...]
    ttft_curve: tuple[float | None, ...] = ()
    e2e_curve: tuple[float | None, ...] = ()
    timeline: Timeline | None = None
    refused: str | None = None

    @property
    def name(self) -> str:
        """Its choice in words."""
        return (
            ", ".join(f"{path}={value}" for path, value in self.choice.items()) or "as configured"
        )

    @property
    def estimates(self) -> dict[Metric, Estimate]:
        """Mean and interval of every figure."""
        return {metric: estimate(values) for metric, values in self.values.items()}

    def to_json(self, targets: Sequence[Target] = ()) -> dict[str, Any]:
        """The point for `--json`."""
        if self.refused is not None:
            return {"choice": self.choice, "refused": self.refused}
        estimates = self.estimates
        return {
            "choice": self.choice,
            "offered_rps": self.offered_rps,
            "figures": {
                metric.value: {
                    "mean": estimates[metric].mean,
                    "ci95_half": estimates[metric].half,
                    "by_seed": values,
                }
                for metric, values in self.values.items()
            },
            "counts": self.counts,
            "digests": self.digests,
            **({"verdict": verdict(targets, estimates).name.lower()} if targets else {}),
        }


class Experiment:
    """Measures points over one workload. `options` hold where nothing else is chosen."""

    def __init__(self, base: Base, options: Options, seeds: int, pool: Pool) -> None:
        self.base = base
        self.options = options
        self.seeds = tuple(range(options.seed, options.seed + seeds))
        self._pool = pool

    @property
    def models(self) -> Sequence[str]:
        """The model ids that the trace asks for."""
        return self._pool.workload.models

    def measure(
        self, choices: Sequence[Choice], *, sample: bool = False, optional: bool = False
    ) -> list[Point]:
        """The points in the order of the choices. Raises `ConfigError` and `sim.pool.PoolError`.

        `sample` asks for timelines; `optional` takes what the engine model refuses as a point too.
        """
        tasks: list[Task] = []
        speeds: list[float] = []
        for choice in choices:
            config, options = self.base.variant(choice, self.options)
            speeds.append(options.speed)
            tasks.extend(
                Task(
                    config,
                    msgspec.structs.replace(options, seed=seed),
                    sample=sample and seed == self.seeds[0],
                    optional=optional,
                )
                for seed in self.seeds
            )
        runs = self._pool.run(tasks)
        each = len(self.seeds)
        return [
            self._point(dict(choice), runs[index * each : (index + 1) * each], speed)
            for index, (choice, speed) in enumerate(zip(choices, speeds, strict=True))
        ]

    def _point(self, choice: dict[str, Value], runs: Sequence[Run], speed: float) -> Point:
        first = runs[0]
        if first.refused is not None:
            return Point(choice, {}, None, (), (), refused=first.refused)
        workload = self._pool.workload
        span_s = workload.span_s / speed
        return Point(
            choice,
            {metric: tuple(metric.of(run.result) for run in runs) for metric in Metric},
            workload.requests / span_s if span_s else None,
            tuple(_counts(run.result) for run in runs),
            tuple(run.result["digest"] for run in runs),
            first.ttft_curve,
            first.e2e_curve,
            first.timeline,
        )


def _counts(result: Mapping[str, Any]) -> dict[str, int]:
    return {
        name: result[name] for name in ("requests", "completed", "rejected", "failed", "unfinished")
    }
