"""How far a stream of rows has come, for who waits for it. Shows nothing where nobody looks."""

from collections.abc import Iterable, Iterator
from typing import Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from sim.traces.profile import Profile
from sim.traces.row import TraceRow

EVERY: Final = 4096


def counted(errors: Console) -> Progress:
    """A bar that counts up to a known number, and says how long it will take."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=errors, transient=True)


def watched(
    rows: Iterable[TraceRow], profile: Profile, errors: Console, verb: str
) -> Iterator[TraceRow]:
    """The same rows, counted on the terminal and taken into the profile as they pass."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task(verb, total=None)
        for row in rows:
            profile.add(row)
            if profile.requests % EVERY == 0:
                progress.update(task, description=f"{verb}: {profile.requests:,} requests")
            yield row
