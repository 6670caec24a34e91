"""One suite, two engines: the emulated one in seconds, vLLM where a test is marked so.

Two workers of two slots each, so four slots for six adapters, served from a real S3 endpoint. Beside
them one engine alone, with every adapter, whose answers the router's must equal.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from adapter_files import write_adapter
from deployment import ROOT, Deployment, deployed, fetch, wait_until
from object_store import s3_server, upload

ADAPTERS = tuple(f"adapter-{letter}" for letter in "abcdef")
SLOTS = 2
MODEL = "tiny"
ENGINE_KWARGS: dict[str, dict[str, Any]] = {
    "emulated": {"max_loras": SLOTS, "max_lora_rank": 8},
    "vllm": {
        "enable_lora": True,
        "max_loras": SLOTS,
        "max_lora_rank": 8,
        "max_model_len": 512,
        "max_num_seqs": 64,
        "dtype": "float32",  # with random weights, bfloat16 would round answers apart
        "enforce_eager": True,
    },
}
CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
BOOT_S = 480


@pytest.fixture(scope="session")
def adapter_store(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Path, dict[str, str]]]:
    """Six adapters in a folder, and in S3 under `s3://adapters/tiny`; the environment to reach it."""
    folder = tmp_path_factory.mktemp("adapters")
    for number, name in enumerate(ADAPTERS):
        write_adapter(folder / name, seed=number)
    with s3_server() as environment:
        upload(folder, "adapters", MODEL)
        yield folder, environment


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random model, for real engines. Built apart, so that torch stays out of pytest."""
    folder = tmp_path_factory.mktemp("model") / MODEL
    script = "import sys, pathlib, tiny_model; tiny_model.build(pathlib.Path(sys.argv[1]))"
    subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests" / "support")},
        check=True,
        capture_output=True,
    )
    return folder


def config_for(engine: str, model: Path | None, store: str, **llm: Any) -> dict[str, Any]:  # noqa: ANN401
    """A configuration of two workers."""
    return {
        "llm_configs": [
            {
                "model_loading_config": {"model_id": MODEL, "model_source": str(model or MODEL)},
                "lora_config": {
                    "dynamic_lora_loading_path": store,
                    "max_num_adapters_per_replica": SLOTS,
                    "accepted_base_models": [MODEL],
                },
                "engine_kwargs": ENGINE_KWARGS[engine],
                "deployment_config": {
                    "max_ongoing_requests": 64,
                    "autoscaling_config": {"min_replicas": 2, "max_replicas": 2},
                },
                "engine": engine,
                **llm,
            }
        ]
    }


class EngineAlone:
    """One engine without a router, with every adapter loaded: the truth to compare with."""

    def __init__(self, url: str) -> None:
        self.url = url

    def chat(self, model: str, prompt: str, tokens: int = 24) -> str:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": tokens,
            "temperature": 0,
        }
        status, _, answer = fetch(f"{self.url}/v1/chat/completions", json.dumps(body).encode(), {})
        assert status == 200, answer
        return str(answer["choices"][0]["message"]["content"])


@contextmanager
def process(
    command: list[str], log: Path, environment: dict[str, str]
) -> Iterator["subprocess.Popen[bytes]"]:
    """A process, ended at the end, its output in a file."""
    with log.open("wb") as out:
        started = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(60)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


