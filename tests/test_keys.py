"""The file of keys: each mistake gets one line, and nothing of a key is ever told."""

import hashlib
import os
import sys
from pathlib import Path

import pytest

from router.__main__ import main
from router.config import ConfigError
from router.frontend.access import Patterns, Scope
from router.key_file import KeyFile
from router.keys import GLOBS_MAX, KeyConfig, parse_keys

ONE, TWO = (hashlib.sha256(key).hexdigest() for key in (b"one", b"two"))
HEAD = f"keys:\n  - name: a\n    sha256: {ONE}\n"


def read(text: str) -> tuple[KeyConfig, ...]:
    return parse_keys(text, name="k.yaml", tenants=("gold", "plain"))


BAD = [
    ("", "k.yaml:1: the file is empty; it needs a list `keys`"),
    ("keys: [\n", "k.yaml:2: not valid YAML: "),
    ("keys:\n  - name: a\n", "k.yaml:2: keys[0]: `sha256` is missing"),
    (f"- name: a\n  sha256: {ONE}\n", "k.yaml:1: Expected `object`, got `array`"),
    (HEAD + "    tenat: gold\n", "k.yaml:4: unknown key `tenat`; did you mean `tenant`?"),
    (
        HEAD + "    tenant: silver\n",
        "k.yaml:4: tenant `silver` is not one of router.tenants; known: go",
    ),
    (HEAD + "    models: qwen\n", "k.yaml:4: models: Expected `array`, got `str`; write a list"),
    (
        HEAD + "    models: ['']\n",
        "k.yaml:4: models: `` can match none; write a base model's id or a",
    ),
    (
        HEAD + "    adapters:\n      - a-*\n      - qwen:b-*\n",
        "k.yaml:6: adapters: `qwen:b-*` can match none; write an adapter's name or a pattern of some, "
        "without the model's id before it",
    ),
    (
        HEAD + f"    adapters: [{', '.join(f'{n}*x' for n in range(GLOBS_MAX + 1))}]\n",
        f"k.yaml:4: adapters: {GLOBS_MAX + 1} patterns that are no name and no `BEGINNING*`; write at",
    ),
    (HEAD + "    priority: 4\n", "k.yaml:4: priority: Expected `int` <= 3"),
    (HEAD + "    tokens_per_minute: 0\n", "k.yaml:4: tokens_per_minute: Expected `float` > 0"),
    (
        HEAD + f"  - name: a\n    sha256: {TWO}\n",
        "k.yaml:4: key `a` stands here twice (first as keys[0])",
    ),
    (
        HEAD + f"  - name: b\n    sha256: {ONE.upper()}\n",
        "k.yaml:5: sha256: it is that of key `a` too;",
    ),
    ("keys:\n  - name: a b\n    sha256: x\n", "k.yaml:2: name: Expected `str` matching regex"),
    (
        "keys:\n  - name: a\n    sha256: ly-secret\n",
        "k.yaml:3: sha256: Expected `str` matching regex",
    ),
    ("keys:\n  - name: a\n    sha256: 12345678\n", "k.yaml:3: sha256: Expected `str`, got `int`"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[message[:60] for _, message in BAD])
def test_a_mistake_is_named_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(text)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    for secret in (ONE, ONE.upper(), "ly-secret", "12345678"):
        assert secret not in str(error.value)


def test_what_is_left_out_is_everything() -> None:
    assert read(HEAD) == (KeyConfig("a", ONE),)
    assert read("keys: []") == ()
    [key] = read(HEAD + "    tenant: gold\n    models: [m]\n    requests_per_minute: 3\n")
    assert (key.tenant, key.models, key.adapters) == ("gold", ("m",), ("*",))
    assert (key.requests_per_minute, key.tokens_per_minute, key.priority) == (3, None, None)


def test_the_shipped_file_of_keys_can_be_used() -> None:
    path = Path(__file__).parents[1] / "configs" / "keys.yaml"
    assert [key.name for key in KeyFile(path, ()).read()] == ["team-a", "gateway"]


def test_a_new_key_is_shown_once_with_the_entry_that_it_fits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["key", "team-a", "--tenant", "gold"]) == 0
    first = capsys.readouterr().out
    [shown] = [line.strip() for line in first.splitlines() if line.strip().startswith("ly-")]
    [entry] = read(first[first.index("keys:") :])
    assert entry == KeyConfig("team-a", hashlib.sha256(shown.encode()).hexdigest(), "gold")
    assert len(shown) > 40
    main(["key", "team-a"])
    assert shown not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["", "a b", "-", "a:b", "x" * 65])
