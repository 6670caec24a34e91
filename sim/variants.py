"""Vary a configuration: `--vary PATH=VALUES` as axes, each choice of values as a checked `Config`.

A value is set in the YAML document, before it is checked, so that a bad one gets the configuration's
own words and nothing can be simulated that `router serve` would refuse. A path is looked up first:
what nobody reads would otherwise be a sweep whose points are all alike.

`PATH` is an option of the replay (`workers`, `policy`, ...), a shorthand (`slots`, `threshold`), a
field of every entry of `llm_configs`, or `router.FIELD`. `VALUES` are separated by commas; each is a
YAML scalar or a range, `2..16` or `0.5..2:0.5`, both ends included.
"""

import copy
import difflib
import itertools
import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, TypeAlias

import msgspec
import yaml

from router.config import Config, ConfigError, LLMConfig, RouterConfig, load, parse
from router.core.policies import POLICIES
from sim.engine import EngineLimits
from sim.replay import Options

Value: TypeAlias = str | int | float | bool | None
Choice: TypeAlias = tuple[tuple[str, Value], ...]

VALUES_MAX: Final = 1_000  # of one axis
POINTS_MAX: Final = 10_000  # of the whole grid
RANGE: Final = re.compile(
    r"(?P<first>-?\d+(?:\.\d+)?)\.\.(?P<last>-?\d+(?:\.\d+)?)(?::(?P<step>\d+(?:\.\d+)?))?"
)


class _Limits(msgspec.Struct, frozen=True):
    kind: type
    least: float
    most: float


# Options of the replay, which are no part of the configuration: their kind and bounds.
OPTIONS: Final[dict[str, _Limits]] = {
    "workers": _Limits(int, 1, 100_000),
    "adapters": _Limits(int, 0, 10_000_000),
    "speed": _Limits(float, 1e-6, 1e6),
    "locality": _Limits(float, 0, 1),
    "zipf": _Limits(float, 0, 100),
}
SLOTS_PATHS: Final = ("lora_config.max_num_adapters_per_replica", "engine_kwargs.max_loras")
THRESHOLD_PATH: Final = "deployment_config.max_ongoing_requests"
# What a simulation reads of a configuration, beside engine_kwargs. All else would vary nothing.
READ: Final = (
    *SLOTS_PATHS[:1],
    THRESHOLD_PATH,
    "deployment_config.autoscaling_config.min_replicas",
    "calibration",
    "router.policy",
    "router.max_queued_requests",
    "router.queue_timeout_s",
    "router.slot_patience_s",
    "router.locality_tokens",
    "router.ttft_deadline_s",
    "lora_config.eviction",
)
SHORTHANDS: Final[dict[str, tuple[str, ...]]] = {
    "slots": SLOTS_PATHS,
    "threshold": (THRESHOLD_PATH,),
}


class Axis(msgspec.Struct, frozen=True):
    """One thing that varies, and its values in the order in which they were given."""

    path: str
    values: tuple[Value, ...]


# From text to axes.


def parse_axis(text: str) -> Axis:
    """Read one `PATH=VALUES`. Raises `ConfigError`."""
    path, equals, rest = text.partition("=")
    path = "policy" if path.strip() == "router.policy" else path.strip()
    if not equals or not path or not rest.strip():
        raise ConfigError(
            f"--vary {text}: write PATH=VALUES, such as workers=2..16 or slots=4,8,16"
        )
    _check_path(path)
    values: list[Value] = []
    for part in rest.split(","):
        values.extend(_values(path, part.strip()))
        if len(values) > VALUES_MAX:
            raise ConfigError(f"--vary {path}: more than {VALUES_MAX:,} values; use larger steps")
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ConfigError(f"--vary {path}: {_shown(value)} stands there twice; remove one")
        check_option(path, value)
    return Axis(path, tuple(values))


def parse_axes(texts: Sequence[str]) -> tuple[Axis, ...]:
    """Read all `--vary`. Raises `ConfigError`, also where the grid would be too large."""
    axes = tuple(parse_axis(text) for text in texts)
    seen: dict[str, str] = {}
    points = 1
    for axis in axes:
        for target in SHORTHANDS.get(axis.path, (axis.path,)):
            if target in seen:
                raise ConfigError(
                    f"--vary {axis.path}: {target} is varied by --vary {seen[target]} already; "
                    "give all its values at once"
                )
            seen[target] = axis.path
        points *= len(axis.values)
    if points > POINTS_MAX:
        raise ConfigError(
            f"--vary: {points:,} points are more than {POINTS_MAX:,}; vary less at once"
        )
    return axes


