"""The core imports the standard library and msgspec only, reads no clock, draws no number of its own,
and iterates no set.
"""

import ast
import sys
from pathlib import Path

import pytest
from source import parsed

CORE = Path(__file__).parents[2] / "router" / "core"
MODULES = sorted(CORE.rglob("*.py"))
FORBIDDEN_MODULES = {"time", "datetime", "socket", "os", "subprocess", "threading", "pathlib", "io"}
FORBIDDEN_CALLS = {"open", "print", "input", "random", "set_event_loop"}


def imports(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.append(node.module or "")
    return found


@pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(CORE)) for path in MODULES])
def test_the_core_is_pure(path: Path) -> None:
    tree = parsed(path)
    for module in imports(tree):
        top = module.partition(".")[0]
        assert (
            module.startswith("router.core")
            or top == "msgspec"
            or (top in sys.stdlib_module_names and top not in FORBIDDEN_MODULES)
        ), f"{path.name} imports {module}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS, f"{path.name} calls {node.func.id}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.value.id != "random", f"{path.name} draws from the module random"
        if isinstance(node, (ast.For, ast.comprehension)):
            iterated = node.iter
            assert not isinstance(iterated, (ast.Set, ast.SetComp))
            assert not (
                isinstance(iterated, ast.Call)
                and isinstance(iterated.func, ast.Name)
                and iterated.func.id in {"set", "frozenset"}
            ), f"{path.name} iterates a set"
