"""The file of API keys: of each key its hash, what it may use, and how much of it.

    keys:
      - name: team-a-ci
        sha256: 2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae
        tenant: team-a
        models: [qwen-7b]
        adapters: ["team-a-*", house-style]

The keys themselves are nowhere: `python -m router key NAME` prints one once, with its entry. A hash
without salt is enough for such a key, which nobody can guess, and for no other: make no key by hand.
Like the configuration's, each mistake is told with its line; what stands in `sha256` is told never.
"""

import hashlib
import re
import secrets
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Final

import msgspec
import yaml

from router.document import ConfigError, Document, read_text

# By libyaml, where PyYAML has it: ten thousand keys take it a second, and eight without.
LOADER: Final = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
KEYS_MAX_BYTES: Final = 16 * 2**20
NODES_MAX: Final = 1_000_000
PATTERNS_MAX: Final = 1000
# Of patterns that are more than a name or its beginning: each is tried on every adapter of a listing.
GLOBS_MAX: Final = 32
KEY_BYTES: Final = 32
NAME: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
ALL: Final = ("*",)
GLOB: Final = frozenset("*?[")
# What a base model's id, or an adapter's name, consists of.
IN_MODELS: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-/")
IN_ADAPTERS: Final = IN_MODELS - {"/"}
IN_GLOBS: Final = frozenset("*?[]!")

Patterns = Annotated[tuple[str, ...], msgspec.Meta(max_length=PATTERNS_MAX)]


class KeyConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One API key, by its hash; `name` is what the router calls it.

    `tenant` is one of `router.tenants`, and whoever holds the key is nobody else. `models` and
    `adapters` are patterns (`*`, `?`, `[abc]`) of base models' ids and of adapters' names that it may
    use, all unless given. `requests_per_minute` and `tokens_per_minute` are the key's own limits,
    beside its tenant's (None: no limit). `priority` is that of its requests, and the most urgent that
    they may ask for.
    """

    name: Annotated[str, msgspec.Meta(pattern=NAME)]
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-fA-F]{64}$")]
    tenant: str | None = None
    models: Patterns = ALL
    adapters: Patterns = ALL
    requests_per_minute: Annotated[float, msgspec.Meta(gt=0)] | None = None
    tokens_per_minute: Annotated[float, msgspec.Meta(gt=0)] | None = None
    priority: Annotated[int, msgspec.Meta(ge=-3, le=3)] | None = None


class KeysConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The whole file."""

    keys: tuple[KeyConfig, ...]


_STRUCTS: Final[dict[str, type[msgspec.Struct]]] = {"$": KeysConfig, "$.keys[]": KeyConfig}


def load_keys(path: Path, tenants: Collection[str]) -> tuple[KeyConfig, ...]:
    """Read and check a file of keys, whose tenants are among these. Raises `ConfigError`."""
    try:
        size = path.stat().st_size
    except OSError:
        size = 0  # reading it says why
    if size > KEYS_MAX_BYTES:
        raise ConfigError(f"{path}: larger than {KEYS_MAX_BYTES:,} bytes; this is no file of keys")
    return parse_keys(read_text(path, "configs/keys.yaml"), name=str(path), tenants=tenants)


def parse_keys(text: str, *, name: str, tenants: Collection[str]) -> tuple[KeyConfig, ...]:
    """Check the text of a file of keys. Raises `ConfigError`."""
    document = Document(text, name, top="keys", nodes_max=NODES_MAX, loader=LOADER)
    keys = document.convert(KeysConfig, _STRUCTS, {}).keys
    names: dict[str, int] = {}
    hashes: dict[str, int] = {}
    for index, key in enumerate(keys):
        path = f"$.keys[{index}]"
        if (first := names.setdefault(key.name, index)) != index:
            raise document.error(
                f"key `{key.name}` stands here twice (first as keys[{first}]); give this one another "
                "name, or remove one",
                f"{path}.name",
            )
        if (first := hashes.setdefault(key.sha256.lower(), index)) != index:
            raise document.error(
                f"sha256: it is that of key `{keys[first].name}` too; remove one of them",
                f"{path}.sha256",
            )
        if key.tenant is not None and key.tenant not in tenants:
            known = f"known: {', '.join(tenants)}" if tenants else "there is none"
            raise document.error(
                f"tenant `{key.tenant}` is not one of router.tenants; {known}", f"{path}.tenant"
            )
        _check_patterns(key.models, IN_MODELS, "models", path, document)
        _check_patterns(key.adapters, IN_ADAPTERS, "adapters", path, document)
    return keys


def _check_patterns(
    patterns: tuple[str, ...], letters: frozenset[str], field: str, path: str, document: Document
) -> None:
    for index, pattern in enumerate(patterns):
        if not pattern or not letters | IN_GLOBS >= set(pattern):
            wanted = (
                "a base model's id or a pattern of some, such as `qwen-*`"
                if field == "models"
                else "an adapter's name or a pattern of some, without the model's id before it"
            )
            raise document.error(
                f"{field}: `{pattern}` can match none; write {wanted}", f"{path}.{field}[{index}]"
            )
    globs = sum(not is_name_or_prefix(pattern) for pattern in patterns)
    if globs > GLOBS_MAX:
        raise document.error(
            f"{field}: {globs} patterns that are no name and no `BEGINNING*`; write at most "
            f"{GLOBS_MAX} of them",
            f"{path}.{field}",
        )


def is_name_or_prefix(pattern: str) -> bool:
    """Whether a pattern is a plain name, or the beginning of names with a `*` behind it."""
    return GLOB.isdisjoint(pattern.removesuffix("*"))


def new_key() -> str:
    """A key that nobody can guess."""
    return f"ly-{secrets.token_urlsafe(KEY_BYTES)}"


def digest_of(key: str) -> bytes:
    """The SHA-256 of a key, by which it is known."""
    return hashlib.sha256(key.encode("utf-8", errors="surrogateescape")).digest()


def is_key_name(text: str) -> bool:
    """Whether a key may be called that."""
    return re.fullmatch(NAME, text) is not None


def described(name: str, key: str, tenant: str | None) -> str:
    """The key, and its entry for the file, for a person to read."""
    lines = [f"name: {name}", f"sha256: {digest_of(key).hex()}"]
    if tenant is not None:
        lines.append(f"tenant: {tenant}")
    entry = "\n    ".join(lines)
    return (
        f"The key, shown this once; give it to whoever is to use it:\n\n  {key}\n\n"
        f"Its entry for the file that router.api_keys_file names:\n\nkeys:\n  - {entry}"
    )
