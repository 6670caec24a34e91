"""Tensors, and the file that they are in: each thing that can be wrong is refused by its name."""

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from adapter_drafts import BASE, PREFIX, Draft, Files, as_files, spoilt, with_head
from adapter_files import HIDDEN, RANK, safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.adapters.base_model import BaseModel, BaseModelError, folder_of, read_base_model
from router.adapters.peft import PeftConfig, Ranks
from router.adapters.store import WEIGHTS_FILE, StoredAdapter, StoredFile
from router.adapters.validate import (
    AdapterFacts,
    AdapterRules,
    InvalidAdapterError,
    adapter_rules,
    check_files,
    check_listing,
)
from router.config import parse

RULES = AdapterRules(("org/tiny", "tiny"), rank_max=16, base=BASE)
MODULE = f"{PREFIX}.0.self_attn.q_proj"
Q = "model.layers.0.self_attn.q_proj"
UP = f"{PREFIX}.0.mlp.up_proj"
A, B = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"


def renamed(draft: Draft, old: str, new: str) -> None:
    draft.tensors[new] = draft.tensors.pop(old)


def other(draft: Draft, name: str, dtype: str, shape: list[int]) -> None:
    draft.tensors[name] = (dtype, shape)


def without(draft: Draft, name: str) -> None:
    del draft.tensors[name]


Change = Callable[[Draft], object]
REFUSED: list[tuple[Change, str]] = [
    (
        lambda d: renamed(d, A, f"{MODULE}.lora_A.default.weight"),
        f"tensor '{MODULE}.lora_A.default.weight' is no LoRA weight; allowed are names that",
    ),
    (
        lambda d: other(d, "base_model.model.score.weight", "F32", [2, HIDDEN]),
        "tensor 'base_model.model.score.weight' is no LoRA weight",
    ),
    (
        lambda d: other(d, f"{MODULE}.lora_magnitude_vector", "F32", [HIDDEN]),
        f"tensor '{MODULE}.lora_magnitude_vector' is no LoRA weight",
    ),
    (
        lambda d: renamed(d, B, "x" * 600 + ".lora_B.weight"),
        f"tensor '{'x' * 159}... has a name of 614 letters; at most 512 are allowed",
    ),
    (
        lambda d: other(d, f"{Q}.lora_A.weight", "F32", [RANK, HIDDEN]),
        f"tensors '{A}' and '{Q}.lora_A.weight' are one and the same",
    ),
    (lambda d: d.add(f"{PREFIX}.0.mlp.zz_proj"), "target_modules has 'zz_proj', which 'org/tiny' do"),
    (
        lambda d: d.add(f"{PREFIX}.2.self_attn.q_proj"),
        "module 'model.layers.2.self_attn.q_proj' is of layer 2; 'org/tiny' has layers 0 to 1",
    ),
    (
        lambda d: without(d, B),
        f"module '{Q}' has no lora B; both matrices are needed",
    ),
    (lambda d: without(d, A), f"module '{Q}' has no lora A"),
    (
        lambda d: renamed(d, B, f"{MODULE}.lora_embedding_B"),
        f"module '{Q}' has no lora embedding A",
    ),
    (
        lambda d: other(d, A, "F64", [RANK, HIDDEN]),
        f"tensor '{A}' has dtype F64; allowed are F32, F16, BF16",
    ),
    (
        lambda d: other(d, A, "BF16", [RANK, HIDDEN]),
        f"tensor '{A}' has dtype BF16, and '{B}' has F32; both must have the same",
    ),
    (lambda d: other(d, A, "F32", [RANK, HIDDEN, 1]), f"tensor '{A}' has shape [8, 128, 1]; it mus"),
    (lambda d: other(d, A, "F32", [0, HIDDEN]), f"tensor '{A}' has shape [0, 128]; it must b"),
    (
        lambda d: other(d, A, "F32", [4, HIDDEN]),
        f"tensor '{A}' has shape [4, 128], so rank 4; by r and rank_pattern "
        f"'{Q}' must have 8",
    ),
    (lambda d: other(d, B, "F32", [HIDDEN, 4]), f"tensor '{B}' has shape [128, 4], so rank 4; by r"),
    (
        lambda d: other(d, A, "F32", [RANK, 64]),
        f"tensor '{A}' has shape [8, 64]; for 'org/tiny' it must be [8, 128]",
    ),
    (
        lambda d: other(d, B, "F32", [256, RANK]),
        f"tensor '{B}' has shape [256, 8]; for 'org/tiny' it must be [128, 8]",
    ),
    (lambda d: d.config.pop("lora_alpha"), "adapter_config.json: Object missing required field `lora"),
    (
        lambda d: d.config.update(init_lora_weights="pissa_niter_4"),
        "init_lora_weights is 'pissa_niter_4', which changes the base model's weights; allowed are",
    ),
    (lambda d: d.config.update(alpha_pattern={"q_proj": "8"}), "alpha_pattern[...]: Expected `"),
    (lambda d: d.config.update(lora_alpha=10**400), "lora_alpha is 1000"),
    (lambda d: d.config.update(lora_alpha=math.nan), "lora_alpha is nan; at most 1,000,000,000 is"),
    (lambda d: d.config.update(alpha_pattern={"q": math.inf}), "alpha_pattern is inf; at most 1,"),
    (lambda d: d.config.update(r=10**400), "its rank is 1000"),
    (lambda d: d.config.update(rank_pattern={"(": 8}), "rank_pattern has '(', which is no regular"),
    (lambda d: d.config.update(rank_pattern={"a*" * 300: 8}), "rank_pattern has 'a*a*"),
    (
        lambda d: d.config.update(rank_pattern={f"a*{n}": 8 for n in range(300)}),
        "rank_pattern has 300 regular expressions; at most 256 are allowed",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[text[-60:] for _, text in REFUSED])
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, change: Change, message: str) -> None:
    draft = Draft()
    change(draft)
    with pytest.raises(InvalidAdapterError) as error:
        check_files("x", draft.write(tmp_path), RULES)
    assert str(error.value).startswith(f"adapter x: {message}")


