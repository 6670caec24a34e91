"""The engine model: its arithmetic on hand-made cases, and its fast path against its slow one."""

from collections.abc import Generator
from typing import Any

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.engine import EngineLimits, EngineRequest, SimEngine
from sim.latency import (
    Calibration,
    Coefficient,
    LatencyModel,
    LoadTimes,
    read_calibration,
    shipped,
)

LATENCY = LatencyModel(read_calibration("emulated"), slots=2, rank_max=8)


def engine(env: simpy.Environment, *, jump: bool = True, **limits: int) -> SimEngine:
    return SimEngine(env, LATENCY, EngineLimits(**{"max_loras": 2, **limits}), jump=jump)


def request(
    env: simpy.Environment, prompt: int, output: int, adapter: str | None = None
) -> EngineRequest:
    return EngineRequest(env, adapter=adapter, prompt_tokens=prompt, output_tokens=output)


def test_one_request_takes_a_prefill_step_and_a_step_for_each_further_token() -> None:
    env = simpy.Environment()
    model = engine(env)
    one = request(env, 100, 5)
    assert model.submit(one)
    env.run(one.done)
    assert one.first_token == pytest.approx(LATENCY.step_s(1, 100, 0))
    assert one.finished == pytest.approx(LATENCY.step_s(1, 100, 0) + 4 * LATENCY.step_s(1, 0, 0))
    assert model.counters.output_tokens == 5
    assert model.counters.prompt_tokens == 100
    assert (model.running, model.waiting, model.kv_usage) == (0, 0, 0)


def test_a_long_prompt_is_prefilled_in_chunks_beside_who_decodes() -> None:
    env = simpy.Environment()
    model = engine(env, max_num_batched_tokens=50)
    decoding = request(env, 10, 100)
    model.submit(decoding)
    env.run(until=0.02)
    long = request(env, 120, 1)
    model.submit(long)
    env.run(long.done)
    assert decoding.finished is None, "49 + 49 + 22 tokens: three steps, and decoding went on"
    assert model.counters.prompt_tokens == 130


def test_a_full_batch_lets_wait_and_memory_does_too() -> None:
    env = simpy.Environment()
    model = engine(env, max_num_seqs=1)
    first, second = request(env, 10, 10), request(env, 10, 10)
    model.submit(first)
    model.submit(second)
    env.run(first.done)
    assert second.first_token is None
    env.run(second.done)
    big = engine(env)
    half = LATENCY.kv_tokens // 2 + 1
    one, other = request(env, half - 5, 5), request(env, half - 5, 5)
    assert big.submit(one)
    assert big.submit(other)
    assert not big.submit(request(env, LATENCY.kv_tokens, 1)), "never fits"
    env.run(one.done)
    assert other.first_token is None
    env.run(other.done)


def test_an_adapter_too_many_is_passed_by() -> None:
    env = simpy.Environment()
    model = engine(env, max_loras=1)
    first = request(env, 10, 50, "a")
    blocked = request(env, 10, 5, "b")
    passing = request(env, 10, 5, "a")
    for item in (first, blocked, passing):
        model.submit(item)
    env.run(passing.done)
    assert blocked.first_token is None
    env.run(blocked.done)
    assert first.finished is not None


def test_a_load_stalls_the_batch_and_costs_by_its_tier() -> None:
    env = simpy.Environment()
    model = engine(env)
    running = request(env, 10, 1000)
    model.submit(running)
    env.run(until=1.0)
    started = env.now
    env.run(model.load("a"))
    assert env.now - started >= LATENCY.load_disk_s
    assert model.counters.stalled_s == pytest.approx(LATENCY.load_disk_s)
    env.run(model.load("b"))
    env.run(model.load("c", evict="a"))
    assert list(model.gpu) == ["b", "c"]
    assert "a" in model.host
    stalled = model.counters.stalled_s
    env.run(model.load("a", evict="b"))
    assert model.counters.stalled_s - stalled == pytest.approx(LATENCY.load_host_s)
    again = model.counters.loads
    env.run(model.load("a"))
    assert model.counters.loads == again, "resident: nothing to do"


