"""What is counted and logged of decisions, and that no label comes from a client."""

import logging
from random import Random

import pytest

from router.core.fleet import Worker
from router.core.job import Job, Outcome
from router.core.placement import Decision, Reason
from router.telemetry.metrics import Metrics, RouterObserver

PLACED = Decision(Worker("w0", max_ongoing=1, slots=0), Reason.BASE)


@pytest.mark.parametrize(
    ("sample", "fewest", "most"), [(0.0, 0, 0), (0.1, 60, 140), (1.0, 1000, 1000)]
)
def test_a_share_of_the_decisions_is_logged(
    sample: float, fewest: int, most: int, caplog: pytest.LogCaptureFixture
) -> None:
    observer = RouterObserver(Metrics(), "m", sample, Random(1))
    with caplog.at_level(logging.INFO, "lorayard.explain"):
        for number in range(1000):
            observer.decided(Job(str(number)), PLACED, None)
    assert fewest <= len(caplog.records) <= most
    assert all(" worker=w0 reason=base" in record.getMessage() for record in caplog.records)


def test_waits_are_counted_by_their_reason() -> None:
    metrics = Metrics()
    observer = RouterObserver(metrics, "m")
    for reason in (Reason.NO_SLOT, Reason.NO_SLOT, Reason.SATURATED):
        observer.waits(Job("1"), Decision(None, reason))
    page = metrics.page().decode()
    assert 'lorayard_waits_total{model="m",reason="no_slot"} 2.0' in page
    assert 'lorayard_waits_total{model="m",reason="saturated"} 1.0' in page


def test_a_tenants_requests_and_tokens_are_counted() -> None:
    metrics = Metrics()
    metrics.tenant_ended("m", "a", Outcome.COMPLETED, 7)
    metrics.tenant_ended("m", "a", Outcome.OVER_QUOTA, 0)
    page = metrics.page().decode()
    for line in (
        'lorayard_tenant_requests_total{model="m",outcome="completed",tenant="a"} 1.0',
        'lorayard_tenant_requests_total{model="m",outcome="over_quota",tenant="a"} 1.0',
        'lorayard_tenant_tokens_total{model="m",tenant="a"} 7.0',
    ):
        assert line in page
