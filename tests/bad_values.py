"""What a caller may give by mistake or malice: one table of values, tried on every argument of every call."""

from __future__ import annotations

import enum
import re
import uuid
from collections import OrderedDict
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

from bson import DBRef, Decimal128, Int64, MaxKey, ObjectId, Regex, Timestamp
from bson.binary import Binary
from bson.code import Code
from bson.datetime_ms import DatetimeMS
from bson.raw_bson import RawBSONDocument
from bson.son import SON

MB = 1024 * 1024


class Text(str):
    """A subclass of str."""

    __slots__ = ()


class Number(int):
    """A subclass of int."""


class Real(float):
    """A subclass of float."""


class Document(dict[str, Any]):
    """A subclass of dict."""


class Moment(datetime):
    """A subclass of datetime."""


class Choice(enum.StrEnum):
    """A text that is an enum's."""

    MAIL = "mail"


class Level(enum.IntEnum):
    """A number that is an enum's."""

    TWO = 2


class Silent:
    """Its repr can't be made."""

    def __repr__(self) -> str:
        raise ValueError("no repr")


class Sly(str):
    """A text whose repr can't be made."""

    __slots__ = ()

    def __repr__(self) -> str:
        raise ValueError("no repr")


def nested(depth: int) -> dict[str, Any]:
    """Documents in documents."""
    out: dict[str, Any] = {}
    for _ in range(depth - 1):
        out = {"a": out}
    return out


def cycle() -> dict[str, Any]:
    """A document that contains itself."""
    out: dict[str, Any] = {}
    out["me"] = out
    return out


def lists(depth: int) -> list[Any]:
    """Lists in lists."""
    out: list[Any] = []
    for _ in range(depth - 1):
        out = [out]
    return out


#: By name. Texts, numbers, dates and documents first, then what no argument could want.
VALUES: dict[str, Any] = {
    "None": None,
    "True": True,
    "False": False,
    # texts
    "text": "mail",
    "empty text": "",
    "blank text": "  ",
    "$-text": "$data.secret",
    "$$-text": "$$ROOT",
    "dotted text": "a.b",
    "operator text": '{"$set": 1}',
    "NUL in text": "a\0b",
    "lone surrogate": "\ud800",
    "terminal escape": "\x1b[31m\u202ea",
    "200 characters": "é" * 200,
    "201 characters": "x" * 201,
    "17 MB text": "x" * (17 * MB),
    "str subclass": Text("mail"),
    "str enum": Choice.MAIL,
    "text without repr": Sly("mail"),
    "hex of an id": "0123456789abcdef01234567",
    # numbers
    "0": 0,
    "1": 1,
    "-1": -1,
    "2**31": 2**31,
    "2**63": 2**63,
    "-2**63": -(2**63),
    "10**400": 10**400,
    "-0.0": -0.0,
    "0.5": 0.5,
    "1.0": 1.0,
    "1e300": 1e300,
    "5e-324": 5e-324,
    "nan": float("nan"),
    "inf": float("inf"),
    "-inf": float("-inf"),
    "int subclass": Number(3),
    "float subclass": Real(3.5),
    "int enum": Level.TWO,
    "Int64": Int64(3),
    "complex": 1j,
    "Decimal": Decimal("1.5"),
    "Decimal nan": Decimal("NaN"),
    "Decimal128": Decimal128("1.5"),
    "text number": "5",
    # times
    "naive date": datetime(2030, 1, 1),  # noqa: DTZ001 - what is tried
    "date": datetime(2100, 1, 1, tzinfo=UTC),
    "past date": datetime(1970, 1, 1, tzinfo=UTC),
    "first date": datetime(1, 1, 1, tzinfo=UTC),
    "last date": datetime.max.replace(tzinfo=UTC),
    "before the first": datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=5))),
    "after the last": datetime(9999, 12, 31, 23, tzinfo=timezone(timedelta(hours=-5))),
    "datetime subclass": Moment(2100, 1, 1, tzinfo=UTC),
    "a day": date(2100, 1, 1),
    "DatetimeMS": DatetimeMS(4_102_444_800_000),
    "DatetimeMS far": DatetimeMS(2**60),
    "Timestamp": Timestamp(1, 1),
    "timedelta": timedelta(seconds=90),
    "negative timedelta": timedelta(seconds=-1),
    "longest timedelta": timedelta.max,
    # documents
    "empty dict": {},
    "dict": {"a": 1},
    "dict subclass": Document(a=1),
    "OrderedDict": OrderedDict(a=1),
    "SON": SON(a=1),
    "RawBSONDocument": RawBSONDocument(b"\x0c\0\0\0\x10a\0\x01\0\0\0\0"),
    "bad RawBSONDocument": RawBSONDocument(b"\x10\0\0\0\x02a\0\x04\0\0\0\xff\xfe\xfd\0\0"),
    "$-operator": {"$set": 1},
    "$-condition": {"$gt": ""},
    "$-expression": {"x": "$data.secret", "y": "$$ROOT", "z": {"$literal": 1}},
    "DBRef-like": {"$ref": "a", "$id": 1},
    "dotted key": {"a.b": 1},
    "empty key": {"": 1},
    "NUL in key": {"a\0b": 1},
    "surrogate in key": {"\ud800": 1},
    "surrogate inside": {"a": ["\ud800"]},
    "NUL inside": {"a": "b\0c"},
    "number as key": {1: 1},
    "None as key": {None: 1},
    "nan inside": {"a": float("nan")},
    "huge int inside": {"a": 2**70},
    "naive date inside": {"a": datetime(2030, 1, 1)},  # noqa: DTZ001 - what is tried
    "set inside": {"a": {1}},
    "object inside": {"a": object()},
    "bytes inside": {"a": b"\0\xff"},
    "uuid inside": {"a": uuid.UUID(int=1)},
    "subclasses inside": {"a": Text("b"), "b": Number(1), "c": Document(d=1)},
    "nested 80": nested(80),
    "nested 200": nested(200),
    "nested 20,000": nested(20_000),
    "lists nested 200": {"a": lists(200)},
    "cycle": cycle(),
    "17 MB inside": {"a": b"x" * (17 * MB)},
    "100,000 keys": {str(n): n for n in range(100_000)},
    # other
    "bytes": b"mail",
    "bytearray": bytearray(b"mail"),
    "Binary": Binary(b"mail", 5),
    "list": ["mail"],
    "empty list": [],
    "tuple": ("mail",),
    "set": {"mail"},
    "range": range(3),
    "ObjectId": ObjectId("0123456789abcdef01234567"),
    "UUID": uuid.UUID(int=1),
    "Regex": Regex("^m"),
    "pattern": re.compile("^m"),
    "Code": Code("1"),
    "DBRef": DBRef("a", 1),
    "MaxKey": MaxKey(),
    "function": len,
    "class": dict,
    "module": re,
    "exception": ValueError("no"),
    "object": object(),
    "no repr": Silent(),
    "ellipsis": ...,
}
