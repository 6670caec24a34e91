"""A latency model of round numbers, so that expectations are written out and not computed alike."""

from typing import Any

from sim.latency import Calibration, Coefficient, EngineDefaults, LatencyModel, LoadTimes

WHY = "a round number for this test"


def calibration(**changed: float) -> Calibration:
    """A calibration of round numbers; `changed` names coefficients."""
    values: dict[str, float] = {
        "request_overhead_s": 0.0,
        "step_base_s": 1.0,
        "step_per_request_s": 0.1,
        "kv_read_per_token_s": 0.0,
        "prefill_per_token_s": 0.01,
        "prefill_per_pair_s": 0.0,
        "prefill_lora_factor": 1.0,
        "prefill_floor_s": 0.0,
        "prefill_floor_lora_factor": 1.0,
        "lora_factor": 2.0,
        "lora_factor_per_adapter": 0.5,
        "lora_factor_per_rank": 0.0,
        "host_contention": 0.0,
        "kv_tokens": 1000.0,
        "kv_tokens_per_slot": 10.0,
        "kv_tokens_per_slot_and_rank": 5.0,
        "adapter_bytes_per_rank": 100.0,
        "store_bytes_per_s": 400.0,
        "store_latency_s": 3.0,
        **changed,
    }
    coefficients: dict[str, Any] = {name: Coefficient(value, WHY) for name, value in values.items()}
    return Calibration(
        name="round",
        engine="none",
        model="none",
        machine="none",
        date="2026-01-01",
        defaults=EngineDefaults(256, 2048, 131072, 16, async_scheduling=False, source=WHY),
        load_host_s=LoadTimes({8: 0.25}, WHY),
        load_disk_s=LoadTimes({8: 4.0}, WHY),
        **coefficients,
    )


def latency(slots: int = 2, **changed: float) -> LatencyModel:
    """The model of that calibration, for adapters of rank 8."""
    return LatencyModel(calibration(**changed), slots=slots, rank_max=8)
