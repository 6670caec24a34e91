"""From a fit to a calibration file: each number with where it comes from."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from engine_worker.protocol import Info
from sim.calibrate.fit import FLOOR, Estimate, Fit
from sim.calibrate.measure import LoadSeen
from sim.latency import Calibration, Coefficient, EngineDefaults, FitError, LoadTimes
from sim.machine import machine

STORE_LATENCY_S = 0.03
NOTHING = 1e-12  # below it a coefficient is what the solver calls 0
STORE_BYTES_PER_S = 1e9


def calibration(
    name: str, info: Info, fit: Fit, loads: Sequence[LoadSeen], adapter: Path | None, command: str
) -> Calibration:
    """The calibration of what was measured."""
    measured = (
        f"measured: robust regression over {fit.steps} windows of steps and {fit.prompts} prompts, "
        f"`{command}`"
    )
    coefficients: dict[str, Any] = {
        key: _coefficient(key, estimate, measured) for key, estimate in fit.estimates.items()
    }
    rank = max(1, info.max_lora_rank)
    return Calibration(
        name=name,
        engine=f"{info.engine} {info.engine_version}",
        model=info.model_id,
        machine=f"{info.device or 'unknown device'}; {machine()}",
        date=datetime.now(tz=UTC).date().isoformat(),
        defaults=EngineDefaults(
            max_num_seqs=info.max_num_seqs,
            max_num_batched_tokens=info.max_num_batched_tokens,
            max_model_len=info.max_model_len,
            block_size=info.block_size,
            async_scheduling=info.async_scheduling,
            source="read from the measured engine: its defaults, or what it was started with",
        ),
        lora_factor_per_rank=Coefficient(
            0.0, f"not measured: one engine has one max_lora_rank, here {rank}"
        ),
        kv_tokens=Coefficient(
            float(max(1, info.kv_tokens)),
            f"read from the engine, with {info.max_loras} slots of rank {rank}",
        ),
        kv_tokens_per_slot=Coefficient(0.0, "not measured: one engine has one number of slots"),
        kv_tokens_per_slot_and_rank=Coefficient(
            0.0, "not measured: one engine has one number of slots and one rank"
        ),
        adapter_bytes_per_rank=Coefficient(*_bytes_per_rank(adapter)),
        store_bytes_per_s=Coefficient(STORE_BYTES_PER_S, "assumption: 1 GB/s from the store"),
        store_latency_s=Coefficient(
            STORE_LATENCY_S, "assumption: 30 ms for listing and first byte"
        ),
        load_host_s=_load_times(loads, "host", rank),
        load_disk_s=_load_times(loads, "disk", rank),
        fit_error=FitError(round(fit.step_error, 4), round(fit.prompt_error, 4)),
        **coefficients,
    )


def _coefficient(name: str, estimate: Estimate, measured: str) -> Coefficient:
    if estimate.interval is None and name in FLOOR:
        return Coefficient(estimate.value, "none: what was seen is explained without one")
    if estimate.interval is None:
        return Coefficient(estimate.value, "not measured: the run did not vary it")
    low, high = (0.0 if bound < NOTHING else bound for bound in estimate.interval)
    value = 0.0 if estimate.value < NOTHING else estimate.value
    if low < high / 100:
        measured += "; this run does not tell it apart from 0"
    return Coefficient(value, measured, (min(low, value), max(high, value)))


def _load_times(loads: Sequence[LoadSeen], tier: str, rank: int) -> LoadTimes:
    times = [one.load_s for one in loads if one.point.tier == tier]
    if times:
        return LoadTimes({rank: median(times)}, f"measured: median of {len(times)} loads, idle")
    disk = [one.load_s for one in loads if one.point.tier == "disk"]
    if disk:  # the engine has no such tier: its evicted adapters come from disk again
        return LoadTimes({rank: median(disk)}, "the engine has no host tier: as from disk")
    return LoadTimes({rank: 0.0}, "not measured: the engine serves no adapters")


def _bytes_per_rank(adapter: Path | None) -> tuple[float, str]:
    if adapter is None:
        return 0.0, "not measured: the engine serves no adapters"
    size = (adapter / "adapter_model.safetensors").stat().st_size
    config = msgspec.json.decode((adapter / "adapter_config.json").read_bytes())
    rank = max(1, int(config.get("r", 1)))
    return size / rank, f"the size of the adapter that was loaded, {size:,} bytes at rank {rank}"
