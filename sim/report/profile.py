"""A trace's profile as a table for a terminal."""

from rich.console import Console
from rich.table import Table

from sim.report.table import share
from sim.traces.profile import CACHE_SLOTS, DISTANCES, Lengths, Profile


def profile_rows(profile: Profile) -> list[tuple[str, str]]:
    """The lines that sum a trace up, as name and value."""
    locality = profile.locality
    rate, cv = profile.rate_rps, profile.gap_cv
    lines = [
        ("requests", f"{profile.requests:,} in {profile.span_s:,.1f} s"),
        (
            "rate",
            "-"
            if rate is None or cv is None
            else f"{rate:,.3g} requests/s, gaps with a coefficient of variation of {cv:.2f}",
        ),
        ("prompt tokens", _lengths(profile.input_tokens)),
        ("output tokens", _lengths(profile.output_tokens)),
    ]
    if not locality.requests:
        return [*lines, ("adapters", "none named")]
    [(favourite, count)] = locality.names.most_common(1)
    median = locality.median
    return [
        *lines,
        (
            "adapters",
            f"{len(locality.names):,} in {locality.requests:,} requests; the most asked for, "
            f"{favourite}, in {share(count / locality.requests)} of them",
        ),
        (
            "reuse distance",
            f"half of the requests ask for an adapter again after "
            f"{f'more than {DISTANCES}' if median is None else f'at most {median}'} others",
        ),
        (
            "one LRU cache",
            ", ".join(
                f"{slots} slots hit {share(locality.hit_rate(slots))}" for slots in CACHE_SLOTS
            ),
        ),
    ]


def print_profile(console: Console, profile: Profile) -> None:
    """Print the profile."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in profile_rows(profile):
        table.add_row(name, value)
    console.print(table, highlight=False)


def _lengths(lengths: Lengths) -> str:
    return f"mean {lengths.mean:,.1f}, p50 {lengths.p50:,}, p99 {lengths.p99:,}"
