"""Qwen's usage traces from Bailian, which vLLM's `timed_trace` was made for: JSON lines in seconds.

Rows name their chat and the chat that they go on from; those that start at one root are a session.
Each row counts its whole prompt, the history included, and hashes it 16 tokens a block.
"""

from collections import OrderedDict
from typing import Final

import msgspec

from sim.traces.jsonl import PER_UNIT_MS, Line, TimeUnit, decoded, row
from sim.traces.row import TraceRow

# A chat that nobody went on with for so many others is forgotten: what follows it is a new session.
CHATS_MAX: Final = 1 << 18


class ChatLine(Line, kw_only=True):
    """A line's fields, with the chat's."""

    chat_id: int
    parent_chat_id: int = -1


class Rows:
    """Reads lines, and remembers each chat's root."""

    def __init__(self) -> None:
        self._decode = msgspec.json.Decoder(ChatLine).decode
        self._roots: OrderedDict[int, int] = OrderedDict()

    def __call__(self, line: bytes) -> TraceRow:
        """One row. Raises `RowError`."""
        chat = decoded(self._decode, line)
        root = self._roots.get(chat.parent_chat_id, chat.chat_id)
        self._roots[chat.chat_id] = root
        if len(self._roots) > CHATS_MAX:
            self._roots.popitem(last=False)
        chat.session_id = root
        return row(chat, PER_UNIT_MS[TimeUnit.SECONDS])
