"""Signals to a supervisor: handed on in order, never lost, and nothing is left behind."""

import os
import queue
import signal
import threading

import pytest

from streamjobs.cli.processes import caught
from tests.command import processes
from tests.supervised import fleet, fleet_place, nothing_left, put, stopped_in


@pytest.fixture
def here(tmp_path, uri, namespace):
    with fleet_place(tmp_path, uri, namespace) as place:
        yield place


def test_a_signal_while_processes_start_stops_all(here):
    one = here.run("--processes", "2", "--name", "fleet")
    one.events("process.started")
    one.signal(signal.SIGTERM)
    assert one.wait() == 0
    nothing_left(one)


def test_a_signal_that_another_thread_was_given_is_noted_while_the_main_thread_waits():
    """Python would call a handler in the main thread, whose wait such a signal does not end."""
    noted, waiting = queue.SimpleQueue(), queue.SimpleQueue()

    def take():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        waiting.get()  # goes on when the main thread lets go of the interpreter: in its wait
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        with caught((signal.SIGUSR1,), noted.put):
            other = threading.Thread(target=take)
            other.start()
            waiting.put(None)
            assert noted.get(timeout=20) == signal.SIGUSR1
            other.join()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert not [thread for thread in threading.enumerate() if thread.name == "signals"]


def test_a_second_signal_cancels_the_handlers(here, raw):
    one = fleet(here)
    (id_,) = put(raw, here, "long")
    one.events("begun")
    one.signal(signal.SIGTERM)
    one.events("runner.stopping", count=2)
    one.signal(signal.SIGINT)
    one.events("handler.cancelled")
    assert one.wait() == 0
    job = raw.find_one({"_id": id_})
    assert (job["status"], job["tries"][0]["outcome"]) == (1, "interrupted")


def test_a_third_signal_ends_all(here, raw):
    one = fleet(here)
    put(raw, here, "frozen")
    one.events("begun")
    one.signal(signal.SIGTERM)
    one.events("supervisor.stopping")
    one.signal(signal.SIGTERM)
    one.signal(signal.SIGINT)  # two of one sort might be delivered as one
    assert one.wait() in {128 + signal.SIGINT, 128 + signal.SIGTERM}
    nothing_left(one)


@pytest.mark.parametrize(("kind", "code"), [("stuck", 1), ("frozen", 128 + signal.SIGKILL)])
def test_stop_is_over_within_its_deadline_and_a_second(here, raw, kind, code):
    one = fleet(here, "--stop-deadline", "1")
    put(raw, here, kind)
    one.events("begun")
    one.signal(signal.SIGTERM)
    assert one.wait() == code  # the worst of both
    assert 1 <= stopped_in(one) <= 2
    nothing_left(one)


def test_a_supervisor_that_is_killed_takes_its_processes_along(here):
    one = fleet(here)
    assert len(processes(here._place["collection"])) == 3
    one.process.kill()
    one.wait()
    nothing_left(one)
