"""Adapters in S3, or anything that speaks its protocol (`AWS_ENDPOINT_URL`), through boto3.

Credentials, region and endpoint are found as every AWS tool finds them. Retries are the caller's,
so that one bound holds for the whole download, and boto3's own are off.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import boto3
import botocore.config
import botocore.exceptions

from router.adapters.store import (
    CHUNK_BYTES,
    NEEDED,
    AdapterGoneError,
    StoredAdapter,
    StoredFile,
    StoreError,
    is_name,
    stored_adapter,
)

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

CONNECT_TIMEOUT_S: Final = 5
READ_TIMEOUT_S: Final = 10
CONNECTIONS: Final = 32
GONE: Final = {"NoSuchKey", "404", "PreconditionFailed", "412"}


class S3Store:
    """`s3://bucket/prefix`, one sub-folder an adapter; listed `page_size` objects at a time."""

    def __init__(self, url: str, *, page_size: int = 1000) -> None:
        self._page_size = page_size
        self.url = url.rstrip("/")
        bucket, _, prefix = self.url.removeprefix("s3://").partition("/")
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        config = botocore.config.Config(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            max_pool_connections=CONNECTIONS,
            retries={"total_max_attempts": 1},
        )
        try:
            self._client: S3Client = boto3.session.Session().client("s3", config=config)
        except (botocore.exceptions.BotoCoreError, ValueError) as error:
            raise StoreError(f"{self.url}: {error}") from None

    def list(self) -> dict[str, StoredAdapter]:
        """List the whole prefix, page by page."""
        files: dict[str, list[StoredFile]] = {}
        for name, file in self._objects(self._prefix):
            files.setdefault(name, []).append(file)
        found = (stored_adapter(self.url, name, files[name]) for name in sorted(files))
        return {adapter.name: adapter for adapter in found if adapter is not None}

    def find(self, name: str) -> StoredAdapter | None:
        """List one adapter's sub-folder."""
        if not is_name(name):
            return None
        files = [file for _, file in self._objects(f"{self._prefix}{name}/")]
        return stored_adapter(self.url, name, files)

    def fetch(self, adapter: StoredAdapter, into: Path, should_stop: Callable[[], bool]) -> None:
        """Get each needed file, only if it is still the one that was listed, and whole."""
        for name in NEEDED:
            file = adapter.file(name)
            if file is None:
                continue
            with self._translated(f"{self.url}/{adapter.name}/{name}"):
                answer = self._client.get_object(
                    Bucket=self._bucket,
                    Key=f"{self._prefix}{adapter.name}/{name}",
                    IfMatch=file.tag,
                )
                size = 0
                with answer["Body"] as body, (into / name).open("wb") as target:
                    while chunk := body.read(CHUNK_BYTES):
                        if should_stop():
                            raise StoreError(f"downloading {adapter.name} took too long")
                        size += target.write(chunk)
            if size != file.size:
                raise StoreError(
                    f"{self.url}/{adapter.name}/{name}: got {size} bytes of {file.size}"
                )

    def _objects(self, prefix: str) -> Iterator[tuple[str, StoredFile]]:
        """Yield (adapter's name, file) for every object two levels under the store's prefix."""
        with self._translated(self.url):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket,
                Prefix=prefix,
                PaginationConfig={"PageSize": self._page_size},
            )
            for page in pages:
                for entry in page.get("Contents", ()):
                    name, _, file = entry["Key"].removeprefix(self._prefix).partition("/")
                    if file and "/" not in file and is_name(name):
                        yield name, StoredFile(file, entry["Size"], entry["ETag"])

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """Turn boto3's exceptions into ours, once."""
        try:
            yield
        except botocore.exceptions.ClientError as error:
            code = error.response.get("Error", {}).get("Code", "unknown")
            if code in GONE:
                raise AdapterGoneError(f"{what}: changed or gone since it was listed") from None
            raise StoreError(f"{what}: {code}: {_hint(code)}") from None
        except botocore.exceptions.NoCredentialsError:
            raise StoreError(
                f"{what}: no AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "AWS_PROFILE, or run with a role"
            ) from None
        except botocore.exceptions.BotoCoreError as error:
            raise StoreError(f"{what}: {error}") from None
        except OSError as error:
            raise StoreError(f"{what}: {error.strerror or error}") from None


def _hint(code: str) -> str:
    hints = {
        "NoSuchBucket": "no such bucket; check dynamic_lora_loading_path",
        "AccessDenied": "access denied; the credentials need s3:ListBucket and s3:GetObject",
        "403": "access denied; the credentials need s3:ListBucket and s3:GetObject",
        "InvalidAccessKeyId": "the access key is unknown to this endpoint",
        "SlowDown": "the store asks to slow down",
    }
    return hints.get(code, "the store refused the request")
