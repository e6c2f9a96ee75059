"""The simulation says what the design promises."""

from __future__ import annotations

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


def test_a_fleet_that_is_nearly_full_passes_jobs_on_and_one_that_is_full_leaves_them_be():
    nearly, full = (Simulation("slots", 64, share * 3_200, 0.2, 2.0).run() for share in (0.95, 1.1))
    assert nearly.passed > 0.2
    assert nearly.tried <= 1.1
    assert full.passed < nearly.passed
    assert full.asked < nearly.asked
