from pathlib import Path

import pytest

from engine_worker.protocol import CORES_ENV
from router.config import parse
from router.workers.devices import Machine, device_environment, this_machine, visible_devices


@pytest.mark.parametrize(
    ("kwargs", "visible", "expected"),
    [
        ("{}", ("0", "1"), ["0", "1", "0"]),
        ("{}", ("GPU-a",), ["GPU-a", "GPU-a", "GPU-a"]),
        ("{tensor_parallel_size: 2}", ("0", "1", "2", "3"), ["0,1", "2,3", "0,1"]),
        ("{tensor_parallel_size: 2, pipeline_parallel_size: 2}", ("4", "5"), ["4,5"] * 3),
        ("{}", (), [None, None, None]),
    ],
)
def test_each_worker_gets_its_own_gpus_in_turn(
    kwargs: str, visible: tuple[str, ...], expected: list[str | None]
) -> None:
    text = f"llm_configs:\n  - model_loading_config: {{model_id: m}}\n    engine_kwargs: {kwargs}\n"
    [llm] = parse(text, name="c", folder=Path()).llm_configs
    each = 2 if "tensor" in kwargs else 1
    each *= 2 if "pipeline" in kwargs else 1
    found = [
        device_environment(llm, number * each, Machine(visible)).get("CUDA_VISIBLE_DEVICES")
        for number in range(3)
    ]
    assert found == expected


def test_what_the_environment_allows_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    assert visible_devices() == ("2", "5")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_devices() == ()


@pytest.mark.parametrize(
    ("cores", "places", "expected"),
    [
        ((0, 1), 2, ["0", "1"]),
        ((0, 1, 2, 3, 6, 7), 2, ["0,1,2", "3,6,7"]),
        ((0, 1, 2), 2, ["0", "1"]),
        ((0,), 2, [None, None]),
    ],
)
def test_without_gpus_each_worker_gets_its_own_cores(
    cores: tuple[int, ...], places: int, expected: list[str | None]
) -> None:
    text = "llm_configs:\n  - model_loading_config: {model_id: m}\n"
    [llm] = parse(text, name="c", folder=Path()).llm_configs
    machine = Machine((), cores, places)
    found = [device_environment(llm, number, machine).get(CORES_ENV) for number in range(2)]
    assert found == expected


def test_the_machine_is_shared_by_the_workers_of_all_models() -> None:
    model = "  - model_loading_config: {{model_id: {}}}\n    engine: {}\n"
    text = "llm_configs:\n" + model.format("a", "vllm") + model.format("b", "emulated")
    assert this_machine(parse(text, name="c", folder=Path()).llm_configs).places == 1
