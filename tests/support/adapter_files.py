"""Adapter folders made by hand: sound ones that a real engine loads, and broken ones."""

import json
import struct
from array import array
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

HIDDEN = 128
LAYERS = 2
RANK = 8
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")


def config(**changes: Any) -> dict[str, Any]:  # noqa: ANN401
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": list(MODULES),
        "bias": "none",
        **changes,
    }


def safetensors(tensors: Mapping[str, tuple[tuple[int, ...], bytes]]) -> bytes:
    """float32 tensors in the safetensors format."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, data) in tensors.items():
        header[name] = {
            "dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + len(data)]
        }  # fmt: skip
        offset += len(data)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head + b"".join(data for _, data in tensors.values())


def weights(seed: int, *, scale: float = 0.5) -> bytes:
    """Random weights for the tiny model, large enough to change its answers."""
    rng = Random(seed)
    tensors = {}
    for layer in range(LAYERS):
        for module in MODULES:
            for part, shape in (("A", (RANK, HIDDEN)), ("B", (HIDDEN, RANK))):
                name = (
                    f"base_model.model.model.layers.{layer}.self_attn.{module}.lora_{part}.weight"
                )
                values = array("f", (rng.gauss(0, scale) for _ in range(HIDDEN * RANK)))
                tensors[name] = (shape, values.tobytes())
    return safetensors(tensors)


def write_adapter(folder: Path, seed: int = 0, **changes: Any) -> Path:  # noqa: ANN401
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config(**changes)))
    (folder / "adapter_model.safetensors").write_bytes(weights(seed))
    return folder
