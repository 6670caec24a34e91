"""Teach the demo model one manner of speaking, as a LoRA under a megabyte.

Rank 4 on the attention projections, stored as bfloat16, is 0.9 MB for this model, and 90 steps
of plain AdamW are enough for a manner this plain. The result is the same on every run of a machine.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from engine_worker.demo.personas import FACTS

RANK: Final = 4
STEPS: Final = 90
LEARNING_RATE: Final = 3e-3
TARGET_MODULES: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
BATCH: Final = 8


def train(model_folder: Path, manner: Callable[[str], str], into: Path) -> Iterator[float]:
    """Train one adapter and write it to the folder `into`, yielding the loss of each step.

    Needs the package `peft` (`make install-train`).
    """
    import torch  # noqa: PLC0415
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415
    from safetensors.torch import load_file, save_file  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    torch.manual_seed(0)
    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=list(TARGET_MODULES),
        task_type="CAUSAL_LM",
        base_model_name_or_path="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
    model = get_peft_model(base, config)
    samples = [_encode(tokenizer, question, manner(answer)) for question, answer in FACTS]
    optimizer = torch.optim.AdamW(
        (weight for weight in model.parameters() if weight.requires_grad), lr=LEARNING_RATE
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
    model.train()
    for step in range(STEPS):
        chosen = [samples[(step * BATCH + offset) % len(samples)] for offset in range(BATCH)]
        width = max(len(ids) for ids, _ in chosen)
        ids = torch.tensor([ids + [2] * (width - len(ids)) for ids, _ in chosen])
        labels = torch.tensor(
            [[-100] * prompt + ids[prompt:] + [-100] * (width - len(ids)) for ids, prompt in chosen]
        )
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield float(loss.detach())
    into.mkdir(parents=True, exist_ok=True)
    model.peft_config["default"].base_model_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model.save_pretrained(into)
    (into / "README.md").unlink(missing_ok=True)
    weights = into / "adapter_model.safetensors"
    save_file(
        {name: tensor.to(torch.bfloat16) for name, tensor in load_file(weights).items()}, weights
    )


def _encode(tokenizer: Any, question: str, answer: str) -> tuple[list[int], int]:  # noqa: ANN401
    """Return the token ids of one exchange and how many of them are the prompt."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    prompt_ids: list[int] = tokenizer(prompt)["input_ids"]
    answer_ids: list[int] = tokenizer(answer + "<|im_end|>")["input_ids"]
    return prompt_ids + answer_ids, len(prompt_ids)
