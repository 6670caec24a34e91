"""The YAML configuration as structs. An error names its line of the file and what to write instead.

The fields of `llm_configs` are those that Ray Serve LLM users already have, with the same meaning.
Anything that is not known is an error: a misspelt key must not be a silent default.
"""

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec

from router.adapters.address import problem_with
from router.adapters.store import is_name
from router.core.policies import POLICIES
from router.core.quotas import Quota
from router.core.residency import Eviction
from router.document import ConfigError, Document, read_text

__all__ = [
    "AutoscalingConfig",
    "Config",
    "ConfigError",
    "DeploymentConfig",
    "LLMConfig",
    "LoraConfig",
    "ModelLoadingConfig",
    "RecordConfig",
    "RouterConfig",
    "TenantConfig",
    "load",
    "parse",
]

Positive = Annotated[int, msgspec.Meta(ge=1)]
Natural = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=1e9)]
CONNECTIONS: Final = 16
# What the stores' clients can hold open.
CONNECTIONS_MAX: Final = 64
# Of vLLM's arguments, those that must be whole numbers and that the simulator reads too.
ENGINE_INTEGERS: Final = (
    "max_loras", "max_cpu_loras", "max_lora_rank", "max_num_seqs", "max_num_batched_tokens",
    "max_model_len",
)  # fmt: skip
MODEL_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


class ModelLoadingConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The base model: the id that clients use, and where its weights are (a hub id or a folder)."""

    model_id: str
    model_source: str | None = None

    @property
    def source(self) -> str:
        """Where the weights are; the id itself where nothing else is said."""
        return self.model_source or self.model_id


class LoraConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Where adapters are and how many one worker holds.

    `dynamic_lora_loading_path` is a folder, or s3://, gs://, az://, https:// or hf://. A download may
    take `download_timeout_s` in all, and each of its parts may be tried `max_download_tries` times.
    `accepted_base_models` names further values of `base_model_name_or_path` that adapters may carry;
    `eviction` says which idle adapter leaves for another; `pinned_adapters` never do, and are loaded at
    the start, as `preload_adapters` are.
    `rollout_weight` is the share of requests that a new version of an adapter gets when it is ready: 1
    and it serves all, 0 and it waits for its promotion. One that serves and fails more often than all
    else is rolled back within its first `rollback_window_s`. One whose weights
    have more than `max_adapter_mib` is refused.
    """

    dynamic_lora_loading_path: str
    max_num_adapters_per_replica: Positive = 16
    download_timeout_s: Seconds = 30.0
    max_download_tries: Positive = 3
    accepted_base_models: tuple[str, ...] = ()
    eviction: Eviction = Eviction.LRU
    pinned_adapters: tuple[str, ...] = ()
    preload_adapters: tuple[str, ...] = ()
    rollout_weight: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0
    rollback_window_s: Seconds = 600.0
    max_adapter_mib: Positive = 2048


class AutoscalingConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How many workers there may be. The router starts `min_replicas` of them."""

    min_replicas: Positive = 1
    max_replicas: Positive = 1


class DeploymentConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One worker's overload threshold, and the number of workers."""

    max_ongoing_requests: Positive = 64
    autoscaling_config: AutoscalingConfig = AutoscalingConfig()


class LLMConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One base model, its adapters and its workers.

    `calibration` names the latency model of the simulator and of the emulated engine: one of
    `sim/calibrations`, or a file.
    """

    model_loading_config: ModelLoadingConfig
    lora_config: LoraConfig | None = None
    engine_kwargs: dict[str, Any] = {}
    deployment_config: DeploymentConfig = DeploymentConfig()
    accelerator_type: str | None = None
    engine: Literal["vllm", "emulated", "attached"] = "vllm"
    attach: tuple[str, ...] = ()
    calibration: str | None = None

    @property
    def model_id(self) -> str:
        """The id of the base model."""
        return self.model_loading_config.model_id

    @property
    def slots(self) -> int:
        """How many adapters one worker holds; 0 without `lora_config`."""
        return self.lora_config.max_num_adapters_per_replica if self.lora_config else 0

    @property
    def eviction(self) -> Eviction:
        """Which idle adapter leaves a worker for another."""
        return self.lora_config.eviction if self.lora_config else Eviction.LRU

    @property
    def pinned(self) -> tuple[str, ...]:
        """Adapters that are loaded at the start and never evicted."""
        return self.lora_config.pinned_adapters if self.lora_config else ()

    @property
    def replicas(self) -> int:
        """How many workers are started, or attached."""
        if self.engine == "attached":
            return len(self.attach)
        return self.deployment_config.autoscaling_config.min_replicas

    def engine_arguments(self) -> dict[str, Any]:
        """`engine_kwargs`, with what `lora_config` implies filled in where it was left out."""
        if self.lora_config is None:
            return dict(self.engine_kwargs)
        return {"enable_lora": True, "max_loras": self.slots, **self.engine_kwargs}


class RecordConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The recording of traffic as a trace, into the file `path`.

    `max_mib` is how large the file may grow; `window_s` how long a row waits for requests that came
    before it, and so the most that a `kill -9` loses; `buffer_mib` what rows may take in memory.
    With `prompts` each row carries the request's body.
    """

    path: Annotated[str, msgspec.Meta(min_length=1)]
    max_mib: Positive = 256
    buffer_mib: Positive = 16
    window_s: Seconds = 120.0
    prompts: bool = False


class TenantConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A tenant: its share under contention, and what it may use a minute (None: no limit).

    `priority` is that of its requests where they carry none; less is more urgent.
    """

    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    weight: Annotated[float, msgspec.Meta(gt=0, le=1e6)] = 1.0
    requests_per_minute: Annotated[float, msgspec.Meta(gt=0)] | None = None
    tokens_per_minute: Annotated[float, msgspec.Meta(gt=0)] | None = None
    priority: Annotated[int, msgspec.Meta(ge=-3, le=3)] = 0


class RouterConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The router process itself. Every bound it keeps is here.

    `processes` is how many of them there are, at one port; each has an equal share of the quotas and of
    `max_queued_requests`, and a recording of its own. `first_byte_timeout_s` is how long a worker may
    take to begin its answer, `idle_timeout_s` how long it may pause within one; `drain_timeout_s` how
    long running requests may take at shutdown. Who has waited for an adapter's slot for
    `slot_patience_s` gets one that is freed for it; `locality_tokens` is how far a request may overtake
    because its adapter is at hand (the policy's own unless given). `ttft_deadline_s` is the latest time
    to the first token that is of use: what would miss it is turned away, so that the others do not.
    `tenants` are named by the header `x-tenant`; a name that is not listed is none. `explain_sample` is
    the share of decisions that are logged with their reasons. `download_connections` is how many parts
    of adapters are downloaded at once, and `download_mib_per_s` how fast all together (None: no limit).
    `cache_max_gib` is what adapters may take on disk, all base models together (None: no bound); the
    least recently used go. Requests need a key if `api_keys_file` names a file of keys (see keys.py),
    which is read again when it changes, or the environment variable that `api_keys_env` names holds
    some, separated by commas; those may use everything. Administration, `/admin/v1`, is there if the
    variable that `admin_key_env` names holds a key of its own.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 8000
    processes: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    policy: str = "cost"
    max_queued_requests: Natural = 1024
    queue_timeout_s: Seconds = 60.0
    slot_patience_s: Seconds = 1.0
    locality_tokens: Annotated[float, msgspec.Meta(ge=0)] | None = None
    ttft_deadline_s: Seconds | None = None
    tenants: tuple[TenantConfig, ...] = ()
    explain_sample: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    max_retries: Natural = 1
    max_body_bytes: Positive = 32 * 2**20
    first_byte_timeout_s: Seconds = 600.0
    idle_timeout_s: Seconds = 120.0
    boot_timeout_s: Seconds = 900.0
    drain_timeout_s: Seconds = 30.0
    store_refresh_s: Seconds = 30.0
    download_connections: Annotated[int, msgspec.Meta(ge=1, le=CONNECTIONS_MAX)] = CONNECTIONS
    download_mib_per_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    cache_dir: str | None = None
    cache_max_gib: Annotated[float, msgspec.Meta(gt=0)] | None = None
    log_dir: str | None = None
    api_keys_env: str = "LORAYARD_API_KEYS"
    api_keys_file: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    admin_key_env: str = "LORAYARD_ADMIN_KEY"
    seed: int | None = None
    record: RecordConfig | None = None

    @property
    def weights(self) -> dict[str, float]:
        """The tenants' shares."""
        return {tenant.name: tenant.weight for tenant in self.tenants}

    @property
    def quotas(self) -> dict[str, Quota]:
        """The tenants' limits."""
        return {
            tenant.name: Quota(tenant.requests_per_minute, tenant.tokens_per_minute)
            for tenant in self.tenants
        }