def grid(axes: Sequence[Axis]) -> Iterator[Choice]:
    """Every point, the last axis changing fastest. Without axes there is one point, as it is."""
    for values in itertools.product(*(axis.values for axis in axes)):
        yield tuple((axis.path, value) for axis, value in zip(axes, values, strict=True))


def _values(path: str, part: str) -> list[Value]:
    if found := RANGE.fullmatch(part):
        return _range(path, part, found)
    if ".." in part:
        raise ConfigError(f"--vary {path}: {part} is no range; write 2..16, or 2..16:2 with a step")
    try:
        value = yaml.safe_load(part) if part else ""
    except yaml.YAMLError:
        value = [part]
    if part == "" or not isinstance(value, str | int | float | bool | None):
        raise ConfigError(
            f"--vary {path}: `{part}` is not one value; write values separated by commas"
        )
    return [value]


def _range(path: str, part: str, found: re.Match[str]) -> list[Value]:
    # Decimal, so that 0.1..0.3:0.1 has the values that it says.
    first, last = Decimal(found["first"]), Decimal(found["last"])
    step = Decimal(found["step"] or 1)
    if step <= 0:
        raise ConfigError(f"--vary {path}: {part}: a step is above 0")
    if first > last:
        raise ConfigError(f"--vary {path}: {part} goes down; write {last}..{first}")
    count = int((last - first) / step) + 1
    if count > VALUES_MAX:
        raise ConfigError(f"--vary {path}: more than {VALUES_MAX:,} values; use larger steps")
    whole = all("." not in (found[name] or "") for name in ("first", "last", "step"))
    numbers = [first + step * index for index in range(count)]
    return [int(number) if whole else float(number) for number in numbers]


def _shown(value: Value) -> str:
    return "null" if value is None else str(value)


# What a path may be.


def check_option(path: str, value: Value) -> None:
    """Refuse a value that an option of the replay cannot have. Raises `ConfigError`."""
    if path == "policy" and value not in POLICIES:
        raise ConfigError(f"no policy `{_shown(value)}`; {_hint(_shown(value), sorted(POLICIES))}")
    limits = OPTIONS.get(path)
    if limits is None:
        return
    kinds = (int,) if limits.kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        kind = "a whole number" if limits.kind is int else "a number"
        raise ConfigError(f"--vary {path}: {_shown(value)} is not {kind}")
    if not limits.least <= value <= limits.most:
        raise ConfigError(
            f"--vary {path}: {value} is not between {limits.least:g} and {limits.most:g}"
        )


def _check_path(path: str) -> None:
    if path == "policy" or path in OPTIONS or path in SHORTHANDS:
        return
    first, *rest = path.split(".")
    top = ["policy", *OPTIONS, *SHORTHANDS, "router", *LLMConfig.__struct_fields__]
    if first == "router":
        _descend(path, "router", RouterConfig, rest)
    elif first in LLMConfig.__struct_fields__:
        _descend(path, "", LLMConfig, [first, *rest])
    else:
        # A field that was named without what it stands in is the commonest slip.
        whole = [known for known in _paths() if known.endswith(f".{path}")]
        raise _unknown(path, whole[0] if whole else None, first, top)
    if path not in READ and first != "engine_kwargs":
        raise ConfigError(
            f"--vary {path}: a simulation does not read it, so it would vary nothing; it reads "
            f"{', '.join(READ)} and engine_kwargs"
        )


def _descend(path: str, at: str, struct: type[msgspec.Struct], names: list[str]) -> None:
    """Follow `names` down the structs of the configuration to a value that can be set."""
    if not names:
        raise _unknown(path, None, "", struct.__struct_fields__, at)
    name, *rest = names
    fields = {field.name: field.type for field in msgspec.structs.fields(struct)}
    if name not in fields:
        raise _unknown(path, None, name, tuple(fields), at)
    below = f"{at}.{name}" if at else name
    if name == "engine_kwargs":
        known = EngineLimits.__struct_fields__
        if len(rest) != 1 or rest[0] not in known:
            raise _unknown(path, None, rest[0] if rest else "", known, below)
    elif (inner := _struct_in(fields[name])) is not None:
        _descend(path, below, inner, rest)
    elif rest:
        raise ConfigError(f"--vary {path}: {below} is one value; nothing stands below it")


def _struct_in(kind: Any) -> type[msgspec.Struct] | None:  # noqa: ANN401  (a type, or a union)
    for part in getattr(kind, "__args__", (kind,)):
        if isinstance(part, type) and issubclass(part, msgspec.Struct):
            return part
    return None


