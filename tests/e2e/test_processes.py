"""Processes that are killed, stopped, broken, attached: nothing is left behind, nothing is lost."""

import asyncio
import json
import os
import shutil
import signal
import socket
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from adapter_files import write_adapter
from apart import run_apart
from conftest import (
    ADAPTERS,
    MODEL,
    config_for,
    free_port,
    process,
    wait_healthy,
)
from deployment import ROOT, Deployment, alive, children, deployed, fetch, wait_until

from router.__main__ import main

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for number, name in enumerate(ADAPTERS):
        write_adapter(folder / name, seed=number)
    return folder


def chat_body(model: str = MODEL, tokens: int = 8, **fields: Any) -> dict[str, Any]:  # noqa: ANN401
    messages = [{"role": "user", "content": "Hi"}]
    return {"model": model, "messages": messages, "max_tokens": tokens, **fields}


@pytest.mark.parametrize("point", ["spawned", "worker spawned", "engine forked", "ready"])
def test_a_killed_router_leaves_nothing(tmp_path: Path, adapters: Path, point: str) -> None:
    """`kill -9` at each point of start-up: the workers end by themselves."""
    deployment = Deployment(config_for("emulated", None, str(adapters)), tmp_path)
    # Two guardians, then an engine below each.
    expected = {"spawned": 0, "worker spawned": 1, "engine forked": 4, "ready": 4}[point]
    try:
        if point == "ready":
            deployment.wait_ready()
        pids = wait_until(
            lambda: len(found := deployment.descendants()) >= expected and [*found, 0], point, 20
        )
        deployment.process.kill()
        deployment.process.wait()
        wait_until(lambda: not alive(pids), f"{pids} ended", 10)
        # A worker that was being started while the list was made is found by its log.
        wait_until(lambda: not workers_of(tmp_path), "no worker of this run", 10)
    finally:
        deployment.stop()