class Config(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The whole file."""

    llm_configs: Annotated[tuple[LLMConfig, ...], msgspec.Meta(min_length=1)]
    router: RouterConfig = RouterConfig()


_STRUCTS: Final[dict[str, type[msgspec.Struct]]] = {
    "$": Config,
    "$.router": RouterConfig,
    "$.router.record": RecordConfig,
    "$.router.tenants[]": TenantConfig,
    "$.llm_configs[]": LLMConfig,
    "$.llm_configs[].model_loading_config": ModelLoadingConfig,
    "$.llm_configs[].lora_config": LoraConfig,
    "$.llm_configs[].deployment_config": DeploymentConfig,
    "$.llm_configs[].deployment_config.autoscaling_config": AutoscalingConfig,
}


# The fields that take one word of a few.
_CHOICES: Final[dict[str, tuple[str, ...]]] = {
    "engine": ("vllm", "emulated", "attached"),
    "eviction": tuple(one.value for one in Eviction),
}


def load(path: Path) -> Config:
    """Read and check a configuration file. Raises `ConfigError`."""
    text = read_text(path, "configs/quickstart.yaml")
    return parse(text, name=str(path), folder=path.absolute().parent)


def parse(text: str, *, name: str, folder: Path) -> Config:
    """Check a configuration text; relative folders in it are taken from `folder`."""
    lines = Document(text, name, top="llm_configs")
    config = lines.convert(Config, _STRUCTS, _CHOICES)
    for index, llm in enumerate(config.llm_configs):
        _check(llm, f"$.llm_configs[{index}]", lines)
    _check_router(config, lines)
    return _resolve(config, folder, lines)


def _check(llm: LLMConfig, path: str, lines: Document) -> None:
    scaling = llm.deployment_config.autoscaling_config
    if scaling.min_replicas > scaling.max_replicas:
        raise lines.error(
            f"min_replicas is {scaling.min_replicas}, more than max_replicas, which is "
            f"{scaling.max_replicas}; raise max_replicas or lower min_replicas",
            f"{path}.deployment_config.autoscaling_config.min_replicas",
        )
    if not MODEL_ID.fullmatch(llm.model_id):
        raise lines.error(
            f"model_id: `{llm.model_id}` cannot be a model id; use letters, digits, and . _ - / "
            "(a colon separates the base model from the adapter)",
            f"{path}.model_loading_config.model_id",
        )
    if (llm.engine == "attached") != bool(llm.attach):
        raise lines.error(
            "`engine: attached` needs a list of URLs in `attach`"
            if llm.engine == "attached"
            else f"`attach` is for `engine: attached`; this says `engine: {llm.engine}`",
            f"{path}.attach" if llm.attach else f"{path}.engine",
        )
    for index, url in enumerate(llm.attach):
        if not re.match(r"^(https?://[^/\s@]+|unix:/\S+)/?$", url):
            raise lines.error(
                f"`{url}` is no address of a worker; write http://HOST:PORT or unix:/PATH",
                f"{path}.attach[{index}]",
            )
    _check_engine(llm, path, lines)


def _shown(value: object) -> str:
    """A value as it stands in the file, about."""
    return msgspec.json.encode(value, enc_hook=str).decode()


def _check_engine(llm: LLMConfig, path: str, lines: Document) -> None:
    kwargs, slots = llm.engine_kwargs, llm.slots
    for name in ENGINE_INTEGERS:
        if type(value := kwargs.get(name, 1)) is not int or value < 1:
            raise lines.error(
                f"{name} is {_shown(value)}; write a whole number above 0",
                f"{path}.engine_kwargs.{name}",
            )
    if llm.lora_config is None:
        if kwargs.get("enable_lora"):
            raise lines.error(
                "enable_lora is set, but there is no `lora_config`; add one with a "
                "`dynamic_lora_loading_path`, or remove enable_lora",
                f"{path}.engine_kwargs.enable_lora",
            )
        return
    if kwargs.get("enable_lora", True) is not True:
        raise lines.error(
            f"enable_lora is {_shown(kwargs['enable_lora'])}, but there is a `lora_config`; "
            "write true, or remove one of them",
            f"{path}.engine_kwargs.enable_lora",
        )
    if kwargs.get("max_loras", slots) != slots:
        raise lines.error(
            f"max_loras is {kwargs['max_loras']}, but lora_config.max_num_adapters_per_replica is "
            f"{slots}; write `max_loras: {slots}`, or leave it out",
            f"{path}.engine_kwargs.max_loras",
        )
    if len(set(llm.pinned)) >= slots and llm.pinned:
        raise lines.error(
            f"{len(set(llm.pinned))} pinned_adapters leave none of the {slots} slots for others; pin "
            f"at most {slots - 1}, or raise max_num_adapters_per_replica",
            f"{path}.lora_config.pinned_adapters",
        )
    _check_preloaded(llm, llm.lora_config, path, lines)
    store = llm.lora_config.dynamic_lora_loading_path
    where = f"{path}.lora_config.dynamic_lora_loading_path"
    if problem := problem_with(store):
        raise lines.error(problem, where)


def _check_preloaded(llm: LLMConfig, lora: LoraConfig, path: str, lines: Document) -> None:
    for field in ("pinned_adapters", "preload_adapters"):
        for index, name in enumerate(getattr(lora, field)):
            if not is_name(name):
                raise lines.error(
                    f"`{name}` can be no adapter's name; write it without its base model, in letters, "
                    "digits, and . _ -",
                    f"{path}.lora_config.{field}[{index}]",
                )
    # More would drive each other out again, one load after the other.
    wanted = len({*lora.pinned_adapters, *lora.preload_adapters})
    room = llm.slots * llm.replicas
    if wanted > room and lora.preload_adapters:
        raise lines.error(
            f"{wanted} adapters are to be pinned or preloaded, but all workers have {room} slots; "
            "name fewer, or raise max_num_adapters_per_replica or min_replicas",
            f"{path}.lora_config.preload_adapters",
        )


def _check_router(config: Config, lines: Document) -> None:
    seen: dict[str, int] = {}
    for index, llm in enumerate(config.llm_configs):
        if llm.model_id in seen:
            raise lines.error(
                f"model_id `{llm.model_id}` is taken by llm_configs[{seen[llm.model_id]}]; "
                "give this one another id",
                f"$.llm_configs[{index}].model_loading_config.model_id",
            )
        seen[llm.model_id] = index
    names: dict[str, int] = {}
    for index, tenant in enumerate(config.router.tenants):
        if tenant.name in names:
            raise lines.error(
                f"tenant `{tenant.name}` stands here twice (first as tenants[{names[tenant.name]}]); "
                "remove one",
                f"$.router.tenants[{index}].name",
            )
        names[tenant.name] = index
    if config.router.policy not in POLICIES:
        close = difflib.get_close_matches(config.router.policy, POLICIES, n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"known: {', '.join(sorted(POLICIES))}"
        raise lines.error(f"no policy `{config.router.policy}`; {hint}", "$.router.policy")


def _resolve(config: Config, folder: Path, lines: Document) -> Config:
    """Take relative folders from where the file is, so that it works from any directory."""
    try:
        return _resolved(config, folder)
    except (ValueError, RuntimeError, OSError) as error:  # a NUL, a user that is not there
        raise lines.error(f"a path cannot be used: {error}") from None


def _resolved(config: Config, folder: Path) -> Config:
    models = []
    for llm in config.llm_configs:
        loading, lora = llm.model_loading_config, llm.lora_config
        if loading.model_source and loading.model_source.startswith(("./", "../", "~", "/")):
            source = str(_absolute(loading.model_source, folder))
            loading = msgspec.structs.replace(loading, model_source=source)
        if lora and "://" not in lora.dynamic_lora_loading_path:
            path = str(_absolute(lora.dynamic_lora_loading_path, folder))
            lora = msgspec.structs.replace(lora, dynamic_lora_loading_path=path)
        calibration = llm.calibration
        if calibration and calibration.endswith(".json"):
            calibration = str(_absolute(calibration, folder))
        models.append(
            msgspec.structs.replace(
                llm, model_loading_config=loading, lora_config=lora, calibration=calibration
            )
        )
    router = config.router
    for name in ("cache_dir", "log_dir", "api_keys_file"):
        if value := getattr(router, name):
            router = msgspec.structs.replace(router, **{name: str(_absolute(value, folder))})
    if record := router.record:
        path = str(_absolute(record.path, folder))
        router = msgspec.structs.replace(router, record=msgspec.structs.replace(record, path=path))
    return msgspec.structs.replace(config, llm_configs=tuple(models), router=router)


def _absolute(path: str, folder: Path) -> Path:
    """Through no link yet: where one leads may change while the router runs, as of mounted secrets."""
    if "\0" in path:
        raise ValueError("it holds a NUL")
    return Path(os.path.abspath(folder / Path(path).expanduser()))  # noqa: PTH100  (resolves none)