def _paths() -> list[str]:
    """Every path that ends in a value."""
    found = [f"engine_kwargs.{name}" for name in EngineLimits.__struct_fields__]

    def walk(struct: type[msgspec.Struct], at: str) -> None:
        for field in msgspec.structs.fields(struct):
            inner = _struct_in(field.type)
            if inner is not None:
                walk(inner, f"{at}{field.name}.")
            elif field.name != "engine_kwargs":
                found.append(at + field.name)

    walk(LLMConfig, "")
    walk(RouterConfig, "router.")
    return found


def _unknown(
    path: str, whole: str | None, word: str, known: Sequence[str], at: str = ""
) -> ConfigError:
    prefix = f"{at}." if at else ""
    if whole is not None:
        return ConfigError(f"--vary {path}: no such path; did you mean `{whole}`?")
    where = f" in {at}" if at else ""
    what = f"there is no `{word}`{where}" if word else f"name what is to vary{where}"
    return ConfigError(f"--vary {path}: {what}; {_hint(word, known, prefix)}")


def _hint(word: str, known: Sequence[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean `{prefix}{close[0]}`?"
    return f"known: {', '.join(known)}"


# From a choice to what a replay is given.


class Base:
    """A configuration file, and the configurations that differ from it by a choice of values."""

    def __init__(self, path: Path) -> None:
        self.config = load(path)
        self._folder = path.resolve().parent
        self._data: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))

    def variant(self, choice: Choice, options: Options) -> tuple[Config, Options]:
        """The configuration and the options at a choice of values. Raises `ConfigError`."""
        changes = {path: value for path, value in choice if path in OPTIONS or path == "policy"}
        options = msgspec.structs.replace(options, **changes)  # `check_option` saw them
        if len(changes) == len(choice):
            return self.config, options
        text = self.text(choice)
        name = ", ".join(f"{path}={_shown(value)}" for path, value in choice if path not in changes)
        try:
            return parse(text, name=name, folder=self._folder), options
        except ConfigError as error:
            # The line is one of a text that the user has never seen.
            message = re.sub(rf"^{re.escape(name)}:\d+: ", "", str(error))
            raise ConfigError(f"--vary {name}: {message}{_slots_hint(choice)}") from None

    def text(self, choice: Choice) -> str:
        """The YAML of the whole configuration with a choice set in it, `workers` and `policy` too."""
        data = copy.deepcopy(self._data)
        for path, value in choice:
            if path == "workers":
                _set_workers(data["llm_configs"], value)
            elif path == "policy":
                _set(data, "router.policy", value)
            elif path.startswith("router."):
                _set(data, path, value)
            elif path not in OPTIONS:
                for llm in data["llm_configs"]:
                    _set_model(llm, path, value)
        return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Dumper(yaml.SafeDumper):
    """Writes a value that stands in two places twice, and short mappings on one line."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ANN401, ARG002  (PyYAML's signature)
        return True


def _set(data: dict[str, Any], path: str, value: Value) -> None:
    *above, last = path.split(".")
    for name in above:
        if not isinstance(data.get(name), dict):
            data[name] = {}
        data = data[name]
    data[last] = value


def _set_model(llm: dict[str, Any], path: str, value: Value) -> None:
    """Set a path of one model. Slots are set wherever they stand, and only where there are any."""
    for target in SHORTHANDS.get(path, (path,)):
        if target in SLOTS_PATHS and path == "slots" and not llm.get("lora_config"):
            continue
        _set(llm, target, value)
    kwargs = llm.get("engine_kwargs")
    if path == "slots" and isinstance(value, int) and kwargs and kwargs.get("max_cpu_loras"):
        # A load needs a spare place in host memory, and vLLM refuses fewer than max_loras.
        kwargs["max_cpu_loras"] = max(kwargs["max_cpu_loras"], value + 1)


def _set_workers(models: list[dict[str, Any]], value: Value) -> None:
    """The number of workers, which are started; attached ones are listed, so the list is cut."""
    for llm in models:
        if llm.get("engine") == "attached":
            assert isinstance(value, int)
            llm["attach"] = llm["attach"][:value]
        else:
            for name in ("min_replicas", "max_replicas"):
                _set(llm, f"deployment_config.autoscaling_config.{name}", value)


def _slots_hint(choice: Choice) -> str:
    if any(path in SLOTS_PATHS for path, _ in choice):
        return "; vary `slots`, which sets both"
    return ""
