"""The core imports what is listed here and nothing else, reads no clock but the loop's, draws from no
generator but the one it is given, does no I/O, and iterates no set.
"""

import ast
import time
from pathlib import Path

import pytest
from source import parsed

CORE = Path(__file__).parents[2] / "router" / "core"
MODULES = sorted(CORE.rglob("*.py"))
# Of the standard library, and msgspec; None allows every name of a module.
ALLOWED: dict[str, set[str] | None] = {
    "asyncio": None,
    "bisect": None,
    "collections": {"OrderedDict", "deque"},
    "collections.abc": None,
    "enum": None,
    "functools": {"partial"},
    "hashlib": {"blake2b"},  # the same in every process, unlike `hash()` of a text
    "heapq": None,
    "math": None,
    "msgspec": None,
    "random": {"Random"},
    "types": {"TracebackType"},
    "typing": None,
}
# asyncio is waited with, not done I/O or slept with.
ASYNCIO = {
    "AbstractEventLoop", "CancelledError", "Future", "Task", "TimerHandle", "gather",
    "get_running_loop",
}  # fmt: skip
FORBIDDEN_NAMES = {"open", "print", "input", "__import__", "eval", "exec", "set", "frozenset"}
# Sets may be asked, never walked: only these two places make one, as constants.
CONSTANT_SETS = {"residency.py"}


@pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(CORE)) for path in MODULES])
def test_the_core_is_pure(path: Path) -> None:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert alias.asname is None, f"{path.name} renames {alias.name}"
                assert alias.name in ALLOWED, f"{path.name} imports {alias.name}"
                assert ALLOWED[alias.name] is None, f"{path.name} imports all of {alias.name}"
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            assert node.level == 0, "imports are absolute"
            if module == "router.core" or module.startswith("router.core."):
                continue
            assert module in ALLOWED, f"{path.name} imports {module}"
            names = ALLOWED[module]
            for alias in node.names:
                assert names is None or alias.name in names, f"{path.name}: {module}.{alias.name}"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "asyncio":
                assert node.attr in ASYNCIO, f"{path.name} uses asyncio.{node.attr}"
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            if node.id == "frozenset" and path.name in CONSTANT_SETS:
                continue
            assert node.id not in FORBIDDEN_NAMES, f"{path.name} uses {node.id}"
        elif isinstance(node, (ast.SetComp, ast.Set)):
            assert is_asked_only(path, node), f"{path.name}:{node.lineno} makes a set to keep"


def is_asked_only(path: Path, wanted: ast.AST) -> bool:
    """Whether a set display stands to the right of `in`, or inside a frozenset constant."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Compare) and any(
            isinstance(operator, (ast.In, ast.NotIn)) and same(right, wanted)
            for operator, right in zip(node.ops, node.comparators, strict=True)
        ):
            return True
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "frozenset"
            and any(same(argument, wanted) for argument in node.args)
        ):
            return True
    return False


def same(one: ast.AST, other: ast.AST) -> bool:
    return isinstance(one, ast.Set) and one.__dict__.get("lineno") == other.__dict__.get("lineno")


SIM = CORE.parents[1] / "sim"
# Who measures real engines, and who tells a person how long a command took; they simulate nothing.
OF_THE_REAL_WORLD = ("calibrate/", "validate/", "commands/", "pool.py", "__main__.py")
CLOCKS = {"time", "datetime", "sched", "timeit", "threading", "signal"}
CLOCK_NAMES = {"perf_counter", "monotonic", "time_ns", "now", "utcnow", "today", "sleep"}
SIMULATED = [
    path
    for path in sorted(SIM.rglob("*.py"))
    if not str(path.relative_to(SIM)).startswith(OF_THE_REAL_WORLD)
]


@pytest.mark.parametrize("path", SIMULATED, ids=[str(path.relative_to(SIM)) for path in SIMULATED])
def test_no_wall_clock_reaches_simulated_time(path: Path) -> None:
    """`datetime` may parse a trace's dates; `env.now` is virtual; nothing else may tell the time."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert alias.name not in CLOCKS, f"{path.name} imports {alias.name}"
        elif isinstance(node, ast.ImportFrom):
            allowed = {"UTC", "datetime", "timedelta"} if node.module == "datetime" else set()
            names = {alias.name for alias in node.names}
            assert node.module not in CLOCKS or names <= allowed, f"{path.name}: {node.module}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called = node.func.attr
            if called == "sleep":  # of the running loop, which is the simulator's
                assert isinstance(node.func.value, ast.Name), path.name
                assert node.func.value.id == "asyncio", path.name
            else:
                assert called not in CLOCK_NAMES, f"{path.name} calls {called}()"


def test_a_real_clock_that_runs_wild_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same replay with every clock of the `time` module broken: the digest is the same."""
    from router.config import load  # noqa: PLC0415
    from sim.replay import Options, Replay  # noqa: PLC0415
    from sim.traces import TraceRow  # noqa: PLC0415

    config = load(SIM / "default.yaml")
    rows = [TraceRow(float(number * 40), 300, 50) for number in range(300)]

    def digest() -> str:
        return str(Replay(config, rows, Options(adapters=40, seed=3)).run()["digest"])

    before = digest()

    def broken() -> float:
        raise AssertionError("a wall clock was read")

    for name in ("time", "monotonic", "perf_counter", "time_ns", "process_time"):
        monkeypatch.setattr(time, name, broken)
    after = digest()
    monkeypatch.undo()
    assert after == before
