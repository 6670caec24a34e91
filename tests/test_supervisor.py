"""What of a configuration each of several router processes gets."""

from pathlib import Path

from router.config import parse
from router.supervisor import part_of

TEXT = """
llm_configs:
  - model_loading_config: {model_id: one}
    deployment_config: {autoscaling_config: {min_replicas: 2, max_replicas: 2}}
  - model_loading_config: {model_id: two}
    engine: attached
    attach: ["http://elsewhere:8100"]
router:
  processes: 4
  max_queued_requests: 6
  record: {path: /traffic.jsonl}
  tenants:
    - {name: gold, weight: 3}
    - {name: batch, requests_per_minute: 600, tokens_per_minute: 1000}
"""


def test_each_process_has_its_share_and_all_have_the_same_workers_and_seed() -> None:
    config = parse(TEXT, name="config.yaml", folder=Path("/"))
    attach = [("unix:/a", "unix:/b"), ("http://elsewhere:8100",)]
    parts = [part_of(config, number, 7, attach) for number in range(4)]
    for number, part in enumerate(parts):
        assert [(llm.engine, llm.attach) for llm in part.llm_configs] == [
            ("attached", attach[0]),
            ("attached", attach[1]),
        ]
        router = part.router
        assert (router.processes, router.seed, router.max_queued_requests) == (1, 7, 2)
        assert router.record is not None
        assert router.record.path == f"/traffic.{number}.jsonl"
        gold, batch = router.tenants
        assert (gold.weight, gold.requests_per_minute, gold.tokens_per_minute) == (3, None, None)
        assert (batch.requests_per_minute, batch.tokens_per_minute) == (150, 250)
