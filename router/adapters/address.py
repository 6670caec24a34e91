"""What the path of a store may look like, checked before anything is imported or opened.

A configuration is checked with it, in the simulator too, so it knows no client library.
"""

import ipaddress
import re
from typing import Final
from urllib.parse import urlsplit

SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# scheme -> (what the rest must look like, what to write)
KINDS: Final = {
    # Old buckets of S3 itself, and other servers', have letters that a new one may not have.
    "s3": (r"[A-Za-z0-9][A-Za-z0-9._-]+(/[^?#]*)?(\?.*)?", "s3://BUCKET/PREFIX"),
    "gs": (r"[a-z0-9][a-z0-9._-]+(/[^?#]*)?", "gs://BUCKET/PREFIX"),
    "az": (r"[a-z0-9$][a-z0-9-]*(/[^?#]*)?", "az://CONTAINER/PREFIX"),
    "https": (r"[^/?#@\s]+(/[^?#]*)?", "https://HOST/PATH, without a password in it"),
    "http": (r"[^/?#@\s]+(/[^?#]*)?", "http://127.0.0.1:PORT/PATH"),
    "hf": (
        r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(/[\w./-]*)?(@[\w./-]+)?",
        "hf://ORG/REPO[/FOLDER][@REVISION]",
    ),
}
LOOPBACK: Final = "localhost"


def problem_with(path: str) -> str | None:
    """What is wrong with the path or URL of a store, and what to write; None if it can be one."""
    found = SCHEME.match(path)
    if found is None:
        return None if path else "`` names no store; write a folder or one of " + _known()
    kind = KINDS.get(found[1])
    if kind is None:
        return f"`{found[1]}://` is not known; write a folder or one of {_known()}"
    pattern, what_to_write = kind
    if not re.fullmatch(pattern, path[found.end() :]):
        shown = re.sub(r"//[^/@]*@", "//***@", path)  # a password is repeated nowhere
        return f"`{shown}` names no store; write {what_to_write}"
    if found[1] == "http" and not _is_loopback(urlsplit(path).hostname or ""):
        return (
            f"`{path}` would bring adapters unprotected over a network; write https://, "
            "or http:// to a server on this machine (127.0.0.1)"
        )
    return None


def _known() -> str:
    return ", ".join(f"{scheme}://" for scheme in KINDS)


def _is_loopback(host: str) -> bool:
    try:
        return host == LOOPBACK or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
