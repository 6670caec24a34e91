"""All that happened to one request of a replay, as it happened.

It stands before the ledger and hands everything on to it unchanged, so the digest is that of a replay
which explains nothing. Only a replay that was asked to explain has one.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from router.core.explain import REASONS, explain
from router.core.fleet import Worker
from router.core.job import AdapterRef, AdapterUse, Job, LoadError
from router.core.lease import Lease
from router.core.placement import Decision, Reason
from router.core.ports import Observer

if TYPE_CHECKING:
    from sim.replay import Ended


class Witness:
    """Watches request `number`, counted from 1 in order of arrival. Its times are virtual seconds."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._id = str(number)
        self._lines: list[str] = []
        self._placed: tuple[str, AdapterRef | None] | None = None
        self._use: AdapterUse | None = None
        self._over = False
        # Reason, first and last time, how often: who waits is tried again and again.
        self._waiting: tuple[Reason, float, float, int] | None = None

    def watching(self, ledger: Observer, clock: Callable[[], float]) -> Observer:
        """The observer to give to a router, in place of its ledger."""
        return _Watching(self, ledger, clock)

    def lines(self) -> list[str]:
        """What is known of the request."""
        self._waited()
        return [*self._lines] if self._over else [*self._lines, "it never ended"]

    # As it happens.

    def came(self, job: Job, now: float) -> None:
        """A request has come."""
        if job.id != self._id:
            return
        adapter = "the base model" if job.adapter is None else job.adapter.model_id
        said = [f"request {job.id} came at {now:.6f} s for {adapter}: {job.prompt_tokens:,} tokens"]
        if job.tenant:
            said.append(f"tenant {job.tenant}")
        if job.priority:
            said.append(f"priority {job.priority}")
        if job.deadline is not None:
            said.append(f"its first token due at {job.deadline:.6f} s")
        self._lines.append(", ".join(said))

    def waits(self, job: Job, decision: Decision, now: float) -> None:
        """It was tried, and no worker took it."""
        if job.id != self._id:
            return
        reason, last = decision.reason, self._waiting
        if last is not None and last[0] is reason:
            self._waiting = (reason, last[1], now, last[3] + 1)
            return
        self._waited()
        self._waiting = (reason, now, now, 1)

    def decided(
        self, job: Job, decision: Decision, evicting: AdapterRef | None, now: float
    ) -> None:
        """It was placed."""
        if job.id != self._id:
            return
        self._waited()
        assert decision.worker is not None
        self._placed = (decision.worker.id, job.adapter)
        first, *rest = explain(job, decision)
        self._lines += [f"at {now:.6f} s {first}", *rest]
        if evicting is not None:
            self._lines.append(f"its load evicts {evicting.name} from {decision.worker.id}")

    def load_ended(
        self,
        worker: Worker,
        adapter: AdapterRef,
        load_s: float,
        error: LoadError | None,
        now: float,
    ) -> None:
        """A load ended; told if the request waited for it."""
        if self._over or self._placed != (worker.id, adapter) or self._use is not None:
            return
        self._use = AdapterUse.LOADING
        how = "was resident" if error is None else f"failed to load ({error})"
        self._lines.append(f"at {now:.6f} s {adapter.name} {how}, {load_s:.3f} s after it began")

    def leased(self, lease: Lease) -> None:
        """It has its place."""
        if lease.job.id != self._id:
            return
        self._use = lease.use
        self._lines.append(
            f"adapter: {lease.use}; it waited {lease.queued_s:.3f} s for a worker and "
            f"{lease.load_s:.3f} s for its adapter"
        )

    def ended(self, ended: "Ended", what: str, now: float) -> None:
        """It has ended; `what` says what it got, or why it got nothing."""
        if ended.number != self.number:
            return
        self._waited()
        self._over = True
        how = f"at {now:.6f} s it ended: {ended.outcome}"
        if ended.ttft_s is None or ended.e2e_s is None:
            self._lines.append(f"{how}: {what}")
        else:
            times = f"first token after {ended.ttft_s:.3f} s, {what} after {ended.e2e_s:.3f} s"
            self._lines.append(f"{how}, {times}")

    def _waited(self) -> None:
        """Write down the wait that has come to an end."""
        if self._waiting is None:
            return
        reason, since, until, times = self._waiting
        self._waiting = None
        again = f", tried {times:,} times until {until:.6f} s" if times > 1 else ""
        self._lines.append(f"at {since:.6f} s it waits: {REASONS[reason]} ({reason}){again}")


class _Watching:
    """Tells the witness, and then the ledger."""

    def __init__(self, witness: Witness, ledger: Observer, clock: Callable[[], float]) -> None:
        self._witness = witness
        self._clock = clock
        self._ledger = ledger
        self.evicted = ledger.evicted
        self.fetch_ended = ledger.fetch_ended
        self.unload_ended = ledger.unload_ended

    def decided(self, job: Job, decision: Decision, evicting: AdapterRef | None) -> None:
        self._witness.decided(job, decision, evicting, self._clock())
        self._ledger.decided(job, decision, evicting)

    def waits(self, job: Job, decision: Decision) -> None:
        self._witness.waits(job, decision, self._clock())
        self._ledger.waits(job, decision)

    def load_ended(
        self, worker: Worker, adapter: AdapterRef, load_s: float, error: LoadError | None
    ) -> None:
        self._witness.load_ended(worker, adapter, load_s, error, self._clock())
        self._ledger.load_ended(worker, adapter, load_s, error)
