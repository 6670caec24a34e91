"""Runs inside vLLM's worker processes: tells which adapters are in slots, mends the CPU's kernels.

vLLM reports adapters with requests in flight, not what is resident; the truth is in the adapter
manager of each worker process. vLLM mixes this class into its worker (`worker_extension_cls`), so
its method can be called from the outside by `collective_rpc`.
"""

from typing import Any

from vllm.platforms import current_platform

if current_platform.is_cpu():
    from engine_worker.vllm_cpu_lora import mend

    mend()


class LoraSlots:
    """Mixed into vLLM's worker class, which has `model_runner`."""

    model_runner: Any

    def lorayard_gpu_lora_ids(self) -> list[int]:
        """The ids of the adapters in GPU slots."""
        manager = getattr(self.model_runner, "lora_manager", None)
        if manager is None:
            return []
        slots: list[int | None] = manager._adapter_manager.lora_index_to_id  # noqa: SLF001
        return [lora_id for lora_id in slots if lora_id is not None]
