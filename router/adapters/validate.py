"""Whether an adapter fits its base model, found out from its files before an engine sees it.

A refusal names the field, what it is, and what is allowed. The rules are vLLM's own where it has
some (its `PEFTHelper`), so that what passes here loads there.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import msgspec

from router.adapters.store import CONFIG_FILE, WEIGHTS_FILE, StoredAdapter
from router.config import LLMConfig

HEADER_BYTES: Final = 8
HEADER_MAX_BYTES: Final = 100 * 2**20
CONFIG_MAX_BYTES: Final = 1 << 20
DEFAULT_RANK_MAX: Final = 16  # vLLM's own default of max_lora_rank
PICKLES: Final = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
MATRIX: Final = 2


class InvalidAdapterError(Exception):
    """The adapter cannot be served. The message is fit for the client to read."""


class AdapterRules(msgspec.Struct, frozen=True):
    """What the adapters of one base model must be.

    `modules` are the names of the base model's weight matrices, or None where its weights are not on
    this machine; then the engine has the last word on target modules.
    """

    base_names: tuple[str, ...]
    rank_max: int
    modules: frozenset[str] | None = None


class AdapterFacts(msgspec.Struct, frozen=True):
    """What a sound adapter is."""

    rank: int
    target_modules: tuple[str, ...]
    bytes: int


def adapter_rules(llm: LLMConfig) -> AdapterRules:
    """The rules that a configuration implies; reads the base model's head where it is local.

    Raises `InvalidAdapterError` where that cannot be read.
    """
    source = llm.model_loading_config.source
    names = {source: None, source.rstrip("/").rpartition("/")[2]: None, llm.model_id: None}
    folder = Path(source)
    config_path = folder / "config.json"
    modules: frozenset[str] | None = None
    if config_path.is_file():
        try:
            config = json.loads(config_path.read_text(encoding="utf-8"))
            name = config.get("_name_or_path")
        except (ValueError, AttributeError, OSError, RecursionError):
            raise InvalidAdapterError(f"{config_path} is no model's config.json") from None
        if isinstance(name, str):
            names[name] = None
        modules = frozenset(_matrices(folder.glob("*.safetensors"))) or None
    if llm.lora_config is not None:
        names |= dict.fromkeys(llm.lora_config.accepted_base_models)
    rank_max = int(llm.engine_kwargs.get("max_lora_rank", DEFAULT_RANK_MAX))
    return AdapterRules(tuple(names), rank_max, modules)


def check_listing(adapter: StoredAdapter) -> None:
    """Refuse from the list of files what need not be downloaded. Raises `InvalidAdapterError`."""
    if adapter.file(WEIGHTS_FILE) is not None:
        return
    pickles = [file.name for file in adapter.files if file.name.endswith(PICKLES)]
    if pickles:
        raise InvalidAdapterError(
            f"adapter {adapter.name}: {pickles[0]} is a pickle, which can run code; "
            f"only safetensors are served, save it as {WEIGHTS_FILE}"
        )
    raise InvalidAdapterError(f"adapter {adapter.name}: {WEIGHTS_FILE} is missing")


class PeftConfig(msgspec.Struct, frozen=True):
    """What matters of an `adapter_config.json`, with PEFT's names; other fields are let be."""

    r: int
    target_modules: list[str] | str
    peft_type: str = "LORA"
    base_model_name_or_path: str | None = None
    rank_pattern: dict[str, int] | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None
    use_dora: Any = None
    lora_bias: Any = None
    use_qalora: Any = None
    use_bdlora: Any = None
    alora_invocation_tokens: Any = None
    layer_replication: Any = None


UNSERVED: Final = (
    "use_dora", "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens",
    "layer_replication",
)  # fmt: skip


def check_files(name: str, folder: Path, rules: AdapterRules) -> AdapterFacts:
    """Check both files of a downloaded adapter. Raises `InvalidAdapterError`."""
    try:
        config = _read_config(folder / CONFIG_FILE)
        _check_config(config, rules)
        tensors = _read_header(folder / WEIGHTS_FILE)
    except InvalidAdapterError as error:
        raise InvalidAdapterError(f"adapter {name}: {error}") from None
    modules = tuple(sorted({_module(key): None for key in tensors}))
    named = config.target_modules if isinstance(config.target_modules, list) else []
    for module in (*modules, *(target.rpartition(".")[2] for target in named)):
        if rules.modules is not None and module not in rules.modules:
            raise InvalidAdapterError(
                f"adapter {name}: target_modules has {module!r}, which {rules.base_names[0]!r} "
                f"does not have; it has {', '.join(sorted(rules.modules))}"
            )
    return AdapterFacts(config.r, modules, (folder / WEIGHTS_FILE).stat().st_size)


