"""Prometheus metrics of the router. Every label is bounded: by the configuration, or by an enum.

An adapter's name is a label only of adapters that are in the store, and of no more than
`ADAPTER_LABELS_MAX` of them; the others are counted together as `other`.
"""

import logging
from collections import Counter as TallyOf
from collections.abc import Awaitable, Callable, Iterable, Iterator
from random import Random
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine_worker.protocol import Refusal
from router.core.explain import in_one_line
from router.core.fleet import Worker
from router.core.job import AdapterRef, AdapterUse, Job, LoadError, Outcome
from router.core.placement import Decision
from router.core.router import Router
from router.telemetry.tallies import Distribution, Tally

explained = logging.getLogger("lorayard.explain")

ADAPTER_LABELS_MAX: Final = 1000
OTHER: Final = "other"
SECONDS: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
)  # fmt: skip


class Metrics:
    """All metrics of one router process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._adapters: dict[tuple[str, str], None] = {}
        # What `GET /metrics` answers, where that is more than this process's own page.
        self.scrape: Callable[[], Awaitable[bytes]] = self._own_page
        self.requests = Tally(
            "lorayard_requests",
            "Requests by the way in which they ended.",
            ("model", "outcome"),
            self.registry,
        )
        self.tenant_requests = Counter(
            "lorayard_tenant_requests",
            "Requests of the tenants that are configured, by the way in which they ended.",
            ("model", "tenant", "outcome"),
            registry=self.registry,
        )
        self.tenant_tokens = Counter(
            "lorayard_tenant_tokens",
            "Tokens of prompts and answers of the tenants that are configured.",
            ("model", "tenant"),
            registry=self.registry,
        )
        self.adapter_requests = Tally(
            "lorayard_adapter_requests",
            "Requests for an adapter, by where it stood: hit, loading, cold.",
            ("model", "adapter", "use"),
            self.registry,
        )
        self.decisions = Tally(
            "lorayard_decisions",
            "Placements by their reason.",
            ("model", "reason"),
            self.registry,
        )
        self.waits = Tally(
            "lorayard_waits",
            "Placements that found no worker, by the reason. One request may be tried several times.",
            ("model", "reason"),
            self.registry,
        )
        self.loads = Counter(
            "lorayard_adapter_loads",
            "Adapter loads by result: ok, or whose fault.",
            ("model", "result"),
            registry=self.registry,
        )
        self.evictions = Counter(
            "lorayard_adapter_evictions",
            "Adapters that left a worker for another.",
            ("model",),
            registry=self.registry,
        )
        self.unloads = Counter(
            "lorayard_adapter_unloads",
            "Adapters that were to leave a worker without a successor, by result: ok, or whose fault.",
            ("model", "result"),
            registry=self.registry,
        )
        self.retries = Counter(
            "lorayard_retries",
            "Requests sent to another worker because one failed.",
            ("model",),
            registry=self.registry,
        )
        self.refusals = Counter(
            "lorayard_worker_refusals",
            "Requests that a worker refused because another router was there first; placed anew.",
            ("model", "refusal"),
            registry=self.registry,
        )
        self.record_rows = Counter(
            "lorayard_record_rows",
            "Requests that were written to the recording.",
            registry=self.registry,
        )
        self.record_dropped = Counter(
            "lorayard_record_dropped",
            "Requests that are not in the recording, by what kept them out.",
            ("reason",),
            registry=self.registry,
        )
        self.fetch_s = self._histogram(
            "lorayard_adapter_fetch_seconds", "Wanted to on this host's disk, where it was not."
        )
        self.load_s = self._histogram(
            "lorayard_adapter_load_seconds", "Decision to resident, of loads that succeeded."
        )
        self.queue_s = self._distribution(
            "lorayard_queue_seconds", "Time that requests waited for capacity, of those that did."
        )
        self.first_byte_s = self._distribution(
            "lorayard_first_byte_seconds", "Arrival to the first byte of the worker's answer."
        )
        self.request_s = self._distribution(
            "lorayard_request_seconds", "Arrival to the last byte of the answer."
        )

    def _distribution(self, name: str, text: str) -> Distribution:
        return Distribution(name, text, ("model",), SECONDS, self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, ("model",), buckets=SECONDS, registry=self.registry)

    def watch(self, model: str, router: Router, explain_sample: float = 0.0) -> "RouterObserver":
        """Show a router's fleet and queue, and return the observer to give to it.

        `explain_sample` is the share of decisions that are logged with their reasons.
        """
        self.registry.register(_FleetCollector(model, router))
        return RouterObserver(self, model, explain_sample)

    def ended(self, model: str, outcome: Outcome) -> None:
        """Count how a request ended."""
        self.requests.add((model, outcome))

    def queued(self, model: str, seconds: float) -> None:
        """A request has waited for capacity."""
        self.queue_s.observe((model,), seconds)

    def first_byte(self, model: str, seconds: float) -> None:
        """The first byte of an answer has come, so long after its request."""
        self.first_byte_s.observe((model,), seconds)

    def answered(self, model: str, seconds: float) -> None:
        """The last byte of an answer has gone, so long after its request."""
        self.request_s.observe((model,), seconds)

    def retried(self, model: str) -> None:
        """A request goes to another worker because one failed."""
        self.retries.labels(model).inc()

    def refused(self, model: str, refusal: str) -> None:
        """A worker refused a request because another router was there first."""
        known = refusal if refusal in set(Refusal) else OTHER
        self.refusals.labels(model, known).inc()

    def tenant_ended(self, model: str, tenant: str, outcome: Outcome, tokens: int) -> None:
        """Count how a tenant's request ended, and its tokens. Only of a tenant that is configured."""
        self.tenant_requests.labels(model, tenant, outcome.value).inc()
        if tokens:
            self.tenant_tokens.labels(model, tenant).inc(tokens)

    def placed(self, job: Job, use: AdapterUse) -> None:
        """Count a request for an adapter."""
        if job.adapter is not None:
            label = self._adapter_label(job.adapter)
            self.adapter_requests.add((job.adapter.model, label, use))

    def _adapter_label(self, adapter: AdapterRef) -> str:
        key = (adapter.model, adapter.name)
        if key not in self._adapters:
            if len(self._adapters) >= ADAPTER_LABELS_MAX:
                return OTHER
            self._adapters[key] = None
        return adapter.name

    async def _own_page(self) -> bytes:
        return self.page()

    def page(self) -> bytes:
        """This process's metrics, in Prometheus' text format."""
        return generate_latest(self.registry)


