"""Several router processes at one port, over the same workers: what holds for one holds for all.

Whether a worker was ever asked for too much is read off its own count (`/worker/v1/occupancy`), which
it keeps for all routers together, and off the engine's own counts of what runs and waits in it.
"""

import asyncio
import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from adapter_files import write_adapter
from apart import run_apart
from conftest import ADAPTERS, MODEL, config_for
from deployment import Deployment, alive, children, deployed, wait_until

pytestmark = pytest.mark.processes

PROCESSES = 4
TOKEN = "of-these-tests"
ENVIRONMENT = {"LORAYARD_WORKER_TOKEN": TOKEN}
NAMES = tuple(f"{MODEL}:{name}" for name in ADAPTERS)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for number, name in enumerate(ADAPTERS):
        write_adapter(folder / name, seed=number)
    return folder


def config_of(
    adapters: Path, *, slots: int = 4, max_ongoing: int = 64, processes: int = PROCESSES
) -> dict[str, Any]:
    config = config_for("emulated", None, str(adapters), engine_kwargs={"max_lora_rank": 8})
    llm = config["llm_configs"][0]
    llm["lora_config"]["max_num_adapters_per_replica"] = slots
    llm["deployment_config"]["max_ongoing_requests"] = max_ongoing
    config["router"] = {"processes": processes}
    return config


def tell(figures: str) -> None:
    """For who reads the tests' output (`-rA`)."""
    print(figures)  # noqa: T201


class Answer:
    def __init__(self, status: int, model: str, use: str, text: str) -> None:
        self.status = status
        self.model = model
        self.use = use
        self.text = text


@asynccontextmanager
async def clients(deployment: Deployment, count: int) -> AsyncIterator[list[aiohttp.ClientSession]]:
    """Clients with a connection each, so that the kernel deals them out over the processes."""
    sessions = [
        aiohttp.ClientSession(deployment.url, connector=aiohttp.TCPConnector(limit=1))
        for _ in range(count)
    ]
    try:
        yield sessions
    finally:
        for session in sessions:
            await session.close()


async def ask(client: aiohttp.ClientSession, model: str, tokens: int = 4) -> Answer:
    messages = [{"role": "user", "content": "Hi"}]
    body = {"model": model, "messages": messages, "max_tokens": tokens}
    async with client.post("/v1/chat/completions", json=body) as answer:
        text = await answer.text()
        if answer.status == 200:
            text = json.loads(text)["choices"][0]["message"]["content"]
        return Answer(answer.status, model, answer.headers["x-adapter"], text)


async def ask_all(deployment: Deployment, scripts: Sequence[Sequence[str]]) -> list[Answer]:
    """Each client asks for its models in turn, all clients at once."""
    async with clients(deployment, len(scripts)) as sessions:

        async def one(session: aiohttp.ClientSession, script: Sequence[str]) -> list[Answer]:
            return [await ask(session, model) for model in script]

        found = await asyncio.gather(*map(one, sessions, scripts))
    return [answer for answers in found for answer in answers]


def all_right(answers: Sequence[Answer]) -> None:
    """Each is 200 and its own adapter's words, the same as every other answer of that adapter."""
    assert Counter(answer.status for answer in answers) == {200: len(answers)}, [
        answer.text for answer in answers if answer.status != 200
    ][:3]
    words: dict[str, set[str]] = {}
    for answer in answers:
        assert answer.text.startswith(f"[emulated {answer.model}]")
        words.setdefault(answer.model, set()).add(answer.text)
    assert {len(texts) for texts in words.values()} == {1}


async def on_workers(deployment: Deployment, path: str) -> list[Any]:
    """What each worker answers to a router's question."""
    found = []
    sockets = re.findall(r"attached to the \S+ \S+ engine worker at unix:(\S+)", deployment.log)
    for socket in sorted(set(sockets)):
        async with aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(socket), headers={"Authorization": f"Bearer {TOKEN}"}
        ) as session:
            answer = await session.get(f"http://worker/worker/v1/{path}")
            found.append(await answer.json())
    assert found
    return found


