"""Adapters in S3, or anything that speaks its protocol (`AWS_ENDPOINT_URL`), through boto3.

Credentials, region and endpoint are found as every AWS tool finds them. Retries are the caller's,
so that one bound holds for the whole download, and boto3's own are off. So is boto3's verification:
it sees ranges, and what is verified is the whole file.
"""

import base64
import binascii
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, urlsplit

import boto3
import botocore.config
import botocore.exceptions

from router.adapters.checksum import Algorithm, Checksum, is_computable
from router.adapters.store import (
    CHUNK_BYTES,
    CONNECT_TIMEOUT_S,
    READ_TIMEOUT_S,
    AdapterGoneError,
    StoredAdapter,
    StoredFile,
    StoreError,
    is_name,
    may_pass,
    seconds_of,
    stored_adapter,
)
from router.config import CONNECTIONS_MAX

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

GONE: Final = {"NoSuchKey", "404", "PreconditionFailed", "412"}
MD5: Final = re.compile(r"[0-9a-f]{32}")
# The best first. S3 has other kinds too, of parts and not of the whole.
CHECKSUMS: Final = (
    ("ChecksumSHA256", Algorithm.SHA256),
    ("ChecksumCRC64NVME", Algorithm.CRC64NVME),
    ("ChecksumCRC32C", Algorithm.CRC32C),
    ("ChecksumCRC32", Algorithm.CRC32),
)
REQUESTER_PAYS: Final = {"true": True, "false": False}


class S3Store:
    """`s3://bucket/prefix`, one sub-folder an adapter; listed `page_size` objects at a time.

    `?requester_pays=true` after the prefix has the reader's account pay for what is read, which such
    buckets demand.
    """

    def __init__(self, url: str, *, page_size: int = 1000) -> None:
        self._page_size = page_size
        parts = urlsplit(url)
        self.url = f"s3://{parts.netloc}{parts.path}".rstrip("/")
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        pays = REQUESTER_PAYS.get(options.pop("requester_pays", "false"))
        if options or pays is None:
            raise StoreError(
                f"{url}: `?{parts.query}` is not known; write ?requester_pays=true, or nothing"
            )
        self._extra: dict[str, Any] = {"RequestPayer": "requester"} if pays else {}
        self._bucket = parts.netloc
        prefix = parts.path.strip("/")
        self._prefix = f"{prefix}/" if prefix else ""
        config = botocore.config.Config(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            max_pool_connections=CONNECTIONS_MAX,
            retries={"total_max_attempts": 1},
            response_checksum_validation="when_required",
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
        found = (stored_adapter(name, files[name]) for name in sorted(files))
        return {adapter.name: adapter for adapter in found if adapter is not None}

    def find(self, name: str) -> StoredAdapter | None:
        """List one adapter's sub-folder."""
        if not is_name(name):
            return None
        files = [file for _, file in self._objects(f"{self._prefix}{name}/")]
        return stored_adapter(name, files)

    def read(
        self, adapter: StoredAdapter, file: StoredFile, start: int, stop: int
    ) -> Iterator[bytes]:
        """Get a range, only if the object is still the one that was listed."""
        extra = dict(self._extra)
        if (start, stop) != (0, file.size):
            extra["Range"] = f"bytes={start}-{stop - 1}"
        with self._translated(self._url_of(adapter, file)):
            answer = self._client.get_object(
                Bucket=self._bucket, Key=self._key(adapter, file), IfMatch=file.tag, **extra
            )
            with closing(answer["Body"]) as body:
                while chunk := body.read(CHUNK_BYTES):
                    yield chunk

    def checksum(self, adapter: StoredAdapter, file: StoredFile) -> Checksum | None:
        """Return the checksum of the whole object, or its ETag where that is the MD5 of its content."""
        with self._translated(self._url_of(adapter, file)):
            head = self._client.head_object(
                Bucket=self._bucket,
                Key=self._key(adapter, file),
                IfMatch=file.tag,
                ChecksumMode="ENABLED",
                **self._extra,
            )
        if head.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT":
            for field, algorithm in CHECKSUMS:
                value = _hex(str(head.get(field, "")))
                if value and is_computable(algorithm):
                    return Checksum(algorithm, value)
        tag = file.tag.strip('"').lower()
        # With a key of KMS or of the customer's own the ETag is of the encrypted content.
        keyed = head.get("SSEKMSKeyId") or head.get("SSECustomerAlgorithm")
        return Checksum(Algorithm.MD5, tag) if MD5.fullmatch(tag) and not keyed else None

    def _key(self, adapter: StoredAdapter, file: StoredFile) -> str:
        return f"{self._prefix}{adapter.name}/{file.name}"

    def _url_of(self, adapter: StoredAdapter, file: StoredFile) -> str:
        return f"{self.url}/{adapter.name}/{file.name}"

    def _objects(self, prefix: str) -> Iterator[tuple[str, StoredFile]]:
        """Yield (adapter's name, file) for every object two levels under the store's prefix."""
        with self._translated(self.url):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket,
                Prefix=prefix,
                PaginationConfig={"PageSize": self._page_size},
                **self._extra,
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
            answer = error.response.get("ResponseMetadata", {})
            headers = answer.get("HTTPHeaders", {})
            raise StoreError(
                f"{what}: {code}: {_hint(code)}",
                passing=may_pass(int(answer.get("HTTPStatusCode", 0))),
                retry_after_s=seconds_of(headers.get("retry-after")),
            ) from None
        except botocore.exceptions.NoCredentialsError:
            raise StoreError(
                f"{what}: no AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "AWS_PROFILE, or run with a role",
                passing=False,
            ) from None
        except botocore.exceptions.BotoCoreError as error:
            raise StoreError(f"{what}: {error}") from None
        except OSError as error:
            raise StoreError(f"{what}: {error.strerror or error}") from None


def _hex(value: str) -> str:
    """S3 writes checksums in base64; that of a composite has a dash and is none of the whole."""
    try:
        return base64.b64decode(value, validate=True).hex()
    except (binascii.Error, ValueError):
        return ""


def _hint(code: str) -> str:
    hints = {
        "NoSuchBucket": "no such bucket; check dynamic_lora_loading_path",
        "AccessDenied": "access denied; the credentials need s3:ListBucket and s3:GetObject",
        "403": "access denied; the credentials need s3:ListBucket and s3:GetObject",
        "InvalidAccessKeyId": "the access key is unknown to this endpoint",
        "SlowDown": "the store asks to slow down",
    }
    return hints.get(code, "the store refused the request")
