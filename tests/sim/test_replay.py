"""`python -m sim replay` as its users run it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from traces import write_trace

ROOT = Path(__file__).parents[2]
AZURE = ROOT.parent / "shared" / "data" / "azure_llm_2023_conv.csv"
KEYS = {
    "policy", "seed", "requests", "completed", "rejected", "failed", "unfinished", "ttft_s", "itl_s",
    "e2e_s", "adapters", "goodput_rps", "slo", "workers", "sim", "digest",
}  # fmt: skip


def sim(*arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "sim", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "120", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def replay(tmp_path: Path, *arguments: object, **environment: str) -> dict[str, Any]:
    out = tmp_path / "out.json"
    done = sim("replay", *arguments, "--json", out, **environment)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(out.read_text())
    assert result["digest"] in done.stdout
    return result


def assert_adds_up(result: dict[str, Any]) -> None:
    parts = ("completed", "rejected", "failed", "unfinished")
    assert sum(result[part] for part in parts) == result["requests"]


def test_the_result_is_that_of_the_contract(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t.jsonl", 300, model="base:a{}")
    result = replay(tmp_path, trace, "--seed", 3, "--report", tmp_path / "out.html")
    assert set(result) >= KEYS
    assert_adds_up(result)
    assert result["requests"] == result["completed"] == 300
    for name in ("ttft_s", "itl_s", "e2e_s"):
        values = [result[name][key] for key in ("p50", "p90", "p99")]
        assert values == sorted(values)
        assert result[name]["mean"] > 0
    adapters = result["adapters"]
    assert adapters["hits"] + adapters["joins"] + adapters["cold_loads"] == 300
    assert adapters["hit_rate"] == pytest.approx(adapters["hits"] / 300)
    assert set(result["slo"]) == {"ttft_s", "itl_s", "attainment"}
    assert set(result["sim"]) == {"virtual_s", "wall_s", "requests_per_wall_s", "peak_rss_mib"}
    assert sum(worker["requests"] for worker in result["workers"]) == 300
    assert result["digest"] in (tmp_path / "out.html").read_text()


def test_the_same_seed_gives_the_same_digest_whatever_the_process(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t.jsonl", 400)
    arguments = (trace, "--adapters", 30, "--locality", 0.5)
    digests = {
        replay(tmp_path, *arguments, "--seed", 1, PYTHONHASHSEED=seed)["digest"]
        for seed in ("0", "1", "77")
    }
    assert len(digests) == 1
    assert replay(tmp_path, *arguments, "--seed", 2)["digest"] not in digests


def test_what_is_turned_away_counts_as_infinite(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t.jsonl", 600, every_ms=0.01)
    config = tmp_path / "c.yaml"
    config.write_text(
        """llm_configs:
  - model_loading_config: {model_id: base, model_source: /does/not/exist}
    lora_config: {dynamic_lora_loading_path: /nor/this, max_num_adapters_per_replica: 2}
    deployment_config: {max_ongoing_requests: 8}
router: {max_queued_requests: 50, queue_timeout_s: 2}
"""
    )
    result = replay(tmp_path, trace, "--config", config, "--adapters", 5)
    assert_adds_up(result)
    assert result["rejected"] > 300
    assert result["ttft_s"]["mean"] is None
    assert result["ttft_s"]["p99"] is None
    assert result["slo"]["attainment"] < 0.5


def test_a_trace_names_its_own_models(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t.jsonl", 50, model="some-other-base:x{}")
    result = replay(tmp_path, trace)
    assert result["completed"] == 50
    assert result["adapters"]["cold_loads"] >= 12


def test_requests_that_can_never_fit_fail_and_are_counted(tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    trace.write_text(
        '{"timestamp": 0, "input_length": 5000000, "output_length": 5}\n'
        '{"timestamp": 0, "input_length": 5, "output_length": 5}\n'
    )
    result = replay(tmp_path, trace)
    assert (result["completed"], result["failed"]) == (1, 1)
    assert result["outcomes"] == {"completed": 1, "refused": 1}


def test_each_option_has_its_effect(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t.jsonl", 200)
    plain = replay(tmp_path, trace)
    assert len(plain["workers"]) == 4
    assert plain["adapters"]["hit_rate"] is None
    assert plain["goodput_rps"] == pytest.approx(200 / plain["sim"]["virtual_s"])
    assert plain["slo"]["attainment"] == 1
    limited = replay(tmp_path, trace, "--limit", 50)
    assert limited["requests"] == 50
    assert len(replay(tmp_path, trace, "--workers", 2)["workers"]) == 2
    faster = replay(tmp_path, trace, "--speed", 4)
    assert faster["sim"]["virtual_s"] < 0.7 * plain["sim"]["virtual_s"]
    strict = replay(tmp_path, trace, "--slo-ttft", 0.001)
    assert (strict["slo"]["attainment"], strict["goodput_rps"]) == (0, 0)
    few = replay(tmp_path, trace, "--adapters", 2, "--locality", 0)
    many = replay(tmp_path, trace, "--adapters", 150, "--locality", 0, "--zipf", 0)
    assert many["adapters"]["cold_loads"] > 3 * few["adapters"]["cold_loads"]
    assert replay(tmp_path, trace, "--policy", "round_robin")["policy"] == "round_robin"


def test_waiting_for_a_worker_counts_in_the_time_to_first_token(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t.jsonl", 40, every_ms=0)
    config = tmp_path / "c.yaml"
    config.write_text(
        """llm_configs:
  - model_loading_config: {model_id: base}
    deployment_config: {max_ongoing_requests: 1}
