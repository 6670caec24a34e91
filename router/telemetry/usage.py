"""The object `usage` at the end of an answer: the engine's own count of tokens."""

from typing import Any, Final

import msgspec

OBJECT_END: Final = b"}"
NESTED_MAX: Final = 8  # objects inside of it: details of the prompt's tokens, of the answer's


class Usage(msgspec.Struct, frozen=True):
    """The engine's own count of tokens; None where it does not say."""

    input_tokens: int | None
    output_tokens: int | None


class _Said(msgspec.Struct):
    """The object, in OpenAI's words: of chats and completions, and of responses."""

    prompt_tokens: Any = None
    input_tokens: Any = None
    completion_tokens: Any = None
    output_tokens: Any = None
    total_tokens: Any = None


_decode: Final = msgspec.json.Decoder(_Said).decode


def read_usage(text: bytes) -> Usage | None:
    """The object that a text begins with; None where it begins with none that is whole."""
    end = 0
    for _ in range(NESTED_MAX):
        end = text.find(OBJECT_END, end) + 1
        if not end:
            return None
        try:
            said = _decode(text[:end])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue  # that was the end of an object inside of it
        given = _count(said.prompt_tokens if said.input_tokens is None else said.input_tokens)
        made = _count(said.completion_tokens if said.output_tokens is None else said.output_tokens)
        if made is None and given is not None and _count(said.total_tokens) == given:
            made = 0  # embeddings generate nothing, and do not say so
        return Usage(given, made)
    return None


def _count(value: Any) -> int | None:  # noqa: ANN401  (a worker may say anything)
    return value if type(value) is int and value >= 0 else None
