"""From `dynamic_lora_loading_path` to a store."""

from router.adapters.local import LocalStore
from router.adapters.store import AdapterStore


def open_store(path: str) -> AdapterStore:
    """The store at a path or URL. Raises `StoreError`."""
    if path.startswith("s3://"):
        from router.adapters.s3 import S3Store  # noqa: PLC0415  (boto3 takes long to import)

        return S3Store(path)
    return LocalStore(path)