def free_port() -> int:
    """A port that the system has free now."""
    import socket  # noqa: PLC0415

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def stock_vllm(folder: Path, model: Path, adapters: Path | None) -> Iterator[str]:
    """A stock vLLM server that has never heard of us; its URL, before it is ready."""
    port = free_port()
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"),
        *("--model", str(model), "--served-model-name", MODEL),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--enable-lora", "--max-loras", "2", "--max-cpu-loras", "8", "--max-lora-rank", "8"),
        *("--max-model-len", "512", "--max-num-seqs", "64"),
        *("--dtype", "float32", "--enforce-eager"),
    ]
    if adapters is not None:
        modules = [f"{MODEL}:{name}={adapters / name}" for name in ADAPTERS]
        command += ["--lora-modules", *modules]
    environment = {
        **CPU,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with process(command, folder / "stock.log", environment):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def emulated_alone(folder: Path, adapters: Path) -> Iterator[str]:
    """An emulated engine worker with every adapter; its URL."""
    port = free_port()
    kwargs = json.dumps({"enable_lora": True, "max_loras": len(ADAPTERS), "max_lora_rank": 8})
    command = [
        *(sys.executable, "-m", "engine_worker", "--engine", "emulated"),
        *("--model", MODEL, "--engine-kwargs", kwargs, "--port", str(port)),
    ]
    url = f"http://127.0.0.1:{port}"
    with process(command, folder / "alone.log", {}):
        wait_healthy(url, folder / "alone.log", 30)
        for name in ADAPTERS:
            body = {"adapter": {"name": f"{MODEL}:{name}"}, "path": str(adapters / name)}
            assert fetch(f"{url}/worker/v1/load", json.dumps(body).encode(), {})[0] == 200
        yield url


def wait_healthy(url: str, log: Path, timeout_s: float) -> None:
    def healthy() -> bool:
        try:
            return fetch(f"{url}/health", None, {})[0] == 200
        except OSError:
            return False

    wait_until(healthy, f"{url} healthy; {log}", timeout_s)


class Served:
    """A deployment, the engine alone, and which engine it is."""

    def __init__(self, engine: str, deployment: Deployment, alone: EngineAlone) -> None:
        self.engine = engine
        self.deployment = deployment
        self.alone = alone


ENGINES = [
    pytest.param("emulated", marks=pytest.mark.processes),
    pytest.param("vllm", marks=pytest.mark.vllm),
]


@pytest.fixture(scope="session")
def stock(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    adapter_store: tuple[Path, dict[str, str]],
) -> Iterator["Stock"]:
    """A stock vLLM server with every adapter, booting; who needs it waits for it."""
    folder = tmp_path_factory.mktemp("stock")
    with stock_vllm(folder, tiny_model, adapter_store[0]) as url:
        yield Stock(url, folder / "stock.log")


class Stock:
    """Where the stock server is, and its log."""

    def __init__(self, url: str, log: Path) -> None:
        self.url = url
        self._log = log

    def wait(self) -> "Stock":
        wait_healthy(self.url, self._log, BOOT_S)
        return self

    def names(self) -> list[str]:
        """What it lists."""
        _, _, listing = fetch(f"{self.url}/v1/models", None, {})
        return [card["id"] for card in listing["data"]]

    def unload(self, name: str) -> int:
        """Unload an adapter by hand; the status."""
        body = json.dumps({"lora_name": name}).encode()
        return fetch(f"{self.url}/v1/unload_lora_adapter", body, {})[0]


@pytest.fixture(scope="module", params=ENGINES)
def served(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    adapter_store: tuple[Path, dict[str, str]],
) -> Iterator[Served]:
    """Two workers behind the router, adapters from S3, and one engine alone."""
    engine = request.param
    adapters, environment = adapter_store
    folder = tmp_path_factory.mktemp(f"served-{engine}")
    model: Path | None = None
    stock: Stock | None = None
    with ExitStack() as stack:
        if engine == "vllm":
            model = request.getfixturevalue("tiny_model")
            stock = request.getfixturevalue("stock")  # boots beside the others, to save time
            url = stock.url
        else:
            url = stack.enter_context(emulated_alone(folder, adapters))
        config = config_for(engine, model, f"s3://adapters/{MODEL}")
        deployment = stack.enter_context(
            deployed(config, folder / "router", {**environment, **CPU}, timeout_s=BOOT_S)
        )
        if stock is not None:
            stock.wait()
        yield Served(engine, deployment, EngineAlone(url))


def in_threads(work: list[Any]) -> list[Any]:
    """Run callables at once, one thread each; their results in order."""
    results: list[Any] = [None] * len(work)

    def run(index: int) -> None:
        results[index] = work[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