def workers_of(folder: Path) -> list[int]:
    """Engine workers that were told of this run's folder, by their environment or command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            told = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            logs = str((entry / "fd" / "1").readlink())
        except OSError:
            continue
        if b"engine_worker" in told and logs.startswith(str(folder)):
            found.append(int(entry.name))
    return alive(found)


def test_sigterm_cuts_no_request_and_leaves_no_process(tmp_path: Path, adapters: Path) -> None:
    with deployed(config_for("emulated", None, str(adapters)), tmp_path) as deployment:
        pids = deployment.descendants()
        pieces: list[str] = []
        begun = threading.Event()

        def stream() -> None:
            answer = deployment.client.chat.completions.create(
                model=f"{MODEL}:{ADAPTERS[0]}",
                messages=[{"role": "user", "content": "Hi"}],
                max_tokens=150,
                stream=True,
            )
            for chunk in answer:
                pieces.append(chunk.choices[0].delta.content or "")
                begun.set()

        thread = threading.Thread(target=stream)
        thread.start()
        assert begun.wait(10)
        deployment.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "stopping" in deployment.log, "stopping", 5)
        assert deployment.process.poll() is None, "it waits for the stream"
        status, headers, answer = deployment.post("/v1/chat/completions", chat_body())
        assert status == 503
        assert answer["error"]["code"] == "shutting_down"
        assert int(headers["retry-after"]) >= 1
        thread.join(20)
        assert len(pieces) == 150
        assert deployment.process.wait(20) == 0
        assert not alive(pids)
        assert "Traceback" not in deployment.log


def test_a_killed_worker_is_replaced_and_its_requests_go_elsewhere(
    tmp_path: Path, adapters: Path
) -> None:
    with deployed(config_for("emulated", None, str(adapters)), tmp_path) as deployment:
        guardians = deployment.workers()
        assert len(guardians) == 2

        async def load() -> list[tuple[int, str]]:
            async with deployment.async_client as client:

                async def one() -> tuple[int, str]:
                    answer = await client.chat.completions.with_raw_response.create(
                        model=MODEL, messages=[{"role": "user", "content": "Hi"}], max_tokens=40
                    )
                    return answer.status_code, answer.headers["x-worker"]

                tasks = [asyncio.create_task(one()) for _ in range(24)]
                while deployment.metric("lorayard_worker_running") < 2:
                    await asyncio.sleep(0.01)
                os.kill(guardians[0], signal.SIGKILL)
                return await asyncio.gather(*tasks)

        answers = run_apart(load())
        assert {status for status, _ in answers} == {200}
        assert deployment.metric("lorayard_retries_total") >= 1
        wait_until(
            lambda: deployment.metric("lorayard_worker_accepting") == 2, "two workers again", 15
        )
        assert "starting again" in deployment.log
        assert deployment.post("/v1/chat/completions", chat_body())[0] == 200


def test_a_worker_that_cannot_start_ends_the_router_with_its_words(
    tmp_path: Path, adapters: Path
) -> None:
    config = config_for("emulated", None, str(adapters), calibration="no-such-machine")
    deployment = Deployment(config, tmp_path)
    assert deployment.process.wait(20) == 2
    assert "no calibration `no-such-machine`" in deployment.log
    assert "Traceback" not in deployment.log
    wait_until(lambda: not workers_of(tmp_path), "no worker is left", 5)


def test_a_port_that_is_taken_is_said_before_anything_is_started(
    tmp_path: Path, adapters: Path
) -> None:
    with deployed(config_for("emulated", None, str(adapters)), tmp_path / "first") as first:
        port = int(first.url.rpartition(":")[2])
        config = {**config_for("emulated", None, str(adapters)), "router": {"port": port}}
        second = Deployment(config, tmp_path / "second")
        assert second.process.wait(20) == 1
        assert "address already in use" in second.log.lower()
        assert not (tmp_path / "second" / "cache" / "logs").exists()


def test_adapters_that_are_not_sound_are_400_with_the_reason(
    tmp_path: Path, adapters: Path
) -> None:
    store = tmp_path / "store"
    write_adapter(store / "good")
    write_adapter(store / "big", r=512)
    write_adapter(store / "alien", base_model_name_or_path="org/other-model")
    write_adapter(store / "pickled")
    weights = store / "pickled" / "adapter_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    write_adapter(store / "cut")
    cut = store / "cut" / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-10])
    reasons = {
        "big": "its rank is 512, but max_lora_rank is 8",
        "alien": "base_model_name_or_path is 'org/other-model'",
        "pickled": "is a pickle",
        "cut": "its header says",
    }
    with deployed(config_for("emulated", None, str(store)), tmp_path / "run") as deployment:
        for name, reason in reasons.items():
            status, _, answer = deployment.post(
                "/v1/chat/completions", chat_body(f"{MODEL}:{name}")
            )
            assert status == 400, answer
            assert reason in answer["error"]["message"]
            assert answer["error"]["code"] == "adapter_invalid"
        assert deployment.metric("lorayard_worker_in_flight") == 0
        assert deployment.metric("lorayard_worker_adapters") == 0
        status, _, _ = deployment.post("/v1/chat/completions", chat_body(f"{MODEL}:good"))
        assert status == 200


def test_no_capacity_is_503_with_retry_after(tmp_path: Path, adapters: Path) -> None:
    config = config_for("emulated", None, str(adapters))
    config["llm_configs"][0]["deployment_config"] = {"max_ongoing_requests": 1}
    config["router"] = {"max_queued_requests": 1, "queue_timeout_s": 0.3}
    with deployed(config, tmp_path) as deployment:

        async def three() -> list[Any]:
            async with deployment.async_client as client:
                return await asyncio.gather(
                    *(
                        client.chat.completions.create(
                            model=MODEL,
                            messages=[{"role": "user", "content": "Hi"}],
                            max_tokens=200,
                        )
                        for _ in range(3)
                    ),
                    return_exceptions=True,
                )

        results = run_apart(three())
        codes = sorted(getattr(result, "code", "ok") or "ok" for result in results)
        assert codes == ["ok", "queue_full", "queue_timeout"]
        for result in results:
            if hasattr(result, "response"):
                assert result.status_code == 503
                assert int(result.response.headers["retry-after"]) >= 1


def test_keys_and_body_limits(tmp_path: Path, adapters: Path) -> None:
    config = {
        **config_for("emulated", None, str(adapters)),
        "router": {"max_body_bytes": 10_000},
    }
    environment = {"LORAYARD_API_KEYS": "first-key, second-key"}
    with deployed(config, tmp_path, environment) as deployment:
        for headers, expected in (
            ({}, 401),
            ({"Authorization": "Bearer wrong"}, 401),
            ({"Authorization": "Bearer second-key"}, 200),
        ):
            status, found, answer = deployment.post(
                "/v1/chat/completions", chat_body(f"{MODEL}:{ADAPTERS[0]}"), **headers
            )
            assert status == expected
            assert "x-request-id" in found
            if status == 401:
                assert answer["error"]["code"] == "invalid_api_key"
        assert deployment.get("/v1/models")[0] == 401
        for path in ("/health", "/ready", "/metrics"):
            assert deployment.get(path)[0] == 200
        status, _, answer = deployment.post(
            "/v1/chat/completions",
            chat_body(padding="x" * 20_000),
            Authorization="Bearer first-key",
        )
        assert status == 413
        assert "10,000 bytes" in answer["error"]["message"]


@pytest.fixture
def attached_config(adapters: Path) -> dict[str, Any]:
    return config_for("emulated", None, str(adapters))


def test_a_running_engine_worker_is_attached_and_left_running(
    tmp_path: Path, adapters: Path, attached_config: dict[str, Any]
) -> None:
    port = free_port()
    command = [
        *(sys.executable, "-m", "engine_worker", "--engine", "emulated", "--model", MODEL),
        *("--engine-kwargs", '{"enable_lora": true, "max_loras": 2}', "--port", str(port)),
    ]
    environment = {"LORAYARD_WORKER_TOKEN": "shared"}
    url = f"http://127.0.0.1:{port}"
    attached_config["llm_configs"][0] |= {
        "engine": "attached",
        "attach": [url],
        "engine_kwargs": {},
    }
    with process(command, tmp_path / "worker.log", environment) as worker:
        wait_healthy(url, tmp_path / "worker.log", 20)
        for round_number in range(2):
            folder = tmp_path / f"router-{round_number}"
            with deployed(attached_config, folder, environment) as deployment:
                status, headers, answer = deployment.post(
                    "/v1/chat/completions", chat_body(f"{MODEL}:{ADAPTERS[0]}")
                )
                assert status == 200, answer
                # The second router learns from the worker that the adapter is there.
                assert headers["x-adapter"] == ("hit" if round_number else "cold")
            assert worker.poll() is None, "it is not ours to stop"


def test_a_wrong_token_is_said(tmp_path: Path, attached_config: dict[str, Any]) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        *(sys.executable, "-m", "engine_worker", "--engine", "emulated", "--model", MODEL),
        *("--engine-kwargs", '{"enable_lora": true, "max_loras": 2}', "--port", str(port)),
    ]
    attached_config["llm_configs"][0] |= {
        "engine": "attached",
        "attach": [url],
        "engine_kwargs": {},
    }
    with process(command, tmp_path / "worker.log", {"LORAYARD_WORKER_TOKEN": "right"}):
        wait_healthy(url, tmp_path / "worker.log", 20)
        deployment = Deployment(attached_config, tmp_path, {"LORAYARD_WORKER_TOKEN": "wrong"})
        try:
            wait_until(lambda: "401" in deployment.log, "the refusal is logged", 10)
            assert "set LORAYARD_WORKER_TOKEN" in deployment.log
        finally:
            assert deployment.stop() == 0


def test_two_routers_share_one_cache_folder(tmp_path: Path, adapters: Path) -> None:
    config = config_for("emulated", None, str(adapters))
    config["router"] = {"cache_dir": str(tmp_path / "shared")}
    with ExitStack() as stack:
        routers = [
            stack.enter_context(deployed(config, tmp_path / f"router-{number}"))
            for number in range(2)
        ]

        async def burst() -> list[Any]:
            clients = [router.async_client for router in routers]
            answers = await asyncio.gather(
                *(
                    clients[number % 2].chat.completions.create(
                        model=f"{MODEL}:{ADAPTERS[number % 6]}",
                        messages=[{"role": "user", "content": "Hi"}],
                        max_tokens=4,
                    )
                    for number in range(48)
                )
            )
            for client in clients:
                await client.close()
            return list(answers)

        assert len(run_apart(burst())) == 48
    kept = list((tmp_path / "shared" / "adapters" / MODEL).glob("*@*"))
    assert len(kept) == len(ADAPTERS)


def test_check_prints_each_adapter_and_its_faults(
    tmp_path: Path, adapters: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    write_adapter(store / "good")
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config_for("emulated", None, str(store))))
    assert main(["check", str(path)]) == 0
    assert "tiny:good  rank 8" in capfd.readouterr().out
    write_adapter(store / "big", r=512)
    assert main(["check", str(path)]) == 1
    out = capfd.readouterr().out
    assert "refused: adapter big: its rank is 512" in out
    assert "1 adapters would be refused" in out
    path.write_text("llm_configs: 3\n")
    assert main(["check", str(path)]) == 2
    assert "c.yaml:1: llm_configs: Expected `array`" in capfd.readouterr().err


# Paths that name no route of vLLM's, and that some reader could take for a step upwards.
STEPS = [
    "/v1/../worker/v1/load",
    "/v1/%2e%2e/worker/v1/load",
    "/v1/x/../../worker/v1/load",
    "/v1/..%2fworker/v1/load",
    "/v1//worker/v1/load",
    "/v1/x/../load_lora_adapter",
    "/v1/load_lora_adapter/",
    "/v1/./chat/completions",
    "/worker/v1/load",
]


def raw(deployment: Deployment, data: bytes) -> bytes:
    """Send bytes as they are; all that comes back until the connection closes."""
    host, port = deployment.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(data)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def test_hostile_requests(tmp_path: Path, adapters: Path) -> None:
    """No path reaches the worker's own routes; no body or head gets more than an error."""
    with deployed(config_for("emulated", None, str(adapters)), tmp_path) as deployment:
        load = {"adapter": {"name": f"{MODEL}:evil"}, "path": str(adapters / ADAPTERS[0])}
        body = json.dumps({"model": MODEL, **load}).encode()
        for path in STEPS:
            line = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            line += f"Content-Length: {len(body)}\r\n\r\n"
            answer = raw(deployment, line.encode() + body)
            assert answer.startswith(b"HTTP/1.1 404"), (path, answer[:200])
            assert b'"error"' in answer
        assert deployment.metric("lorayard_worker_adapters") == 0
        assert deployment.metric("lorayard_decisions_total") == 0
        for head, status in (
            (b"Content-Encoding: gzip\r\n", b"400"),
            (b"X-Request-Id: a\tb\r\n", b"200"),
        ):
            chat = json.dumps(chat_body()).encode()
            request = (
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + head
            )
            request += b"Content-Length: %d\r\n\r\n" % len(chat) + chat
            answer = raw(deployment, request)
            assert answer.startswith(b"HTTP/1.1 " + status), answer[:300]
            assert b"a\tb" not in answer
        assert "Traceback" not in deployment.log
        assert deployment.post("/v1/chat/completions", chat_body())[0] == 200


