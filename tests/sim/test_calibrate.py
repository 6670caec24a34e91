"""Calibration: the design covers every term, the fit finds what made the data, a session goes on."""

from pathlib import Path
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_worker.protocol import Info
from sim.calibrate.design import Bounds, Decode, Load, Mixed, Prompt, points, rounds
from sim.calibrate.fit import NAMES, fit
from sim.calibrate.measure import LoadSeen, PromptSeen, Seen, StepSeen, steps_of
from sim.calibrate.session import Head, Session, SessionError
from sim.calibrate.target import Stream, TargetError, cache_config
from sim.calibrate.write import calibration
from sim.latency import LatencyModel

BOUNDS = Bounds(
    max_num_seqs=32,
    max_model_len=2048,
    max_loras=4,
    max_num_batched_tokens=2048,
    kv_tokens=40_000,
    host_tier=True,
    neighbours=True,
)
INFO = Info(
    "vllm",
    "0.32.0",
    "base",
    4,
    8,
    1,
    max_num_seqs=32,
    max_num_batched_tokens=2048,
    block_size=128,
    kv_tokens=40_000,
)
TRUTH = {
    "request_overhead_s": 0.004,
    "step_base_s": 0.030,
    "step_per_request_s": 0.0025,
    "kv_read_per_token_s": 4e-6,
    "prefill_per_token_s": 1.6e-3,
    "prefill_per_pair_s": 2e-7,
    "prefill_lora_factor": 2.5,
    "prefill_floor_s": 0.0,
    "prefill_floor_lora_factor": 1.0,
    "lora_factor": 1.8,
    "lora_factor_per_adapter": 0.05,
    "host_contention": 0.4,
}


def test_the_design_varies_every_term_within_what_the_engine_allows() -> None:
    design = points(BOUNDS, quick=False)
    decodes = [point for point in design if isinstance(point, Decode)]
    prompts = [point for point in design if isinstance(point, Prompt)]
    for values in (
        {point.requests for point in decodes},
        {point.adapters for point in decodes},
        {point.prompt for point in decodes},
        {point.tokens for point in prompts},
    ):
        assert len(values) >= 3
    assert (
        {point.beside for point in decodes}
        == {point.beside for point in prompts}
        == {
            False,
            True,
        }
    )
    assert all(point.adapters <= min(point.requests, BOUNDS.max_loras) for point in decodes)
    assert {point.tier for point in design if isinstance(point, Load)} == {"disk", "host"}
    twice = rounds(BOUNDS, 2, quick=True)
    half = len(twice) // 2
    assert twice[:half] != twice[half:]
    assert sorted(map(repr, twice[:half])) == sorted(map(repr, twice[half:]))


def seen(random: Random, noise: float) -> tuple[list[StepSeen], list[PromptSeen]]:
    """What an engine of `TRUTH` would show, with noise, and one measurement in twenty quite wrong."""
    t = TRUTH

    def disturbed(value: float) -> float:
        wrong = 3.0 if noise and random.random() < 0.05 else 1.0
        return value * wrong * (1 + random.gauss(0, noise))

    def lora(adapters: int) -> float:
        return t["lora_factor"] + t["lora_factor_per_adapter"] * adapters if adapters else 1.0

    steps, prompts = [], []
    for point in rounds(BOUNDS, 3, quick=False):
        if isinstance(point, Decode):
            context = point.requests * (point.prompt + 12.0)
            step_s = (t["step_base_s"] + t["step_per_request_s"] * point.requests) * lora(
                point.adapters
            ) + t["kv_read_per_token_s"] * context
            step_s *= 1 + t["host_contention"] * point.beside
            steps.append(StepSeen(point, context, disturbed(step_s)))
        elif isinstance(point, Mixed):
            context = point.requests * (point.prompt + 3.0)
            pairs = point.tokens * (point.tokens + 1) / 2
            step_s = (t["step_base_s"] + t["step_per_request_s"] * (point.requests + 1)) * lora(
                point.adapters
            ) + t["kv_read_per_token_s"] * context
            prefill_s = t["prefill_per_token_s"] * point.tokens + t["prefill_per_pair_s"] * pairs
            step_s += prefill_s * (t["prefill_lora_factor"] if point.adapters else 1)
            steps.append(StepSeen(point, context, disturbed(step_s)))
        elif isinstance(point, Prompt):
            pairs = point.tokens * (point.tokens + 1) / 2
            prefill_s = t["prefill_per_token_s"] * point.tokens + t["prefill_per_pair_s"] * pairs
            ttft_s = (t["step_base_s"] + t["step_per_request_s"]) * lora(int(point.adapter))
            ttft_s += prefill_s * (t["prefill_lora_factor"] if point.adapter else 1)
            ttft_s *= 1 + t["host_contention"] * point.beside
            prompts.append(PromptSeen(point, disturbed(ttft_s + t["request_overhead_s"])))
    return steps, prompts


