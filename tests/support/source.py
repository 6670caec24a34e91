"""The project's source, parsed."""

import ast
import gc
from pathlib import Path


def parsed(path: Path) -> ast.Module:
    """A file's syntax tree.

    Without the garbage collector: Hypothesis hangs a callback on it, and a collection within the
    parser then trips a check of CPython 3.11 ("AST constructor recursion depth mismatch").
    """
    gc.disable()
    try:
        return ast.parse(path.read_text())
    finally:
        gc.enable()