def occupancy(deployment: Deployment) -> list[Any]:
    return run_apart(on_workers(deployment, "occupancy"))


def routers(deployment: Deployment) -> dict[str, int]:
    """The router processes under the supervisor, by name."""
    found = {}
    for pid in children(deployment.process.pid):
        told = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"router.part" in told:
            found[told[-2].decode()] = pid
    return found


def hit_rate(deployment: Deployment, rounds: int) -> float:
    """Of requests for all adapters over many connections, once all are warm."""
    count = 24
    scripts = [
        [NAMES[(client + step) % len(NAMES)] for step in range(rounds)] for client in range(count)
    ]
    all_right(run_apart(ask_all(deployment, scripts)))  # warms up
    answers = run_apart(ask_all(deployment, scripts))
    all_right(answers)
    return sum(answer.use == "hit" for answer in answers) / len(answers)


def test_affinity_is_that_of_one_process_and_cold_loads_are_few(
    tmp_path: Path, adapters: Path
) -> None:
    with deployed(config_of(adapters, processes=1), tmp_path / "one", ENVIRONMENT) as alone:
        rate_alone = hit_rate(alone, 6)
    with deployed(config_of(adapters), tmp_path / "several", ENVIRONMENT) as several:
        burst = run_apart(ask_all(several, [[NAMES[0]]] * 64))
        all_right(burst)
        loads = [worker["loads"].get(NAMES[0], 0) for worker in occupancy(several)]
        assert max(loads) == 1, "once a worker, however many processes asked for it"
        rate = hit_rate(several, 6)
        total = Counter[str]()
        for worker in occupancy(several):
            assert max(worker["loads"].values()) == 1, "nothing was evicted: all fit"
            total.update(worker["loads"])
        assert set(total) == set(NAMES)
        served = {
            name: several.metric("lorayard_requests_total", process=name, outcome="completed")
            for name in routers(several)
        }
        assert len(served) == PROCESSES
        assert all(served.values()), "the kernel deals connections out"
        assert sum(served.values()) == 64 + 2 * 24 * 6
        assert several.metric("lorayard_processes") == PROCESSES
        tell(f"hit rate {rate:.3f}, alone {rate_alone:.3f}; burst {loads}; loads {total}")
        assert rate >= rate_alone - 0.02


def test_a_worker_never_has_more_than_its_limit(tmp_path: Path, adapters: Path) -> None:
    limit = 4
    config = config_of(adapters, max_ongoing=limit)
    with deployed(config, tmp_path, ENVIRONMENT) as deployment:
        seen: list[int] = []

        async def main() -> list[Answer]:
            scripts = [[NAMES[client % 3], MODEL, NAMES[client % 3]] for client in range(48)]
            asking = asyncio.create_task(ask_all(deployment, scripts))
            while not asking.done():
                states = await on_workers(deployment, "adapters")
                seen.extend(state["running"] + state["waiting"] for state in states)
            return await asking

        all_right(run_apart(main()))
        counted = occupancy(deployment)
        assert [worker["ongoing_peak"] for worker in counted] == [limit, limit]
        assert max(seen) <= limit
        assert {worker["ongoing"] for worker in counted} == {0}
        refused = sum(worker["refused"]["full"] for worker in counted)
        assert deployment.metric("lorayard_worker_refusals_total", refusal="full") == refused
        assert deployment.metric("lorayard_retries_total") == 0
        tell(f"{refused} refusals for 144 requests; sampled {Counter(seen)}")


