from pathlib import Path

import pytest

from router.config import parse
from router.workers.devices import device_environment, visible_devices


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
        device_environment(llm, number * each, visible).get("CUDA_VISIBLE_DEVICES")
        for number in range(3)
    ]
    assert found == expected


def test_what_the_environment_allows_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    assert visible_devices() == ("2", "5")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_devices() == ()
