"""What is measured: points spread over batch sizes, contexts, adapters, prompts and tiers.

The rule: each point varies what one term of the latency model stands for, and every round visits all
points in an order of its own, so that a machine that warms up or is disturbed biases no single term.
"""

from random import Random
from typing import Final, TypeAlias

import msgspec

DECODE_TOKENS: Final = 24
BATCHES: Final = (1, 2, 4, 8, 16, 32, 64, 128)
BATCHES_MANY_ADAPTERS: Final = 32  # in larger ones, one adapter or none: they take the longest
CONTEXTS: Final = (32, 512, 1536, 6144)
BATCHES_MIN: Final = 4  # so few are not halved: a fit takes three
MIXED_BATCHES: Final = (1, 4, 16, 64)
MIXED_PROMPTS: Final = (64, 256, 1024)
PROMPTS: Final = (16, 64, 256, 512, 1024, 2000, 4000, 8000)
DISTINCT: Final = (1, 2, 4, 8, 16, 32)
LOADS: Final = 5  # of each tier a round
PROMPT_REPEATS: Final = 2  # a prompt is one measurement, a batch several
# One factor is to be told from measurements with busy neighbours, which take the longest: a few do.
BESIDE_BATCHES: Final = frozenset({1, 4, 8})
BESIDE_PROMPTS: Final = frozenset({64, 512})


class Decode(msgspec.Struct, frozen=True, tag="decode"):
    """So many streams at once, each after a prompt, over so many distinct adapters (0 for none).

    `beside` says whether the other workers of the host are kept busy meanwhile.
    """

    requests: int
    adapters: int
    prompt: int
    beside: bool = False


class Mixed(msgspec.Struct, frozen=True, tag="mixed"):
    """So many streams that decode, each after a short prompt, and then a prompt that joins them."""

    requests: int
    adapters: int
    prompt: int
    tokens: int


class Prompt(msgspec.Struct, frozen=True, tag="prompt"):
    """One prompt alone, for one token."""

    tokens: int
    adapter: bool
    beside: bool = False


class Load(msgspec.Struct, frozen=True, tag="load"):
    """One load: from `disk`, or from `host` memory, of an adapter that has left its slot."""

    tier: str


Point: TypeAlias = Decode | Mixed | Prompt | Load


class Bounds(msgspec.Struct, frozen=True):
    """What the engine allows."""

    max_num_seqs: int
    max_model_len: int
    max_loras: int
    max_num_batched_tokens: int
    kv_tokens: int
    host_tier: bool
    neighbours: bool


def points(bounds: Bounds, *, quick: bool) -> list[Point]:
    """Every point of one round that the engine allows."""
    longest = bounds.max_model_len - DECODE_TOKENS - 1
    batches = [size for size in BATCHES if size <= bounds.max_num_seqs]
    contexts = [tokens for tokens in CONTEXTS if tokens <= longest]
    distinct = [0, *(count for count in DISTINCT if count <= bounds.max_loras)]
    if quick:
        batches = batches[::2] if len(batches) > BATCHES_MIN else batches
        contexts, distinct = contexts[:2], distinct[:3]
    sides = (False, True) if bounds.neighbours else (False,)
    found: list[Point] = [
        Decode(requests, adapters, context, beside)
        for requests in batches
        for adapters in distinct
        for context in contexts
        for beside in sides
        if adapters <= requests
        and (requests <= BATCHES_MANY_ADAPTERS or adapters in {0, 1, distinct[-1]})
        and requests * (context + DECODE_TOKENS) <= bounds.kv_tokens * 0.9
        # Prompts cost time and are not what these points measure: two full steps of them at most.
        and (context == contexts[0] or requests * context <= 2 * bounds.max_num_batched_tokens)
        and (context == contexts[0] or adapters in {0, 1})
        and not (beside and (context != contexts[0] or requests not in BESIDE_BATCHES))
    ]
    found += [
        Mixed(requests, adapters, contexts[0], tokens)
        for requests in MIXED_BATCHES[:: 2 if quick else 1]
        if requests < bounds.max_num_seqs
        for adapters in distinct[:2]
        for tokens in MIXED_PROMPTS[:: 2 if quick else 1]
        if tokens <= min(longest, bounds.max_num_batched_tokens - requests)
        and requests * (contexts[0] + DECODE_TOKENS) + tokens <= bounds.kv_tokens * 0.9
    ]
    found += [
        Prompt(tokens, adapter, beside)
        for tokens in PROMPTS[:: 2 if quick else 1]
        for _ in range(PROMPT_REPEATS)
        if tokens <= longest
        for adapter in ((False, True) if bounds.max_loras else (False,))
        for beside in sides
        if not (beside and tokens not in BESIDE_PROMPTS)
    ]
    if bounds.max_loras:
        tiers = ("disk", "host") if bounds.host_tier else ("disk",)
        found += [Load(tier) for tier in tiers for _ in range(LOADS)]
    return found


def rounds(bounds: Bounds, count: int, *, quick: bool, seed: int = 0) -> list[Point]:
    """All points, `count` times, each round shuffled by itself."""
    found: list[Point] = []
    for number in range(count):
        one = points(bounds, quick=quick)
        Random(f"{seed}:{number}").shuffle(one)
        found += one
    return found
