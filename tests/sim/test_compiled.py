"""The engine model and the policy compiled (setup.py) and as Python: the same to the last bit."""

import importlib
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from traces import write_trace

ROOT = Path(__file__).parents[2]
COMPILED = (
    "router.core.demand",
    "router.core.policies.cost",
    "router.core.residency",
    "router.core.shares",
    "router.core.timing",
    "router.frontend.connection",
    "router.frontend.exchange",
    "router.frontend.relay",
    "router.frontend.request",
    "router.frontend.service",
    "router.patience",
    "router.telemetry.answer",
    "router.workers.upstream",
    "sim.engine",
    "sim.host",
    "sim.kv",
)
# A process that cannot import extensions of ours: they are passed by, and the source is found.
PURE = """
import sys
from importlib.machinery import SOURCE_SUFFIXES, FileFinder, PathFinder, SourceFileLoader

class Source:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] not in ("sim", "router"):
            return None
        for folder in path or sys.path:
            spec = FileFinder(folder or ".", (SourceFileLoader, SOURCE_SUFFIXES)).find_spec(name)
            if spec is not None:
                return spec

sys.meta_path.insert(0, Source)
"""
RUN = """
import sys
from sim.__main__ import main
import sim.engine
import router.core.policies.cost
print(sim.engine.__file__, router.core.policies.cost.__file__, file=sys.stderr)
sys.exit(main(sys.argv[1:]))
"""


def is_compiled(name: str) -> bool:
    return not str(importlib.import_module(name).__file__).endswith(".py")


def test_what_is_compiled_is_what_is_written() -> None:
    # All code is in one library; a module's own file is a few lines that point to it.
    built = max((lib.stat().st_mtime for lib in ROOT.glob("lorayard__mypyc*.so")), default=0.0)
    stale = []
    for name in COMPILED:
        source = ROOT.joinpath(*name.split(".")).with_suffix(".py")
        if is_compiled(name) and built < source.stat().st_mtime:
            stale.append(name)
    assert not stale, f"{', '.join(stale)}: changed since it was compiled; run `make install`"


@pytest.mark.skipif(not is_compiled("sim.engine"), reason="no compiler was there: all is Python")
@pytest.mark.parametrize(
    "arguments",
    [
        ("--adapters", "40", "--workers", "3"),
        ("--adapters", "30", "--workers", "2", "--speed", "8", "--policy", "round_robin"),
        ("--adapters", "60", "--workers", "2", "--speed", "9", "--policy", "cost"),
    ],
)
def test_a_replay_is_the_same_compiled_and_as_python(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    trace = write_trace(tmp_path / "t.jsonl", 400)

    def replay(program: str, out: str) -> tuple[str, dict[str, object]]:
        path = tmp_path / out
        done = subprocess.run(
            [sys.executable, "-c", program, "replay", str(trace), *arguments, "--json", str(path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        result = msgspec.json.decode(path.read_bytes(), type=dict[str, object])
        del result["sim"]  # how long it took
        return done.stderr, result

    where, compiled = replay(RUN, "compiled.json")
    assert "sim/engine.py" not in where
    assert "policies/cost.py" not in where
    where, python = replay(PURE + RUN, "python.json")
    assert "sim/engine.py" in where
    assert "policies/cost.py" in where
    assert compiled == python
