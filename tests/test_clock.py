"""The estimate of the server's clock, and dates as milliseconds."""

from __future__ import annotations

import calendar
from datetime import UTC, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import bson
import pytest
from bson import DatetimeMS
from hypothesis import given
from hypothesis import strategies as st

from streamjobs import ASAP, clock
from streamjobs.clock import ServerClock, boot, to_ms, wall
from streamjobs.job import ASAP_MS, MS_CODEC


class Times:
    """The two clocks of a host, in a test's hand."""

    def __init__(self, patch: pytest.MonkeyPatch, *, at: float = 1_000.0, host: float = 1.7e9) -> None:
        self.at, self.host = at, host
        patch.setattr(clock, "boot", lambda: self.at)
        patch.setattr(clock, "wall", lambda: self.host)

    def passes(self, seconds: float) -> None:
        self.at += seconds
        self.host += seconds


@pytest.fixture
def times(monkeypatch):
    return Times(monkeypatch)


def test_a_moment_has_one_date_by_one_sample_however_long_the_asking_takes(monkeypatch):
    """Guard: ``at_ms`` asks no clock. Tries that began together would else be written one by one, now and then."""
    one, ticks = ServerClock(), iter(range(1_000))
    one.observe(10.0, 10.0, 5_000.0)
    monkeypatch.setattr(clock, "boot", lambda: 20.0 + next(ticks))
    assert {one.at_ms(12.5) for _ in range(10)} == {7_500.0}


_spans = st.floats(0, 50, allow_nan=False)


@given(
    st.floats(-1e9, 1e9),
    st.lists(
        st.tuples(_spans, st.floats(0, 5), st.floats(0, 1), st.sampled_from([0, -300, 300])),
        min_size=1,
        max_size=12,
    ),
)
def test_the_estimate_is_wrong_by_at_most_half_a_round_trip_whatever_the_hosts_clock_does(offset, samples):
    with pytest.MonkeyPatch.context() as patch:
        times, one = Times(patch), ServerClock()
        trips = []
        for wait, trip, part, step in samples:
            times.passes(wait)
            sent = times.at
            times.passes(trip * part)
            server = (times.at + offset) * 1000
            times.passes(trip * (1 - part))
            one.observe(sent, times.at, server)
            trips.append(trip)
            times.host += step  # somebody sets the host's clock
            truth = (times.at + offset) * 1000
            assert abs(one.now_ms() - truth) <= max(trips) * 500 + 0.5
            assert abs(one.at_ms(times.at - 7) - (truth - 7_000)) <= max(trips) * 500 + 0.5
            assert abs(one.offset_ms() - (truth - times.host * 1000)) <= max(trips) * 500 + 0.5


@pytest.mark.parametrize("step", [-300, 300])
def test_a_step_of_the_hosts_clock_does_not_move_the_estimate(times, step):
    one = ServerClock()
    one.observe(times.at, times.at, 5_000)
    before = one.now_ms()
    times.host += step
    assert one.now_ms() == before
    times.passes(3)
    assert one.now_ms() == pytest.approx(before + 3_000)
    assert one.offset_ms() == pytest.approx(before + 3_000 - times.host * 1000)


def test_before_the_first_sample_the_hosts_clock_is_believed(times):
    one = ServerClock()
    assert not one.known
    assert one.stale
    assert one.now_ms() == times.host * 1000
    assert one.offset_ms() == 0


def test_a_sample_is_stale_after_a_minute(times):
    one = ServerClock()
    one.observe(times.at, times.at, 5_000)
    assert one.known
    assert not one.stale
    times.passes(60)
    assert not one.stale
    times.passes(0.001)
    assert one.stale
    assert one.known
    one.observe(times.at, times.at, 70_000)
    assert not one.stale


def test_a_recent_sample_with_a_shorter_round_trip_is_kept_for_half_a_minute(times):
    one = ServerClock()
    one.observe(times.at - 0.01, times.at, 100_000)
    times.passes(29)
    one.observe(times.at - 1, times.at, 500_000)
    assert one.now_ms() == pytest.approx(100_005 + 29_000)
    one.observe(times.at - 0.005, times.at, 600_000)
    assert one.now_ms() == pytest.approx(600_002.5)
    times.passes(30)
    one.observe(times.at - 1, times.at, 700_000)
    assert one.now_ms() == pytest.approx(700_500)


@pytest.mark.parametrize(
    ("moment", "ms"),
    [
        (datetime(1, 1, 1, tzinfo=UTC), -62_135_596_800_000),
        (datetime(1, 1, 1, 0, 0, 0, 999, tzinfo=UTC), -62_135_596_800_000),
        (datetime(1, 1, 1, 0, 0, 0, 1_000, tzinfo=UTC), -62_135_596_799_999),
        (datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC), 253_402_300_799_999),
        (datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC), -1),
        (datetime(1970, 1, 1, tzinfo=UTC), 0),
        (datetime(2026, 1, 1, 0, 0, 0, 999, tzinfo=UTC), 1_767_225_600_000),
        (datetime(1, 1, 1, 5, tzinfo=timezone(timedelta(hours=5))), -62_135_596_800_000),
        (datetime(2026, 7, 1, 2, tzinfo=ZoneInfo("Europe/Berlin")), 1_782_864_000_000),
    ],
)
def test_a_date_is_cut_to_milliseconds_at_both_ends_of_the_calendar(moment, ms):
    assert to_ms(moment) == ms
    assert to_ms(ASAP) == ASAP_MS


@given(
    st.datetimes(min_value=datetime(1, 1, 3), max_value=datetime(9999, 12, 29)),  # noqa: DTZ001 - hypothesis wants naive ones
    st.integers(-1439, 1439),
)
def test_a_date_in_any_zone_has_the_milliseconds_that_bson_gives_it(naive, minutes):
    moment = naive.replace(tzinfo=timezone(timedelta(minutes=minutes)))
    (stored,) = bson.decode(bson.encode({"": moment}), MS_CODEC).values()
    assert stored == DatetimeMS(to_ms(moment))
    utc = naive.replace(tzinfo=UTC)
    assert to_ms(utc) == calendar.timegm(utc.timetuple()) * 1000 + naive.microsecond // 1000
    assert to_ms(naive) == to_ms(utc)


def test_the_two_clocks_of_the_host_go_forward():
    first = boot()
    assert boot() >= first
    assert abs(wall() - datetime.now(UTC).timestamp()) < 5
