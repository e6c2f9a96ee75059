"""A runner's settings are checked once, together, by name."""

from __future__ import annotations

import dataclasses
import math
import os
import socket

import pytest

from streamjobs import BadArgument, ConfigError, Queue, Settings, StreamJobsError
from streamjobs.settings import Choices

SPANS = ["interval", "stop_deadline", "lease", "beat", "margin", "poll", "stream_wait"]


def test_the_defaults_are_what_the_design_says():
    one = Settings()
    assert (one.interval, one.lease, one.beat, one.margin, one.poll) == (30.0, 30.0, 5.0, 2.0, None)
    assert one.period == 30.0
    assert Settings(poll=0.5).period == 0.5


@pytest.mark.parametrize("name", SPANS)
@pytest.mark.parametrize("value", [-1, -0.001, math.nan, math.inf, -math.inf, 86_401, True, "5", [5]])
def test_a_span_that_cannot_be_one_is_refused_by_name(name, value):
    with pytest.raises(BadArgument, match=f"^{name}: give seconds from ") as caught:
        Settings(**{name: value})
    assert caught.value.name == name


@pytest.mark.parametrize("name", [name for name in SPANS if name != "poll"])
def test_only_poll_may_be_none(name):
    with pytest.raises(BadArgument, match=f"^{name}: "):
        Settings(**{name: None})
    assert Settings(poll=None).poll is None


@pytest.mark.parametrize("name", ["interval", "lease", "beat", "poll", "stream_wait"])
def test_these_may_not_be_zero(name):
    with pytest.raises(BadArgument, match=f"^{name}: "):
        Settings(**{name: 0})


@pytest.mark.parametrize("name", ["stop_deadline", "margin"])
def test_these_may_be_zero(name):
    assert getattr(Settings(**{name: 0}), name) == 0


@pytest.mark.parametrize("value", [0, -1, 10_001, True, 1.5, "5", None, math.nan])
def test_a_concurrency_that_cannot_be_one_is_refused(value):
    with pytest.raises(BadArgument, match=r"^concurrency: give a whole number from 1 to 10000"):
        Settings(concurrency=value)


@pytest.mark.parametrize("value", [1, 10_000])
def test_the_ends_of_concurrency_are_taken(value):
    assert Settings(concurrency=value).concurrency == value


@pytest.mark.parametrize(
    ("lease", "beat", "margin"), [(16.9, 5, 2), (30, 10, 2), (30, 5, 16), (0.5, 0.2, 0.1)]
)
def test_a_lease_shorter_than_three_beats_and_the_margin_is_refused(lease, beat, margin):
    with pytest.raises(ConfigError, match="at least three beats and the margin"):
        Settings(lease=lease, beat=beat, margin=margin)


@pytest.mark.parametrize(("lease", "beat", "margin"), [(17, 5, 2), (30, 10, 0), (0.7, 0.2, 0.1)])
def test_a_lease_of_three_beats_and_the_margin_is_taken(lease, beat, margin):
    assert Settings(lease=lease, beat=beat, margin=margin).lease == lease


def test_settings_are_frozen_keywords_and_known():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().lease = 5  # type: ignore[misc]
    with pytest.raises(TypeError):
        Settings(5)  # type: ignore[misc]
    with pytest.raises(TypeError):
        Settings(intervall=5)  # type: ignore[call-arg]


def test_the_choices_are_the_settings():
    fields = {one.name: one.type for one in dataclasses.fields(Settings)}
    assert {name: one.__forward_arg__ for name, one in Choices.__annotations__.items()} == fields


async def test_a_setting_that_there_is_not_is_refused_with_the_nearest():
    queue = Queue("mongodb://127.0.0.1:1/", "app.jobs")
    queue.handler("mail")(lambda job: None)
    with pytest.raises(
        BadArgument, match=r"^concurency: did you mean concurrency\? there are concurrency, inter"
    ):
        queue.runner("w", concurency=5)  # type: ignore[call-arg]
    with pytest.raises(BadArgument, match=r"^lost: there are concurrency, "):
        async with queue.running(lost=5):  # type: ignore[call-arg]
            pass


def test_a_runner_without_a_name_is_called_by_host_and_process():
    queue = Queue("mongodb://127.0.0.1:1/", "app.jobs")
    queue.handler("mail")(lambda job: None)
    assert queue.runner().name == f"{socket.gethostname()}-{os.getpid()}"[-190:]


def test_a_runners_settings_are_checked_when_it_is_made():
    queue = Queue("mongodb://127.0.0.1:1/", "app.jobs")
    queue.handler("mail")(lambda job: None)
    with pytest.raises(StreamJobsError):
        queue.runner("worker", lease=1)
    with pytest.raises(BadArgument, match=r"^concurrency: "):
        queue.runner("worker", concurrency=0)
