"""What each of several router processes gets, and what is said where they cannot be had."""

import asyncio
from pathlib import Path

import pytest

from router.__main__ import parser
from router.config import parse
from router.part import Part, bound
from router.supervisor import _RouterProcess, part_of

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


async def test_a_process_that_cannot_even_be_started_is_heard_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def fails(*_: object, **__: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", fails)
    config = parse(TEXT, name="config.yaml", folder=Path("/"))
    process = _RouterProcess(Part(0, 4, "/", "info", config), "token")
    process.start()
    with pytest.raises(OSError, match="temporarily unavailable"):
        async with asyncio.timeout(5):
            await process.ready


def test_a_port_that_is_taken_is_named() -> None:
    with bound("127.0.0.1", 0, shared=False) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(OSError, match=f"(?i)address already in use: 127.0.0.1:{port}"):
            bound("127.0.0.1", port, shared=False)


@pytest.mark.parametrize(
    "flag", [("--processes", "0"), ("--processes", "x"), ("--port", "-1"), ("--port", "70000")]
)
def test_a_number_that_cannot_be_says_what_can(
    flag: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["serve", "c.yaml", f"{flag[0]}={flag[1]}"])
    assert f"`{flag[1]}` is no " in capsys.readouterr().err