def test_the_fit_finds_what_made_the_data() -> None:
    found = fit(*seen(Random(1), 0.0), resamples=0)
    for name in NAMES:
        assert found.estimates[name].value == pytest.approx(TRUTH[name], rel=0.02, abs=1e-9), name
    assert found.step_error < 0.001


def test_a_floor_is_found_where_there_is_one() -> None:
    floor_s, factor = 0.2, 2.2
    steps, prompts = seen(Random(6), 0.0)
    prompts = [
        msgspec.structs.replace(
            one,
            ttft_s=max(
                one.ttft_s,
                floor_s * (factor if one.point.adapter else 1) + TRUTH["request_overhead_s"],
            ),
        )
        for one in prompts
        if not one.point.beside
    ]
    steps = [
        msgspec.structs.replace(
            one, step_s=max(one.step_s, floor_s * (factor if one.point.adapters else 1))
        )
        if isinstance(one.point, Mixed)
        else one
        for one in steps
    ]
    found = fit(steps, prompts, resamples=0)
    assert found.estimates["prefill_floor_s"].value == pytest.approx(floor_s, rel=0.02)
    assert found.estimates["prefill_floor_lora_factor"].value == pytest.approx(factor, rel=0.02)
    assert found.estimates["prefill_per_token_s"].value == pytest.approx(1.6e-3, rel=0.05)


def test_noise_and_wrong_measurements_move_it_little_and_the_intervals_say_so() -> None:
    found = fit(*seen(Random(2), 0.03), resamples=60)
    for name in ("step_base_s", "step_per_request_s", "lora_factor", "prefill_per_token_s"):
        estimate = found.estimates[name]
        assert estimate.value == pytest.approx(TRUTH[name], rel=0.15), name
        assert estimate.interval is not None
        low, high = estimate.interval
        assert low <= estimate.value <= high
        assert low < TRUTH[name] * 1.05
        assert high > TRUTH[name] * 0.95


def test_what_was_not_varied_is_left_at_nothing_and_said() -> None:
    steps, prompts = seen(Random(3), 0.0)
    plain = fit(
        [
            one
            for one in steps
            if not one.point.adapters and not (isinstance(one.point, Decode) and one.point.beside)
        ],
        [one for one in prompts if not one.point.adapter and not one.point.beside],
        resamples=5,
    )
    assert plain.estimates["lora_factor"].value == 1.0
    assert plain.estimates["host_contention"].value == 0.0
    assert plain.estimates["lora_factor"].interval is None
    with pytest.raises(ValueError, match="three batch sizes"):
        fit(steps[:1], prompts)


def test_the_calibration_names_what_was_measured_and_can_be_used(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 8}')
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(800))
    found = fit(*seen(Random(4), 0.01), resamples=5)
    loads = [LoadSeen(Load("disk"), value) for value in (0.05, 0.06, 0.9)]
    made = calibration("mine", INFO, found, loads, tmp_path, "the command")
    assert (made.engine, made.model) == ("vllm 0.32.0", "base")
    assert made.load_disk_s.at(8) == 0.06
    assert made.adapter_bytes_per_rank.value == 100
    assert made.defaults.max_num_seqs == 32
    assert made.step_base_s.interval is not None
    assert "the command" in made.step_base_s.source
    model = LatencyModel(made, slots=4, rank_max=8)
    assert model.step_s(running=4) == pytest.approx(0.040, rel=0.1)