def test_churn_over_few_slots_is_answered_without_an_error(tmp_path: Path, adapters: Path) -> None:
    with deployed(config_of(adapters, slots=1), tmp_path, ENVIRONMENT) as deployment:
        scripts = [
            [NAMES[(7 * client + 5 * step) % len(NAMES)] for step in range(8)]
            for client in range(24)
        ]
        started = time.monotonic()
        all_right(run_apart(ask_all(deployment, scripts)))
        took_s = time.monotonic() - started
        counted = occupancy(deployment)
        assert deployment.metric("lorayard_requests_total") == 192
        assert deployment.metric("lorayard_requests_total", outcome="completed") == 192
        assert deployment.metric("lorayard_retries_total") == 0
        refused = Counter[str]()
        loads = Counter[str]()
        for worker in counted:
            refused.update(worker["refused"])
            loads.update(worker["loads"])
        tell(f"192 requests in {took_s:.1f} s; loads {loads.total()}; refused {refused}")
        assert deployment.log.count("Traceback") == 0


def test_adapters_in_constant_use_make_room_for_another(tmp_path: Path, adapters: Path) -> None:
    """The two slots are never idle: the worker closes one to all routers for who waited too long."""
    with deployed(config_of(adapters, slots=1), tmp_path, ENVIRONMENT) as deployment:

        async def main() -> list[Answer]:
            over = asyncio.Event()

            async def occupy(client: aiohttp.ClientSession, model: str) -> list[Answer]:
                answers = []
                while not over.is_set():
                    answers.append(await ask(client, model, tokens=24))
                return answers

            async with clients(deployment, 40) as sessions:
                occupying = [
                    asyncio.create_task(occupy(session, NAMES[number % 2]))
                    for number, session in enumerate(sessions[8:])
                ]
                while (await asyncio.to_thread(occupancy, deployment))[0]["ongoing"] < 8:
                    await asyncio.sleep(0.01)
                others = await asyncio.gather(*(ask(session, NAMES[2]) for session in sessions[:8]))
                over.set()
                return [
                    *others,
                    *(one for found in await asyncio.gather(*occupying) for one in found),
                ]

        started = time.monotonic()
        answers = run_apart(main())
        all_right(answers)
        tell(f"{len(answers)} answers in {time.monotonic() - started:.1f} s")
        assert time.monotonic() - started < 30
        assert deployment.metric("lorayard_retries_total") == 0


async def stream(
    client: aiohttp.ClientSession, model: str, tokens: int, begun: Counter[str]
) -> int:
    """How many tokens came; -1 where the answer was cut off."""
    messages = [{"role": "user", "content": "Hi"}]
    body = {"model": model, "messages": messages, "max_tokens": tokens, "stream": True}
    count = 0
    try:
        async with client.post("/v1/chat/completions", json=body) as answer:
            assert answer.status == 200
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    begun["streams"] += not count
                    count += 1
    except aiohttp.ClientError:
        return -1
    return count


def test_a_killed_router_takes_its_own_streams_alone_and_comes_back(
    tmp_path: Path, adapters: Path
) -> None:
    with deployed(config_of(adapters), tmp_path, ENVIRONMENT) as deployment:
        before = routers(deployment)
        count, tokens = 24, 600  # so long that none ends between the count and the kill

        async def main() -> tuple[int, list[int]]:
            begun: Counter[str] = Counter()
            async with clients(deployment, count) as sessions:
                streams = [
                    asyncio.create_task(stream(session, NAMES[number % 3], tokens, begun))
                    for number, session in enumerate(sessions)
                ]
                while begun["streams"] < count:
                    await asyncio.sleep(0.01)
                held = await asyncio.to_thread(
                    deployment.metric, "lorayard_worker_in_flight", process="r2"
                )
                os.kill(before["r2"], signal.SIGKILL)
                return int(held), await asyncio.gather(*streams)

        held, counts = run_apart(main())
        assert held > 0
        assert Counter(counts) == {-1: held, tokens: count - held}
        wait_until(lambda: "r2: serves again" in deployment.log, "r2 again", 30)
        assert deployment.metric("lorayard_processes") == PROCESSES
        assert routers(deployment)["r2"] != before["r2"]
        assert {name: pid for name, pid in routers(deployment).items() if name != "r2"} == {
            name: pid for name, pid in before.items() if name != "r2"
        }
        wait_until(
            lambda: all(worker["ongoing"] == 0 for worker in occupancy(deployment)),
            "its places are free",
        )
        all_right(run_apart(ask_all(deployment, [[NAMES[0]]] * 16)))


