"""MongoDB's framing: messages as bytes, and what has to be known of them.

OP_MSG with its document sequences, and the OP_QUERY of a driver's first ``hello`` with its OP_REPLY. Whatever is
passed through stays the bytes that it was.
"""

from __future__ import annotations

import asyncio
import itertools
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import bson
from bson.codec_options import CodecOptions, DatetimeConversion

OP_REPLY, OP_QUERY, OP_MSG = 1, 2004, 2013
CHECKSUM, MORE_TO_COME, EXHAUST_ALLOWED = 1 << 0, 1 << 1, 1 << 16
HELLO = frozenset({"hello", "ismaster", "isMaster"})

_HEADER = struct.Struct("<iiii")
_INT = struct.Struct("<i")
_UINT = struct.Struct("<I")
_CODEC: CodecOptions[dict[str, Any]] = CodecOptions(datetime_conversion=DatetimeConversion.DATETIME_MS)
_ids = itertools.count(1)


@dataclass(frozen=True)
class Message:
    """One message as it was on the wire."""

    raw: bytes

    @property
    def id(self) -> int:
        """What its reply names."""
        return _INT.unpack_from(self.raw, 4)[0]

    @property
    def reply_to(self) -> int:
        """The id of the request that this answers."""
        return _INT.unpack_from(self.raw, 8)[0]

    @property
    def opcode(self) -> int:
        """OP_MSG, or OP_QUERY."""
        return _INT.unpack_from(self.raw, 12)[0]

    @property
    def flags(self) -> int:
        """Of an OP_MSG."""
        return _UINT.unpack_from(self.raw, 16)[0] if self.opcode == OP_MSG else 0

    @cached_property
    def name(self) -> str:
        """The command's name; every form of ``hello`` is "hello"."""
        if self.opcode == OP_MSG and self.raw[20] == 0:  # the first key of the body, without decoding it
            name = self.raw[26 : self.raw.index(b"\0", 26)].decode()
        else:
            name = next(iter(self.document))
        return "hello" if name in HELLO else name

    @cached_property
    def document(self) -> dict[str, Any]:
        """The command or reply, with its document sequences as arrays; dates are DatetimeMS."""
        if self.opcode == OP_QUERY:
            return bson.decode(self.raw[self.raw.index(b"\0", 20) + 9 :][: self._query_size], _CODEC)
        body: dict[str, Any] = {}
        sequences: dict[str, Any] = {}
        at, end = 20, len(self.raw) - (4 if self.flags & CHECKSUM else 0)
        while at < end:
            kind = self.raw[at]
            size = _INT.unpack_from(self.raw, at + 1)[0]
            section = self.raw[at + 1 : at + 1 + size]
            if kind == 0:
                body = bson.decode(section, _CODEC)
            else:
                close = section.index(b"\0", 4)
                sequences[section[4:close].decode()] = bson.decode_all(section[close + 1 :], _CODEC)
            at += 1 + size
        return {**body, **sequences}

    @property
    def _query_size(self) -> int:
        return _INT.unpack_from(self.raw, self.raw.index(b"\0", 20) + 9)[0]

    def again(self) -> Message:
        """The same request under an id of its own."""
        return Message(self.raw[:4] + _INT.pack(-next(_ids)) + self.raw[8:])

    def reply(self, document: Mapping[str, Any], *, flags: int = 0, to: int | None = None) -> Message:
        """An answer to this request, in the form that it takes."""
        answers = self.id if to is None else to
        if self.opcode == OP_QUERY:
            head = struct.pack("<iqii", 8, 0, 0, 1)  # awaitable; no cursor; from 0; one document
            return _message(OP_REPLY, head + bson.encode(document), answers)
        return _message(OP_MSG, _UINT.pack(flags) + b"\0" + bson.encode(document), answers)


def request(document: Mapping[str, Any]) -> Message:
    """A command of our own."""
    return _message(OP_MSG, _UINT.pack(0) + b"\0" + bson.encode(document), 0)


async def read(reader: asyncio.StreamReader) -> Message | None:
    """The next message, or None at the end of the connection."""
    try:
        size = await reader.readexactly(4)
        return Message(size + await reader.readexactly(_INT.unpack(size)[0] - 4))
    except (asyncio.IncompleteReadError, OSError):
        return None


def _message(opcode: int, body: bytes, reply_to: int) -> Message:
    return Message(_HEADER.pack(16 + len(body), next(_ids), reply_to, opcode) + body)
