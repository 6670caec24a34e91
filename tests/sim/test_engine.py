"""The engine model: vLLM's rules on hand-made cases, and its fast path against its slow one."""

from typing import Any

import msgspec
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st
from round_numbers import latency

from sim.engine import EngineLimits, EngineRequest, SimEngine
from sim.environment import Environment, Moment
from sim.host import Host


def engine(env: Environment, **limits: int) -> SimEngine:
    return SimEngine(env, latency(), msgspec.convert({"max_loras": 2, **limits}, EngineLimits))


def request(
    prompt: int, output: int, adapter: str | None = None, hash_ids: tuple[int, ...] = ()
) -> EngineRequest:
    return EngineRequest(
        adapter=adapter, prompt_tokens=prompt, output_tokens=output, hash_ids=hash_ids
    )


def until_done(env: Environment, item: EngineRequest) -> None:
    while not item.ended:
        env.step()


def test_one_request_takes_a_prefill_step_and_a_step_for_each_further_token() -> None:
    env = Environment()
    model = engine(env)
    one = request(100, 5)
    model.submit(one)
    env.run()
    assert one.first_token == pytest.approx(2.1)
    assert one.finished == pytest.approx(2.1 + 4 * 1.1)
    assert model.counters.output_tokens == 5
    assert model.counters.prompt_tokens == 100
    assert model.counters.busy_s == pytest.approx(6.5)
    assert (model.running, model.waiting, model.kv_usage) == (0, 0, 0)


def test_two_requests_on_round_numbers() -> None:
    env = Environment()
    model = engine(env)
    first, second = request(100, 3), request(50, 2, "a")
    model.submit(first)
    env.run(until=1.0)
    model.load("a")
    model.submit(second)
    env.run()
    # Step 1, 0 to 2.1: the first prompt. The load, to 6.1. Step 2: one decodes, one prompt of 50, one
    # adapter: 1.2 × 2.5 + 0.5 = 3.5. Step 3: both decode: 1.2 × 2.5 = 3.
    assert first.first_token == pytest.approx(2.1)
    assert second.first_token == pytest.approx(9.6)
    assert first.finished == pytest.approx(12.6)
    assert second.finished == pytest.approx(12.6)
    assert model.counters.busy_s == pytest.approx(8.6)
    assert model.counters.stalled_s == pytest.approx(4.0)
    assert model.counters.steps == 3


def test_the_token_budget_is_shared_with_those_who_decode() -> None:
    env = Environment()
    model = engine(env, max_num_batched_tokens=11)
    decoding, prompt = request(1, 100), request(25, 1)
    model.submit(decoding)
    env.run(until=0.5)
    model.submit(prompt)
    until_done(env, prompt)
    # 10 a step beside the one that decodes: 10, 10 and 5.
    assert model.counters.steps == 4
    assert decoding.finished is None


def test_two_prompts_share_a_step_and_the_second_goes_on_in_the_next() -> None:
    env = Environment()
    model = engine(env, max_num_batched_tokens=100)
    first, second, third = request(60, 1), request(60, 1), request(10, 1)
    for item in (first, second, third):
        model.submit(item)
    env.run()
    # Step 1: 60 + 40 tokens, 1 + 0.2 + 1 = 2.2 s. Step 2: 20 + 10 tokens, 1 + 0.2 + 0.3 = 1.5 s.
    assert first.first_token == pytest.approx(2.2)
    assert second.first_token == third.first_token == pytest.approx(3.7)


def test_a_full_batch_lets_wait() -> None:
    env = Environment()
    model = engine(env, max_num_seqs=1)
    first, second = request(10, 10), request(10, 10)
    model.submit(first)
    model.submit(second)
    until_done(env, first)
    assert second.first_token is None
    env.run()
    assert second.finished is not None