def test_a_new_version_is_served_and_a_rollback_too(tmp_path: Path, adapters: Path) -> None:
    """Each request gets the weights that are in the store, however often they change."""
    store = tmp_path / "store"
    config = config_for("emulated", None, str(store))
    config["router"] = {"store_refresh_s": 0.1}
    one, other = (write_adapter(tmp_path / str(seed), seed) for seed in (1, 2))
    folder = store / "a"

    def put(source: Path) -> None:
        """As an object store does: the same content has the same tag."""
        shutil.copytree(source, folder, dirs_exist_ok=True, copy_function=shutil.copy2)

    put(one)
    write_adapter(store / "b", 3)
    write_adapter(store / "c", 4)
    with deployed(config, tmp_path / "run") as deployment:

        def answer(name: str = "a") -> str:
            status, _, body = deployment.post("/v1/chat/completions", chat_body(f"{MODEL}:{name}"))
            assert status == 200, body
            return str(body["choices"][0]["message"]["content"])

        first = answer()
        put(other)
        second = wait_until(lambda: (text := answer()) != first and text, "the new version", 10)
        put(one)
        wait_until(lambda: answer() == first, "the old version again", 10)
        for name in ("b", "c", "b", "c"):  # evicts versions of a
            answer(name)
        assert answer() == first
        put(other)
        wait_until(lambda: answer() == second, "the new version again", 10)


