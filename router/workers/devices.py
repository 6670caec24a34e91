"""Which GPUs, or which cores, a worker gets: its own, in turn, and shared only where there are too few.

vLLM takes the first GPUs that it sees, so two workers of one machine would take the same. A worker
sees only those that `CUDA_VISIBLE_DEVICES` names, and that is what is set for it. On a machine without
GPUs it is the cores that are shared out: an engine's processes wait for each other by spinning, and
would take the time of another engine's.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import Final

import msgspec

from engine_worker.protocol import CORES_ENV
from router.config import LLMConfig

QUERY = ("nvidia-smi", "--query-gpu=index", "--format=csv,noheader")
QUERY_TIMEOUT_S = 10


class Machine(msgspec.Struct, frozen=True):
    """What this machine has for its workers, and for how many places in all it has to last."""

    gpus: tuple[str, ...] = ()
    cores: tuple[int, ...] = ()
    places: int = 0


NOTHING: Final = Machine()


def this_machine(llms: Sequence[LLMConfig]) -> Machine:
    """Look at what the machine has, for the workers of these models."""
    cores = tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()
    places = sum(llm.replicas * gpus_per_worker(llm) for llm in llms if llm.engine == "vllm")
    return Machine(visible_devices(), cores, places)


def visible_devices() -> tuple[str, ...]:
    """The GPUs of this machine that may be used, by the names that CUDA takes."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return tuple(name.strip() for name in given.split(",") if name.strip())
    if shutil.which(QUERY[0]) is None:
        return ()
    try:
        done = subprocess.run(  # noqa: S603  (a constant)
            QUERY, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in done.stdout.splitlines() if line.strip())


def devices_of(first: int, count: int, visible: Sequence[str]) -> tuple[str, ...]:
    """`count` GPUs beginning at the one numbered `first`, again from the start after the last."""
    return tuple(visible[(first + offset) % len(visible)] for offset in range(count))


def gpus_per_worker(llm: LLMConfig) -> int:
    """How many GPUs one engine spreads over."""
    kwargs = llm.engine_kwargs
    return int(kwargs.get("tensor_parallel_size", 1)) * int(kwargs.get("pipeline_parallel_size", 1))


def device_environment(llm: LLMConfig, first: int, machine: Machine) -> dict[str, str]:
    """The environment that gives a worker its GPUs or cores, beginning at place `first`.

    Empty where there is nothing to share out: another engine than vLLM, fewer cores than places.
    """
    if llm.engine != "vllm":
        return {}
    places = gpus_per_worker(llm)
    if machine.gpus:
        count = min(places, len(machine.gpus))
        return {"CUDA_VISIBLE_DEVICES": ",".join(devices_of(first, count, machine.gpus))}
    share = len(machine.cores) // machine.places if machine.places else 0
    if not share:
        return {}
    own = machine.cores[first * share : (first + places) * share]
    return {CORES_ENV: ",".join(str(core) for core in own)}