def test_a_whole_prompt_must_fit_to_be_admitted() -> None:
    env = Environment()
    model = engine(env)  # 900 tokens: 56 blocks of 16, one of them vLLM's null block
    requests = [request(350, 50) for _ in range(3)]  # prompts of 22 blocks
    for item in requests:
        model.submit(item)
    env.run(until=0.5)
    assert (model.running, model.waiting) == (2, 1)
    assert model.kv_usage == pytest.approx(44 / 55)
    env.run()
    assert all(item.finished for item in requests)
    assert not model.fits(request(881, 1)), "never"
    assert not engine(env, max_model_len=20).fits(request(15, 6))


def test_who_was_admitted_last_is_preempted_and_computed_again() -> None:
    env = Environment()
    # 4 blocks of 16; two prompts of 16 and one token each that decodes into a second block.
    model = engine(env, num_gpu_blocks_override=5, enable_prefix_caching=False)
    first, second = request(16, 30), request(16, 30)
    model.submit(first)
    model.submit(second)
    env.run()
    # Both take their second block at the first decode step. At token 33, 17 steps on, the first needs a
    # third one: the second gives back its two and waits, with 17 tokens generated.
    assert (first.preemptions, second.preemptions) == (0, 1)
    assert model.counters.preemptions == 1
    assert first.finished is not None
    assert second.finished is not None
    assert second.finished > first.finished
    assert model.counters.prompt_tokens == 16 + 16 + (16 + 17), "prompt and output, again"
    assert model.counters.output_tokens == 60
    assert model.kv.free == 4


def test_a_preempted_request_finds_what_nobody_took() -> None:
    env = Environment()
    model = engine(env, num_gpu_blocks_override=5)
    first, second = request(16, 20), request(16, 20)
    model.submit(first)
    model.submit(second)
    env.run()
    assert model.counters.preemptions == 1
    # 32 tokens stood in two full blocks; the first took one of them to end with.
    assert model.counters.cached_tokens == 16


def test_a_prefix_is_computed_once_for_each_adapter() -> None:
    env = Environment()
    model = SimEngine(env, latency(), EngineLimits(max_loras=2, block_size=16), segment_tokens=64)
    cases = [
        # prompt, adapter, hash ids -> found in the cache
        (200, None, (1, 2, 3, 4), 0),
        (200, None, (1, 2, 3, 4), 192),  # 12 whole blocks of 12.5
        (200, None, (1, 2, 9, 10), 128),
        (128, None, (1, 2), 112),  # the last token is always computed: 7 blocks of 8
        (64, None, (5,), 0),
        (200, "a", (1, 2, 3, 4), 0),
        (200, "a", (1, 2, 3, 4), 192),
        (200, None, (7, 8, 9, 11), 0),
    ]
    found = []
    for prompt, adapter, hash_ids, _ in cases:
        before = model.counters.cached_tokens
        model.submit(request(prompt, 2, adapter, hash_ids))
        env.run()
        found.append(model.counters.cached_tokens - before)
    assert found == [case[3] for case in cases]


def test_the_least_recently_used_prefix_goes_first_and_its_end_before_its_beginning() -> None:
    env = Environment()
    model = SimEngine(env, latency(), EngineLimits(num_gpu_blocks_override=11), segment_tokens=64)

    def run(prompt: int, hash_ids: tuple[int, ...]) -> int:
        before = model.counters.cached_tokens
        model.submit(request(prompt, 1, None, hash_ids))
        env.run()
        return model.counters.cached_tokens - before

    run(64, (1,))
    run(64, (2,))
    assert run(65, (1,)) == 64, "used again: 2 is the oldest now"
    assert run(96, ()) == 0  # takes 2 blank blocks and all 4 of the oldest
    assert run(17, ()) == 0  # the oldest is 1 now: takes the last 2 of its 4
    assert run(65, (1,)) == 32
    assert run(65, (2,)) == 0


