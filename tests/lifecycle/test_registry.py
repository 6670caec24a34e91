"""One truth on disk for all processes: steps are whole, in order, and seen by everyone."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from router.lifecycle.alias import Alias
from router.lifecycle.registry import FILE, News, Registry, RegistryError
from router.lifecycle.words import LifecycleError


def count(alias: Alias) -> Alias:
    return msgspec.structs.replace(alias, changed_at=alias.changed_at + 1)


def test_what_one_process_changes_another_sees_once(tmp_path: Path) -> None:
    one, other = Registry(tmp_path), Registry(tmp_path)
    assert not one.news()
    assert not other.news()
    after, serial = one.change("a", lambda _: Alias(serving="x"))
    assert after == Alias(serving="x")
    assert one.news() == other.news() == News({"a": Alias(serving="x")})
    assert not one.news()
    assert not other.news()
    assert other.change("a", lambda alias: alias)[1] == serial, "no change has no number of its own"
    assert not one.news()
    one.close()
    assert other.change("b", count)[1] > serial
    other.close()
    assert set(Registry(tmp_path).news().aliases) == {"a", "b"}


def test_a_step_that_raises_changes_nothing(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    registry.change("a", lambda _: Alias(serving="x"))

    def refuses(_: Alias) -> Alias:
        raise LifecycleError("conflict", "no")

    with pytest.raises(LifecycleError):
        registry.change("a", refuses)
    assert registry.change("a", lambda alias: alias)[0] == Alias(serving="x")
    registry.close()


def _count_up(folder: Path, times: int) -> None:
    registry = Registry(folder)
    for _ in range(times):
        registry.change("a", count)
    registry.close()


def test_no_step_of_several_processes_is_lost(tmp_path: Path) -> None:
    Registry(tmp_path).close()
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_count_up, args=(tmp_path, 50)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    registry = Registry(tmp_path)
    assert registry.news().aliases["a"].changed_at == 150
    registry.close()


CHANGING = """
import sys
from pathlib import Path
import msgspec
from router.lifecycle.registry import Registry
from router.lifecycle.usage import UsageRecord
registry = Registry(Path(sys.argv[1]))
assert registry.claim("a")
registry.tell_usage({"a": UsageRecord(requests=1)})
print("begun", flush=True)
while True:
    registry.change("a", lambda a: msgspec.structs.replace(a, changed_at=a.changed_at + 1))
"""


def test_a_killed_process_leaves_whole_steps_and_claims_nothing(tmp_path: Path) -> None:
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", CHANGING, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        registry = Registry(tmp_path)
        assert not registry.claim("a"), "it is the other's"
        _, serial = registry.change("b", count)
        registry.news()
        registry.tell_seen()
        assert not registry.seen_by_all(serial)
        assert registry.usage_elsewhere(["a"])
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert registry.seen_by_all(serial), "who is gone need not be waited for"
        assert not registry.usage_elsewhere(["a"])
        assert registry.claim("a")
        registry.give_back("a")
        before = registry.change("a", lambda alias: alias)[0].changed_at
        assert registry.change("a", count)[0].changed_at == before + 1
        registry.close()


def test_a_change_waits_for_who_has_just_begun(tmp_path: Path) -> None:
    """It has taken nothing in yet, so it would answer by what was before."""
    one, other = Registry(tmp_path), Registry(tmp_path)
    _, serial = one.change("a", lambda _: Alias(serving="x"))
    one.news()
    one.tell_seen()
    assert not one.seen_by_all(serial)
    other.news()
    other.tell_seen()
    assert one.seen_by_all(serial)
    one.close()
    other.close()


def test_who_was_killed_is_not_taken_for_who_has_its_number(tmp_path: Path) -> None:
    """In a container the next router process has the number of the one before."""
    pid = os.fork()
    if not pid:
        killed = Registry(tmp_path)
        killed.claim("a")
        os._exit(0)
    os.waitpid(pid, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "kill", lambda *_: None)  # there is one of that number
        registry = Registry(tmp_path)
        other = Registry(tmp_path)
        assert other.claim("a")
        other.close()
        registry.close()
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".router-")] == []


def _open(folder: Path) -> None:
    Registry(folder).close()


def test_several_processes_that_begin_at_once_all_open_it(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    for number in range(20):
        folder = tmp_path / str(number)
        processes = [fork.Process(target=_open, args=(folder,)) for _ in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            assert process.exitcode == 0


def test_a_file_that_is_none_of_ours_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"not a database, whatever its name says" * 100)
    with pytest.raises(RegistryError, match=FILE):
        Registry(tmp_path)
