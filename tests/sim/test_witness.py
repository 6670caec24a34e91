"""`python -m sim replay TRACE --explain REQUEST_ID` as its users run it."""

import json
from pathlib import Path

import pytest
from traces import write_trace

from sim.__main__ import main

CONFIG = """llm_configs:
  - model_loading_config: {{model_id: base}}
    lora_config: {{dynamic_lora_loading_path: s3://bucket/a, max_num_adapters_per_replica: 2}}
    deployment_config:
      max_ongoing_requests: {ongoing}
      autoscaling_config: {{min_replicas: 2, max_replicas: 2}}
    calibration: h100-llama-3.1-8b
router: {{{router}}}
"""


def explained(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    number: int,
    router: str = "policy: cost",
    ongoing: int = 2,
) -> list[str]:
    """What is said of one request of a crowd on two small workers."""
    trace = write_trace(tmp_path / "t.jsonl", 60, every_ms=1, model="base:a{}")
    config = tmp_path / "c.yaml"
    config.write_text(CONFIG.format(router=router, ongoing=ongoing))
    assert main(["replay", str(trace), "--config", str(config), "--explain", str(number)]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = next(line for line in lines if line.startswith(f"request {number} "))
    return lines[lines.index(first) :]


def test_what_a_load_evicts_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a crowd for more adapters than slots, somebody's load evicts another adapter."""
    texts = ("\n".join(explained(tmp_path, capsys, number)) for number in range(60, 20, -1))
    assert any("its load evicts a" in text for text in texts)


@pytest.mark.parametrize(
    ("ongoing", "waits"),
    [
        (2, "it waits: every worker is overloaded (all_overloaded)"),
        (
            64,
            "it waits: workers are free, but all their adapter slots are in use or loading (no_slot)",
        ),
    ],
)
def test_a_request_that_waits_is_told_from_beginning_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ongoing: int, waits: str
) -> None:
    lines = explained(tmp_path, capsys, 20, ongoing=ongoing)
    assert lines[0] == "request 20 came at 0.019000 s for base:a7: 69 tokens"
    text = "\n".join(lines)
    for part in (waits, "request 20 for base:a7 goes to base-", "\n> base-", "adapter: "):
        assert part in text
    assert " s it ended: completed, first token after " in lines[-1]


@pytest.mark.parametrize(
    ("router", "ending"),
    [
        ("policy: cost, ttft_deadline_s: 0.2", "it ended: deadline: no capacity: "),
        ("max_queued_requests: 3", "it ended: queue_full: no capacity: 3 requests are waiting"),
    ],
)
def test_who_is_turned_away_is_told_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], router: str, ending: str
) -> None:
    assert ending in explained(tmp_path, capsys, 60, router)[-1]


def test_explaining_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = write_trace(tmp_path / "t.jsonl", 200, every_ms=3, model="base:a{}")
    digests = []
    for number, extra in enumerate(([], ["--explain", "150"], ["--explain", "1"])):
        out = tmp_path / f"{number}.json"
        assert main(["replay", str(trace), "--policy", "cost", "--json", str(out), *extra]) == 0
        digests.append(json.loads(out.read_text())["digest"])
    capsys.readouterr()
    assert len(set(digests)) == 1


def test_an_unknown_request_is_an_error_that_says_the_range(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = write_trace(tmp_path / "t.jsonl", 30)
    assert main(["replay", str(trace), "--explain", "31"]) == 2
    assert "there is no request 31; those of t.jsonl are 1 to 30" in capsys.readouterr().err
    for text in ("0", "first"):
        with pytest.raises(SystemExit):
            main(["replay", str(trace), "--explain", text])
    assert "first is not a whole number" in capsys.readouterr().err
