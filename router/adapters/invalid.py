"""Why an adapter is refused, in words fit for its owner: the field, what it is, and what is allowed.

What is shown of an adapter is written by whoever made it, so it is quoted and cut to a line's length.
"""

from typing import Final

SHOWN_MAX: Final = 160


class InvalidAdapterError(Exception):
    """The adapter cannot be served. The message is fit for the client to read."""


def shown(value: object) -> str:
    """A value of the adapter's, for a message."""
    text = repr(value[: SHOWN_MAX + 1] if isinstance(value, str) else value)
    return text if len(text) <= SHOWN_MAX else f"{text[:SHOWN_MAX]}..."
