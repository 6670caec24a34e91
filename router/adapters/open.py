"""From `dynamic_lora_loading_path` to a store.

Each kind's client library is imported only where it is used: they take long to import, and those of
the extra `stores` need not be installed.
"""

from router.adapters.address import problem_with
from router.adapters.local import LocalStore
from router.adapters.store import AdapterStore, StoreError


def open_store(path: str) -> AdapterStore:
    """The store at a path or URL. Raises `StoreError`."""
    if problem := problem_with(path):
        raise StoreError(problem, passing=False)
    scheme, has_scheme, _ = path.partition("://")
    match scheme if has_scheme else "":
        case "":
            return LocalStore(path)
        case "s3":
            from router.adapters.s3 import S3Store  # noqa: PLC0415

            return S3Store(path)
        case "hf":
            from router.adapters.hub import HubStore  # noqa: PLC0415

            return HubStore(path)
        case _:
            from router.adapters.objects import ObjectsStore  # noqa: PLC0415

            return ObjectsStore(path)
