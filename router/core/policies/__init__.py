"""The policies by name: what `router.policy` and `--policy` accept.

`cost` is ours, `affinity` the rule that it began with; the others are rules that other routers go by,
for comparison. Each file says where its rule was read, what was given to it, and where it had to be
bent to the router's own bounds.
"""

from collections.abc import Callable
from random import Random
from typing import Final

from router.core.placement import Policy
from router.core.policies.affinity import Affinity
from router.core.policies.chwbl import Chwbl
from router.core.policies.cost import Cost
from router.core.policies.dynamo import Dynamo
from router.core.policies.least_loaded import LeastLoaded
from router.core.policies.llm_d import LlmD
from router.core.policies.power_of_two import PowerOfTwo
from router.core.policies.ray_serve import RayServe
from router.core.policies.round_robin import RoundRobin
from router.core.policies.smg import Smg

POLICIES: Final[dict[str, Callable[[Random], Policy]]] = {
    "affinity": Affinity,
    "cost": Cost,
    "round_robin": RoundRobin,
    "least_loaded": LeastLoaded,
    "power_of_two": PowerOfTwo,
    "ray_serve": RayServe,
    "llm_d": LlmD,
    "dynamo": Dynamo,
    "chwbl": Chwbl,
    "smg": Smg,
}