TAKEN: list[Change] = [
    lambda _: None,
    lambda d: renamed(d, A, "model.layers.0.self_attn.q_proj.lora_A.weight"),
    lambda d: other(d, "base_model.model.lm_head.base_layer.weight", "U8", [3]),
    lambda d: d.add("base_model.model.lm_head", features=(99, HIDDEN)),
    lambda d: d.add(f"{PREFIX}.0.mlp.experts.3.w1", rank=3),
    lambda d: d.config.update(init_lora_weights="EVA", use_rslora=True, bias="none"),
    lambda d: d.config.update(alpha_pattern={"q_proj": 2.5}, lora_alpha=1.5),
    lambda d: (d.config.update(rank_pattern={"up_proj": 2}), d.add(UP, 2)),
    lambda d: (d.config.update(rank_pattern={".*_p.*": 2}), d.add(UP, 2)),
]  # fmt: skip


@pytest.mark.parametrize("change", TAKEN, ids=range(len(TAKEN)))
def test_what_fits_is_taken(tmp_path: Path, change: Change) -> None:
    draft = Draft()
    change(draft)
    facts = check_files("x", draft.write(tmp_path), RULES)
    assert facts.rank == RANK
    assert set(facts.target_modules) >= {"q_proj", "k_proj"}


def test_an_embedding_looks_its_rows_up(tmp_path: Path) -> None:
    base = BaseModel(None, {"model.embed_tokens": (99, HIDDEN)})
    rules = AdapterRules(("tiny",), 16, base)
    draft = Draft()
    name = "base_model.model.model.embed_tokens.lora_embedding_"
    draft.tensors |= {f"{name}A": ("F32", [RANK, 99]), f"{name}B": ("F32", [HIDDEN, RANK])}
    assert "embed_tokens" in check_files("x", draft.write(tmp_path), rules).target_modules
    draft.tensors[f"{name}A"] = ("F32", [RANK, 98])
    with pytest.raises(
        InvalidAdapterError, match=r"embedding_A' has shape \[8, 98\]; for 'tiny' it"
    ):
        check_files("x", draft.write(tmp_path), rules)


def test_the_facts(tmp_path: Path) -> None:
    draft = Draft()
    folder = draft.write(tmp_path)
    size = (folder / "adapter_model.safetensors").stat().st_size
    modules = ("k_proj", "o_proj", "q_proj", "v_proj")
    assert check_files("x", folder, RULES) == AdapterFacts(RANK, modules, size, "F32")
    draft.add(f"{PREFIX}.0.mlp.up_proj", dtype="BF16")
    assert check_files("x", draft.write(tmp_path), RULES).dtype == "BF16, F32"


