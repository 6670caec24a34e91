"""Operators of a real router of two processes, by its command line and by vLLM's routes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from adapter_files import write_adapter
from conftest import ADAPTERS, MODEL, config_for
from deployment import Deployment, deployed, wait_until

pytestmark = pytest.mark.processes

KEYS = {"LORAYARD_ADMIN_KEY": "operators-only", "LORAYARD_API_KEYS": "clients-only"}
OPERATOR = {"Authorization": "Bearer operators-only"}
CLIENT = {"Authorization": "Bearer clients-only"}
FIRST = f"{MODEL}:{ADAPTERS[0]}"


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    for number, name in enumerate(ADAPTERS):
        write_adapter(folder / name, seed=number)
    return folder


def chat_body(model: str) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}


def adapters_command(deployment: Deployment, *arguments: str) -> Any:  # noqa: ANN401
    """What the command line prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "router", "adapters", *arguments, "--json"],
        env={**os.environ, **KEYS, "LORAYARD_URL": deployment.url},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return json.loads(done.stdout)


def test_operators_see_and_change_what_clients_get(tmp_path: Path, adapters: Path) -> None:
    config = config_for("emulated", None, str(adapters))
    config["router"] = {**config.get("router", {}), "processes": 2}
    with deployed(config, tmp_path, KEYS) as deployment:
        listed = adapters_command(deployment, "list")["adapters"]
        assert [one["id"] for one in listed] == sorted(f"{MODEL}:{name}" for name in ADAPTERS)

        change = adapters_command(deployment, "load", FIRST)
        assert list(change["workers"].values()) == ["resident"]
        (worker,) = change["workers"]

        def held() -> list[str]:
            (model,) = adapters_command(deployment, "workers")["models"]
            return next(one["adapters"] for one in model["workers"] if one["id"] == worker)

        # The process that answers may be the other one, which hears of it from the worker.
        wait_until(lambda: held() == [FIRST], "both know that it is there")
        assert deployment.post("/v1/chat/completions", chat_body(FIRST), **CLIENT)[0] == 200

        adapters_command(deployment, "drain", worker)
        _, headers, _ = deployment.post("/v1/chat/completions", chat_body(FIRST), **CLIENT)
        assert headers["x-worker"] != worker
        adapters_command(deployment, "undrain", worker)

        mine = {"lora_name": "mine", "lora_path": str(adapters / ADAPTERS[0])}
        assert deployment.post("/v1/load_lora_adapter", mine, **CLIENT)[0] == 401
        status, _, text = deployment.post("/v1/load_lora_adapter", mine, **OPERATOR)
        assert (status, text) == (200, "Success: LoRA adapter 'mine' added successfully.")
        status, _, _ = deployment.post("/v1/chat/completions", chat_body(f"{MODEL}:mine"), **CLIENT)
        assert status == 200
        status, _, text = deployment.post(
            "/v1/unload_lora_adapter", {"lora_name": "mine"}, **OPERATOR
        )
        assert (status, text) == (200, "Success: LoRA adapter 'mine' removed successfully.")
        status, _, _ = deployment.post("/v1/chat/completions", chat_body(f"{MODEL}:mine"), **CLIENT)
        assert status == 404

        assert deployment.get("/v1/models", **OPERATOR)[0] == 401
        assert deployment.get("/admin/v1/adapters", **CLIENT)[0] == 401
        wait_until(lambda: f"load_adapter {FIRST}" in deployment.log, "the operation is logged")
        assert "operators-only" not in deployment.log