def test_workers_that_are_silent_for_a_while_lose_no_stream(tmp_path: Path, adapters: Path) -> None:
    with deployed(config_of(adapters, processes=2), tmp_path, ENVIRONMENT) as deployment:
        parts = routers(deployment).values()
        guardians = [pid for pid in children(deployment.process.pid) if pid not in parts]
        engines = [engine for guardian in guardians for engine in children(guardian)]
        count, tokens = 12, 150

        def accepting(wanted: int) -> None:
            wait_until(
                lambda: deployment.metric("lorayard_worker_accepting") == wanted,
                f"{wanted} accept",
                20,
            )

        async def main() -> list[int]:
            begun: Counter[str] = Counter()
            async with clients(deployment, count) as sessions:
                streams = [
                    asyncio.create_task(stream(session, MODEL, tokens, begun))
                    for session in sessions
                ]
                while begun["streams"] < count:
                    await asyncio.sleep(0.01)
                for engine in engines:
                    os.kill(engine, signal.SIGSTOP)
                try:
                    await asyncio.to_thread(accepting, 0)
                finally:
                    for engine in engines:
                        os.kill(engine, signal.SIGCONT)
                return await asyncio.gather(*streams)

        assert len(engines) == 2
        assert run_apart(main()) == [tokens] * count
        accepting(2 * 2)


def test_a_killed_supervisor_leaves_nothing(tmp_path: Path, adapters: Path) -> None:
    deployment = Deployment(config_of(adapters), tmp_path, ENVIRONMENT)
    try:
        deployment.wait_ready()
        pids = deployment.descendants()
        assert len(pids) == PROCESSES + 4, "router processes, two guardians, two engines"
        deployment.process.kill()
        deployment.process.wait()
        wait_until(lambda: not alive(pids), f"{pids} ended", 10)
    finally:
        deployment.stop()


def test_sigterm_drains_every_process(tmp_path: Path, adapters: Path) -> None:
    config = config_of(adapters)
    record = tmp_path / "traffic.jsonl"
    config["router"]["record"] = {"path": str(record)}
    with deployed(config, tmp_path, ENVIRONMENT) as deployment:
        pids = deployment.descendants()
        count, tokens = 16, 150

        async def main() -> list[int]:
            begun: Counter[str] = Counter()
            async with clients(deployment, count) as sessions:
                streams = [
                    asyncio.create_task(stream(session, MODEL, tokens, begun))
                    for session in sessions
                ]
                while begun["streams"] < count:
                    await asyncio.sleep(0.01)
                deployment.process.send_signal(signal.SIGTERM)
                return await asyncio.gather(*streams)

        assert run_apart(main()) == [tokens] * count
        assert deployment.process.wait(20) == 0
        assert not alive(pids)
        assert "Traceback" not in deployment.log
        rows = [
            len((tmp_path / f"traffic.{number}.jsonl").read_text().splitlines())
            for number in range(PROCESSES)
        ]
        assert sum(rows) == count, "a recording each, with what it served"


def test_what_keeps_it_from_starting_is_said(tmp_path: Path, adapters: Path) -> None:
    config = config_of(adapters)
    with deployed(config, tmp_path / "first", ENVIRONMENT) as first:
        config["router"]["port"] = int(first.url.rpartition(":")[2])
        second = Deployment(config, tmp_path / "second")
        assert second.process.wait(20) == 1
        assert "address already in use" in second.log.lower()
        assert not (tmp_path / "second" / "cache" / "logs").exists()
    config = config_of(adapters)
    config["llm_configs"][0]["calibration"] = "no-such-machine"
    third = Deployment(config, tmp_path / "third")
    assert third.process.wait(30) == 2
    assert "no calibration `no-such-machine`" in third.log
    assert "Traceback" not in third.log
