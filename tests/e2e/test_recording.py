"""A router that records, as real processes: what is in the file, after whatever end."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from adapter_files import write_adapter
from conftest import ADAPTERS, MODEL, config_for
from deployment import ROOT, Deployment, deployed, wait_until

from router.__main__ import main as router_main
from sim.__main__ import main as sim_main

pytestmark = pytest.mark.processes


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """Two workers, and a recording beside the configuration's file."""
    for number, name in enumerate(ADAPTERS):
        write_adapter(tmp_path / "adapters" / name, seed=number)
    made = config_for("emulated", None, str(tmp_path / "adapters"))
    made["router"] = {"record": {"path": "traffic.jsonl"}}
    return made


def body(model: str = MODEL, tokens: int = 8, **fields: Any) -> dict[str, Any]:  # noqa: ANN401
    messages = [{"role": "user", "content": "A secret of eight words, or about so."}]
    return {"model": model, "messages": messages, "max_tokens": tokens, **fields}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ask(deployment: Deployment, request_id: str, *args: Any, **fields: Any) -> int:  # noqa: ANN401
    return deployment.post(
        "/v1/chat/completions", body(*args, **fields), x_request_id=request_id, x_session_id="s-1"
    )[0]


def test_what_happened_is_in_the_file(tmp_path: Path, config: dict[str, Any]) -> None:
    path = tmp_path / "traffic.jsonl"
    adapter = f"{MODEL}:{ADAPTERS[0]}"
    with deployed(config, tmp_path) as deployment:
        usage = {"include_usage": True}
        assert ask(deployment, "cold", adapter) == 200
        assert ask(deployment, "hit", adapter) == 200
        assert ask(deployment, "streamed", adapter, 20, stream=True, stream_options=usage) == 200
        assert ask(deployment, "counted", MODEL, 20, stream=True) == 200
        assert ask(deployment, "refused", MODEL, messages=None) == 400
        assert ask(deployment, "unknown", f"{MODEL}:nope") == 404
        wait_until(lambda: deployment.metric("lorayard_record_rows_total") == 5, "written", 5)
        live = rows(path)
    found = {row["extra"]["id"]: row for row in rows(path)}
    assert rows(path) == live, "nothing is added at the end"
    assert list(found) == ["cold", "hit", "streamed", "counted", "refused"]
    tokens = {name: (row["input_length"], row["output_length"]) for name, row in found.items()}
    prompt = tokens["cold"][0]
    assert tokens["hit"] == tokens["cold"] == (prompt, 8)
    assert tokens["streamed"] == (prompt, 20)
    assert tokens["counted"][1] == 20
    extra = {name: row["extra"] for name, row in found.items()}
    for name, use, outcome, estimated in (
        ("cold", "cold", "completed", False),
        ("hit", "hit", "completed", False),
        ("streamed", "hit", "completed", False),
        ("counted", "none", "completed", True),
        ("refused", "none", "refused", True),
    ):
        seen = extra[name]
        assert (seen["adapter_use"], seen["outcome"]) == (use, outcome)
        assert seen.get("estimated", False) is estimated
        assert seen.get("stream", False) is (name in {"streamed", "counted"})
        assert seen["model"] == (MODEL if use == "none" else adapter)
        assert seen["worker"].startswith(f"{MODEL}-")
        assert 0 < seen["ttft_s"] <= seen["e2e_s"] < 10
        assert found[name]["session_id"] == "s-1"
    assert extra["cold"]["load_s"] > 0 == extra["hit"]["load_s"]
    # Twenty tokens are not there at the first one.
    assert extra["streamed"]["ttft_s"] < extra["streamed"]["e2e_s"] * 0.8
    assert "secret" not in path.read_text()
    out = tmp_path / "out.json"
    replayed = ["replay", str(path), "--config", str(tmp_path / "config.yaml")]
    assert sim_main([*replayed, "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert (result["requests"], result["completed"]) == (5, 5)
    assert result["adapters"]["cold_loads"] == 1


def test_who_is_turned_away_or_leaves_is_recorded_too(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    llm = config["llm_configs"][0]
    llm["deployment_config"] = {"max_ongoing_requests": 1}
    config["router"] |= {"max_queued_requests": 0}
    with deployed(config, tmp_path) as deployment:
        stream = deployment.client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hi"}], max_tokens=4000, stream=True
        )
        next(iter(stream))
        with pytest.raises(openai.InternalServerError):
            deployment.client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "Hi"}], max_tokens=9
            )
        stream.close()
        wait_until(lambda: deployment.metric("lorayard_record_rows_total") == 2, "written", 10)
    gone, full = rows(tmp_path / "traffic.jsonl")
    assert (gone["extra"]["outcome"], full["extra"]["outcome"]) == ("client_gone", "queue_full")
    assert 1 <= gone["output_length"] < 4000
    assert full["output_length"] == 9
    assert "worker" not in full["extra"]
    assert "ttft_s" not in full["extra"]


def test_a_killed_router_leaves_a_trace_that_it_continues(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    path = tmp_path / "traffic.jsonl"
    deployment = Deployment(config, tmp_path)
    try:
        deployment.wait_ready()
        for number in range(3):
            assert ask(deployment, f"first-{number}") == 200
        wait_until(lambda: deployment.metric("lorayard_record_rows_total") == 3, "written", 5)
    finally:
        deployment.process.send_signal(signal.SIGKILL)
        deployment.process.wait()
    with path.open("ab") as file:  # as if the kernel had stopped in the middle
        file.write(path.read_bytes()[:40])
    assert sim_main(["replay", str(path)]) == 0
    with deployed(config, tmp_path) as again:
        assert ask(again, "second") == 200
    found = rows(path)
    assert [row["extra"]["id"] for row in found] == ["first-0", "first-1", "first-2", "second"]
    assert found[3]["timestamp"] > found[2]["timestamp"]
    assert sim_main(["replay", str(path)]) == 0


def test_sigterm_writes_the_last_row(tmp_path: Path, config: dict[str, Any]) -> None:
    """The file is whole as soon as the process has ended; `--record` names it, with the prompts."""
    config["router"]["record"]["prompts"] = True
    path = tmp_path / "c.yaml"
    config["router"] |= {"port": 0, "cache_dir": str(tmp_path / "cache")}
    path.write_text(yaml.safe_dump(config))
    elsewhere = tmp_path / "elsewhere.jsonl"
    options = ["--record", str(elsewhere)]
    with deployed(path, tmp_path / "run", options=options) as deployment:
        assert ask(deployment, "last") == 200
    [row] = rows(elsewhere)
    assert json.loads(row["extra"]["body"]) == body()
    assert not (tmp_path / "traffic.jsonl").exists()


def test_a_file_that_is_no_recording_is_let_be(
    tmp_path: Path, config: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "traffic.jsonl").write_text("my notes\n")
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({**config, "router": {**config["router"], "port": 0}}))
    command = [sys.executable, "-m", "router", "serve", str(path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    message = "traffic.jsonl is there and is no recording, so it is let be; name a file that is not"
    assert ended.returncode == 2
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
    assert router_main(["check", str(path)]) == 2
    assert message in capfd.readouterr().err
    (tmp_path / "traffic.jsonl").unlink()
    assert router_main(["check", str(path)]) == 0
    assert f"recorded into {tmp_path}/traffic.jsonl, at most 256 MiB" in capfd.readouterr().out
    assert not (tmp_path / "traffic.jsonl").exists(), "check makes nothing"
