"""An adapter's own configuration, `adapter_config.json`, with PEFT's names and under vLLM's rules.

What vLLM's `PEFTHelper` refuses is refused here, in words that name the field; what it does not look at
is let be.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import msgspec

from router.adapters.invalid import InvalidAdapterError, shown
from router.adapters.store import CONFIG_FILE

CONFIG_MAX_BYTES: Final = 1 << 20
UNSERVED: Final = (
    "use_dora", "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens",
    "layer_replication",
)  # fmt: skip
# Of ways to begin training: those that leave the base model's weights as they are.
PLAIN_INITS: Final = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
ALPHA_MAX: Final = 1e9
EXPRESSIONS_MAX: Final = 256
EXPRESSION_MAX_LETTERS: Final = 512
LITERAL: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-")


class PeftConfig(msgspec.Struct, frozen=True):
    """What matters of an `adapter_config.json`; other fields are let be."""

    r: int
    lora_alpha: int | float
    target_modules: list[str] | str
    peft_type: str = "LORA"
    base_model_name_or_path: str | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, int | float] | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_lora_weights: Any = True
    use_dora: Any = None
    lora_bias: Any = None
    use_qalora: Any = None
    use_bdlora: Any = None
    alora_invocation_tokens: Any = None
    layer_replication: Any = None


def read_config(path: Path) -> PeftConfig:
    """Read the file. Raises `InvalidAdapterError`."""
    try:
        if path.stat().st_size > CONFIG_MAX_BYTES:
            raise InvalidAdapterError(f"{CONFIG_FILE} is larger than {CONFIG_MAX_BYTES:,} bytes")
        # By the parser that vLLM takes, so that neither reads what the other does not.
        return msgspec.convert(json.loads(path.read_bytes().decode()), PeftConfig)
    except OSError as error:
        raise InvalidAdapterError(f"{CONFIG_FILE}: {error.strerror}") from None
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at ")
        field = where.strip("`").removeprefix("$.").removeprefix("$")
        raise InvalidAdapterError(f"{field or CONFIG_FILE}: {what}") from None
    except (ValueError, RecursionError):
        raise InvalidAdapterError(f"{CONFIG_FILE} is not valid JSON") from None


def check_config(config: PeftConfig, *, base_names: tuple[str, ...], rank_max: int) -> None:
    """Refuse what vLLM does not serve, and what is for another base. Raises `InvalidAdapterError`."""
    if config.peft_type != "LORA":
        raise InvalidAdapterError(f"peft_type is {shown(config.peft_type)}; only LORA is served")
    _check_numbers(config, rank_max)
    base = config.base_model_name_or_path
    if base and not _is_base(base, base_names):
        raise InvalidAdapterError(
            f"base_model_name_or_path is {shown(base)}, but this model is "
            f"{base_names[0]!r}; if it fits, add it to lora_config.accepted_base_models"
        )
    _check_features(config)
    if not config.target_modules:
        raise InvalidAdapterError(
            f"target_modules is {config.target_modules!r}; it must name modules"
        )


def _check_numbers(config: PeftConfig, rank_max: int) -> None:
    """Ranks and scales, and what they are for."""
    ranks = (config.r, *(config.rank_pattern or {}).values())
    if min(ranks) < 1:
        raise InvalidAdapterError(f"r is {shown(min(ranks))}; it must be a whole number above 0")
    if max(ranks) > rank_max:
        raise InvalidAdapterError(
            f"its rank is {shown(max(ranks))}, but max_lora_rank is {rank_max}"
        )
    for field, alphas in (
        ("lora_alpha", [config.lora_alpha]),
        ("alpha_pattern", (config.alpha_pattern or {}).values()),
    ):
        for alpha in alphas:
            if not abs(alpha) <= ALPHA_MAX:  # nor is it for one that is no number
                raise InvalidAdapterError(
                    f"{field} is {shown(alpha)}; at most {ALPHA_MAX:,.0f} is allowed"
                )
    _check_expressions("rank_pattern", config.rank_pattern or {})
    _check_expressions("alpha_pattern", config.alpha_pattern or {})


def _check_features(config: PeftConfig) -> None:
    for field in UNSERVED:
        if getattr(config, field):
            raise InvalidAdapterError(f"{field} is set; vLLM does not serve such adapters")
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower() not in PLAIN_INITS:
        raise InvalidAdapterError(
            f"init_lora_weights is {shown(init)}, which changes the base model's weights; allowed are "
            f"true, false, {', '.join(PLAIN_INITS)}: convert it with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    if config.bias != "none":
        raise InvalidAdapterError(f"bias is {shown(config.bias)}; only 'none' is served")
    if config.modules_to_save:
        raise InvalidAdapterError(
            f"modules_to_save is {shown(config.modules_to_save)}; only LoRA weights are served"
        )


def _check_expressions(field: str, keys: Iterable[str]) -> None:
    """Refuse what is no regular expression. They are only compiled, and never run."""
    expressions = [key for key in keys if not LITERAL.issuperset(key)]
    if len(expressions) > EXPRESSIONS_MAX:
        raise InvalidAdapterError(
            f"{field} has {len(expressions):,} regular expressions; at most {EXPRESSIONS_MAX} are "
            "allowed"
        )
    for key in expressions:
        try:
            if len(key) > EXPRESSION_MAX_LETTERS:
                raise InvalidAdapterError(
                    f"{field} has {shown(key)}, of {len(key):,} letters; at most "
                    f"{EXPRESSION_MAX_LETTERS} are allowed"
                )
            re.compile(f"({key})$")
        except (
            re.error,
            RecursionError,
            OverflowError,
            Warning,
        ) as error:  # some run with -W error
            raise InvalidAdapterError(
                f"{field} has {shown(key)}, which is no regular expression: {shown(str(error))}"
            ) from None


def _is_base(base: str, names: tuple[str, ...]) -> bool:
    last = base.rstrip("/").rpartition("/")[2].lower()
    return any(last == name.rstrip("/").rpartition("/")[2].lower() for name in names)


class Ranks:
    """Which rank a module has, by `r` and `rank_pattern`.

    The keys of `rank_pattern` are regular expressions, matched at the end of a module's name, and the
    first that matches counts. They are an adapter's own words, and are not run here: one that is more
    than a name may or may not match, so its rank is one of those that are allowed.
    """

    def __init__(self, config: PeftConfig) -> None:
        self._usual = config.r
        self._named: dict[str, tuple[int, int]] = {}
        self._others: list[tuple[int, int]] = []
        for index, (key, rank) in enumerate((config.rank_pattern or {}).items()):
            if LITERAL.issuperset(key):
                self._named[key] = (index, rank)
            else:
                self._others.append((index, rank))

    def of(self, module: str) -> frozenset[int]:
        """The ranks that a module of that name may have."""
        found = []
        ending = module
        while ending:
            if ending in self._named:
                found.append(self._named[ending])
            ending = ending.partition(".")[2]
        index, rank = min(found, default=(len(self._named) + len(self._others), self._usual))
        return frozenset({rank, *(other for at, other in self._others if at < index)})
