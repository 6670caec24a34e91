"""`router check`: everything about a configuration that can be known without starting anything."""

import tempfile
from pathlib import Path

from rich.console import Console

from router.adapters.open import open_store
from router.adapters.pace import Deadline
from router.adapters.store import StoreError
from router.adapters.transfer import Downloads, reserve
from router.adapters.validate import (
    InvalidAdapterError,
    adapter_rules,
    check_files,
    check_listing,
)
from router.config import Config, LLMConfig, LoraConfig
from router.frontend.admin_key import AdminKey
from router.frontend.gate import key_file
from router.telemetry.record_file import check_path


class CheckError(Exception):
    """Something that the configuration names is not as it must be."""


def check(config: Config, console: Console) -> int:
    """Print what was found; return the exit status, 1 where an adapter would be refused.

    Raises `CheckError`, `ConfigError`, `RecordError` and `StoreError` for what would keep the router
    from starting.
    """
    refused = 0
    downloads = Downloads(config.router.download_connections, config.router.download_mib_per_s)
    for llm in config.llm_configs:
        _check_model(llm)
        scaling = llm.deployment_config
        console.print(
            f"{llm.model_id}: engine {llm.engine}, {llm.replicas} workers, "
            f"{scaling.max_ongoing_requests} requests each, {llm.slots} adapter slots each",
            highlight=False,
        )
        if llm.lora_config is not None:
            refused += _check_adapters(llm, llm.lora_config, downloads, console)
    if record := config.router.record:
        check_path(Path(record.path))
        prompts = "with" if record.prompts else "without"
        console.print(
            f"traffic is recorded into {record.path}, at most {record.max_mib:,} MiB, "
            f"{prompts} prompts",
            highlight=False,
        )
    admin_key = AdminKey.from_environment(config.router)
    if (keys := key_file(config.router)) is not None:
        listed = keys.read()
        if admin_key is not None:
            admin_key.check_clients(listed)
        console.print(f"{len(listed)} API keys in {keys.path}", highlight=False)
    console.print("ok" if not refused else f"{refused} adapters would be refused", highlight=False)
    return 1 if refused else 0


def _check_model(llm: LLMConfig) -> None:
    source = llm.model_loading_config.source
    if (
        llm.engine == "vllm"
        and source.startswith("/")
        and not (Path(source) / "config.json").is_file()
    ):
        raise CheckError(f"{llm.model_id}: model_source {source} has no config.json")


def _check_adapters(
    llm: LLMConfig, lora: LoraConfig, downloads: Downloads, console: Console
) -> int:
    store = open_store(lora.dynamic_lora_loading_path)
    names = list(store.list())
    console.print(f"  {len(names)} adapters in {lora.dynamic_lora_loading_path}", highlight=False)
    rules = adapter_rules(llm)
    refused = 0
    for name in names:
        try:
            adapter = store.find(name)
            if adapter is None:  # it left since it was listed
                continue
            check_listing(adapter, rules)
            with tempfile.TemporaryDirectory(prefix="lorayard-check-") as above:
                folder = Path(above) / name
                reserve(adapter, folder)
                deadline = Deadline(lora.download_timeout_s)
                downloads.fetch(store, adapter, folder, deadline, max_tries=lora.max_download_tries)
                facts = check_files(name, folder, rules)
        except (InvalidAdapterError, StoreError) as error:
            refused += 1
            console.print(f"  refused: {error}", style="red", highlight=False, markup=False)
        else:
            console.print(
                f"  {llm.model_id}:{name}  rank {facts.rank}, {facts.dtype}, "
                f"{facts.bytes / 1e6:.1f} MB, "
                f"{', '.join(facts.target_modules)}",
                highlight=False,
            )
    return refused
