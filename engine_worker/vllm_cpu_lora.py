"""Mends one fault of vLLM's CPU build: base-model requests that are computed with an adapter.

In a batch that mixes requests with and without an adapter, tokens without one carry the index -1.
vLLM's GPU kernels skip them; its PyTorch kernels for the CPU use -1 as an index, which is the last
slot, and answer a base-model request with that adapter's weights (vllm#48421, open in 0.32). Here
those tokens' intermediate values are set to zero, so that nothing is added to them. Whether there is
anything to mend is tried out, not read off the version.
"""

from typing import Any

import torch
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu


def mend() -> bool:
    """Replace the kernel where it is at fault; say whether it was."""
    faulty = lora_ops.bgmv_shrink
    if _skips_tokens_without_adapter(faulty):
        return False

    def bgmv_shrink(
        inputs: torch.Tensor,
        lora_b_weights: torch.Tensor,
        output_tensor: torch.Tensor,
        lora_indices_tensor: torch.Tensor,
        scaling: float = 1.0,
    ) -> None:
        faulty(inputs, lora_b_weights, output_tensor, lora_indices_tensor, scaling)
        output_tensor[lora_indices_tensor < 0] = 0

    # Both names that are called: by the kernels for prompts, and by the wrapper for decoding.
    lora_ops.bgmv_shrink = bgmv_shrink
    punica_cpu.bgmv_shrink = bgmv_shrink
    return True


def _skips_tokens_without_adapter(bgmv_shrink: Any) -> bool:  # noqa: ANN401  (vLLM publishes no types)
    inputs, weights, output = torch.ones(2, 4), torch.ones(1, 2, 4), torch.zeros(2, 2)
    bgmv_shrink(inputs, weights, output, torch.tensor([0, -1]))
    return bool((output[1] == 0).all())
