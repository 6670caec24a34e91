"""A new version of an adapter, on real router processes and workers under load: nobody notices but by
the answers, which are all of one version or all of the other."""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from adapter_files import write_adapter
from apart import run_apart
from conftest import MODEL, config_for
from deployment import Deployment, deployed, wait_until

pytestmark = pytest.mark.processes

NAMES = ("pirate", "poet", "chef")
STREAMS = 32


def put(store: Path, name: str, seed: int, **changes: Any) -> None:  # noqa: ANN401
    """Put a version into the store as one does who knows that it is read meanwhile: in one step."""
    beside = store.parent / f"incoming-{name}-{seed}"
    write_adapter(beside, seed=seed, **changes)
    (store / name).mkdir(exist_ok=True)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (beside / file).replace(store / name / file)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    folder.mkdir()
    for number, name in enumerate(NAMES):
        put(folder, name, number)
    return folder


def config_of(store: Path, **lora: Any) -> dict[str, Any]:  # noqa: ANN401
    config = config_for("emulated", None, str(store), engine_kwargs={"max_lora_rank": 8})
    config["llm_configs"][0]["lora_config"] |= {"max_num_adapters_per_replica": 4, **lora}
    config["router"] = {"store_refresh_s": 0.2}
    return config


class Answer:
    """What a client got: which version it says it is, and what it says."""

    def __init__(self, asked_at: float, status: int, version: str, text: str) -> None:
        self.asked_at = asked_at
        self.status = status
        self.version = version
        self.text = text


@asynccontextmanager
async def session(deployment: Deployment) -> AsyncIterator[aiohttp.ClientSession]:
    """A client whose every request may reach another router process."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(deployment.url, connector=connector) as client:
        yield client


async def ask(client: aiohttp.ClientSession, model: str, tokens: int = 6, user: str = "") -> Answer:
    asked_at = time.monotonic()
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": tokens}
    if user:
        body["user"] = user
    async with client.post("/v1/chat/completions", json=body) as answer:
        text = await answer.text()
        if answer.status == 200:
            text = json.loads(text)["choices"][0]["message"]["content"]
        return Answer(asked_at, answer.status, answer.headers.get("x-adapter-version", ""), text)


async def stream(client: aiohttp.ClientSession, model: str, begun: asyncio.Event) -> Answer:
    asked_at = time.monotonic()
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 150,
        "stream": True,
    }
    words = []
    async with client.post("/v1/chat/completions", json=body) as answer:
        async for line in answer.content:
            if line.startswith(b"data: {"):
                begun.set()
                choices = json.loads(line[6:])["choices"]
                words += [choice["delta"].get("content") or "" for choice in choices]
        assert line.strip() in {b"", b"data: [DONE]"}
        version = answer.headers["x-adapter-version"]
        return Answer(asked_at, answer.status, version, "".join(words))


async def until_new(client: aiohttp.ClientSession, model: str, old: str) -> Answer:
    """Ask until another version answers than the old one."""
    deadline = time.monotonic() + 20
    while True:
        answer = await ask(client, model)
        assert answer.status == 200, answer.text
        if answer.version != old:
            return answer
        assert time.monotonic() < deadline, "the old version answers still"
        await asyncio.sleep(0.02)


def held(deployment: Deployment, name: str) -> float:
    """How many versions of an adapter are in the workers' slots, all workers together."""
    return deployment.metric("lorayard_worker_adapter", adapter=name)


@pytest.fixture(params=[1, 2])
def processes(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def test_a_new_version_while_32_streams_run_on_the_old_one(
    store: Path, tmp_path: Path, processes: int
) -> None:
    model = f"{MODEL}:pirate"

    async def scene(deployment: Deployment) -> None:
        async with session(deployment) as client:
            old = await ask(client, model, 150)
            begun = [asyncio.Event() for _ in range(STREAMS)]
            streams = [asyncio.create_task(stream(client, model, event)) for event in begun]
            await asyncio.gather(*(event.wait() for event in begun))
            put(store, "pirate", 77)
            new = await until_new(client, model, old.version)
            running = sum(not one.done() for one in streams)
            assert running > STREAMS // 2, "the flip waited for the streams"
            after = await asyncio.gather(*(ask(client, model) for _ in range(50)))
            assert {answer.version for answer in after} == {new.version}
            assert {answer.text for answer in after} == {new.text}
            assert new.text != old.text[: len(new.text)]
            finished = await asyncio.gather(*streams)
            assert {answer.text for answer in finished} == {old.text}, "each is whole, and the old"
            # Every process's word on the same workers: each counts what it knows to be there.
            await asyncio.to_thread(
                wait_until,
                lambda: held(deployment, "pirate") <= 2 * processes,
                "the old version has left: one on each worker at most",
            )
            pinned = await ask(client, f"{model}@{old.version}")
            assert (pinned.status, pinned.version) == (200, old.version), pinned.text

    options = ["--processes", str(processes)]
    with deployed(config_of(store), tmp_path / "router", options=options) as deployment:
        run_apart(scene(deployment))
        assert deployment.metric("lorayard_requests_total", outcome="completed") >= STREAMS
        for outcome in ("load_failed", "worker_failed", "router_failed"):
            assert deployment.metric("lorayard_requests_total", outcome=outcome) == 0


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ({"r": 64}, "its rank is 64"),
        ({"base_model_name_or_path": "another/model"}, "base_model_name_or_path"),
    ],
)
def test_a_version_that_is_no_good_never_answers(
    store: Path, tmp_path: Path, broken: dict[str, Any], says: str
) -> None:
    model = f"{MODEL}:poet"
    with deployed(config_of(store), tmp_path / "router") as deployment:

        async def scene() -> None:
            async with session(deployment) as client:
                old = await ask(client, model)
                put(store, "poet", 78, **broken)
                wait_until(lambda: says in deployment.log, "the refusal is in the log")
                after = await asyncio.gather(*(ask(client, model) for _ in range(20)))
                assert {answer.text for answer in after} == {old.text}
                put(store, "poet", 79)
                await until_new(client, model, old.version)

        run_apart(scene())


def test_what_serves_is_the_same_after_a_kill(store: Path, tmp_path: Path) -> None:
    """A share of the requests goes to a new version; so it does after a `kill -9` of the router."""
    model = f"{MODEL}:chef"
    config = config_of(store, rollout_weight=0.5)
    users = [f"user-{number}" for number in range(40)]

    async def versions(deployment: Deployment) -> dict[str, str]:
        async with session(deployment) as client:
            answers = await asyncio.gather(*(ask(client, model, user=user) for user in users))
        assert {answer.status for answer in answers} == {200}
        return {user: answer.version for user, answer in zip(users, answers, strict=True)}

    with deployed(config, tmp_path / "router") as deployment:
        (old,) = set(run_apart(versions(deployment)).values())
        put(store, "chef", 80)
        wait_until(lambda: len(set(run_apart(versions(deployment)).values())) == 2, "both serve")
        before = run_apart(versions(deployment))
        assert 8 < sum(version == old for version in before.values()) < 32
        os.kill(deployment.process.pid, signal.SIGKILL)
        deployment.process.wait()
    with deployed(config, tmp_path / "router") as deployment:
        assert run_apart(versions(deployment)) == before