class RouterObserver:
    """Counts what one router decides and loads, and logs some of it: the core's `Observer`."""

    def __init__(
        self,
        metrics: Metrics,
        model: str,
        explain_sample: float = 0.0,
        rng: Random | None = None,
    ) -> None:
        self._metrics = metrics
        self._model = model
        self._sample = explain_sample
        self._rng = rng or Random()  # its own: placement draws as it would without the log

    def decided(self, job: Job, decision: Decision, evicting: AdapterRef | None) -> None:
        """Count the placement by its reason, and log it if it is drawn."""
        self._metrics.decisions.add((self._model, decision.reason))
        if self._sample and self._rng.random() < self._sample:
            explained.info("%s", in_one_line(job, decision, evicting))

    def waits(self, job: Job, decision: Decision) -> None:  # noqa: ARG002
        """Count the reason; how many wait is a gauge."""
        self._metrics.waits.add((self._model, decision.reason))

    def fetch_ended(
        self,
        adapter: AdapterRef,  # noqa: ARG002
        fetch_s: float,
        error: LoadError | None,
    ) -> None:
        """Count its time where it succeeded."""
        if error is None:
            self._metrics.fetch_s.labels(self._model).observe(fetch_s)

    def load_ended(
        self,
        worker: Worker,  # noqa: ARG002
        adapter: AdapterRef,  # noqa: ARG002
        load_s: float,
        error: LoadError | None,
    ) -> None:
        """Count the load, and its time where it succeeded."""
        result = "ok" if error is None else error.fault.value
        self._metrics.loads.labels(self._model, result).inc()
        if error is None:
            self._metrics.load_s.labels(self._model).observe(load_s)

    def evicted(self, worker: Worker, adapter: AdapterRef) -> None:  # noqa: ARG002
        """Count the eviction."""
        self._metrics.evictions.labels(self._model).inc()

    def unload_ended(
        self,
        worker: Worker,  # noqa: ARG002
        adapter: AdapterRef,  # noqa: ARG002
        error: LoadError | None,
    ) -> None:
        """Count the unload."""
        result = "ok" if error is None else error.fault.value
        self._metrics.unloads.labels(self._model, result).inc()


class _FleetCollector(Collector):
    """Gauges read off the fleet when they are asked for, so that they cost requests nothing."""

    def __init__(self, model: str, router: Router) -> None:
        self._model = model
        self._router = router

    def collect(self) -> Iterator[Metric]:
        queued = GaugeMetricFamily(
            "lorayard_queued_requests", "Requests that wait for capacity.", labels=["model"]
        )
        queued.add_metric([self._model], self._router.queued)
        yield queued
        workers = list(self._router.fleet)
        rows: Iterable[tuple[str, str, list[float]]] = (
            ("in_flight", "Requests that the router has there.", [w.in_flight for w in workers]),
            ("running", "Requests in the engine's batch.", [w.report.running for w in workers]),
            ("waiting", "Requests in the engine's queue.", [w.report.waiting for w in workers]),
            ("kv_usage", "Share of KV blocks in use.", [w.report.kv_usage for w in workers]),
            ("adapters", "Adapter slots taken or promised.", [w.slots.occupied for w in workers]),
            ("accepting", "1 while it is sent requests.", [float(w.accepting) for w in workers]),
        )
        for name, text, values in rows:
            gauge = GaugeMetricFamily(f"lorayard_worker_{name}", text, labels=["model", "worker"])
            for worker, value in zip(workers, values, strict=True):
                gauge.add_metric([self._model, worker.id], value)
            yield gauge
        resident = GaugeMetricFamily(
            "lorayard_worker_adapter",
            "How many versions of an adapter are in slots; loading, resident, evicting or leaving.",
            labels=["adapter", "model", "phase", "worker"],
        )
        for worker in workers:
            versions = TallyOf((slot.adapter.name, slot.phase.value) for slot in worker.slots)
            for (name, phase), count in versions.items():
                resident.add_metric([name, self._model, phase, worker.id], count)
        yield resident
