"""The small languages of `generate`'s options: each error says what would be right."""

import argparse
from typing import Final

from sim.commands.arguments import above_zero, not_negative, positive
from sim.generate.arrivals import Flash, State
from sim.generate.lengths import Fixed, Law, LogNormal
from sim.traces.jsonl import ADAPTER
from sim.traces.row import TOKENS_MAX

LEAST_A_CYCLE: Final = 1e-4
SYNTAX: Final = """\
LAW      512, or lognormal:MEAN:CV, or lognormal:MEAN:CV:MOST (cut there, default 131,072)
STATES   RPS:SECONDS,RPS:SECONDS: the rate in each state and how long it lasts on average
CROWD    AT:SECONDS:FACTOR, or AT:SECONDS:FACTOR:ADAPTER: from second AT on, FACTOR times the rate
NAMES    a=3,b=1: three times as many requests of tenant a as of b; or a number of equal tenants
P        0=9,1=1: one request in ten of priority 1

examples:
  python -m sim generate steady.jsonl --rate 8 --requests 20000 --adapters 200
  python -m sim generate bursts.jsonl --arrivals gamma --cv 4 --adapters 200 --sessions 6
  python -m sim generate day.jsonl --arrivals diurnal --rate 10 --duration 86400 --adapters 500 \\
      --tenants big=8,small=2 --lengths-from azure.csv
  python -m sim generate crowd.jsonl --rate 5 --duration 1800 --adapters 100 \\
      --flash 600:60:10:adapter-0042
"""


def law(text: str) -> Law:
    """How many tokens."""
    kind, *parts = text.split(":")
    if kind == "lognormal" and len(parts) in {2, 3}:
        most = [_length(part) for part in parts[2:]]
        return LogNormal(above_zero(parts[0]), not_negative(parts[1]), *most)
    if parts or not kind.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is no LAW: write 512 or lognormal:1024:1.5")
    return Fixed(_length(kind))


def _length(text: str) -> int:
    tokens = positive(text)
    if tokens > TOKENS_MAX:
        raise argparse.ArgumentTypeError(f"{text}: no trace takes more than {TOKENS_MAX:,} tokens")
    return tokens


def states(text: str) -> tuple[State, ...]:
    """The states of an MMPP."""
    found = []
    for part in text.split(","):
        rate, colon, mean = part.partition(":")
        if not colon:
            raise argparse.ArgumentTypeError(f"{part} is no state: write RPS:SECONDS")
        found.append(State(not_negative(rate), above_zero(mean)))
    if len(found) < 2 or not any(state.rate_rps for state in found):  # noqa: PLR2004
        raise argparse.ArgumentTypeError(f"{text}: name two states or more, one with a rate")
    # States are walked through one by one until a request comes.
    if sum(state.rate_rps * state.mean_s for state in found) < LEAST_A_CYCLE:
        raise argparse.ArgumentTypeError(
            f"{text}: fewer than {LEAST_A_CYCLE:g} requests a round of its states; let them last longer"
        )
    return tuple(found)


def flash(text: str) -> Flash:
    """A flash crowd."""
    parts = text.split(":")
    if len(parts) not in {3, 4}:
        raise argparse.ArgumentTypeError(f"{text} is no CROWD: write 600:60:10 or 600:60:10:NAME")
    adapter = parts[3] if parts[3:] else None
    if adapter is not None and not ADAPTER.fullmatch(adapter):
        raise argparse.ArgumentTypeError(f"{adapter} is no adapter's name")
    factor = above_zero(parts[2])
    if factor <= 1:
        raise argparse.ArgumentTypeError(f"{parts[2]} makes no crowd: write a factor above 1")
    at_s = 0.0 if parts[0] == "0" else above_zero(parts[0])
    return Flash(at_s, above_zero(parts[1]), factor, adapter)


def tenants(text: str) -> tuple[tuple[str, float], ...]:
    """Tenants and their weights."""
    if text.isdecimal():
        return tuple((f"tenant-{number}", 1.0) for number in range(1, positive(text) + 1))
    return tuple(_weights(text))


def priorities(text: str) -> tuple[tuple[int, float], ...]:
    """Priorities and their weights."""
    found = []
    for name, weight in _weights(text):
        try:
            found.append((int(name), weight))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{name} is no priority: write 0=9,1=1") from None
    return tuple(found)


def _weights(text: str) -> list[tuple[str, float]]:
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, weight = part.partition("=")
        if not name or not equals or name in found:
            raise argparse.ArgumentTypeError(f"{part or text}: write NAME=WEIGHT, each name once")
        found[name] = above_zero(weight)
    return list(found.items())