def test_an_adapter_that_changed_since_the_listing_is_served(
    tmp_path: Path, adapters: Path
) -> None:
    store = tmp_path / "store"
    write_adapter(store / "a", 1)
    config = config_for("emulated", None, str(store))
    config["router"] = {"store_refresh_s": 1000, "max_retries": 0}
    with deployed(config, tmp_path / "run") as deployment:
        write_adapter(store / "a", 2)
        os.utime(store / "a" / "adapter_model.safetensors", ns=(1, 1))
        status, _, body = deployment.post("/v1/chat/completions", chat_body(f"{MODEL}:a"))
        assert status == 200, body
        write_adapter(store / "b", 1)
        assert deployment.post("/v1/chat/completions", chat_body(f"{MODEL}:b"))[0] == 200


def test_a_hung_worker_gets_nothing_new_until_it_speaks_again(
    tmp_path: Path, adapters: Path
) -> None:
    with deployed(config_for("emulated", None, str(adapters)), tmp_path) as deployment:
        [guardian, _] = deployment.workers()
        [engine] = children(guardian)
        os.kill(engine, signal.SIGSTOP)
        try:
            wait_until(
                lambda: deployment.metric("lorayard_worker_accepting") == 1, "silence noticed", 15
            )
            for _ in range(8):
                assert deployment.post("/v1/chat/completions", chat_body())[0] == 200
        finally:
            os.kill(engine, signal.SIGCONT)
        wait_until(lambda: deployment.metric("lorayard_worker_accepting") == 2, "it is back", 15)


