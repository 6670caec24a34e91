"""What is refused, and with which words."""

import json
from pathlib import Path
from typing import Any

import pytest
from adapter_files import config, safetensors, weights, write_adapter

from router.adapters.base_model import BaseModel
from router.adapters.store import StoredAdapter, StoredFile
from router.adapters.validate import (
    AdapterRules,
    InvalidAdapterError,
    adapter_rules,
    check_files,
    check_listing,
)
from router.config import parse

MODULES = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "embed_tokens"})
RULES = AdapterRules(("org/tiny", "tiny"), rank_max=16, base=BaseModel(MODULES))

CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA is served"),
    ({"r": 0}, "r is 0; it must be a whole number above 0"),
    ({"r": "8"}, "r: Expected `int`, got `str`"),
    ({"r": None}, "r: Expected `int`, got `null`"),
    ({"rank_pattern": [1]}, "rank_pattern: Expected `object | null`, got `array`"),
    ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern[...]: Expected `int`, got `float`"),
    ({"r": 32}, "its rank is 32, but max_lora_rank is 16"),
    ({"rank_pattern": {"q_proj": 64}}, "its rank is 64, but max_lora_rank is 16"),
    (
        {"base_model_name_or_path": "org/other"},
        "base_model_name_or_path is 'org/other', but this model is 'org/tiny'; "
        "if it fits, add it to lora_config.accepted_base_models",
    ),
    ({"use_dora": True}, "use_dora is set"),
    ({"bias": "all"}, "bias is 'all'; only 'none' is served"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
    ({"target_modules": []}, "target_modules is []"),
    ({"target_modules": ["q_proj", "zz_proj"]}, "target_modules has 'zz_proj', which 'org/tiny'"),
]


@pytest.mark.parametrize(("changes", "message"), CONFIGS, ids=[text[:40] for _, text in CONFIGS])
def test_a_config_that_does_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_adapter(tmp_path, **changes)
    with pytest.raises(InvalidAdapterError) as error:
        check_files("x", tmp_path, RULES)
    assert str(error.value).startswith(f"adapter x: {message}")


TENSOR = {"model.layers.0.mlp.zz_proj.lora_A.weight": ((1, 1), b"\0\0\0\0")}
WEIGHTS: list[tuple[bytes, str]] = [
    (b"", "adapter_model.safetensors is not a safetensors file"),
    (b"\x80\x02}q\x00.", "adapter_model.safetensors is not a safetensors file"),
    (b"\xff" * 64, "adapter_model.safetensors is not a safetensors file"),
    (weights(0)[:-100], "adapter_model.safetensors has"),
    (weights(0) + b"more", "adapter_model.safetensors has"),
    (safetensors({}), "adapter_model.safetensors holds no tensors"),
    (safetensors(TENSOR), "target_modules has 'zz_proj'"),
]


@pytest.mark.parametrize(("data", "message"), WEIGHTS, ids=range(len(WEIGHTS)))
def test_weights_that_are_not_sound(tmp_path: Path, data: bytes, message: str) -> None:
    write_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(InvalidAdapterError) as error:
        check_files("x", tmp_path, RULES)
    assert str(error.value).startswith(f"adapter x: {message}")


@pytest.mark.parametrize("text", ["", "9" * 5000, "[]", "{", "\0", "[" * 100_000, "{}"])
def test_a_config_that_is_none(tmp_path: Path, text: str) -> None:
    write_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(InvalidAdapterError, match=r"adapter x: adapter_config\.json"):
        check_files("x", tmp_path, RULES)


def test_a_sound_adapter_passes_and_its_facts_are_told(tmp_path: Path) -> None:
    facts = check_files("x", write_adapter(tmp_path), RULES)
    assert facts.rank == 8
    assert facts.target_modules == ("k_proj", "o_proj", "q_proj", "v_proj")
    check_files("x", write_adapter(tmp_path, target_modules="all-linear"), RULES)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["adapter_config.json", "adapter_model.bin"],
            "'adapter_model.bin' is a pickle, which can run",
        ),
        (["adapter_config.json"], "adapter_model.safetensors is missing"),
    ],
)
def test_pickles_are_refused_unread(files: list[str], message: str) -> None:
    listed = StoredAdapter("x", "1", "1", tuple(StoredFile(name, 1, "") for name in files))
    with pytest.raises(InvalidAdapterError) as error:
        check_listing(listed, RULES)
    assert str(error.value).startswith(f"adapter x: {message}")


def test_the_rules_follow_from_the_configuration_and_the_model_folder(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"_name_or_path": "org/Original"}))
    matrix = ((2, 2), b"\0" * 16)
    (model / "model.safetensors").write_bytes(
        safetensors(
            {"model.layers.0.q_proj.weight": matrix, "model.norm.weight": ((2,), b"\0" * 8)}
        )
    )
    text = """llm_configs:
  - model_loading_config: {model_id: served, model_source: ./model}
    lora_config: {dynamic_lora_loading_path: ., accepted_base_models: [org/cousin]}
    engine_kwargs: {max_lora_rank: 64}
"""
    [llm] = parse(text, name="c", folder=tmp_path).llm_configs
    rules = adapter_rules(llm)
    assert rules.rank_max == 64
    assert rules.base.modules == frozenset({"q_proj"})
    assert set(rules.base_names) >= {str(model), "served", "org/Original", "org/cousin"}
    assert config()["base_model_name_or_path"] == "tiny"
