"""The head of a safetensors file: which tensors it holds, found without reading them.

The format (github.com/huggingface/safetensors): eight bytes of little-endian length, that much JSON,
then the data. A file is taken for one only if the data is exactly what the head says: each tensor where
the one before it ends, as long as its shape and type make it, and nothing behind the last. Then nothing
can be hidden in it, and a file that was cut off, or that two writers made, is noticed.
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

LENGTH_BYTES: Final = 8
HEAD_MAX_BYTES: Final = 100_000_000  # the format's own limit
DIMENSIONS_MAX: Final = 8
METADATA: Final = "__metadata__"
# Of one element. The format has a few more, of less than a byte, which no adapter and no base model of
# ours is in.
BYTES_OF: Final[Mapping[str, int]] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "F64": 8, "I64": 8, "U64": 8, "C64": 8,
}  # fmt: skip


Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class Tensor(msgspec.Struct, frozen=True):
    """One tensor: its type by the format's name, its shape, and from where to where its bytes are."""

    dtype: str
    shape: Annotated[tuple[Count, ...], msgspec.Meta(max_length=DIMENSIONS_MAX)]
    data_offsets: tuple[Count, Count]

    @property
    def nbytes(self) -> int:
        """How many bytes its shape and type make."""
        return prod(self.shape) * BYTES_OF[self.dtype]


class NotSafetensorsError(Exception):
    """The file is no safetensors file, or cannot be read. The message names it, and says why."""


def read_header(path: Path, *, head_max_bytes: int = HEAD_MAX_BYTES) -> dict[str, Tensor]:
    """The tensors of a file by name. Raises `NotSafetensorsError`."""
    name = path.name
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            if length > head_max_bytes:
                raise NotSafetensorsError(
                    f"{name} is not a safetensors file: its head would have {length:,} bytes, and at "
                    f"most {head_max_bytes:,} are allowed"
                )
            head = file.read(length)
            size = file.seek(0, 2)
    except OSError as error:
        raise NotSafetensorsError(f"{name}: {error.strerror}") from None
    if len(head) < length or not head.startswith(b"{"):
        raise NotSafetensorsError(f"{name} is not a safetensors file: it has no head")
    tensors = _parsed(name, head)
    end = _end_of(name, tensors)
    if LENGTH_BYTES + length + end != size:
        raise NotSafetensorsError(
            f"{name} has {size:,} bytes, its header says {LENGTH_BYTES + length + end:,}"
        )
    return tensors


def _parsed(name: str, head: bytes) -> dict[str, Tensor]:
    try:
        entries = json.loads(head.decode(), object_pairs_hook=_without_duplicates)
        metadata = entries.pop(METADATA, {})
        msgspec.convert(metadata, dict[str, str])
        return msgspec.convert(entries, dict[str, Tensor])
    except _DuplicateError as error:
        raise NotSafetensorsError(f"{name} has {error} twice in its head") from None
    except msgspec.ValidationError as error:
        raise NotSafetensorsError(
            f"{name} is not a safetensors file: its head has what no tensor has ({error})"
        ) from None
    except (ValueError, RecursionError):
        raise NotSafetensorsError(
            f"{name} is not a safetensors file: its head is no JSON"
        ) from None


class _DuplicateError(Exception):
    """A name stands twice: readers differ in which of the two they take."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: dict[str, None] = {}
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateError(repr(key[:80]))
            seen[key] = None
    return found


def _end_of(name: str, tensors: Mapping[str, Tensor]) -> int:
    """Where the data ends. Raises `NotSafetensorsError` where it is not whole, or has more."""
    end = 0
    for key, tensor in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        what = f"{name}: tensor {key[:160]!r}"
        if tensor.dtype not in BYTES_OF:
            raise NotSafetensorsError(f"{what} has dtype {tensor.dtype[:40]!r}, which is none")
        start, stop = tensor.data_offsets
        if start != end:
            raise NotSafetensorsError(
                f"{what} begins at byte {start:,} of the data, and the one before it ends at {end:,}; "
                "data_offsets must leave no gap and not overlap"
            )
        if stop - start != tensor.nbytes:
            raise NotSafetensorsError(
                f"{what} has {stop - start:,} bytes by its data_offsets, and {tensor.nbytes:,} by its "
                "shape and dtype"
            )
        end = stop
    return end
