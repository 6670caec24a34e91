"""Build the engine model as C extensions, by mypyc, where a C compiler is at hand.

The rule: compiled or not, the results are the same to the last bit; compiled, they come sooner. So
nothing here may fail an installation: what cannot be compiled runs as Python. `LORAYARD_PURE_PYTHON=1`
leaves the extensions out on purpose.
"""

import os
import sys

from setuptools import Extension, setup

COMPILED = ["sim/engine.py", "sim/host.py", "sim/kv.py"]
BUILDS = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel"}


def extensions() -> list[Extension]:
    """What to build: nothing where nothing is built, or where that was asked for."""
    if not BUILDS & set(sys.argv) or os.environ.get("LORAYARD_PURE_PYTHON") == "1":
        return []
    from mypyc.build import mypycify  # noqa: PLC0415  (takes a second)

    try:
        found: list[Extension] = mypycify(COMPILED, group_name="lorayard", opt_level="3")
    except SystemExit:  # mypy has said why
        sys.stderr.write("the engine model is not compiled: it runs as Python\n")
        return []
    for extension in found:
        extension.optional = True  # so that a missing compiler is a warning
    return found


setup(ext_modules=extensions())