def _check_config(config: PeftConfig, rules: AdapterRules) -> None:
    if config.peft_type != "LORA":
        raise InvalidAdapterError(f"peft_type is {config.peft_type!r}; only LORA is served")
    ranks = (config.r, *(config.rank_pattern or {}).values())
    if min(ranks) < 1:
        raise InvalidAdapterError(f"r is {min(ranks)}; it must be a whole number above 0")
    if max(ranks) > rules.rank_max:
        raise InvalidAdapterError(
            f"its rank is {max(ranks)}, but max_lora_rank is {rules.rank_max}"
        )
    base = config.base_model_name_or_path
    if base and not _is_base(base, rules.base_names):
        raise InvalidAdapterError(
            f"base_model_name_or_path is {base!r}, but this model is "
            f"{rules.base_names[0]!r}; if it fits, add it to lora_config.accepted_base_models"
        )
    for field in UNSERVED:
        if getattr(config, field):
            raise InvalidAdapterError(f"{field} is set; vLLM does not serve such adapters")
    if config.bias != "none":
        raise InvalidAdapterError(f"bias is {config.bias!r}; only 'none' is served")
    if config.modules_to_save:
        raise InvalidAdapterError(
            f"modules_to_save is {config.modules_to_save!r}; only LoRA weights are served"
        )
    if not config.target_modules:
        raise InvalidAdapterError(
            f"target_modules is {config.target_modules!r}; it must name modules"
        )


def _read_config(path: Path) -> PeftConfig:
    try:
        if path.stat().st_size > CONFIG_MAX_BYTES:
            raise InvalidAdapterError(f"{CONFIG_FILE} is larger than {CONFIG_MAX_BYTES:,} bytes")
        return msgspec.json.decode(path.read_bytes(), type=PeftConfig)
    except OSError as error:
        raise InvalidAdapterError(f"{CONFIG_FILE}: {error.strerror}") from None
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at ")
        field = where.strip("`").removeprefix("$.")
        raise InvalidAdapterError(f"{field or CONFIG_FILE}: {what}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidAdapterError(f"{CONFIG_FILE} is not valid JSON") from None


def _read_header(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file, by name; the file must be exactly as long as they say.

    The format: 8 bytes of little-endian length, that much JSON, then the data.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(HEADER_BYTES), "little")
            if not 0 < length <= HEADER_MAX_BYTES:
                raise InvalidAdapterError(f"{path.name} is not a safetensors file")
            header = msgspec.json.decode(file.read(length))
        size = path.stat().st_size
    except OSError as error:
        raise InvalidAdapterError(f"{path.name}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidAdapterError(f"{path.name} is not a safetensors file") from None
    if not isinstance(header, dict):
        raise InvalidAdapterError(f"{path.name} is not a safetensors file")
    header.pop("__metadata__", None)
    try:
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (TypeError, KeyError, IndexError, ValueError):
        raise InvalidAdapterError(f"{path.name} is not a safetensors file") from None
    if not header:
        raise InvalidAdapterError(f"{path.name} holds no tensors")
    if HEADER_BYTES + length + end != size:
        raise InvalidAdapterError(
            f"{path.name} has {size:,} bytes, its header says {HEADER_BYTES + length + end:,}"
        )
    return header


def _module(tensor: str) -> str:
    """`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` -> `q_proj`."""
    parts = tensor.split(".")
    for index, part in enumerate(parts):
        if part.startswith("lora_") and index:
            return parts[index - 1]
    return parts[-2] if len(parts) > 1 else tensor


def _matrices(files: Iterable[Path]) -> Iterable[str]:
    """The last names of all weight matrices in safetensors files."""
    for path in sorted(files):
        for tensor, entry in _read_header(path).items():
            if len(entry.get("shape", ())) == MATRIX and tensor.endswith(".weight"):
                yield tensor.split(".")[-2]


def _is_base(base: str, names: tuple[str, ...]) -> bool:
    last = base.rstrip("/").rpartition("/")[2].lower()
    return any(last == name.rstrip("/").rpartition("/")[2].lower() for name in names)
