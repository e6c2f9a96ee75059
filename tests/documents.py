"""Documents as programs store them, and the date of the server that holds them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from bson import Int64, ObjectId

from streamjobs import ASAP

START = datetime(2026, 1, 2, tzinfo=UTC)
FAR = datetime(2126, 1, 1, tzinfo=UTC)


def server_now(raw: Any) -> datetime:
    return raw.database.client.admin.command("hello")["localTime"].replace(tzinfo=UTC)


def stored(raw: Any, **fields: Any) -> Any:
    """Insert a document as another program might have; its id."""
    document = {
        "_id": ObjectId(), "status": 1, "tries": [], "created": datetime(2026, 1, 1, tzinfo=UTC), "runat": ASAP, "data": {},
        "retries": 0, "retryinterval": Int64(0), "kind": "mail", **fields,
    }  # fmt: skip
    raw.insert_one(document)
    return document["_id"]


def plain(**fields: Any) -> dict[str, Any]:
    """A stored job; what is None is left out."""
    document = {
        "_id": ObjectId(), "status": 1, "tries": [], "created": START, "runat": ASAP, "data": {"secret": "s3cret"},
        "retries": 0, "retryinterval": Int64(0), "kind": "mail", **fields,
    }  # fmt: skip
    return {key: value for key, value in document.items() if value is not None}