"""
    )
    result = replay(tmp_path, trace, "--config", config)
    # One at a time: the last waits for all the others.
    assert result["ttft_s"]["p99"] > 0.9 * result["sim"]["virtual_s"] - 1
    assert result["e2e_s"]["p99"] == pytest.approx(result["sim"]["virtual_s"], rel=0.01)


def test_attached_workers_are_simulated_one_for_each(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t.jsonl", 10)
    config = tmp_path / "c.yaml"
    config.write_text(
        """llm_configs:
  - model_loading_config: {model_id: base}
    engine: attached
    attach: [http://a:1, http://b:1, http://c:1]
"""
    )
    assert len(replay(tmp_path, trace, "--config", config)["workers"]) == 3


def test_a_model_that_is_not_configured_is_said_before_the_run(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t.jsonl", 10, model="zz:a{}")
    config = tmp_path / "c.yaml"
    config.write_text(
        """llm_configs:
  - model_loading_config: {model_id: a}
  - model_loading_config: {model_id: b}
"""
    )
    done = sim("replay", trace, "--config", config)
    assert done.returncode == 2
    assert "asks for `zz:a0`, but the configuration has only a, b; add the model" in done.stderr


BAD = [
    (("nowhere.jsonl",), "nowhere.jsonl: No such file or directory; name a .jsonl or .csv trace"),
    (("{broken}",), "broken.jsonl:2: row is"),
    (("{good}", "--config", "{config}"), "c.yaml:2: unknown key `llm`"),
    (("{good}", "--json", "/nonexistent/x.json"), "there is no folder /nonexistent; make it first"),
    (("{good}", "--adapters", "-1"), "-1 is below 0"),
    (("{good}", "--locality", "2"), "2 is not between 0 and 1"),
    (("{good}", "--policy", "none"), "invalid choice: 'none'"),
    (("{good}", "--limit", "x"), "--limit: x is not a whole number"),
    (("{good}", "--speed", "0"), "0 is not between 1e-06 and 1e+06"),
    (("{good}", "--json", "{folder}"), "is a folder; name a file in it"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_a_mistake_gets_one_clear_line(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    good = write_trace(tmp_path / "good.jsonl", 3)
    broken = tmp_path / "broken.jsonl"
    broken.write_text(good.read_text().splitlines()[0] + "\n{oops\n")
    config = tmp_path / "c.yaml"
    config.write_text("llm_configs:\n  - llm: {}\n")
    names = {
        "{folder}": str(tmp_path),
        "{good}": str(good),
        "{broken}": str(broken),
        "{config}": str(config),
    }
    done = sim("replay", *(names.get(argument, argument) for argument in arguments))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.skipif(not AZURE.is_file(), reason="the shared traces are not beside this checkout")
def test_the_azure_trace_with_200_adapters(tmp_path: Path) -> None:
    arguments = (AZURE, "--adapters", 200, "--seed", 1)
    result = replay(tmp_path, *arguments)
    assert result["requests"] == 19_366
    assert_adds_up(result)
    assert all(math.isfinite(worker["utilization"]) for worker in result["workers"])
    assert replay(tmp_path, *arguments)["digest"] == result["digest"]
    spread = replay(tmp_path, *arguments, "--policy", "round_robin")
    assert spread["adapters"]["cold_loads"] > 2 * result["adapters"]["cold_loads"]
