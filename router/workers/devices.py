"""Which GPUs a worker gets: each its own, in turn, and shared only where there are too few.

vLLM takes the first GPUs that it sees, so two workers of one machine would take the same. A worker
sees only those that `CUDA_VISIBLE_DEVICES` names, and that is what is set for it. A machine without
NVIDIA GPUs is left alone.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence

from router.config import LLMConfig

QUERY = ("nvidia-smi", "--query-gpu=index", "--format=csv,noheader")
QUERY_TIMEOUT_S = 10


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


def device_environment(llm: LLMConfig, first: int, visible: Sequence[str]) -> dict[str, str]:
    """The environment that gives a worker its GPUs; empty where there are none to give."""
    if llm.engine != "vllm" or not visible:
        return {}
    count = min(gpus_per_worker(llm), len(visible))
    return {"CUDA_VISIBLE_DEVICES": ",".join(devices_of(first, count, visible))}