def test_steps_are_read_off_where_all_streams_decode() -> None:
    point = Decode(2, 0, 100)
    early = Stream(0.0, [1.0 + 0.1 * number for number in range(24)])
    late = Stream(0.0, [1.1 + 0.1 * number for number in range(24)])
    found = list(steps_of(point, [early, late]))
    assert len(found) == 3
    assert all(one.step_s == pytest.approx(0.1) for one in found)
    contexts = [one.context for one in found]
    assert contexts == sorted(contexts)
    assert 2 * 100 < contexts[0] < contexts[-1] < 2 * 124
    assert list(steps_of(point, [Stream(0.0, [1.0, 1.1])])) == []


def test_the_step_of_a_prompt_that_joins_is_read_off_whenever_tokens_are_handed_out() -> None:
    # Decoding takes 0.1; a prompt asked for at 1.02 is computed in a step of 0.5 that ends at 1.7.
    at_once = Stream(0.0, [0.8, 0.9, 1.0, 1.1, 1.2, 1.7, 1.8, 1.9])
    # An engine that schedules ahead hands out the tokens of 1.2 when the long step is launched.
    late = Stream(0.0, [0.8, 0.9, 1.0, 1.1, 1.6, 1.7, 1.8, 1.9])
    for stream in (at_once, late):
        assert stream.step_until(1.7, 1.02) == pytest.approx(0.5)
        # The piece of that step may come a moment after the prompt's own.
        assert stream.step_until(1.69, 1.02) == pytest.approx(0.5)
    assert at_once.step_until(0.7, 0.6) is None


HEAD = Head(INFO, 1, quick=False, neighbours=0)


def test_a_session_goes_on_after_an_interruption_at_any_byte(tmp_path: Path) -> None:
    path = tmp_path / "one.partial.jsonl"
    session = Session(path, HEAD)
    first: list[Seen] = [PromptSeen(Prompt(16, adapter=False), 0.5)]
    second: list[Seen] = [LoadSeen(Load("disk"), 0.1)]
    session.add(0, first)
    session.add(1, second)
    whole = path.read_bytes()
    for cut in range(len(whole), whole.index(b"\n"), -7):
        path.write_bytes(whole[:cut])
        again = Session(path, HEAD)
        assert all(again.done[number] == (first, second)[number] for number in again.done)
        again.add(1, second)
        assert Session(path, HEAD).done[1] == second


def test_another_measurement_is_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "one.partial.jsonl"
    Session(path, HEAD)
    with pytest.raises(SessionError, match="another engine or design"):
        Session(path, Head(INFO, 2, quick=False, neighbours=0))
    path.write_text("something else\n")
    with pytest.raises(SessionError, match="no measurement"):
        Session(path, HEAD)


def test_a_stock_server_says_how_much_memory_it_has() -> None:
    metrics = 'vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="412"} 1.0\n'
    assert cache_config(metrics) == (412, 16)
    with pytest.raises(TargetError, match="is it a vLLM server"):
        cache_config("something 1\n")


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 8),
    gaps=st.lists(st.floats(0.01, 0.5), min_size=20, max_size=20),
)
def test_windows_add_up_to_what_they_cover(batch: int, gaps: list[float]) -> None:
    moments = [1.0]
    for gap in gaps:
        moments.append(moments[-1] + gap)
    streams = [Stream(0.0, list(moments)) for _ in range(batch)]
    found = list(steps_of(Decode(batch, 0, 10), streams))
    counts = [7, 6, 7]  # 20 steps in three parts, cut where rounding cuts
    total = sum(one.step_s * count for one, count in zip(found, counts, strict=True))
    assert total == pytest.approx(moments[-1] - moments[0], rel=1e-6)
