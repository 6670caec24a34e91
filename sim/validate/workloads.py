"""The workloads of a validation: each strains another part of the model.

Rates are for `rate` requests a second that the fleet can just bear with short prompts.
"""

from collections.abc import Sequence
from itertools import islice

import msgspec

from sim.generate.arrivals import Gamma, Poisson
from sim.generate.lengths import Independent, LogNormal
from sim.generate.workload import Adapters, Workload, generate
from sim.traces import TraceRow


class Case(msgspec.Struct, frozen=True):
    """One workload: its name, its share of the rate, and how it is made."""

    name: str
    why: str
    share: float  # of the rate
    requests: float  # of the number
    adapters: float  # of the slots of the whole fleet
    locality: float
    input_mean: float
    output_mean: float
    cv: float = 1.0  # of the gaps between arrivals


CASES = (
    Case("steady", "Poisson arrivals, every adapter fits", 0.7, 1.0, 0.75, 0.8, 48, 16),
    Case("bursty", "gaps of a coefficient of variation of 3", 0.5, 1.0, 0.75, 0.8, 48, 16, 3.0),
    Case("slots", "half again as many adapters as slots", 0.5, 1.0, 1.5, 0.3, 48, 16),
    Case("long", "prompts of hundreds of tokens", 0.12, 0.4, 0.5, 0.8, 500, 16),
)
LONGEST_INPUT = 1500
LONGEST_OUTPUT = 64


def rows(
    case: Case,
    *,
    base: str,
    names: Sequence[str],
    slots: int,
    rate: float,
    requests: int,
    seed: int,
    longer: float = 1.0,
) -> list[TraceRow]:
    """The requests of one case, for adapters that exist. Needs as many `names` as it asks for.

    Prompts and answers are `longer` times as long as the case says.
    """
    count = max(1, round(case.adapters * slots))
    assert count <= len(names), (case.name, count, len(names))
    per_s = case.share * rate
    workload = Workload(
        seed=seed,
        requests=max(1, round(case.requests * requests)),
        arrivals=Poisson(per_s) if case.cv == 1.0 else Gamma(per_s, case.cv),
        lengths=Independent(
            LogNormal(case.input_mean * longer, 0.5, round(LONGEST_INPUT * longer)),
            LogNormal(case.output_mean * longer, 0.5, round(LONGEST_OUTPUT * longer)),
        ),
        adapters=Adapters(count, zipf=0.7, locality=case.locality),
        base=base,
    )
    made: dict[str, str] = {}
    found = []
    for row in islice(generate(workload), workload.requests):
        assert row.model is not None
        name = made.setdefault(row.model, names[len(made) % len(names)])
        found.append(msgspec.structs.replace(row, model=f"{base}:{name}"))
    return found