RANKS: list[tuple[dict[str, int], str, set[int]]] = [
    ({}, "a.q", {8}),
    ({"q": 4}, "a.q", {4}),
    ({"q": 4}, "a.xq", {8}),
    ({"a.q": 4, "q": 2}, "b.a.q", {4}),
    ({"q": 2, "a.q": 4}, "b.a.q", {2}),
    ({"x.*": 3, "q": 2}, "a.q", {2, 3}),
    ({"q": 2, "x.*": 3}, "a.q", {2}),
    ({"x.*": 3}, "a.q", {8, 3}),
]


@pytest.mark.parametrize(("pattern", "module", "ranks"), RANKS)
def test_ranks(pattern: dict[str, int], module: str, ranks: set[int]) -> None:
    assert Ranks(PeftConfig(8, 8, ["q"], rank_pattern=pattern)).of(module) == ranks


# The file.

ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
FILES: list[tuple[bytes, str]] = [
    (
        with_head(b'{"a": {"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a": {}}', bytes(4)),
        " has 'a' twice in its head",
    ),
    (
        with_head(
            b'{"a": {"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)
        ),
        " has 'dtype' twice in its head",
    ),
    (
        with_head(json.dumps({"a": ONE, "b": ONE}).encode(), bytes(4)),
        ": tensor 'b' begins at byte 0 of the data, and the one before it ends at 4; data_offsets must",
    ),
    (
        with_head(json.dumps({"a": {**ONE, "data_offsets": [4, 8]}}).encode(), bytes(8)),
        ": tensor 'a' begins at byte 4 of the data, and the one before it ends at 0",
    ),
    (
        with_head(json.dumps({"a": {**ONE, "shape": [2]}}).encode(), bytes(4)),
        ": tensor 'a' has 4 bytes by its data_offsets, and 8 by its shape and dtype",
    ),
    (
        with_head(json.dumps({"a": {**ONE, "dtype": "F31"}}).encode(), bytes(4)),
        ": tensor 'a' has dtype 'F31', which is none",
    ),
    (
        with_head(json.dumps({"a": {**ONE, "shape": [-1]}}).encode(), bytes(4)),
        " is not a safetensors file: its head has what no tensor has (Expected `int` >= 0 -",
    ),
    (
        with_head(json.dumps({"a": {**ONE, "shape": [2**62] * 9}}).encode(), bytes(4)),
        " is not a safetensors file: its head has what no tensor has (Expected `array` of length <= 8",
    ),
    (
        with_head(json.dumps({"__metadata__": {"a": 1}, "a": ONE}).encode(), bytes(4)),
        " is not a safetensors file: its head has what no tensor has (Expected `str`, got `int`",
    ),
    (
        with_head(b'{"a": ' + b"[" * 100_000, b""),
        " is not a safetensors file: its head is no JSON",
    ),
    (
        with_head(b'{"a": ' + b"9" * 5000 + b"}", b""),
        " is not a safetensors file: its head is no JSON",
    ),
    (with_head(b"[]", b""), " is not a safetensors file: it has no head"),
    (
        (1 << 40).to_bytes(8, "little"),
        " is not a safetensors file: its head would have 1,099,511,627,776",
    ),
]


@pytest.mark.parametrize(("data", "message"), FILES, ids=[text[:40] for _, text in FILES])
def test_a_file_that_is_not_what_its_head_says(tmp_path: Path, data: bytes, message: str) -> None:
    folder = Draft().write(tmp_path)
    (folder / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(InvalidAdapterError) as error:
        check_files("x", folder, RULES)
    assert str(error.value).startswith(f"adapter x: adapter_model.safetensors{message}")


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_what_is_no_plain_file_is_refused(tmp_path: Path, file: str) -> None:
    folder = Draft().write(tmp_path / "adapter")
    (folder / file).rename(tmp_path / "elsewhere")
    (folder / file).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidAdapterError, match=f"{file} is a symbolic link; it must be a plain"):
        check_files("x", folder, RULES)
    (folder / file).unlink()
    os.mkfifo(folder / file)
    with pytest.raises(InvalidAdapterError, match=f"{file} is no file"):
        check_files("x", folder, RULES)
    (folder / file).unlink()
    with pytest.raises(InvalidAdapterError, match=f"{file}: No such file"):
        check_files("x", folder, RULES)


