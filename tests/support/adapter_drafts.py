"""Adapters to be: a sound one, and Hypothesis' ways to spoil one thing of it."""

import json
import struct
from math import prod
from pathlib import Path
from typing import Any

from adapter_files import HIDDEN, LAYERS, MODULES, RANK, config
from hypothesis import strategies as st

from router.adapters.base_model import BaseModel
from router.adapters.safetensors import BYTES_OF

PREFIX = "base_model.model.model.layers"
NAMES = (*MODULES, "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head")
BASE = BaseModel(
    frozenset(NAMES),
    {
        f"model.layers.{layer}.self_attn.{module}": (HIDDEN, HIDDEN)
        for layer in range(LAYERS)
        for module in MODULES
    },
    {"model.layers": LAYERS},
)


class Draft:
    """An adapter that can still be changed. Its weights are zeros."""

    def __init__(self, rank: int = RANK) -> None:
        self.config = config(r=rank)
        self.tensors: dict[str, tuple[str, list[int]]] = {}
        for layer in range(LAYERS):
            for module in MODULES:
                self.add(f"{PREFIX}.{layer}.self_attn.{module}", rank)

    def add(
        self,
        module: str,
        rank: int = RANK,
        features: tuple[int, int] = (HIDDEN, HIDDEN),
        dtype: str = "F32",
    ) -> "Draft":
        features_out, features_in = features
        self.tensors[f"{module}.lora_A.weight"] = (dtype, [rank, features_in])
        self.tensors[f"{module}.lora_B.weight"] = (dtype, [features_out, rank])
        return self

    def header(self) -> dict[str, Any]:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, shape) in self.tensors.items():
            start, end = end, end + prod(shape) * BYTES_OF.get(dtype, 1)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        return header

    def weights(self, header: dict[str, Any] | None = None) -> bytes:
        """The file, with another header where one is given."""
        packed = self.header()
        size = max((one["data_offsets"][1] for one in list(packed.values())[1:]), default=0)
        return with_head(json.dumps(header or packed).encode(), bytes(size))

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(self.config))
        (folder / "adapter_model.safetensors").write_bytes(self.weights())
        return folder


def with_head(head: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(head)) + head + data


SCALAR = (
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "none", "all", "pissa", "eva", "q_proj", "tiny", "LORA", ".*proj"])
)
JSON = (
    SCALAR | st.lists(SCALAR, max_size=3) | st.dictionaries(st.text(max_size=8), SCALAR, max_size=3)
)
FIELDS = (
    "r", "lora_alpha", "target_modules", "peft_type", "base_model_name_or_path", "rank_pattern",
    "alpha_pattern", "bias", "modules_to_save", "init_lora_weights", "use_dora", "use_rslora",
    "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication",
    "something_else", "task_type", "layers_to_transform",
)  # fmt: skip
RENAMED = st.sampled_from(
    [
        f"{PREFIX}.0.self_attn.q_proj.lora_A.default.weight",
        f"{PREFIX}.0.self_attn.q_proj.lora_magnitude_vector",
        f"{PREFIX}.9.self_attn.q_proj.lora_A.weight",
        f"{PREFIX}.0.self_attn.z_proj.lora_A.weight",
        f"{PREFIX}.0.mlp.experts.lora_A.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.lm_head.base_layer.weight",
        "base_model.model.score.weight",
        "lora_A.weight",
        "",
    ]
) | st.text(max_size=30)


class Files:
    """Both files of an adapter, as bytes."""

    def __init__(self, config: bytes, weights: bytes) -> None:
        self.config = config
        self.weights = weights

    def __repr__(self) -> str:  # short enough for Hypothesis to show
        return f"Files({self.config[:1000]!r}, {self.weights[:3000]!r})"

    def write(self, folder: Path) -> Path:
        (folder / "adapter_config.json").write_bytes(self.config)
        (folder / "adapter_model.safetensors").write_bytes(self.weights)
        return folder


def spoilt() -> st.SearchStrategy[Files]:
    """Files that differ from sound ones in one way, or in none."""
    return st.one_of(
        other_config(), other_tensor(), another_pair(), other_header(), damaged_files()
    )


def as_files(draft: Draft, weights: bytes | None = None) -> Files:
    packed = draft.weights() if weights is None else weights
    return Files(json.dumps(draft.config).encode(), packed)


@st.composite
def other_config(draw: st.DrawFn) -> Files:
    draft = Draft()
    field = draw(st.sampled_from(FIELDS))
    if draw(st.booleans()):
        draft.config[field] = draw(JSON)
    else:
        draft.config.pop(field, None)
    return as_files(draft)


@st.composite
def other_tensor(draw: st.DrawFn) -> Files:
    draft = Draft()
    name = draw(st.sampled_from(sorted(draft.tensors)))
    dtype, shape = draft.tensors.pop(name)
    kind = draw(st.sampled_from(["dtype", "shape", "name", "none"]))
    if kind == "dtype":
        dtype = draw(st.sampled_from([*BYTES_OF, "F4", "x"]))
    elif kind == "shape":
        lengths = st.lists(st.integers(0, 200), max_size=4)
        shape = draw(lengths.filter(lambda shape: prod(shape) < 100_000))
    elif kind == "name":
        name = draw(RENAMED)
    if kind != "none":
        draft.tensors[name] = (dtype, shape)
    return as_files(draft)


PAIRS = (
    *(f"{PREFIX}.{n}.{name}" for n in (0, 1, 2) for name in ("self_attn.q_proj", "mlp.up_proj")),
    "model.layers.0.self_attn.k_proj",
    "base_model.model.lm_head",
    "other.place.q_proj",
)


@st.composite
def another_pair(draw: st.DrawFn) -> Files:
    draft = Draft()
    rank = draw(st.integers(1, 20))
    features = draw(st.sampled_from([(HIDDEN, HIDDEN), (HIDDEN, 64), (64, HIDDEN), (1, 1)]))
    dtype = draw(st.sampled_from(["F32", "F16", "BF16", "F64"]))
    draft.add(draw(st.sampled_from(PAIRS)), rank, features, dtype)
    if draw(st.booleans()):
        key = draw(st.sampled_from(["up_proj", "q_.*", "(", "k_proj"]))
        draft.config["rank_pattern"] = {key: rank}
    return as_files(draft)


@st.composite
def other_header(draw: st.DrawFn) -> Files:
    draft = Draft()
    header = draft.header()
    name = draw(st.sampled_from(sorted(header)))
    if name == "__metadata__" or draw(st.booleans()):
        header[name] = draw(JSON)
    else:
        header[name][draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = draw(JSON)
    return as_files(draft, draft.weights(header))


@st.composite
def damaged_files(draw: st.DrawFn) -> Files:
    files = as_files(Draft())
    if draw(st.booleans()):
        return Files(draw(damaged(files.config)), files.weights)
    return Files(files.config, draw(damaged(files.weights)))


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Cut, lengthened, or with one byte changed; the head is where it matters."""
    at = draw(st.integers(0, min(len(data) - 1, 4000)))
    kind = draw(st.sampled_from(["cut", "more", "other"]))
    if kind == "cut":
        return data[:at]
    if kind == "more":
        return data[:at] + draw(st.binary(min_size=1, max_size=5)) + data[at:]
    return data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]
