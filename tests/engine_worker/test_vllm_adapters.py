"""How a vLLM worker tells adapters and their versions apart, over an engine that only keeps books."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from engine_worker.protocol import AdapterId
from engine_worker.service import WorkerError
from engine_worker.vllm_engine import ServedAdapters, VllmAdapters, asked_version


class Counter:
    def __init__(self) -> None:
        self.value = 0

    def inc(self, by: int) -> int:
        self.value += by
        return self.value


class Engine:
    """Holds ids as vLLM does, and says which calls it got."""

    errored = False

    def __init__(self) -> None:
        self.held: list[int] = []
        self.added: list[int] = []
        self.removed: list[int] = []

    async def add_lora(self, request: SimpleNamespace) -> None:
        self.added.append(request.lora_int_id)
        if request.lora_int_id not in self.held:
            self.held.append(request.lora_int_id)

    async def remove_lora(self, lora_id: int) -> None:
        if self.errored:
            raise RuntimeError("Engine core is dead")
        self.removed.append(lora_id)
        self.held.remove(lora_id)

    async def list_loras(self) -> set[int]:
        return set(self.held)

    async def collective_rpc(self, _: str) -> list[list[int]]:
        return [self.held[-1:]]


@pytest.fixture(autouse=True)
def _lora_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's request class, where vLLM is not installed."""
    for name in ("vllm", "vllm.lora", "vllm.lora.request"):
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(
        sys.modules["vllm.lora.request"], "LoRARequest", SimpleNamespace, raising=False
    )


def adapters(max_cpu_loras: int) -> tuple[VllmAdapters, Engine, SimpleNamespace]:
    engine = Engine()
    serving = SimpleNamespace(lora_id_counter=Counter(), lora_requests={})
    config = SimpleNamespace(max_loras=1, max_cpu_loras=max_cpu_loras)
    return VllmAdapters(engine, serving, config), engine, serving


def version(name: str, number: int = 1) -> AdapterId:
    return AdapterId(f"base:{name}", str(number))


async def test_what_is_evicted_is_removed_where_there_is_no_host_tier() -> None:
    held, engine, serving = adapters(max_cpu_loras=2)
    await held.add(version("a"), "/a", ())
    await held.add(version("b"), "/b", (version("a"),))
    assert engine.removed == [1]
    assert "base:a" not in serving.lora_requests
    assert "base:b" in serving.lora_requests
    gpu, host = await held.residency()
    assert (gpu, host) == ((version("b"),), ())


async def test_the_host_tier_knows_an_adapter_again() -> None:
    held, engine, serving = adapters(max_cpu_loras=64)
    await held.add(version("a"), "/a", ())
    await held.add(version("b"), "/b", (version("a"),))
    await held.add(version("a"), "/a", (version("b"),))
    assert engine.added == [1, 2, 1], "the same id: vLLM finds it in host memory"
    assert engine.removed == []
    assert "base:b" not in serving.lora_requests, "kept, but not served"
    _, host = await held.residency()
    assert version("b") in host


async def test_a_request_gets_the_version_that_it_names() -> None:
    held, _, serving = adapters(max_cpu_loras=4)
    requests = serving.lora_requests
    assert isinstance(requests, ServedAdapters)
    await held.add(version("a", 1), "/a1", ())
    await held.add(version("a", 2), "/a2", ())
    assert requests["base:a"].lora_path == "/a2", "without a version, the one loaded last"
    for number, path in (("1", "/a1"), ("2", "/a2")):
        token = asked_version.set(number)
        assert "base:a" in requests
        assert requests["base:a"].lora_path == path
        asked_version.reset(token)
    token = asked_version.set("3")
    assert "base:a" not in requests
    asked_version.reset(token)
    await held.remove(version("a", 2))
    assert requests["base:a"].lora_path == "/a1", "the name falls to the version that is left"
    await held.remove(version("a", 1))
    assert "base:a" not in requests


async def test_a_load_again_is_the_same_adapter_and_another_path_is_not() -> None:
    held, engine, _ = adapters(max_cpu_loras=4)
    await held.add(version("a"), "/a", ())
    await held.add(version("a"), "/a", ())
    await held.add(version("a"), "/elsewhere", ())
    assert engine.added == [1, 1, 2]


async def test_an_unload_takes_it_from_host_memory_too() -> None:
    held, engine, serving = adapters(max_cpu_loras=64)
    await held.add(version("a"), "/a", ())
    await held.add(version("b"), "/b", (version("a"),))
    for name in ("a", "b", "nobody's"):
        await held.remove(version(name))
    assert engine.held == []
    assert not serving.lora_requests
    assert await held.residency() == ((), ())


async def test_an_unload_that_fails_leaves_it_served() -> None:
    held, engine, serving = adapters(max_cpu_loras=4)
    await held.add(version("a"), "/a", ())
    engine.errored = True
    with pytest.raises(WorkerError, match=r"vLLM did not drop base:a: Engine core is dead"):
        await held.remove(version("a"))
    assert "base:a" in serving.lora_requests