def test_what_is_too_large_is_refused_before_it_is_downloaded(tmp_path: Path) -> None:
    rules = AdapterRules(("tiny",), 16, bytes_max=2 * 2**20)
    files = [
        StoredFile("adapter_config.json", 9, ""),
        StoredFile(WEIGHTS_FILE, 3 * 2**20, ""),
    ]
    listed = StoredAdapter("x", "1", "1", tuple(files))
    message = r"has 3\.0 MiB; lora_config\.max_adapter_mib is 2$"
    with pytest.raises(InvalidAdapterError, match=message):
        check_listing(listed, rules)
    check_listing(listed, AdapterRules(("tiny",), 16))
    folder = Draft().write(tmp_path)
    os.truncate(folder / "adapter_model.safetensors", 3 * 2**20)
    with pytest.raises(InvalidAdapterError, match=message):
        check_files("x", folder, rules)


@pytest.mark.parametrize("name", ["../adapter_model.safetensors", "a/b", "a\\b", "..", ""])
def test_a_file_that_is_not_in_the_folder_is_refused(name: str) -> None:
    files = (StoredFile(WEIGHTS_FILE, 9, ""), StoredFile(name, 9, ""))
    with pytest.raises(InvalidAdapterError, match="is no name of a file in its folder"):
        check_listing(StoredAdapter("x", "1", "1", files), RULES)


# Whatever is in the files.


def checked(files: Files, rules: AdapterRules = RULES) -> AdapterFacts | str:
    """The facts, or why there are none; any other exception fails the test."""
    with tempfile.TemporaryDirectory() as name:
        try:
            return check_files("x", files.write(Path(name)), rules)
        except InvalidAdapterError as error:
            return str(error)


SOUND = as_files(Draft())


def test_the_sound_one_is_sound() -> None:
    assert isinstance(checked(SOUND), AdapterFacts)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(spoilt(), st.sampled_from([RULES, AdapterRules(("tiny",), 16)]))
def test_whatever_is_spoilt_is_taken_or_refused_by_name(files: Files, rules: AdapterRules) -> None:
    found = checked(files, rules)
    if isinstance(found, str):
        assert found.startswith("adapter x: ")
        assert len(found) < 1200
        assert found.isprintable()


@given(st.binary(max_size=300), st.binary(max_size=300), st.booleans())
def test_random_bytes_are_refused(config: bytes, weights: bytes, with_length: bool) -> None:
    if with_length:
        weights = with_head(b"{" + weights, b"")
    assert isinstance(checked(Files(SOUND.config, weights)), str)
    assert isinstance(checked(Files(config, SOUND.weights)), str)


# The base model.


Shapes = Mapping[str, tuple[int, ...]]


