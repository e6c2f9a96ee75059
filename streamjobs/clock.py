"""The three clocks; the only module that reads the time.

* The **server's** date decides: updates use ``$$NOW``. :class:`ServerClock` estimates it, to know what to
  ask for, when a timer should fire, and what to write as ``created`` or ``delay`` of an insert, which has
  no ``$$NOW``.
* The **boot** clock measures trust, sleeps and durations. It counts while the machine is suspended, where
  the system has such a clock (Linux); elsewhere it is the monotonic one.
* The **wall** clock of this host is believed only until the first reply of a server.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

_BOOT = getattr(time, "CLOCK_BOOTTIME", None)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def boot() -> float:
    """Seconds since some fixed moment, never set back, counting while the machine is suspended."""
    return time.monotonic() if _BOOT is None else time.clock_gettime(_BOOT)


def wall() -> float:
    """This host's idea of the date, in seconds since 1970 UTC; right only if the host's clock is."""
    return time.time()


def to_ms(moment: datetime) -> int:
    """A datetime as milliseconds since 1970 UTC, cut as BSON cuts it (a naive one is UTC there)."""
    delta = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH
    return (delta.days * 86_400 + delta.seconds) * 1000 + delta.microseconds // 1000


class ServerClock:
    """An estimate of the server's date, learnt from its replies.

    A sample is the server's ``localTime``, taken to be half a round trip old, tied to the boot clock; so a
    step of the host's clock does not move it. Samples older than :attr:`fresh` seconds want renewing.
    """

    fresh = 60.0

    def __init__(self) -> None:
        self._at = 0.0
        self._server_ms: float | None = None
        self._round_trip = 0.0

    def observe(self, sent: float, received: float, server_ms: float) -> None:
        """Take a sample: boot times of sending and receiving (seconds), the server's date (ms)."""
        trip = received - sent
        if self._server_ms is not None and received - self._at < self.fresh / 2 and trip > self._round_trip:
            return  # a recent sample with a shorter round trip is the better one
        self._at = received
        self._server_ms = server_ms + trip * 500
        self._round_trip = trip

    def heard(self, sent: float, hello: Mapping[str, Any]) -> None:
        """Take a sample from a reply to ``hello`` that has just come; boot time of its sending (seconds)."""
        local = hello.get("localTime")
        if isinstance(local, datetime):
            aware = local if local.tzinfo else local.replace(tzinfo=UTC)
            self.observe(sent, boot(), aware.timestamp() * 1000)

    @property
    def known(self) -> bool:
        """Whether there is a sample at all."""
        return self._server_ms is not None

    @property
    def stale(self) -> bool:
        """Whether there is no sample, or the last one is over a minute old."""
        return self._server_ms is None or boot() - self._at > self.fresh

    def now_ms(self) -> float:
        """The server's date now, in milliseconds since 1970 UTC; the host's before the first sample."""
        if self._server_ms is None:
            return wall() * 1000
        return self._server_ms + (boot() - self._at) * 1000

    def date(self) -> datetime:
        """The server's date now, cut to the millisecond that BSON keeps: what is written equals what is read back."""
        return _EPOCH + timedelta(milliseconds=int(self.now_ms()))

    def at_ms(self, boot_time: float) -> float:
        """The server's date at a moment of the boot clock, in milliseconds since 1970 UTC.

        By one sample the same whenever it is asked for, so that tries that began together are written alike.
        """
        if self._server_ms is None:
            return (wall() - boot() + boot_time) * 1000
        return self._server_ms + (boot_time - self._at) * 1000

    def offset_ms(self) -> float:
        """The server's date minus this host's, in milliseconds: how wrong the host's clock is."""
        return self.now_ms() - wall() * 1000
