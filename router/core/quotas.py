"""What may be used each minute: requests and tokens, reserved on arrival, settled at the end.

A job is charged to several accounts at once, its tenant's and its key's: to all of them, or where one
is used up to none. Token buckets hold a minute's worth: an unused minute may be spent at once, no more.
A job reserves what it may use (its prompt and the answer that is expected); what it did not use is
given back at its end, and what it used beyond is owed. O(accounts) for each job.

Limits may change while jobs run. What was used of the old ones counts against the new, so that a limit
cannot be had twice by changing it, and a job settles with the buckets that it reserved of.
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

    def limit(self, per_minute: float, now: float) -> None:
        """Hold so much from now on, less what was used."""
        self.refill(now)
        self.left += per_minute - self.per_minute
        self.per_minute = per_minute


class _Account:
    """The buckets of one; None where there is no limit."""

    __slots__ = ("requests", "tokens")

    def __init__(self) -> None:
        self.requests: _Bucket | None = None
        self.tokens: _Bucket | None = None

    def limit(self, quota: Quota, now: float) -> None:
        self.requests = _limited(self.requests, quota.requests_per_minute, now)
        self.tokens = _limited(self.tokens, quota.tokens_per_minute, now)


def _limited(bucket: _Bucket | None, per_minute: float | None, now: float) -> _Bucket | None:
    if per_minute is None:
        return None
    if bucket is None:
        return _Bucket(per_minute, now)
    bucket.limit(per_minute, now)
    return bucket


class Charge:
    """What one job has reserved: `tokens` of each of its accounts' budgets, to be settled once."""

    __slots__ = ("budgets", "tokens")

    def __init__(self, tokens: float, budgets: tuple[_Bucket, ...]) -> None:
        self.tokens = tokens
        self.budgets = budgets

    def settle(self, used: float, now: float) -> None:
        """The job has ended: give back what it did not use, or take what it used beyond."""
        for budget in self.budgets:
            budget.refill(now)
            budget.left = min(budget.per_minute, budget.left + self.tokens - used)


class Shortage(msgspec.Struct, frozen=True):
    """An account that is used up, and after how many seconds it will have what was asked for."""

    account: str
    wait_s: float


class Quotas:
    """The accounts that have limits, by name; one without a quota has none.

    Several routers may share them: a limit is then one over all of their models.
    """

    def __init__(self, quotas: Mapping[str, Quota], now: float) -> None:
        self._accounts: dict[str, _Account] = {}
        self.change(quotas, now)

    def change(self, quotas: Mapping[str, Quota], now: float) -> None:
        """Hold these limits from now on; of accounts that stay, what was used stays used."""
        before = self._accounts
        self._accounts = {}
        for name, quota in quotas.items():
            if quota.requests_per_minute is None and quota.tokens_per_minute is None:
                continue
            account = self._accounts[name] = before.get(name) or _Account()
            account.limit(quota, now)

    def reserve(
        self, accounts: tuple[str, ...], tokens: float, now: float, *, again: bool = False
    ) -> Charge | Shortage:
        """Take one request and its tokens of every account; of none where one of them lacks it.

        `again` is for one that was counted before. Its tokens are reserved anew, since those that it
        reserved then were settled when it failed.
        """
        if not self._accounts:
            return Charge(tokens, ())
        one = 0.0 if again else 1.0
        requests: list[_Bucket] = []
        budgets: list[_Bucket] = []
        shortage: Shortage | None = None
        for name in accounts:
            account = self._accounts.get(name)
            if account is None:
                continue
            for bucket, amount, found in (
                (account.requests, one, requests),
                (account.tokens, tokens, budgets),
            ):
                if bucket is None:
                    continue
                bucket.refill(now)
                found.append(bucket)
                wait_s = bucket.wait_s(amount)
                if wait_s > (0.0 if shortage is None else shortage.wait_s):
                    shortage = Shortage(name, wait_s)
        if shortage is not None:
            return shortage
        for bucket in requests:
            bucket.left -= one
        for bucket in budgets:
            bucket.left -= tokens
        return Charge(tokens, tuple(budgets))
