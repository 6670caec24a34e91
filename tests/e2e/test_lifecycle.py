"""What operators do with adapters, on real router processes, workers and stores, while clients ask."""

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from adapter_files import write_adapter
from apart import run_apart
from conftest import MODEL, config_for
from deployment import Deployment, deployed, wait_until
from faults import Fault, FaultProxy, fault_proxy
from object_store import s3_server, upload
from test_versions import Answer, ask, put, session, store  # noqa: F401  (a fixture)

pytestmark = pytest.mark.processes

KEY = "of-these-operators"
ENVIRONMENT = {"LORAYARD_ADMIN_KEY": KEY}
PIRATE = f"{MODEL}:pirate"
FAILURES = ("load_failed", "worker_failed", "worker_stalled", "router_failed")


def config_of(place: str, *, slots: int = 4, processes: int = 1, **router: Any) -> dict[str, Any]:  # noqa: ANN401
    config = config_for("emulated", None, place, engine_kwargs={"max_lora_rank": 8})
    config["llm_configs"][0]["lora_config"]["max_num_adapters_per_replica"] = slots
    # Nothing is noticed by itself: what happens is what the operator asked for.
    config["router"] = {"store_refresh_s": 3600, "processes": processes, **router}
    return config


def operate(deployment: Deployment, path: str, **body: Any) -> tuple[int, Any]:  # noqa: ANN401
    """POST to `/admin/v1`; status and answer."""
    status, _, answer = deployment.post(f"/admin/v1/{path}", body, authorization=f"Bearer {KEY}")
    return status, answer


def show(deployment: Deployment, model: str) -> dict[str, Any]:
    status, _, answer = deployment.get(f"/admin/v1/adapters/{model}", authorization=f"Bearer {KEY}")
    assert status == 200, answer
    return dict(answer)


async def operated(deployment: Deployment, path: str, **body: Any) -> Any:  # noqa: ANN401
    status, answer = await asyncio.to_thread(lambda: operate(deployment, path, **body))
    assert status == 200, answer
    return answer


def no_failures(deployment: Deployment) -> None:
    for outcome in FAILURES:
        assert deployment.metric("lorayard_requests_total", outcome=outcome) == 0, deployment.log


class Load:
    """Clients that never pause, each a request at a time."""

    def __init__(self, client: aiohttp.ClientSession, model: str, clients: int) -> None:
        self._client = client
        self._model = model
        self._going = True
        self.answers: list[Answer] = []
        self._tasks = [asyncio.create_task(self._ask(f"user-{n}")) for n in range(clients)]

    async def _ask(self, user: str) -> None:
        while self._going:
            self.answers.append(await ask(self._client, self._model, user=user))

    async def more(self, count: int = 40) -> list[Answer]:
        """The answers to what is asked from now on, when there are so many."""
        now = time.monotonic()
        while len(found := [answer for answer in self.answers if answer.asked_at > now]) < count:
            await asyncio.sleep(0.02)
        return found

    async def stop(self) -> list[Answer]:
        self._going = False
        await asyncio.gather(*self._tasks)
        return self.answers


@pytest.mark.parametrize("processes", [1, 2])
def test_a_rollout_and_a_rollback_under_load(
    store: Path,  # noqa: F811
    tmp_path: Path,
    processes: int,
) -> None:
    """Whoever asks after a call has returned gets what it decided, from every process."""

    async def scene(deployment: Deployment) -> None:
        async with session(deployment) as client:
            load = Load(client, PIRATE, 8)
            (old,) = {answer.version for answer in await load.more()}
            put(store, "pirate", 91)
            answer = await operated(deployment, f"adapters/{PIRATE}/refresh")
            (new,) = {answer.version for answer in await load.more()}
            assert new != old
            assert new in answer["message"]
            await operated(deployment, f"adapters/{PIRATE}/rollback")
            assert {answer.version for answer in await load.more()} == {old}
            await operated(deployment, f"adapters/{PIRATE}/refresh")
            assert {answer.version for answer in await load.more()} == {old}, "not by itself"
            await operated(deployment, f"adapters/{PIRATE}/rollout", version=new, weight=0.5)
            both = await load.more(200)
            assert {answer.version for answer in both} == {old, new}
            await operated(deployment, f"adapters/{PIRATE}/promote")
            assert {answer.version for answer in await load.more()} == {new}
            await operated(deployment, f"adapters/{PIRATE}/rollback")
            assert {answer.version for answer in await load.more()} == {old}
            answers = await load.stop()
            assert {answer.status for answer in answers} == {200}
            texts = {(answer.version, answer.text) for answer in answers}
            assert len(texts) == 2, "each version says always the same"
            seen = await asyncio.to_thread(show, deployment, PIRATE)
            assert seen["version"] == old
            assert [version["state"] for version in seen["versions"]][:1] == ["serving"]

    config = config_of(str(store), processes=processes)
    with deployed(config, tmp_path / "router", ENVIRONMENT) as deployment:
        run_apart(scene(deployment))
        no_failures(deployment)
        asked = deployment.metric("lorayard_requests_total", outcome="completed")
        wait_until(
            lambda: show(deployment, PIRATE)["requests"] == asked,
            "what all processes have counted",
        )