def test_a_name_that_is_none_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["key", "--", name])
    assert "use letters, digits" in capsys.readouterr().err


MATCHES = [
    (("*",), ("a", "a-b", ""), ()),
    ((), (), ("a", "")),
    (("a", "b.c"), ("a", "b.c"), ("A", "ab", "bxc", "b.c.d")),
    (("team-*",), ("team-", "team-x"), ("team", "xteam-")),
    (("*-v2",), ("a-v2",), ("a-v2b", "v2")),
    (("t?", "[ab]x", "[!ab]y"), ("t1", "ax", "cy"), ("t", "t12", "cx", "ay")),
    (("a*b*", "c"), ("ab", "axbx", "c"), ("a", "cb")),
]  # fmt: skip


@pytest.mark.parametrize(("patterns", "matched", "others"), MATCHES)
def test_patterns(
    patterns: tuple[str, ...], matched: tuple[str, ...], others: tuple[str, ...]
) -> None:
    made = Patterns(patterns)
    assert [name for name in matched if not made.match(name)] == []
    assert [name for name in others if made.match(name)] == []


def test_a_scope_is_of_models_and_adapters_whatever_their_version() -> None:
    scope = Scope(("m-*",), ("a", "b-*"))
    assert scope.has_model("m-1")
    assert not scope.has_model("n")
    assert scope.has_adapter("a")
    assert scope.has_adapter("a@0123456789abcdef")
    assert not scope.has_adapter("c@b-1")
    assert not scope.has_adapter("")
    assert scope == Scope(("m-*",), ("a", "b-*"))
    assert hash(scope) == hash(Scope(("m-*",), ("a", "b-*")))
    assert scope != Scope(("m-*",), ("a",))


async def names(file: KeyFile) -> list[str]:
    """Of the keys of a file that has changed."""
    keys = await file.read_if_changed()
    assert keys is not None
    return [key.name for key in keys]


def replace(path: Path, text: str) -> None:
    """Put another file in its place, as careful editors do."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


async def test_a_file_is_read_again_when_it_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(HEAD)
    file = KeyFile(path, ())
    assert [key.name for key in file.read()] == ["a"]
    assert await file.read_if_changed() is None
    replace(path, HEAD.replace("name: a", "name: b"))
    assert await names(file) == ["b"]
    assert await file.read_if_changed() is None
    with path.open("a") as appended:
        appended.write(f"  - name: c\n    sha256: {TWO}\n")
    assert await names(file) == ["b", "c"]


async def test_a_broken_file_is_told_once_for_each_change(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    file = KeyFile(path, ())
    with pytest.raises(ConfigError, match="No such file or directory; name a YAML file such as"):
        file.read()
    assert await file.read_if_changed() is None
    for text in ("keys: 1", "keys: [2]"):
        replace(path, text)
        with pytest.raises(ConfigError, match=r"keys\.yaml:1: "):
            await file.read_if_changed()
        assert await file.read_if_changed() is None
    path.unlink()
    with pytest.raises(ConfigError, match="No such file"):
        await file.read_if_changed()
    assert await file.read_if_changed() is None


async def test_a_file_whose_reader_fails_is_read_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where memory was short for a moment: a key that was taken back must not stay good."""
    path = tmp_path / "keys.yaml"
    path.write_text(HEAD)
    file = KeyFile(path, ())
    file.read()
    replace(path, HEAD.replace("name: a", "name: b"))
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", "/bin/false")
        for _ in range(2):
            with pytest.raises(ConfigError, match="its reader ended with 1"):
                await file.read_if_changed()
    assert await names(file) == ["b"]


async def test_a_file_behind_a_link_that_is_moved_is_another(tmp_path: Path) -> None:
    """As Kubernetes mounts a secret."""
    for number, name in enumerate("ab"):
        folder = tmp_path / f"data-{number}"
        folder.mkdir()
        (folder / "keys.yaml").write_text(HEAD.replace("name: a", f"name: {name}"))
        os.utime(folder / "keys.yaml", (1, 1))
    link = tmp_path / "data"
    link.symlink_to("data-0")
    file = KeyFile(link / "keys.yaml", ())
    assert [key.name for key in file.read()] == ["a"]
    link.with_name("next").symlink_to("data-1")
    link.with_name("next").replace(link)
    assert await names(file) == ["b"]


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ConfigError, match="larger than 16,777,216 bytes; this is no file of keys"):
        KeyFile(path, ()).read()
