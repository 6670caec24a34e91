"""What only a real engine can show: its processes end, a stock server serves, the words are right.

Runs after test_serving, whose engine alone is the stock server that is attached here and changed.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from adapter_files import write_adapter
from conftest import ADAPTERS, BOOT_S, CPU, MODEL, Stock, config_for
from deployment import ROOT, Deployment, alive, deployed, wait_until

pytestmark = pytest.mark.vllm

DEMO_MODEL = ROOT / ".lorayard" / "smollm2-135m"
DEMO = "smollm2-135m"


def engine_processes(pids: list[int]) -> list[int]:
    """Those of the processes that are vLLM's own engine."""
    found = []
    for pid in pids:
        try:
            if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found


@pytest.mark.parametrize("point", ["importing", "engine started"])
def test_a_router_killed_while_vllm_boots_leaves_nothing(
    tmp_path: Path, tiny_model: Path, adapter_store: tuple[Path, dict[str, str]], point: str
) -> None:
    config = config_for("vllm", tiny_model, str(adapter_store[0]))
    config["llm_configs"][0]["deployment_config"] = {}
    deployment = Deployment(config, tmp_path, CPU)
    try:
        if point == "importing":
            pids = wait_until(
                lambda: len(found := deployment.descendants()) >= 2 and found, "a worker", 30
            )
        else:
            wait_until(
                lambda: engine_processes(deployment.descendants()), "an engine process", BOOT_S
            )
            pids = deployment.descendants()
            assert len(pids) >= 3
        deployment.process.kill()
        deployment.process.wait()
        wait_until(lambda: not alive(pids), f"{pids} ended", 10)
    finally:
        deployment.stop()


def test_a_stock_vllm_server_is_attached(
    tmp_path: Path, stock: Stock, adapter_store: tuple[Path, dict[str, str]]
) -> None:
    stock.wait()
    store = shutil.copytree(adapter_store[0], tmp_path / "store")
    config = config_for("vllm", None, str(store))
    config["llm_configs"][0] |= {"engine": "attached", "attach": [stock.url], "engine_kwargs": {}}
    config["llm_configs"][0]["lora_config"]["accepted_base_models"] = ["tiny"]
    config["router"] = {"store_refresh_s": 1}
    with deployed(config, tmp_path / "router") as deployment:
        assert "attached to the stock vLLM server" in deployment.log
        answers = {}
        for model in (MODEL, *(f"{MODEL}:{name}" for name in ADAPTERS)):
            status, headers, answer = deployment.post("/v1/chat/completions", chat_body(model))
            assert status == 200, answer
            answers[model] = answer["choices"][0]["message"]["content"]
            assert headers["x-adapter"] == ("none" if model == MODEL else "cold")
            assert answer["model"].partition("@")[0] == model
            assert ("@" in answer["model"]) == (model != MODEL), "by its version's own name"
        assert len(set(answers.values())) == len(answers)
        assert deployment.metric("lorayard_adapter_evictions_total") == len(ADAPTERS) - 2
        again = f"{MODEL}:{ADAPTERS[-1]}"
        _, headers, answer = deployment.post("/v1/chat/completions", chat_body(again))
        assert headers["x-adapter"] == "hit"
        assert answer["choices"][0]["message"]["content"] == answers[again]
        wait_until(lambda: deployment.metric("lorayard_worker_running") == 0, "its metrics", 5)
        hers = [f"{MODEL}:{name}" for name in ADAPTERS]
        assert set(hers) <= set(stock.names()), "what was loaded without us is as it was"

        # Somebody takes it away by hand, and it is noticed before anybody asks for it.
        [versioned] = [name for name in stock.names() if name.startswith(f"{again}@")]
        assert stock.unload(versioned) == 200
        held = {"adapter": ADAPTERS[-1], "phase": "resident"}
        wait_until(lambda: not deployment.metric("lorayard_worker_adapter", **held), "noticed", 10)
        _, headers, answer = deployment.post("/v1/chat/completions", chat_body(again))
        assert headers["x-adapter"] == "cold"
        assert answer["choices"][0]["message"]["content"] == answers[again]

        # A new version is loaded beside the old one, which leaves when nobody uses it any more.
        write_adapter(store / ADAPTERS[-1], seed=99)

        def changed() -> bool:
            _, _, answer = deployment.post("/v1/chat/completions", chat_body(again))
            return bool(answer["model"] != versioned)

        wait_until(changed, "the new version", 20)
        _, _, answer = deployment.post("/v1/chat/completions", chat_body(again))
        assert answer["choices"][0]["message"]["content"] != answers[again]
        assert answer["model"] in stock.names()
        wait_until(lambda: versioned not in stock.names(), "the old one has left", 20)


def chat_body(model: str, text: str = "Hi", tokens: int = 12) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0}


def test_the_demonstration_speaks_as_its_adapters_were_taught(tmp_path: Path) -> None:
    """`make serve`, less make: the real model, the real adapters, and then a `kill -9`."""
    subprocess.run(
        [sys.executable, "-m", "engine_worker.demo", "build", str(DEMO_MODEL)], cwd=ROOT, check=True
    )
    deployment = Deployment(ROOT / "configs" / "quickstart.yaml", tmp_path, CPU)
    try:
        deployment.wait_ready(BOOT_S)
        words = {}
        for name in ("", ":pirate", ":professor", ":robot"):
            status, _, answer = deployment.post(
                "/v1/chat/completions",
                chat_body(f"{DEMO}{name}", "What is the capital of France?", 40),
            )
            assert status == 200, answer
            words[name] = answer["choices"][0]["message"]["content"]
        assert "Paris" in words[""]
        for name, sign in ((":pirate", "Arrr"), (":professor", "student"), (":robot", "BEEP BOOP")):
            assert sign in words[name]
            assert sign not in words[""]
        assert deployment.metric("lorayard_adapter_loads_total", result="ok") >= 3
        pids = deployment.descendants()
        assert len(engine_processes(pids)) == 2
        deployment.process.kill()
        deployment.process.wait()
        wait_until(lambda: not alive(pids), f"{pids} ended", 10)
    finally:
        deployment.stop()
        assert os.path.isdir(DEMO_MODEL)  # noqa: PTH112  (kept for the next run)
