"""Whether an adapter fits its base model, found out from its files before an engine sees it.

A refusal names the field, what it is, and what is allowed. The rules are vLLM's own where it has
some (peft.py, tensors.py), so that what passes here loads there; what is not known of the base model is
left to the engine (base_model.py). Files are read as they are: a link is none.
"""

import stat
from pathlib import Path
from typing import Final

import msgspec

from router.adapters.base_model import (
    UNKNOWN,
    BaseModel,
    BaseModelError,
    folder_of,
    read_base_model,
)
from router.adapters.invalid import InvalidAdapterError, shown
from router.adapters.peft import check_config, read_config
from router.adapters.safetensors import NotSafetensorsError, Tensor, read_header
from router.adapters.store import CONFIG_FILE, NEEDED, WEIGHTS_FILE, StoredAdapter
from router.adapters.tensors import EXPERTS, check_tensors, last_name, modules_of
from router.config import LLMConfig, LoraConfig

__all__ = [
    "AdapterFacts",
    "AdapterRules",
    "InvalidAdapterError",
    "adapter_rules",
    "check_files",
    "check_listing",
]

DEFAULT_RANK_MAX: Final = 16  # vLLM's own default of max_lora_rank
DEFAULT_BYTES_MAX: Final = LoraConfig("").max_adapter_mib * 2**20
HEAD_MAX_BYTES: Final = (
    32 * 2**20
)  # 200,000 tensors; an adapter of 256 experts in 60 layers has half
PICKLES: Final = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


class AdapterRules(msgspec.Struct, frozen=True):
    """What the adapters of one base model must be. The first of `base_names` is what it is called."""

    base_names: tuple[str, ...]
    rank_max: int
    base: BaseModel = UNKNOWN
    bytes_max: int = DEFAULT_BYTES_MAX


class AdapterFacts(msgspec.Struct, frozen=True):
    """What a sound adapter is.

    `rank` is its `r`, `target_modules` are the last names of the modules that it has weights for, and
    `bytes` is the length of its weights. `dtype` is theirs, by safetensors' name; of several, all.
    """

    rank: int
    target_modules: tuple[str, ...]
    bytes: int
    dtype: str = ""


def adapter_rules(llm: LLMConfig) -> AdapterRules:
    """The rules that a configuration implies; reads the base model's head where it is local.

    Raises `InvalidAdapterError` where that cannot be read.
    """
    source = llm.model_loading_config.source
    names = {source: None, source.rstrip("/").rpartition("/")[2]: None, llm.model_id: None}
    try:
        revision = str(llm.engine_kwargs.get("revision") or "main")
        base, name = read_base_model(folder_of(source, revision))
    except BaseModelError as error:
        raise InvalidAdapterError(str(error)) from None
    if name is not None:
        names[name] = None
    bytes_max = DEFAULT_BYTES_MAX
    if llm.lora_config is not None:
        names |= dict.fromkeys(llm.lora_config.accepted_base_models)
        bytes_max = llm.lora_config.max_adapter_mib * 2**20
    rank_max = int(llm.engine_kwargs.get("max_lora_rank", DEFAULT_RANK_MAX))
    return AdapterRules(tuple(names), rank_max, base, bytes_max)


def check_listing(adapter: StoredAdapter, rules: AdapterRules) -> None:
    """Refuse from the list of files what need not be downloaded. Raises `InvalidAdapterError`."""
    for file in adapter.files:
        if "/" in file.name or "\\" in file.name or file.name in {"", ".", ".."}:
            raise InvalidAdapterError(
                f"adapter {adapter.name}: {shown(file.name)} is no name of a file in its folder"
            )
    weights = adapter.file(WEIGHTS_FILE)
    if weights is not None:
        _check_size(f"adapter {adapter.name}: ", weights.size, rules)
        return
    pickles = [file.name for file in adapter.files if file.name.endswith(PICKLES)]
    if pickles:
        raise InvalidAdapterError(
            f"adapter {adapter.name}: {shown(pickles[0])} is a pickle, which can run code; "
            f"only safetensors are served, save it as {WEIGHTS_FILE}"
        )
    raise InvalidAdapterError(f"adapter {adapter.name}: {WEIGHTS_FILE} is missing")


def check_files(name: str, folder: Path, rules: AdapterRules) -> AdapterFacts:
    """Check both files of a downloaded adapter. Raises `InvalidAdapterError`, and nothing else."""
    try:
        return _checked(folder, rules)
    except (InvalidAdapterError, NotSafetensorsError) as error:
        raise InvalidAdapterError(f"adapter {name}: {error}") from None


def _checked(folder: Path, rules: AdapterRules) -> AdapterFacts:
    sizes = {file: _size_of(folder / file) for file in NEEDED}
    config = read_config(folder / CONFIG_FILE)
    check_config(config, base_names=rules.base_names, rank_max=rules.rank_max)
    _check_size("", sizes[WEIGHTS_FILE], rules)
    tensors = read_header(folder / WEIGHTS_FILE, head_max_bytes=HEAD_MAX_BYTES)
    if not tensors:
        raise InvalidAdapterError(f"{WEIGHTS_FILE} holds no tensors")
    modules = modules_of(tensors)
    targets = config.target_modules if isinstance(config.target_modules, list) else []
    base_name = rules.base_names[0]
    names = tuple(sorted({last_name(module) for module in modules}))
    if (known := rules.base.modules) is not None:
        for target in (*names, *map(last_name, targets)):
            if target not in known and target != EXPERTS:
                raise InvalidAdapterError(
                    f"target_modules has {shown(target)}, which {base_name!r} does not have; "
                    f"it has {', '.join(sorted(known))}"
                )
    check_tensors(modules, config, rules.base, base_name)
    return AdapterFacts(config.r, names, sizes[WEIGHTS_FILE], _dtypes(tensors))


def _size_of(path: Path) -> int:
    """A file's length. Raises `InvalidAdapterError` where it is not there, or is no plain file."""
    try:
        found = path.lstat()
    except OSError as error:
        raise InvalidAdapterError(f"{path.name}: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        what = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "no file"
        raise InvalidAdapterError(f"{path.name} is {what}; it must be a plain file")
    return found.st_size


def _check_size(before: str, size: int, rules: AdapterRules) -> None:
    if size > rules.bytes_max:
        raise InvalidAdapterError(
            f"{before}{WEIGHTS_FILE} has {size / 2**20:,.1f} MiB; lora_config.max_adapter_mib is "
            f"{rules.bytes_max // 2**20:,}"
        )


def _dtypes(tensors: dict[str, Tensor]) -> str:
    return ", ".join(sorted({tensor.dtype for tensor in tensors.values()}))