def test_a_preempted_request_with_shared_prefixes_comes_back() -> None:
    env = Environment()
    # Found by a reviewer: what it left behind and what it shares overlapped, and it never fitted again.
    model = SimEngine(
        env,
        latency(),
        EngineLimits(num_gpu_blocks_override=21, block_size=4),
        segment_tokens=40,
    )
    model.submit(request(40, 1, None, (1,)))
    env.run()
    long = request(7, 39, None, (1,))
    others = [request(40, 20, None, (number,)) for number in (2, 3)]
    for item in (long, *others):
        model.submit(item)
    env.run()
    assert all(item.finished for item in (long, *others))
    assert model.counters.preemptions > 0
    assert (model.kv.free, model.kv.blank + model.kv.cached) == (20, 20)


def test_a_load_is_told_even_if_its_batch_is_aborted() -> None:
    env = Environment()
    model = engine(env)
    running = request(10, 100)
    model.submit(running)
    env.run(until=1.0)
    loaded = model.load("a")
    env.run(until=3.0)
    model.abort(running)
    env.run(loaded)
    assert list(model.gpu) == ["a"]


def test_an_adapter_too_many_is_passed_by_and_starves_while_others_come() -> None:
    env = Environment()
    model = engine(env, max_loras=1)
    running = request(10, 50, "a")
    starving = request(10, 5, "b")
    overtaking = [request(10, 60, "a") for _ in range(3)]
    model.submit(running)
    model.submit(starving)
    for item in overtaking:
        env.run(until=env.now + 40)
        model.submit(item)
    until_done(env, overtaking[-1])
    assert all(item.finished for item in (running, *overtaking))
    assert starving.first_token is None
    env.run()
    assert starving.finished is not None


def test_a_load_stalls_the_batch_and_costs_by_its_tier() -> None:
    env = Environment()
    model = engine(env, max_cpu_loras=4)
    model.submit(request(10, 1000))
    env.run(until=1.5)
    env.run(model.load("a"))
    # The first step ends at 1.2, the second at 2.3; then the load, and the step until it is known.
    assert env.now == pytest.approx(2.3 + 4.0 + 1.1)
    env.run(model.load("b"))
    env.run(model.load("c", evict="a"))
    assert list(model.gpu) == ["b", "c"]
    assert "a" in model.host
    stalled = model.counters.stalled_s
    env.run(model.load("a", evict="b"))
    assert model.counters.stalled_s - stalled == pytest.approx(0.25)
    again = model.counters.loads
    env.run(model.load("a"))
    assert model.counters.loads == again, "resident: nothing to do"


def test_a_request_for_an_adapter_in_no_slot_makes_its_step_wait() -> None:
    env = Environment()
    model = engine(env, max_loras=1, max_cpu_loras=2)
    first, second, third = (request(100, 1, name) for name in ("a", "b", "a"))
    for item in (first, second, third):
        model.submit(item)
        env.run()
    # 1.1 × 2.5 + 1 = 3.75 s a step; a and b from disk, then a again from host memory.
    times = [item.first_token for item in (first, second, third)]
    assert times == pytest.approx([7.75, 15.5, 19.5])
    assert model.counters.stalled_s == pytest.approx(8.25)
    assert list(model.gpu) == ["a"]


def test_without_a_host_tier_what_is_evicted_is_gone() -> None:
    env = Environment()
    model = engine(env, max_loras=1)
    for adapter, evict in (("a", None), ("b", "a"), ("a", "b")):
        env.run(model.load(adapter, evict))
    assert model.counters.stalled_s == pytest.approx(12.0)
    assert (list(model.gpu), list(model.host)) == (["a"], ["a"])


def test_host_memory_keeps_the_last_used() -> None:
    env = Environment()
    model = engine(env, max_loras=1, max_cpu_loras=3)
    times = []
    for adapter, evict in (
        ("a", None),
        ("b", "a"),
        ("a", "b"),
        ("c", "a"),
        ("d", "c"),
        ("b", "d"),
    ):
        started = env.now
        env.run(model.load(adapter, evict))
        times.append(env.now - started)
    # a and b from disk; a again from host memory; c from disk; d from disk drops b, used longest ago.
    assert times == pytest.approx([4.0, 4.0, 0.25, 4.0, 4.0, 4.0])