def test_vllms_own_routes_mean_the_whole_fleet(store: Path, tmp_path: Path) -> None:  # noqa: F811
    """Scripts for one vLLM server work: an adapter that is in no store is loaded, and unloaded."""
    own = write_adapter(tmp_path / "elsewhere" / "sailor", seed=50)
    model = f"{MODEL}:sailor"
    key = {"authorization": f"Bearer {KEY}"}
    config = config_of(str(store), processes=2)
    with deployed(config, tmp_path / "router", ENVIRONMENT) as deployment:
        body = {"lora_name": "sailor", "lora_path": str(own)}
        status, _, _ = deployment.post("/v1/load_lora_adapter", body)
        assert status == 401
        status, _, text = deployment.post("/v1/load_lora_adapter", body, **key)
        assert (status, "sailor" in text) == (200, True)

        async def answers() -> set[tuple[int, str]]:
            async with session(deployment) as client:
                found = await asyncio.gather(*(ask(client, model) for _ in range(20)))
            return {(answer.status, answer.version) for answer in found}

        ((status, version),) = run_apart(answers())
        assert status == 200, "in both processes"
        assert show(deployment, model)["version"] == version
        assert show(deployment, model)["source"] == str(own)
        status, _, _ = deployment.post("/v1/unload_lora_adapter", {"lora_name": "sailor"}, **key)
        assert status == 200
        assert {status for status, _ in run_apart(answers())} == {404}
        assert [one["id"] for one in deployment.get("/v1/models")[2]["data"]][1:] == [
            f"{MODEL}:{name}" for name in ("chef", "pirate", "poet")
        ]


def test_pinned_preloaded_drained_unloaded(store: Path, tmp_path: Path) -> None:  # noqa: F811
    """Each is seen on the workers themselves, by the router's own listing."""
    config = config_of(str(store), slots=2)
    config["llm_configs"][0]["lora_config"]["preload_adapters"] = ["poet"]
    with deployed(config, tmp_path / "router", ENVIRONMENT) as deployment:
        wait_until(lambda: show(deployment, f"{MODEL}:poet")["tier"] == "gpu", "it is preloaded")
        assert operate(deployment, f"adapters/{PIRATE}/load", workers=2)[0] == 200
        assert show(deployment, PIRATE)["versions"][0]["workers"] == {
            f"{MODEL}-0": "resident",
            f"{MODEL}-1": "resident",
        }
        assert operate(deployment, f"adapters/{PIRATE}/pin")[0] == 200
        for name in ("chef", "poet", "chef", "poet"):
            body = {"model": f"{MODEL}:{name}", "prompt": "Hi", "max_tokens": 1}
            assert deployment.post("/v1/completions", body)[0] == 200
        assert len(show(deployment, PIRATE)["versions"][0]["workers"]) == 2, "never evicted"
        assert operate(deployment, f"workers/{MODEL}-0/drain")[0] == 200
        for _ in range(6):
            body = {"model": PIRATE, "prompt": "Hi", "max_tokens": 1}
            assert deployment.post("/v1/completions", body)[1]["x-worker"] == f"{MODEL}-1"
        assert operate(deployment, f"workers/{MODEL}-0/undrain")[0] == 200
        assert operate(deployment, f"adapters/{PIRATE}/unpin")[0] == 200
        assert operate(deployment, f"adapters/{PIRATE}/unload")[0] == 200
        wait_until(lambda: show(deployment, PIRATE)["tier"] == "disk", "it has left the workers")
        status, answer = operate(deployment, f"adapters/{MODEL}:nobody/load")
        assert (status, answer["error"]["code"]) == (404, "not_found")
        no_failures(deployment)


# Faults of the store, while clients ask.


