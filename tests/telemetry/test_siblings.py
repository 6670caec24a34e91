"""One page of metrics for several processes."""

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from router.core.job import Outcome
from router.telemetry.metrics import Metrics
from router.telemetry.siblings import Siblings, merged


def test_each_sample_says_its_process_and_each_family_stands_once() -> None:
    pages = []
    for name, count in (("r0", 1), ("r1", 2)):
        metrics = Metrics()
        for _ in range(count):
            metrics.ended("m", Outcome.COMPLETED)
            metrics.queued("m", 0.5)
        pages.append((name, metrics.page()))
    families = list(text_string_to_metric_families(merged(pages).decode()))
    assert len({family.name for family in families}) == len(families)
    values = {
        (sample.name, sample.labels.get("process")): sample.value
        for family in families
        for sample in family.samples
        if sample.name
        in {"lorayard_requests_total", "lorayard_queue_seconds_count", "lorayard_processes"}
    }
    assert values == {
        ("lorayard_processes", None): 2,
        ("lorayard_requests_total", "r0"): 1,
        ("lorayard_requests_total", "r1"): 2,
        ("lorayard_queue_seconds_count", "r0"): 1,
        ("lorayard_queue_seconds_count", "r1"): 2,
    }


async def test_whoever_is_asked_answers_for_those_that_are_there(tmp_path: Path) -> None:
    names = ("r0", "r1", "r2")
    metrics = {name: Metrics() for name in names[:2]}
    siblings: list[Siblings] = []
    for name, one in metrics.items():
        one.ended("m", Outcome.COMPLETED)
        siblings.append(Siblings(tmp_path, name, names, one))
        await siblings[-1].start()
    for one in metrics.values():
        page = (await one.scrape()).decode()
        assert "lorayard_processes 2.0" in page
        assert 'lorayard_requests_total{process="r0",model="m",outcome="completed"} 1.0' in page
        assert 'lorayard_requests_total{process="r1",model="m",outcome="completed"} 1.0' in page
    for sibling in siblings:
        sibling.close()
