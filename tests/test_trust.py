"""Trust in one's own lease, and the settings that it follows from."""

from __future__ import annotations

import pytest

from streamjobs import BadArgument, ConfigError, Settings
from streamjobs.clock import boot
from streamjobs.runner.lease import Trust


def test_trust_ends_margin_before_the_lease_counted_from_the_sending():
    trust = Trust(Settings(lease=10, beat=1, margin=2))
    assert not trust.holds()
    trust.renewed("me", boot() - 7.5, "primary")
    assert trust.holds("me")
    assert not trust.holds("another")
    trust.renewed("me", boot() - 8.1, "primary")
    assert not trust.holds("me")


def test_a_failure_or_another_primary_forbids_fencing_for_a_beat_and_margin():
    trust = Trust(Settings(lease=10, beat=1, margin=2))
    trust.renewed("me", boot() - 3.5, "first")
    assert trust.may_fence()
    trust.failed()
    assert not trust.may_fence()
    trust.renewed("me", boot() - 2.5, "first")
    assert not trust.may_fence()
    trust.renewed("me", boot(), "first")
    trust.fence_from = boot()
    assert trust.may_fence()
    trust.renewed("me", boot(), "second")
    assert not trust.may_fence()


@pytest.mark.parametrize("bad", [{"lease": 3, "beat": 1, "margin": 1}, {"lease": 10, "beat": 5}])
def test_lease_beat_and_margin_are_checked_together(bad):
    with pytest.raises(ConfigError, match="three beats"):
        Settings(**bad)


def test_settings_refuse_what_is_no_time():
    with pytest.raises(BadArgument, match="beat"):
        Settings(beat=float("nan"))
