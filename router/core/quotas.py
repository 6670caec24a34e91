"""What a tenant may use each minute: requests and tokens, reserved on arrival, settled at the end.

Token buckets that hold a minute's worth: an unused minute may be spent at once, no more. A job
reserves what it may use (its prompt and the answer that is expected); what it did not use is given
back at its end, and what it used beyond is owed. O(1) for each job.
"""

from collections.abc import Mapping
from typing import Final

import msgspec

MINUTE_S: Final = 60.0


class Quota(msgspec.Struct, frozen=True):
    """Limits a minute; None for no limit."""

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None


class _Bucket:
    """`left` may be negative: what is owed."""

    __slots__ = ("at", "left", "per_minute")

    def __init__(self, per_minute: float, now: float) -> None:
        self.per_minute = per_minute
        self.left = per_minute
        self.at = now

    def refill(self, now: float) -> None:
        self.left = min(self.per_minute, self.left + (now - self.at) * self.per_minute / MINUTE_S)
        self.at = now

    def wait_s(self, amount: float) -> float:
        """How long until so much is left; more than the bucket holds is had when it is full."""
        lack = min(amount, self.per_minute) - self.left
        return max(0.0, lack) / self.per_minute * MINUTE_S


class Quotas:
    """The buckets of the tenants that have limits; a tenant without a quota has none."""

    def __init__(self, quotas: Mapping[str, Quota], now: float) -> None:
        self._buckets: dict[str, tuple[_Bucket | None, _Bucket | None]] = {
            tenant: (
                _Bucket(quota.requests_per_minute, now) if quota.requests_per_minute else None,
                _Bucket(quota.tokens_per_minute, now) if quota.tokens_per_minute else None,
            )
            for tenant, quota in quotas.items()
        }

    def reserve(self, tenant: str, tokens: float, now: float, *, again: bool = False) -> float:
        """Take one request and its tokens. 0.0 if they were had, else after how long they can be.

        `again` is for one that was counted before. Its tokens are reserved anew, since those that it
        reserved then were settled when it failed.
        """
        buckets = self._buckets.get(tenant)
        if buckets is None:
            return 0.0
        requests, budget = buckets
        wait_s = 0.0
        one = 0.0 if again else 1.0
        for bucket, amount in ((requests, one), (budget, tokens)):
            if bucket is not None:
                bucket.refill(now)
                wait_s = max(wait_s, bucket.wait_s(amount))
        if wait_s > 0.0:
            return wait_s
        if requests is not None:
            requests.left -= one
        if budget is not None:
            budget.left -= tokens
        return 0.0

    def settle(self, tenant: str, reserved: float, used: float, now: float) -> None:
        """A request has ended: give back what it did not use, or take what it used beyond."""
        buckets = self._buckets.get(tenant)
        if buckets is not None and (budget := buckets[1]) is not None:
            budget.refill(now)
            budget.left = min(budget.per_minute, budget.left + reserved - used)
