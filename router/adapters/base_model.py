"""What a base model's weight matrices are, as far as it is known here with certainty.

From the heads of its weights where they are on this machine, in its folder or the hub's cache; else,
for architectures whose matrices follow from a few numbers, from its config.json. What is not known is
left to the engine: an adapter must never be refused by a guess.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import msgspec

from router.adapters.safetensors import NotSafetensorsError, Tensor, read_header

CONFIG: Final = "config.json"
INDEX: Final = "model.safetensors.index.json"
MATRIX: Final = 2
FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
# Their linear layers are stored the other way round (transformers' Conv1D).
TRANSPOSED: Final = frozenset({"gpt2", "openai-gpt"})
LAYER: Final = re.compile(r"(.*?)\.([0-9]{1,6})\.")

# vLLM's and transformers' names; of those that end in Moe, and Mixtral, the attention alone is so.
DENSE: Final = frozenset(
    {
        "GemmaForCausalLM", "Gemma2ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM",
        "Qwen2ForCausalLM", "Qwen3ForCausalLM",
    }
)  # fmt: skip
SPARSE: Final = frozenset({"MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"})
# For these the size of a head is hidden_size / num_attention_heads where config.json does not say.
HEADS_DIVIDE: Final = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "Qwen2ForCausalLM"}
)

HUB_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
HUB_REVISION: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Shape = tuple[int, int]


class BaseModelError(Exception):
    """The base model's folder holds what no model has. The message names the file."""


class BaseModel(msgspec.Struct, frozen=True):
    """What is known of a base model.

    `modules` are the last names of all its weight matrices, None where they are not known. `shapes` are
    (features out, features in) of matrices by their whole names, those that are known. `layers` is how
    many there are under a name: `{"model.layers": 24}`.
    """

    modules: frozenset[str] | None = None
    shapes: Mapping[str, Shape] = {}
    layers: Mapping[str, int] = {}

    def lacks_layer(self, module: str) -> tuple[int, int] | None:
        """The layer that a module's name has and the model has not, and how many it has."""
        found = LAYER.match(module)
        if found is None:
            return None
        count = self.layers.get(found[1])
        layer = int(found[2])
        return (layer, count) if count is not None and layer >= count else None


UNKNOWN: Final = BaseModel()


def folder_of(source: str, revision: str = "main") -> Path:
    """Where a model's files are on this machine, if they are: its folder, or the hub's cache.

    `source` is a folder or a hub id. Engines fill that cache, so after a model's first start it is
    known.
    """
    folder = Path(source)
    if (
        folder.is_dir()
        or HUB_ID.fullmatch(source) is None
        or HUB_REVISION.fullmatch(revision) is None
    ):
        return folder
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    model = cache / f"models--{source.replace('/', '--')}"
    with suppress(OSError, ValueError):  # else it may be a commit itself
        revision = (model / "refs" / revision).read_text(encoding="ascii").strip()
    return model / "snapshots" / revision


def read_base_model(folder: Path) -> tuple[BaseModel, str | None]:
    """What a folder says of its model, and the name that the model gives itself.

    Nothing, where it is no model's folder. Raises `BaseModelError` where it cannot be read.
    """
    path = folder / CONFIG
    if not path.is_file():
        return UNKNOWN, None
    config = _read_json(path)
    name = config.get("_name_or_path")
    transposed = config.get("model_type") in TRANSPOSED
    model = _from_weights(folder, transposed=transposed) or _from_config(config)
    return model, name if isinstance(name, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise BaseModelError(f"{path} is no model's {path.name}")
    return found


def _from_weights(folder: Path, *, transposed: bool) -> BaseModel | None:
    """From the heads of its weights, if all of them are there."""
    files = _weight_files(folder)
    if not files or not all(path.is_file() for path in files):
        return None
    modules: dict[str, None] = {}
    shapes: dict[str, Shape] = {}
    names: list[str] = []
    for path in files:
        for tensor, entry in _header(path).items():
            names.append(tensor)
            module, _, kind = tensor.rpartition(".")
            if len(entry.shape) < MATRIX or not module:
                continue
            modules[module.rpartition(".")[2]] = None
            if kind == "weight" and len(entry.shape) == MATRIX and entry.dtype in FLOATS:
                shapes[module] = (entry.shape[0], entry.shape[1])
    if transposed:
        shapes = {}
    _tie(modules, shapes)
    return BaseModel(frozenset(modules), shapes, _layers(names))


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    weights = _read_json(index).get("weight_map")
    if not isinstance(weights, dict):
        raise BaseModelError(f"{index} is no model's {INDEX}")
    return sorted({folder / str(file) for file in weights.values()})


def _header(path: Path) -> dict[str, Tensor]:
    try:
        return read_header(path)
    except NotSafetensorsError as error:
        raise BaseModelError(f"{path.parent}: {error}") from None


def _tie(modules: dict[str, None], shapes: dict[str, Shape]) -> None:
    """Where the matrix of the output is that of the input, it is stored once, under that one's name."""
    if "embed_tokens" in modules and "lm_head" not in modules:
        modules["lm_head"] = None
        if (embedding := shapes.get("model.embed_tokens")) is not None:
            shapes["lm_head"] = embedding


def _layers(names: list[str]) -> dict[str, int]:
    layers: dict[str, int] = {}
    for name in names:
        if found := LAYER.match(name):
            layers[found[1]] = max(layers.get(found[1], 0), int(found[2]) + 1)
    return layers


class _Sizes(msgspec.Struct, frozen=True):
    """What of a config.json makes the matrices, by transformers' names."""

    hidden_size: int
    num_attention_heads: int
    num_hidden_layers: int
    architectures: tuple[str, ...] = ()
    intermediate_size: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None


def _from_config(config: dict[str, Any]) -> BaseModel:
    """From its few numbers, for architectures whose matrices are known to follow from them."""
    try:
        sizes = msgspec.convert(config, _Sizes)
    except msgspec.ValidationError:
        return UNKNOWN
    architecture = sizes.architectures[0] if len(sizes.architectures) == 1 else ""
    if architecture not in DENSE | SPARSE:
        return UNKNOWN
    if sizes.head_dim is None and architecture not in HEADS_DIVIDE:
        return UNKNOWN
    dense = architecture in DENSE
    shapes = {
        f"model.layers.{layer}.{module}": shape
        for layer in range(sizes.num_hidden_layers)
        for module, shape in _matrices(sizes, dense=dense)
    }
    return BaseModel(None, shapes, {"model.layers": sizes.num_hidden_layers})


def _matrices(sizes: _Sizes, *, dense: bool) -> Iterator[tuple[str, Shape]]:
    """Those of one layer."""
    hidden = sizes.hidden_size
    head = sizes.head_dim or hidden // sizes.num_attention_heads
    queries = head * sizes.num_attention_heads
    keys = head * (sizes.num_key_value_heads or sizes.num_attention_heads)
    yield "self_attn.q_proj", (queries, hidden)
    yield "self_attn.k_proj", (keys, hidden)
    yield "self_attn.v_proj", (keys, hidden)
    yield "self_attn.o_proj", (hidden, queries)
    if dense and sizes.intermediate_size is not None:
        yield "mlp.gate_proj", (sizes.intermediate_size, hidden)
        yield "mlp.up_proj", (sizes.intermediate_size, hidden)
        yield "mlp.down_proj", (hidden, sizes.intermediate_size)
