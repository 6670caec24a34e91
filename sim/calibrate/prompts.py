"""Prompts of an exact length that no cache knows: random token ids, drawn anew for each request."""

from random import Random
from typing import Final

TOKEN_IDS: Final = (100, 1000)  # ordinary tokens in any vocabulary


def random_prompt(random: Random, tokens: int) -> list[int]:
    """So many token ids."""
    return [random.randrange(*TOKEN_IDS) for _ in range(tokens)]
