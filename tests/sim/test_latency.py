"""The latency model's formulas on round numbers, and that each shipped number has a source."""

import pytest
from round_numbers import latency

from sim.latency import (
    EngineDefaults,
    LatencyModel,
    LoadTimes,
    pairs_of,
    read_calibration,
    shipped,
)


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_calibration_says_where_each_number_comes_from(name: str) -> None:
    calibration = read_calibration(name)
    LatencyModel(calibration, slots=2, rank_max=16)
    for field in calibration.__struct_fields__:
        value = getattr(calibration, field)
        if hasattr(value, "source"):
            assert len(value.source) > 20, field
    assert isinstance(calibration.defaults, EngineDefaults)


def test_load_times_between_measured_ranks_are_on_the_line() -> None:
    times = LoadTimes({8: 1.0, 16: 2.0}, "made up for this test")
    assert [times.at(rank) for rank in (4, 8, 12, 16, 64)] == [1.0, 1.0, 1.5, 2.0, 2.0]


STEPS = [
    # running, adapters, context, tokens, pairs -> seconds
    ((1, 0, 0, 0, 0), 1.1),
    ((10, 0, 0, 50, 0), 1.0 + 1.0 + 0.5),
    ((10, 1, 0, 50, 0), 2.0 * (2.0 + 0.5 + 8 * 0.25) + 0.5 * 3.0),
    ((10, 2, 0, 0, 0), 2.0 * (2.0 + 1.0 + 8 * 0.25)),
    ((1, 0, 500, 0, 0), 1.1 + 500 * 0.002),
    ((1, 1, 0, 10, 55), 1.1 * 4.5 + (0.1 + 55 * 0.001) * 3.0),
]


FLOORS = [
    # running, adapters, tokens -> seconds, where launching takes 2 s, and 6 s with adapters
    ((1, 0, 0), 1.1),
    ((1, 0, 10), 2.0),
    ((1, 0, 100), 2.1),
    ((1, 1, 10), 6.0),
    ((1, 1, 1000), 1.1 * 2.5 + 10.0),
]


@pytest.mark.parametrize(("step", "expected_s"), FLOORS)
def test_a_step_with_prompts_takes_as_long_as_its_launch(
    step: tuple[int, int, int], expected_s: float
) -> None:
    model = latency(prefill_floor_s=2.0, prefill_floor_lora_factor=3.0)
    running, adapters, tokens = step
    found = model.step_s(running=running, adapters=adapters, tokens=tokens)
    assert found == pytest.approx(expected_s, abs=1e-11)


@pytest.mark.parametrize(("step", "expected_s"), STEPS)
def test_a_step_on_round_numbers(step: tuple[int, int, int, int, int], expected_s: float) -> None:
    model = latency(
        kv_read_per_token_s=0.002,
        prefill_per_pair_s=0.001,
        prefill_lora_factor=3.0,
        prefill_floor_s=0.0,
        prefill_floor_lora_factor=1.0,
        lora_factor_per_rank=0.25,
    )
    running, adapters, context, tokens, pairs = step
    found = model.step_s(
        running=running, adapters=adapters, context=context, tokens=tokens, pairs=pairs
    )
    assert found == pytest.approx(expected_s, abs=1e-11)


def test_memory_and_the_way_from_the_store_on_round_numbers() -> None:
    model = latency()
    assert model.kv_tokens == 1000 - 2 * (10 + 5 * 8)
    assert model.fetch_s == pytest.approx(3 + 100 * 8 / 400)


@pytest.mark.parametrize(("start", "tokens"), [(0, 1), (0, 7), (5, 3), (100, 1)])
def test_pairs_are_what_a_causal_mask_leaves(start: int, tokens: int) -> None:
    assert pairs_of(start, tokens) == sum(start + 1 + index for index in range(tokens))
