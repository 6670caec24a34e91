"""From `dynamic_lora_loading_path` to a store."""

from router.adapters.local import LocalStore
from router.adapters.s3 import S3Store
from router.adapters.store import AdapterStore


def open_store(path: str) -> AdapterStore:
    """The store at a path or URL. Raises `StoreError`."""
    if path.startswith("s3://"):
        return S3Store(path)
    return LocalStore(path)
