"""The policies by name: what `router.policy` and `--policy` accept."""

from typing import Final

from router.core.placement import Policy
from router.core.policies import affinity, round_robin

POLICIES: Final[dict[str, Policy]] = {
    "affinity": affinity.place,
    "round_robin": round_robin.place,
}
