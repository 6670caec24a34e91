"""A random Qwen2 of two layers with a byte-level tokenizer: real to vLLM, and booted fast."""

import os
from pathlib import Path

HIDDEN = 128
HEADS = 2  # of 64: the CPU attention kernel refuses smaller ones
CHAT = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def build(folder: Path) -> Path:
    """Write the model. The weights are large enough that its answers vary with its prompts."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch  # noqa: PLC0415  (only the tests on real engines have it)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415
    from transformers import (  # noqa: PLC0415
        PreTrainedTokenizerFast,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    # ASCII alone (a space is Ġ, a new line Ċ there), so that every token is text by itself and
    # streams as one piece.
    alphabet = [chr(code) for code in range(0x21, 0x7F)] + ["Ġ", "Ċ"]
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    vocabulary["<|end|>"] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    )
    fast.chat_template = CHAT
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(vocabulary),
            hidden_size=HIDDEN,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=1024,
            initializer_range=0.4,
            tie_word_embeddings=False,
            eos_token_id=vocabulary["<|end|>"],
        )
    )
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
