"""What passes here loads in vLLM: its own reading of adapters, over everything that was not refused.

No engine is booted: `PEFTHelper` and `LoRAModel` are all that reads an adapter's files.
"""

import tempfile
from pathlib import Path
from typing import Any

import pytest
from adapter_drafts import BASE, Files, spoilt
from hypothesis import HealthCheck, given, reject, settings

from router.adapters.validate import AdapterRules, InvalidAdapterError, check_files

pytestmark = pytest.mark.vllm
RULES = AdapterRules(("org/tiny", "tiny"), rank_max=16, base=BASE)


def load(folder: Path) -> Any:  # noqa: ANN401
    """The adapter as vLLM's worker loads it (`WorkerLoRAManager._load_adapter`)."""
    import torch  # noqa: PLC0415  (only the tests on real engines have it)
    from vllm.config.lora import LoRAConfig  # noqa: PLC0415
    from vllm.lora.lora_model import LoRAModel  # noqa: PLC0415
    from vllm.lora.peft_helper import PEFTHelper  # noqa: PLC0415

    helper = PEFTHelper.from_local_dir(str(folder), 1024)
    helper.validate_legal(LoRAConfig(max_lora_rank=RULES.rank_max))
    return LoRAModel.from_local_checkpoint(
        str(folder),
        {*(BASE.modules or ()), "experts"},
        peft_helper=helper,
        lora_model_id=1,
        device="cpu",
        dtype=torch.float32,
    )


@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
@given(spoilt())
def test_what_was_not_refused_loads(files: Files) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = files.write(Path(name))
        try:
            facts = check_files("x", folder, RULES)
        except InvalidAdapterError:
            reject()
        loaded = load(folder)
    assert loaded.rank == facts.rank
    assert loaded.loras
    for module, layer in loaded.loras.items():
        assert layer.lora_a is not None, module
        assert layer.lora_b is not None, module
        if "experts" not in module:
            assert layer.lora_a.shape[0] == layer.lora_b.shape[1]
            assert layer.input_dim > 0
            assert layer.output_dim > 0