def test_an_abort_frees_what_it_held() -> None:
    env = simpy.Environment()
    model = engine(env, max_num_seqs=2)
    running, prefilling, waiting = (request(env, 10, 1000, "a") for _ in range(3))
    model.submit(running)
    env.run(until=0.5)
    model.submit(prefilling)
    model.submit(waiting)
    for item in (waiting, prefilling, running):
        model.abort(item)
        model.abort(item)
    assert (model.running, model.waiting, model.kv_usage) == (0, 0, 0)
    env.run(until=1.0)
    after = request(env, 10, 2)
    model.submit(after)
    env.run(after.done)


EVENTS = st.lists(
    st.tuples(
        st.floats(0, 0.5, width=32),
        st.sampled_from(["submit", "submit", "submit", "load", "abort"]),
        st.integers(1, 300),
        st.integers(1, 60),
        st.sampled_from([None, "a", "b", "c"]),
    ),
    max_size=25,
)


def play(events: list[Any], *, jump: bool) -> list[tuple[Any, ...]]:
    """What happens to each request: its first and last token, or that it was aborted."""
    env = simpy.Environment()
    model = engine(env, jump=jump, max_num_seqs=4, max_num_batched_tokens=128)
    requests: list[EngineRequest] = []

    def script() -> Generator[simpy.Event, None, None]:
        for delay_s, what, prompt, output, adapter in events:
            yield env.timeout(delay_s)
            if what == "submit":
                requests.append(request(env, prompt, output, adapter))
                model.submit(requests[-1])
            elif what == "load":
                model.load(adapter or "a")
            elif requests:
                model.abort(requests[prompt % len(requests)])

    env.process(script())
    env.run(until=1000)
    return [(item.first_token, item.finished, item.aborted) for item in requests]


@settings(max_examples=150, deadline=None)
@given(events=EVENTS)
def test_steps_taken_as_one_event_end_where_single_steps_do(events: list[Any]) -> None:
    fast, slow = play(events, jump=True), play(events, jump=False)
    assert len(fast) == len(slow)
    for one, other in zip(fast, slow, strict=True):
        assert one[2] == other[2]
        for time, expected in zip(one[:2], other[:2], strict=True):
            # A jump's boundary is n × step, a walk's is a sum of n steps: the last bits differ.
            assert time == (None if expected is None else pytest.approx(expected, rel=1e-9))


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_calibration_says_where_each_number_comes_from(name: str) -> None:
    calibration = read_calibration(name)
    LatencyModel(calibration, slots=4, rank_max=16)
    for field in calibration.__struct_fields__:
        value = getattr(calibration, field)
        if not isinstance(value, str):
            assert len(value.source) > 20, field


def test_load_times_between_measured_ranks_are_on_the_line() -> None:
    times = LoadTimes({8: 1.0, 16: 2.0}, "made up for this test")
    assert [times.at(rank) for rank in (4, 8, 12, 16, 64)] == [1.0, 1.0, 1.5, 2.0, 2.0]


# A latency model of round numbers, so that expectations are written out and not computed alike.
def round_numbers(slots: int = 2) -> LatencyModel:
    def of(value: float) -> Coefficient:
        return Coefficient(value, "a round number for this test")

    return LatencyModel(
        Calibration(
            name="round",
            engine="none",
            model="none",
            machine="none",
            date="2026-01-01",
            step_base_s=of(1.0),
            step_per_request_s=of(0.1),
            prefill_per_token_s=of(0.01),
            lora_factor=of(2.0),
            lora_factor_per_adapter=of(0.5),
            kv_tokens=of(1000),
            kv_tokens_per_slot=of(10),
            kv_tokens_per_slot_and_rank=of(5),
            adapter_bytes_per_rank=of(100),
            store_bytes_per_s=of(400),
            store_latency_s=of(3),
            load_host_s=LoadTimes({8: 0.25}, "a round number for this test"),
            load_disk_s=LoadTimes({8: 4.0}, "a round number for this test"),
        ),
        slots=slots,
        rank_max=8,
    )


