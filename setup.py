"""Build the engine model and the policy as C extensions, by mypyc, where a C compiler is at hand.

The rule: compiled or not, the results are the same to the last bit; compiled, they come sooner. So all
modules are built or none, nothing here may fail an installation, and where they are built beside the
source, what is there is removed first: an extension that is older than its source would hide it.
`LORAYARD_PURE_PYTHON=1` builds none.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
COMPILED = [
    "router/core/demand.py",
    "router/core/policies/cost.py",
    "router/core/residency.py",
    "router/core/shares.py",
    "router/core/timing.py",
    "router/frontend/connection.py",
    "router/frontend/exchange.py",
    "router/frontend/relay.py",
    "router/frontend/request.py",
    "router/frontend/service.py",
    "router/patience.py",
    "router/telemetry/answer.py",
    "router/workers/upstream.py",
    "sim/engine.py",
    "sim/host.py",
    "sim/kv.py",
]
BESIDE_SOURCE = {"develop", "editable_wheel"}
BUILDS = {"bdist_wheel", "build", "build_ext", *BESIDE_SOURCE}
# Types are checked by `make lint`; where it is built, not all that is imported need be installed.
MYPY = ["--config-file=", "--ignore-missing-imports", "--explicit-package-bases"]
# No fused multiply-add, whose last bit is another; and a new compiler's warnings are no errors.
FLAGS = ["-ffp-contract=off", "-Wno-error"]


def extensions() -> list[Extension]:
    """What to build: nothing where nothing is built, or where that was asked for."""
    if not BUILDS & set(sys.argv):
        return []
    if BESIDE_SOURCE & set(sys.argv):
        remove_built()
    if os.environ.get("LORAYARD_PURE_PYTHON") == "1":
        return []
    try:
        from mypyc.build import mypycify  # noqa: PLC0415  (it may not be there)

        found: list[Extension] = mypycify([*MYPY, *COMPILED], group_name="lorayard", opt_level="3")
    except (Exception, SystemExit) as error:  # noqa: BLE001  (whatever it was, Python will do)
        tell(error)
        return []
    if os.name == "posix":
        for extension in found:
            extension.extra_compile_args += FLAGS
    return found


class BuildAllOrNone(build_ext):
    """The modules call each other: one of them alone would not import."""

    def run(self) -> None:
        """Build, or go on without."""
        try:
            super().run()
        except (Exception, SystemExit) as error:  # noqa: BLE001
            tell(error)
            for extension in self.extensions:
                Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            if BESIDE_SOURCE & set(sys.argv):
                remove_built()
            self.extensions = []


def remove_built() -> None:
    """Take away what an earlier build left beside the source."""
    for pattern in (
        "lorayard__mypyc*.so",
        *(f"{Path(path).with_suffix('')}.*.so" for path in COMPILED),
    ):
        for built in ROOT.glob(pattern):
            built.unlink()


def tell(error: BaseException) -> None:
    """Say that it goes on without."""
    sys.stderr.write(f"the engine model is not compiled ({error}): it runs as Python\n")


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildAllOrNone})
