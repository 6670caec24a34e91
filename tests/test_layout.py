"""Which package may import which, by the design."""

import ast
from pathlib import Path

import pytest
from source import parsed

ROOT = Path(__file__).parents[1]
# package -> what of ours it may import
ALLOWED = {
    "router/core": ("router.core",),
    "sim": ("sim", "router.core", "router.config", "engine_worker.protocol"),
    "engine_worker": ("engine_worker", "sim"),
    # The calibrations alone: what an engine's times are before any was observed.
    "router": ("router", "engine_worker.protocol", "sim.latency"),
}
OURS = ("router", "sim", "engine_worker")


def files() -> list[tuple[str, Path]]:
    found = []
    for package in ALLOWED:
        for path in sorted((ROOT / package).rglob("*.py")):
            if package == "router" and "core" in path.parts:
                continue
            found.append((package, path))
    return found


@pytest.mark.parametrize(
    ("package", "path"), files(), ids=[str(path.relative_to(ROOT)) for _, path in files()]
)
def test_imports_follow_the_design(package: str, path: Path) -> None:
    for node in ast.walk(parsed(path)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        for module in modules:
            if module.partition(".")[0] in OURS:
                assert module.startswith(ALLOWED[package]), f"{path} imports {module}"


def test_only_the_emulated_engine_imports_the_simulator() -> None:
    for path in sorted((ROOT / "engine_worker").rglob("*.py")):
        if path.name != "emulated_engine.py":
            assert "from sim" not in path.read_text(), path
