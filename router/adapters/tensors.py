"""An adapter's tensors: two matrices a module, of a rank, a type and shapes that the base model takes.

The names are read as vLLM reads them (`parse_fine_tuned_lora_name`), and what it would refuse, or take
without a use, is refused. Weights of fused experts have shapes of their own, which the engine checks.
"""

from collections.abc import Mapping
from typing import Final

from router.adapters.base_model import BaseModel, Shape
from router.adapters.invalid import InvalidAdapterError, shown
from router.adapters.peft import PeftConfig, Ranks
from router.adapters.safetensors import Tensor

PREFIX: Final = "base_model.model."
ENDINGS: Final[Mapping[str, str]] = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "embedding A",
    ".lora_embedding_B": "embedding B",
}
PAIRS: Final[Mapping[str, tuple[str, str]]] = {
    "linear": ("A", "B"),
    "embedding": ("embedding A", "embedding B"),
}
# PEFT saves them beside an adapter of the embeddings, and vLLM skips them.
SKIPPED: Final = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
EXPERTS: Final = "experts"
# What training leaves; vLLM converts each to the type that the engine computes adapters in.
DTYPES: Final = ("F32", "F16", "BF16")
MATRIX: Final = 2
NAME_MAX: Final = 512

Named = tuple[str, Tensor]
Parts = dict[str, Named]


def modules_of(tensors: Mapping[str, Tensor]) -> dict[str, Parts]:
    """The tensors by their modules' names and their part in it. Raises `InvalidAdapterError`."""
    modules: dict[str, Parts] = {}
    for name, tensor in tensors.items():
        if len(name) > NAME_MAX:
            raise InvalidAdapterError(
                f"tensor {shown(name)} has a name of {len(name):,} letters; at most {NAME_MAX} are "
                "allowed"
            )
        if name.endswith(SKIPPED):
            continue
        module, part = _split(name)
        parts = modules.setdefault(module, {})
        if part in parts:
            raise InvalidAdapterError(
                f"tensors {shown(parts[part][0])} and {shown(name)} are one and the same; keep one"
            )
        parts[part] = (name, tensor)
    if not modules:
        raise InvalidAdapterError("it holds no LoRA weights; they end in .lora_A.weight and so on")
    return modules


def _split(name: str) -> tuple[str, str]:
    """A tensor's module and its part in it. Raises `InvalidAdapterError`."""
    for ending, part in ENDINGS.items():
        module = name.removesuffix(ending)
        if module and module != name:
            return (module.replace(PREFIX, "") if module.startswith(PREFIX) else module), part
    raise InvalidAdapterError(
        f"tensor {shown(name)} is no LoRA weight; allowed are names that end in {', '.join(ENDINGS)}"
    )


def last_name(module: str) -> str:
    """`model.layers.0.self_attn.q_proj` -> `q_proj`; of any expert, `experts`."""
    path = module.split(".")
    return EXPERTS if EXPERTS in path else path[-1]


def check_tensors(
    modules: Mapping[str, Parts], config: PeftConfig, base: BaseModel, base_name: str
) -> None:
    """Refuse what does not fit together, or not to the base. Raises `InvalidAdapterError`."""
    ranks = Ranks(config)
    for module, parts in modules.items():
        if (lacking := base.lacks_layer(module)) is not None:
            layer, count = lacking
            raise InvalidAdapterError(
                f"module {shown(module)} is of layer {layer}; {base_name!r} has layers 0 to {count - 1}"
            )
        kind = "embedding" if any(part not in PAIRS["linear"] for part in parts) else "linear"
        first, second = PAIRS[kind]
        for part in (first, second):
            if part not in parts:
                raise InvalidAdapterError(
                    f"module {shown(module)} has no lora {part}; both matrices are needed"
                )
        if len(parts) > len(PAIRS[kind]):
            raise InvalidAdapterError(
                f"module {shown(module)} has matrices for a linear layer and for an embedding; keep one"
            )
        _check_dtypes(parts[first], parts[second])
        if last_name(module) != EXPERTS:
            _check_shapes(module, parts[first], parts[second], ranks.of(module))
            shape = base.shapes.get(module)
            if shape is not None:
                # An embedding looks a row up, so what goes in is its vocabulary.
                fits = shape if kind == "linear" else (shape[1], shape[0])
                _check_fit(parts[first], parts[second], fits, base_name)


def _check_dtypes(first: Named, second: Named) -> None:
    for name, tensor in (first, second):
        if tensor.dtype not in DTYPES:
            raise InvalidAdapterError(
                f"tensor {shown(name)} has dtype {tensor.dtype}; allowed are {', '.join(DTYPES)}"
            )
    if first[1].dtype != second[1].dtype:
        raise InvalidAdapterError(
            f"tensor {shown(first[0])} has dtype {first[1].dtype}, and {shown(second[0])} has "
            f"{second[1].dtype}; both must have the same"
        )


def _check_shapes(module: str, first: Named, second: Named, ranks: frozenset[int]) -> None:
    """`first` is (rank, features in), `second` is (features out, rank)."""
    for name, tensor in (first, second):
        if len(tensor.shape) != MATRIX or min(tensor.shape) < 1:
            raise InvalidAdapterError(
                f"tensor {shown(name)} has shape {list(tensor.shape)}; it must be a matrix"
            )
    for (name, tensor), at in ((first, 0), (second, 1)):
        rank = tensor.shape[at]
        if rank not in ranks:
            allowed = " or ".join(map(str, sorted(ranks)))
            raise InvalidAdapterError(
                f"tensor {shown(name)} has shape {list(tensor.shape)}, so rank {rank}; by r and "
                f"rank_pattern {shown(module)} must have {allowed}"
            )
    if first[1].shape[0] != second[1].shape[1]:
        raise InvalidAdapterError(
            f"module {shown(module)} has rank {first[1].shape[0]} in one matrix and "
            f"{second[1].shape[1]} in the other"
        )


def _check_fit(first: Named, second: Named, fits: Shape, base_name: str) -> None:
    features_out, features_in = fits
    for (name, tensor), wanted in (
        (first, (first[1].shape[0], features_in)),
        (second, (features_out, second[1].shape[1])),
    ):
        if tensor.shape != wanted:
            raise InvalidAdapterError(
                f"tensor {shown(name)} has shape {list(tensor.shape)}; for {base_name!r} it must be "
                f"{list(wanted)}"
            )