def test_the_formulas_on_round_numbers() -> None:
    model = round_numbers()
    assert model.step_s(1, 0, 0) == pytest.approx(1.1)
    assert model.step_s(10, 50, 0) == pytest.approx(1.0 + 1.0 + 0.5)
    assert model.step_s(10, 50, 1) == pytest.approx(2.0 * 2.5 + 0.5)
    assert model.step_s(10, 0, 2) == pytest.approx(2.0 * 3.0)
    assert model.kv_tokens == 1000 - 2 * (10 + 5 * 8)
    assert model.fetch_s == pytest.approx(3 + 100 * 8 / 400)


def test_two_requests_on_round_numbers() -> None:
    env = simpy.Environment()
    model = SimEngine(env, round_numbers(), EngineLimits(max_loras=2))
    first, second = request(env, 100, 3), request(env, 50, 2, "a")
    model.submit(first)
    env.run(until=1.0)
    model.submit(second)
    env.run()
    # Step 1, 0 to 2.1: the first prompt. Step 2: one decodes, one prompt of 50, one adapter:
    # (1 + 0.2) × 2.5 + 0.5 = 3.5. Step 3: both decode: 1.2 × 2.5 = 3.
    assert first.first_token == pytest.approx(2.1)
    assert second.first_token == pytest.approx(5.6)
    assert first.finished == pytest.approx(8.6)
    assert second.finished == pytest.approx(8.6)
    assert model.counters.busy_s == pytest.approx(8.6)
    assert model.counters.steps == 3


def test_memory_decides_who_is_admitted_on_round_numbers() -> None:
    env = simpy.Environment()
    model = SimEngine(env, round_numbers(), EngineLimits())
    requests = [request(env, 350, 50) for _ in range(3)]  # 400 of 900 tokens each
    for item in requests:
        model.submit(item)
    env.run(until=0.5)
    assert (model.running, model.waiting) == (2, 1)
    assert model.kv_usage == pytest.approx(800 / 900)
    env.run(requests[0].done)
    env.run(until=env.now + 0.5)
    assert model.waiting == 0


def test_the_token_budget_is_shared_with_those_who_decode() -> None:
    env = simpy.Environment()
    model = SimEngine(env, round_numbers(), EngineLimits(max_num_batched_tokens=11))
    decoding, prompt = request(env, 1, 100), request(env, 25, 1)
    model.submit(decoding)
    env.run(until=0.5)
    model.submit(prompt)
    env.run(prompt.done)
    # 10 a step beside the one that decodes: 10, 10 and 5.
    assert model.counters.steps == 4


def test_host_memory_keeps_the_last_used() -> None:
    env = simpy.Environment()
    model = SimEngine(env, round_numbers(), EngineLimits(max_loras=1, max_cpu_loras=2))
    times = []
    for adapter, evict in (("a", None), ("b", "a"), ("a", "b"), ("c", "a"), ("b", "c")):
        started = env.now
        env.run(model.load(adapter, evict))
        times.append(env.now - started)
    # a and b from disk; a again from host memory; c from disk drops b, used longest ago.
    assert times == pytest.approx([4.0, 4.0, 0.25, 4.0, 4.0])


def test_more_in_slots_than_host_memory_is_meant_for_does_not_end_the_engine() -> None:
    env = simpy.Environment()
    model = SimEngine(env, round_numbers(), EngineLimits(max_loras=1))
    for adapter in "abcd":
        env.run(model.load(adapter))
    assert model._process.is_alive