class Shop:
    """A bucket behind a proxy that fails as it is told."""

    def __init__(self, proxy: FaultProxy, bucket: str, environment: dict[str, str]) -> None:
        self.proxy = proxy
        self.bucket = bucket
        self.environment = environment


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    folder = tmp_path / "shop"
    for number, name in enumerate(("pirate", "poet", "chef")):
        write_adapter(folder / name, seed=number)
    with s3_server() as environment, fault_proxy(environment["AWS_ENDPOINT_URL"]) as proxy:
        # The servers of one process share their buckets.
        bucket = f"shop-{secrets.token_hex(4)}"
        upload(folder, bucket, "")
        yield Shop(
            proxy,
            bucket,
            {**environment, **ENVIRONMENT, "AWS_ENDPOINT_URL": proxy.url},
        )


@contextmanager
def over(shop: Shop, folder: Path, **changes: Any) -> Iterator[Deployment]:  # noqa: ANN401
    config = config_of(f"s3://{shop.bucket}", **changes)
    with deployed(config, folder / "router", shop.environment) as deployment:
        yield deployment


def test_a_cold_burst_over_two_processes_fetches_each_file_once(shop: Shop, tmp_path: Path) -> None:
    async def burst(deployment: Deployment) -> list[Answer]:
        async with session(deployment) as client:
            return list(await asyncio.gather(*(ask(client, PIRATE) for _ in range(64))))

    with over(shop, tmp_path, processes=2) as deployment:
        shop.proxy.forget()
        answers = run_apart(burst(deployment))
        assert Counter(answer.status for answer in answers) == {200: 64}
        assert len({answer.text for answer in answers}) == 1
        fetched = {name: count for name, count in shop.proxy.requests.items() if "adapter" in name}
        assert fetched == {"adapter_config.json": 1, "adapter_model.safetensors": 1}


WEIGHTS = "pirate/adapter_model.safetensors"
STORE_FAULTS = [
    # What the store does, the status of who asks meanwhile, and what it reads.
    (Fault(WEIGHTS, times=99, cut_after=100), 503, "adapter pirate"),
    (Fault(WEIGHTS, times=99, corrupt=True), 400, "adapter pirate"),
    (Fault(WEIGHTS, times=99, status=403), 503, "pirate"),
    (Fault(WEIGHTS, times=2, status=503), 200, ""),
    (Fault(WEIGHTS, times=1, cut_after=100), 200, ""),
]


@pytest.mark.parametrize(("fault", "status", "says"), STORE_FAULTS)
def test_a_fault_of_the_store_is_told_and_passes(
    shop: Shop, tmp_path: Path, fault: Fault, status: int, says: str
) -> None:
    with over(shop, tmp_path) as deployment:
        shop.proxy.faults.append(replace(fault))  # which counts itself down
        body = {"model": PIRATE, "prompt": "Hi", "max_tokens": 4}
        found, _, answer = deployment.post("/v1/completions", body)
        assert found == status, answer
        if status != 200:
            assert says in answer["error"]["message"]
            assert deployment.metric("lorayard_adapter_loads_total", result="ok") == 0
        other = {**body, "model": f"{MODEL}:poet"}
        assert deployment.post("/v1/completions", other)[0] == 200, "others are not held up"
        shop.proxy.forget()
        assert deployment.post("/v1/completions", body)[0] == 200, "and then it is whole"


def test_a_new_version_that_cannot_be_had_leaves_the_old_one_serving(
    shop: Shop, tmp_path: Path
) -> None:
    """Truncated, then broken in its content, then sound: only the last one ever answers."""
    model = {"model": PIRATE, "prompt": "Hi", "max_tokens": 8}

    def text(deployment: Deployment) -> str:
        status, _, answer = deployment.post("/v1/completions", model)
        assert status == 200, answer
        return str(answer["choices"][0]["text"])

    new = write_adapter(tmp_path / "new" / "pirate", seed=60)
    with over(shop, tmp_path) as deployment:
        old = text(deployment)
        upload(new.parent, shop.bucket, "")
        shop.proxy.faults.append(Fault(WEIGHTS, times=999, cut_after=100))
        status, _ = operate(deployment, f"adapters/{PIRATE}/refresh")
        assert status == 200
        assert text(deployment) == old
        shop.proxy.forget()
        weights = new / "adapter_model.safetensors"
        sound = weights.read_bytes()
        weights.write_bytes(sound[:-100])
        upload(new.parent, shop.bucket, "")
        status, answer = operate(deployment, f"adapters/{PIRATE}/refresh")
        assert status == 200
        assert "is not served" in answer["message"]
        assert text(deployment) == old
        weights.write_bytes(sound)
        upload(new.parent, shop.bucket, "")
        assert operate(deployment, f"adapters/{PIRATE}/refresh")[0] == 200
        assert text(deployment) != old
        no_failures(deployment)
