"""The simulation says what the design promises; it takes the extra ``bench``."""

from __future__ import annotations

import pytest

pytest.importorskip("simpy")

from benchmarks.simulate import Simulation, killed


def test_slots_keep_events_and_claims_flat_where_listening_to_all_does_not():
    slots, herd = (Simulation(mode, 64, 500.0, 0.02, 2.0).run() for mode in ("slots", "all"))
    assert slots.told <= 2.5
    assert slots.tried <= 1.1
    assert herd.told == 64
    assert herd.tried > 32


def test_a_dead_quarter_delays_only_the_slots_that_lost_both_beyond_the_watchers_look():
    after = killed()
    assert after.worst_ms <= 31_000
    assert after.p50_ms <= 10
