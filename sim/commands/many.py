"""What the commands that replay many times share: the workload, the pool, its progress, their files."""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sim.commands import arguments as shared
from sim.experiment import Experiment
from sim.pool import Pool, Workload
from sim.traces import scan
from sim.variants import Base


def check_files(arguments: argparse.Namespace) -> None:
    """Find out before hours of work what would lose their result. Raises `ConfigError`."""
    read_too = (arguments.trace, arguments.config)
    shared.check_writable("--json", arguments.json, *read_too)
    shared.check_writable("--report", arguments.report, *read_too, arguments.json)


@contextmanager
def experiment(
    arguments: argparse.Namespace, errors: Console, base: Base, points: int | None
) -> Iterator[tuple[Experiment, Callable[[int], None]]]:
    """An experiment over the trace, with a bar for `points` points; the rest of it where known.

    The second is to be told how many points more there will be, where a search finds that out.
    """
    reading = shared.reading(arguments)
    summary = scan(arguments.trace, limit=arguments.limit, reading=reading)
    shared.tell_skipped(errors, summary.bad)
    workload = Workload(
        arguments.trace,
        arguments.limit,
        summary.requests,
        summary.span_s,
        tuple(summary.models),
        reading,
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    each = arguments.seeds * summary.requests
    total = 0 if points is None else points * each
    jobs = min(arguments.jobs, arguments.seeds * (points or 64))
    with Progress(*columns, console=errors, transient=True) as progress:
        bar = progress.add_task(f"{arguments.command}: replaying on {jobs} cores", total=total)

        def more(count: int) -> None:
            nonlocal total
            total += count * each
            progress.update(bar, total=total)

        with Pool(
            workload,
            jobs=jobs,
            progress=lambda ended: progress.update(bar, completed=ended),
        ) as pool:
            options = shared.options(
                arguments,
                arguments.policy or base.config.router.policy,
                summary.hash_block_tokens,
            )
            yield Experiment(base, options, arguments.seeds, pool), more


def workload_json(arguments: argparse.Namespace, running: Experiment) -> dict[str, Any]:
    """What every JSON of these commands begins with: nothing in it depends on the machine."""
    options = running.options
    return {
        "trace": arguments.trace.name,
        "seeds": running.seeds,
        "policy": options.policy,
        "slo": {"ttft_s": options.slo.ttft_s, "itl_s": options.slo.itl_s},
    }


def write_json(path: Path | None, result: dict[str, Any], started: float) -> None:
    """Write the result, with how long it took under `sim`."""
    if path is None:
        return
    whole = {**result, "sim": {"wall_s": time.perf_counter() - started}}
    path.write_text(json.dumps(whole, indent=2, allow_nan=False) + "\n", encoding="utf-8")
