"""Read every adapter under a folder as vLLM's workers do, and say what came of each: a program apart.

No engine is booted: `PEFTHelper` and `LoRAModel` are all that reads an adapter's files
(`WorkerLoRAManager._load_adapter`).
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from vllm.config.lora import LoRAConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper


def read(folder: Path, modules: list[str], rank_max: int) -> dict[str, Any]:
    """The rank of one adapter, and of each of its modules the shapes; or the error."""
    try:
        helper = PEFTHelper.from_local_dir(str(folder), 1024)
        helper.validate_legal(LoRAConfig(max_lora_rank=rank_max))
        loaded = LoRAModel.from_local_checkpoint(
            str(folder),
            set(modules),
            peft_helper=helper,
            lora_model_id=1,
            device="cpu",
            dtype=torch.float32,
        )
    except Exception as error:  # noqa: BLE001  (whatever it is, is to be told)
        return {"error": repr(error)}
    shapes = {
        name: [None if one is None else list(one.shape) for one in (layer.lora_a, layer.lora_b)]
        for name, layer in loaded.loras.items()
    }
    return {"rank": loaded.rank, "shapes": shapes}


def main() -> None:
    """`FOLDER RANK_MAX MODULE...`: print JSON, by the adapters' names."""
    folder, rank_max, *modules = sys.argv[1:]
    found = {
        path.name: read(path, modules, int(rank_max)) for path in sorted(Path(folder).iterdir())
    }
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()