def test_a_client_that_reads_nothing_does_not_keep_its_place(
    tmp_path: Path, adapters: Path
) -> None:
    # An engine that makes tokens as fast as it can, so that all buffers between fill at once.
    calibration = json.loads((ROOT / "sim" / "calibrations" / "emulated.json").read_text())
    calibration["step_base_s"]["value"] = calibration["step_per_request_s"]["value"] = 1e-6
    fast = tmp_path / "fast.json"
    fast.write_text(json.dumps(calibration))
    config = config_for("emulated", None, str(adapters), calibration=str(fast))
    config["router"] = {"idle_timeout_s": 1}
    with deployed(config, tmp_path) as deployment:
        host, port = deployment.url.removeprefix("http://").split(":")
        body = json.dumps(chat_body(tokens=100_000, stream=True)).encode()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((host, int(port)))
            connection.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
                % len(body)
                + body
            )
            wait_until(lambda: deployment.metric("lorayard_worker_in_flight") == 1, "it runs", 5)
            wait_until(lambda: deployment.metric("lorayard_worker_in_flight") == 0, "it ends", 60)
        assert deployment.metric("lorayard_requests_total", outcome="client_gone") == 1


def test_a_worker_that_lost_an_adapter_loads_it_again(
    tmp_path: Path, adapters: Path, attached_config: dict[str, Any]
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        *(sys.executable, "-m", "engine_worker", "--engine", "emulated", "--model", MODEL),
        *("--engine-kwargs", '{"enable_lora": true, "max_loras": 2}', "--port", str(port)),
    ]
    attached_config["llm_configs"][0] |= {
        "engine": "attached",
        "attach": [url],
        "engine_kwargs": {},
    }
    name = f"{MODEL}:{ADAPTERS[0]}"
    with process(command, tmp_path / "worker.log", {}):
        wait_healthy(url, tmp_path / "worker.log", 20)
        with deployed(attached_config, tmp_path / "run") as deployment:
            assert deployment.post("/v1/chat/completions", chat_body(name))[0] == 200
            _, _, state = fetch(f"{url}/worker/v1/adapters", None, {})
            [held] = state["gpu"]
            unload = json.dumps({"adapter": held}).encode()
            assert fetch(f"{url}/worker/v1/unload", unload, {})[0] == 200
            status, _, answer = deployment.post("/v1/chat/completions", chat_body(name))
            assert status == 200, answer