def write_base(folder: Path, config: dict[str, Any], *files: Shapes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    index: dict[str, str] = {}
    for number, tensors in enumerate(files):
        name = f"model-{number}.safetensors"
        sized = {key: (shape, bytes(4 * math.prod(shape))) for key, shape in tensors.items()}
        (folder / name).write_bytes(safetensors(sized))
        index |= dict.fromkeys(tensors, name)
    if len(files) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
LLAMA_LAYER = {
    "self_attn.q_proj": (12, 12),
    "self_attn.k_proj": (4, 12),
    "self_attn.v_proj": (4, 12),
    "self_attn.o_proj": (12, 12),
    "mlp.gate_proj": (20, 12),
    "mlp.up_proj": (20, 12),
    "mlp.down_proj": (12, 20),
}
LLAMA_SHAPES = {
    f"model.layers.{n}.{name}": shape for n in (0, 1) for name, shape in LLAMA_LAYER.items()
}


def test_a_base_model_by_its_weights(tmp_path: Path) -> None:
    halves: list[dict[str, tuple[int, ...]]] = [
        {f"model.layers.{n}.{name}.weight": shape for name, shape in LLAMA_LAYER.items()}
        for n in (0, 1)
    ]
    halves[0] |= {"model.embed_tokens.weight": (9, 12), "model.norm.weight": (12,)}
    folder = write_base(tmp_path / "m", {"_name_or_path": "org/m"}, *halves)
    model, name = read_base_model(folder)
    assert name == "org/m"
    last = {name.rpartition(".")[2] for name in LLAMA_LAYER}
    assert model.modules == frozenset(last | {"embed_tokens", "lm_head"})
    embedding = {"model.embed_tokens": (9, 12), "lm_head": (9, 12)}
    assert model.shapes == LLAMA_SHAPES | embedding
    assert model.layers == {"model.layers": 2}
    (folder / "model-1.safetensors").unlink()  # half of a model says nothing of the rest
    assert read_base_model(folder)[0] == BaseModel()


def test_quantized_weights_name_modules_and_no_shapes(tmp_path: Path) -> None:
    tensors = {"model.layers.0.q_proj.qweight": (2, 2), "model.layers.0.q_proj.scales": (1, 2)}
    model, _ = read_base_model(write_base(tmp_path, {}, tensors))
    assert (model.modules, model.shapes) == (frozenset({"q_proj"}), {})
    turned = {"h.0.attn.c_attn.weight": (2, 6)}
    model, _ = read_base_model(write_base(tmp_path, {"model_type": "gpt2"}, turned))
    assert (model.modules, model.shapes, model.layers) == (frozenset({"c_attn"}), {}, {"h": 1})


CONFIGS: list[tuple[dict[str, Any], dict[str, tuple[int, int]]]] = [
    (LLAMA, LLAMA_SHAPES),
    ({**LLAMA, "architectures": ["Qwen3ForCausalLM"], "head_dim": 2}, LLAMA_SHAPES),
    ({**LLAMA, "architectures": ["Qwen3ForCausalLM"]}, {}),
    (
        {**LLAMA, "architectures": ["MixtralForCausalLM"]},
        {name: shape for name, shape in LLAMA_SHAPES.items() if "mlp" not in name},
    ),
    (
        {**LLAMA, "head_dim": 5, "num_key_value_heads": None},
        LLAMA_SHAPES
        | {
            f"model.layers.{n}.self_attn.{name}": (12, 30) if name == "o_proj" else (30, 12)
            for n in (0, 1)
            for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        },
    ),
    ({**LLAMA, "architectures": ["NewForCausalLM"]}, {}),
    ({**LLAMA, "architectures": ["LlamaForCausalLM", "Other"]}, {}),
    ({**LLAMA, "hidden_size": "12"}, {}),
    ({}, {}),
]


@pytest.mark.parametrize(("config", "shapes"), CONFIGS, ids=range(len(CONFIGS)))
def test_a_base_model_by_its_config(
    tmp_path: Path, config: dict[str, Any], shapes: dict[str, tuple[int, int]]
) -> None:
    model, _ = read_base_model(write_base(tmp_path, config))
    assert model == BaseModel(None, shapes, {"model.layers": 2} if shapes else {})


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("model.safetensors.index.json", "{}"),
        ("model-0.safetensors", "no weights"),
    ],
)
def test_a_base_model_that_cannot_be_read_is_named(tmp_path: Path, file: str, text: str) -> None:
    folder = write_base(tmp_path, LLAMA, {"a.b.weight": (1, 1)})
    (folder / file).write_text(text)
    with pytest.raises(BaseModelError, match=file.replace(".", r"\.")):
        read_base_model(folder)


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE"])
def test_a_model_of_the_hub_is_found_in_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    hub = tmp_path / "hub" if variable == "HF_HOME" else tmp_path
    model = hub / "models--org--llama"
    commit = model / "snapshots" / "abc123"
    commit.mkdir(parents=True)
    write_base(commit, LLAMA)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("abc123")
    assert folder_of("org/llama") == folder_of("org/llama", "abc123") == commit
    assert read_base_model(folder_of("org/llama", "other"))[0] == BaseModel()
    assert folder_of("org/llama", "../..") == Path("org/llama")
    assert folder_of(str(model)) == model
    text = "llm_configs:\n  - model_loading_config: {model_id: m, model_source: org/llama}\n"
    [llm] = parse(text, name="c", folder=tmp_path).llm_configs
    assert adapter_rules(llm).base.shapes == LLAMA_SHAPES


def test_what_is_no_folder_is_not_known() -> None:
    assert read_base_model(Path("org/model")) == (BaseModel(), None)
