"""The policies by name: what `router.policy` and `--policy` accept."""

from collections.abc import Callable
from random import Random
from typing import Final

from router.core.placement import Policy
from router.core.policies.affinity import Affinity
from router.core.policies.cost import Cost
from router.core.policies.round_robin import RoundRobin

POLICIES: Final[dict[str, Callable[[Random], Policy]]] = {
    "affinity": Affinity,
    "cost": Cost,
    "round_robin": RoundRobin,
}