def test_an_abort_frees_what_it_held_at_the_next_boundary() -> None:
    env = Environment()
    model = engine(env, max_num_seqs=2)
    running, prefilling, waiting = (request(10, 1000, "a") for _ in range(3))
    model.submit(running)
    env.run(until=20)
    model.submit(prefilling)
    env.run(until=23)
    model.submit(waiting)
    for item in (waiting, prefilling, running):
        model.abort(item)
        model.abort(item)
    assert model.waiting == 0
    env.run(until=40)
    assert (model.running, model.kv_usage) == (0, 0)
    after = request(10, 2)
    model.submit(after)
    env.run()
    assert after.finished is not None


def test_engines_of_one_host_slow_each_other() -> None:
    env = Environment()
    host, model = Host(), latency(host_contention=0.5)
    one, other = (SimEngine(env, model, EngineLimits(), host=host) for _ in range(2))
    alone = request(100, 5)
    one.submit(alone)
    env.run(until=3.0)
    other.submit(request(100, 1))
    env.run()
    # 2.1 and 1.1 alone, to 3.2; the next step begins while the other works, from 3.0 to 6.15: 1.65 s
    # to 4.85, 1.65 s to 6.5, and the last one alone again, to 7.6.
    assert alone.finished == pytest.approx(7.6)


def test_an_engine_that_schedules_ahead_admits_one_step_later() -> None:
    moments = []
    for ahead in (False, True):
        env = Environment()
        limits = EngineLimits(async_scheduling=ahead)
        model = SimEngine(env, latency(), limits)
        model.submit(request(1, 100))
        env.run(until=5.0)
        late = request(1, 1)
        model.submit(late)
        until_done(env, late)
        moments.append(late.first_token)
    # Steps end at 1.11, 2.21, 3.31, 4.41, 5.51, 6.61; one with both takes 1.21.
    assert moments == pytest.approx([5.51 + 1.21, 6.61 + 1.21])


def test_an_engine_that_schedules_ahead_hands_tokens_out_when_the_next_step_is_launched() -> None:
    env = Environment()
    model = SimEngine(env, latency(prefill_floor_s=3.0), EngineLimits(async_scheduling=True))
    first, second, third = request(1, 100), request(1, 1), request(1, 1)
    model.submit(first)
    env.run(until=3.5)
    model.submit(second)
    env.run(until=4.5)
    model.submit(third)
    until_done(env, third)
    # Steps end at 3.0 (a prompt), 4.1, 5.2, 8.2 (a prompt), 11.2 (a prompt): what the step until 8.2
    # sampled is looked at when the kernels of the one after it are launched, 3.0 later.
    assert first.first_token == pytest.approx(3.0)
    assert second.first_token == pytest.approx(11.2)
    assert third.first_token == pytest.approx(11.2)


# The fast path against the slow one.


EVENTS = st.lists(
    st.tuples(
        # Whole and half seconds meet the boundaries of round steps; others fall between them.
        st.one_of(st.sampled_from([0.0, 0.5, 1.0, 1.1, 2.0]), st.floats(0, 30, width=32)),
        st.sampled_from(
            ["submit", "submit", "submit", "submit", "load", "abort", "unload", "evict"]
        ),
        st.integers(0, 2),
        st.integers(1, 300),
        st.integers(1, 120),
        st.sampled_from([None, "a", "b", "c"]),
        st.sampled_from([(), (), (1, 2, 3), (1, 2, 4), (1, 5), (6,)]),
    ),
    max_size=30,
)
LIMITS = st.builds(
    EngineLimits,
    max_num_seqs=st.sampled_from([1, 2, 4, 16]),
    max_num_batched_tokens=st.sampled_from([16, 64, 256]),
    max_loras=st.sampled_from([1, 2]),
    max_cpu_loras=st.sampled_from([0, 3]),
    block_size=st.sampled_from([4, 16]),
    num_gpu_blocks_override=st.sampled_from([0, 11, 21, 31, 111]),
    enable_prefix_caching=st.booleans(),
    async_scheduling=st.booleans(),
)


