"""A YAML file as msgspec structs. An error names its line of the file and what to write instead.

Anything that is not known is an error: a misspelt key must not be a silent default. What a file is to
hold is for who reads it (config.py, keys.py); here is how a mistake is told.
"""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import yaml

NODES_MAX: Final = 100_000
T = TypeVar("T")


class ConfigError(Exception):
    """The file cannot be used. The message says where, why, and what to write instead."""


def read_text(path: Path, such_as: str) -> str:
    """The file's text. Raises `ConfigError`, which names `such_as` as a file to look at."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"{path}: {reason}; name a YAML file such as {such_as}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text; a configuration is a YAML file") from None


class Document:
    """A text in YAML, and the line of each of its keys and items, by msgspec's paths.

    `top` is the list that it must hold, and `nodes_max` how many values it may. `loader` is one of
    PyYAML's. Raises `ConfigError` where it is not YAML.
    """

    def __init__(
        self,
        text: str,
        name: str,
        *,
        top: str,
        nodes_max: int = NODES_MAX,
        loader: "type[yaml.SafeLoader | yaml.CSafeLoader]" = yaml.SafeLoader,
    ) -> None:
        self.name = name
        self._nodes_max = nodes_max
        self._lines: dict[str, int] = {}
        try:
            made = loader(text)
            root = made.get_single_node()
            if root is None:
                raise ConfigError(f"{name}:1: the file is empty; it needs a list `{top}`")
            # Before the values are made of the nodes, which changes these: keys are merged (`<<`).
            self._walk(root, "$")
            self._data: Any = made.construct_document(root)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise ConfigError(f"{name}:{line}: not valid YAML: {error.problem}") from None
        except (yaml.YAMLError, ValueError, AttributeError, OverflowError) as error:
            what = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(f"{name}:1: not valid YAML: {what}") from None
        except RecursionError:
            raise _too_deep(name) from None

    def convert(
        self,
        kind: type[T],
        structs: Mapping[str, type[msgspec.Struct]],
        choices: Mapping[str, tuple[str, ...]],
    ) -> T:
        """Its values as a struct.

        `structs` are those within it, by their paths, and `choices` the words of fields that take one
        of a few. Raises `ConfigError`.
        """
        try:
            return msgspec.convert(self._data, kind)
        except msgspec.ValidationError as error:
            raise self._explain(str(error), structs, choices) from None
        except RecursionError:
            raise _too_deep(self.name) from None

    def _walk(self, node: yaml.Node, path: str) -> None:
        self._lines.setdefault(path, node.start_mark.line + 1)
        if len(self._lines) > self._nodes_max:
            raise self.error(
                f"more than {self._nodes_max:,} values; this is no router's configuration"
            )
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                line = key.start_mark.line + 1
                if key.tag == "tag:yaml.org,2002:merge":
                    continue
                if key.tag != "tag:yaml.org,2002:str":
                    raise self.error(f"the key `{key.value}` is not text; quote it", line=line)
                below = f"{path}.{key.value}"
                if below in self._lines:
                    raise self.error(
                        f"`{key.value}` stands here twice (first on line {self._lines[below]}); "
                        "remove one",
                        line=line,
                    )
                self._lines[below] = line
                self._walk(value, below)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                self._walk(value, f"{path}[{index}]")

    def error(self, message: str, path: str = "$", line: int | None = None) -> ConfigError:
        """An error at a path, or at the nearest line above it that is known."""
        while line is None and path not in self._lines:
            shorter = re.sub(r"(\.[^.\[]*|\[[^\]]*\])$", "", path)
            path = shorter if shorter != path else "$"
        return ConfigError(f"{self.name}:{line or self._lines[path]}: {message}")

    def _explain(
        self,
        message: str,
        structs: Mapping[str, type[msgspec.Struct]],
        choices: Mapping[str, tuple[str, ...]],
    ) -> ConfigError:
        """Turn msgspec's message into one with a line and a suggestion."""
        what, _, where = message.partition(" - at ")
        path = where.strip("`") or "$"
        unknown = re.match(r"Object contains unknown field `(.*)`", what)
        if unknown is None:
            what = re.sub(r"^Object missing required field `(.*)`$", r"`\1` is missing", what)
            what = re.sub(r"^Expected `(.*?)`(.*), got `.*`$", _write_instead, what)
            key = path.rpartition(".")[2]
            if key_enum := re.match(r"^Invalid enum value '?(.*?)'?$", what):
                what = f"`{key_enum[1]}` is not one of {', '.join(choices[key])}"
            return self.error(f"{key}: {what}" if path != "$" else what, path)
        word = unknown[1]
        struct = structs.get(re.sub(r"\[[^\]]*\]", "[]", path))
        allowed = struct.__struct_fields__ if struct else ()
        close = difflib.get_close_matches(word, allowed, n=1, cutoff=0.5)
        hint = f"did you mean `{close[0]}`?" if close else f"known here: {', '.join(allowed)}"
        return self.error(f"unknown key `{word}`; {hint}", f"{path}.{word}")


def _too_deep(name: str) -> ConfigError:
    return ConfigError(f"{name}:1: nested too deeply; this is no configuration")


def _write_instead(found: "re.Match[str]") -> str:
    """Say msgspec's expectation as what to write."""
    kinds = {
        "object": "a mapping (`key: value` lines)",
        "array": "a list",
        "int": "a whole number",
        "float": "a number",
        "str": "text",
        "bool": "true or false",
    }
    wanted = " or ".join(kinds.get(kind, "nothing") for kind in found[1].split(" | "))
    return f"{found[0]}; write {wanted}"