def play(
    events: list[tuple[float, str, int, int, int, str | None, tuple[int, ...]]],
    *,
    jump: bool,
    limits: EngineLimits,
    contention: float,
    floor_s: float,
) -> list[tuple[object, ...]]:
    """Everything that happens, with its moment: first tokens, ends, loads; and what was counted."""
    env = Environment()
    model = latency(
        kv_read_per_token_s=0.0007,
        prefill_per_pair_s=0.00013,
        host_contention=contention,
        prefill_floor_s=floor_s,
        prefill_floor_lora_factor=1.75,
    )
    seen: list[tuple[object, ...]] = []
    host = Host()
    engines = [
        SimEngine(env, model, limits, host=host, segment_tokens=64, jump=jump) for _ in range(3)
    ]
    requests: list[tuple[SimEngine, EngineRequest]] = []
    ended: list[EngineRequest] = []
    loads: list[simpy.Event] = []

    def submit(
        which: int,
        prompt: int,
        output: int,
        adapter: str | None,
        hash_ids: tuple[int, ...],
        *,
        again: bool,
    ) -> None:
        number = len(requests)

        def follow(_: Moment) -> None:
            submit((which + 1) % 3, output, 1 + prompt // 4, adapter, (), again=False)

        def done(item: EngineRequest) -> None:
            ended.append(item)
            seen.append((number, env.now, item.first_token, item.aborted, item.preemptions))
            if again:  # as a router does: what ends makes room for the next, elsewhere too
                env.at(env.now, follow)

        item = EngineRequest(
            adapter=adapter,
            prompt_tokens=prompt,
            output_tokens=output,
            hash_ids=hash_ids,
            on_done=done,
        )
        requests.append((engines[which], item))
        if engines[which].fits(item):
            engines[which].submit(item)

    def happen(event: Moment) -> None:
        entry: Any = event.value
        _, what, which, prompt, output, adapter, hash_ids = entry
        if what == "submit":
            submit(which, prompt, output, adapter, hash_ids, again=prompt % 3 == 0)
        elif what in {"load", "unload"}:
            number = len(seen)
            on = engines[which]
            moved = on.load(adapter or "a") if what == "load" else on.unload(adapter or "b")
            assert moved.callbacks is not None
            moved.callbacks.append(lambda _: seen.append((what, number, env.now)))
            loads.append(moved)
        elif what == "evict":
            engines[which].evict(adapter or "b")
        elif requests:
            on, item = requests[prompt % len(requests)]
            on.abort(item)

    moment = 0.0
    for entry in events:
        moment += entry[0]
        env.at(moment, happen, value=entry)
    env.run()
    assert all(load.processed for load in loads)
    served = [item for on, item in requests if on.fits(item) or item.aborted]
    assert sorted(map(id, ended)) == sorted(map(id, served)), "each is told its end once"
    for one in engines:
        assert (one.running, one.waiting, one.kv.free) == (0, 0, one.kv.total)
        assert one.kv.blank + one.kv.cached == one.kv.total
        seen.append((repr(one.counters), tuple(one.gpu), tuple(one.host)))
    return seen


@settings(max_examples=300, deadline=None)
@given(
    events=EVENTS,
    limits=LIMITS,
    contention=st.sampled_from([0.0, 0.4567]),
    floor_s=st.sampled_from([0.0, 2.71]),
)
def test_many_steps_as_one_event_are_the_same_steps_to_the_last_bit(
    events: list[tuple[float, str, int, int, int, str | None, tuple[int, ...]]],
    limits: EngineLimits,
    contention: float,
    floor_s: float,
) -> None:
    fast = play(events, jump=True, limits=limits, contention=contention, floor_s=floor_s)
    slow = play(events, jump=False, limits=limits, contention=contention, floor_s=floor_s)
    assert fast == slow
