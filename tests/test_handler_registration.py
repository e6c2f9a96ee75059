"""Registering handlers: what is a coroutine function, and what is refused and when."""

from __future__ import annotations

import functools
import math
from datetime import timedelta

import pytest

from streamjobs import BadArgument, Cancel, Handler, HandlerError, Job, Queue, Snooze
from streamjobs.check import seconds
from streamjobs.handler import is_async

# ---- async or not


async def coroutine_function(job): ...
def plain_function(job): ...


class Object:
    async def __call__(self, job): ...
    async def method(self, job): ...
    def plain(self, job): ...
    @staticmethod
    async def static(job): ...
    @classmethod
    async def of_class(cls, job): ...


class PlainObject:
    def __call__(self, job): ...


@functools.wraps(coroutine_function)
async def wrapping(job): ...
@functools.wraps(coroutine_function)
def wrapping_plain(job): ...


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (coroutine_function, True),
        (plain_function, False),
        (functools.partial(coroutine_function), True),
        (functools.partial(functools.partial(coroutine_function)), True),
        (functools.partial(plain_function), False),
        (Object(), True),
        (functools.partial(Object()), True),
        (Object().method, True),
        (functools.partial(Object().method), True),
        (Object().plain, False),
        (Object.static, True),
        (Object.of_class, True),
        (PlainObject(), False),
        (wrapping, True),
        (wrapping_plain, False),
        (lambda job: None, False),
        (print, False),
    ],
    ids=lambda value: getattr(value, "__qualname__", None),
)
def test_coroutine_functions_are_told_from_others_behind_partials_methods_and_objects(function, wanted):
    assert is_async(function) is wanted
    if function is not print:
        handler = Handler.of("mail", function)
        assert handler.asynchronous is wanted
        job = Job.new("mail")
        assert handler.arguments(job) == ((), {"job": job})


# ---- registration


def star(*args): ...
def star_after(a: int, *more: int): ...
def unknown(a: NoSuchType): ...  # noqa: F821
def unknown_attribute(a: math.NoSuchThing): ...
def no_expression(a: "not an expression("): ...
def raises(a: 1 / 0): ...


@pytest.mark.parametrize("function", [star, star_after])
def test_star_parameters_are_refused_when_registered(function):
    with pytest.raises(HandlerError, match=r"handler of 'mail': \*(args|more) can't be filled"):
        Handler.of("mail", function)


@pytest.mark.parametrize("function", [unknown, unknown_attribute, no_expression, raises])
def test_an_annotation_that_cannot_be_resolved_is_refused_when_registered(function):
    with pytest.raises(HandlerError, match="handler of 'mail': its parameters can't be read"):
        Handler.of("mail", function)


@pytest.mark.parametrize("function", [None, 5, "mail", [print]])
def test_what_cannot_be_called_is_no_handler(function):
    with pytest.raises(BadArgument, match=r"^handler: "):
        Handler.of("mail", function)


@pytest.mark.parametrize("retries", [-1, 2**31, True, 1.5, "5", None, math.nan])
def test_a_handlers_retries_are_checked_when_registered(retries):
    with pytest.raises(BadArgument, match=r"^retries: "):
        Handler.of("mail", plain_function, retries=retries)


@pytest.mark.parametrize(
    "value", [-1, math.nan, math.inf, True, "5", None, timedelta(seconds=-1), 10**12, [1]]
)
def test_spans_are_checked(value):
    with pytest.raises(BadArgument, match=r"^retry_interval: "):
        Handler.of("mail", plain_function, retry_interval=value)
    with pytest.raises(BadArgument, match=r"^delay: "):
        Snooze(value)
    queue = Queue("mongodb://127.0.0.1:1/", "app.jobs")
    with pytest.raises(BadArgument, match=r"^retry_interval: "):
        queue.handler("mail", retry_interval=value)(plain_function)
    assert not queue.handlers


@pytest.mark.parametrize("value", [0, 5, 0.25, timedelta(minutes=2), timedelta(0), 100 * 365 * 86_400])
def test_a_span_is_a_number_of_seconds_or_a_timedelta(value):
    wanted = value.total_seconds() if isinstance(value, timedelta) else value
    assert seconds("x", value) == wanted
    snooze = Snooze(value)
    assert snooze.delay == wanted
    assert isinstance(snooze.delay, float)
    assert Handler.of("mail", plain_function, retry_interval=value).retry_interval == wanted


@pytest.mark.parametrize("reason", [None, 5, b"x"])
def test_a_cancels_reason_is_a_text(reason):
    with pytest.raises(BadArgument, match=r"^reason: "):
        Cancel(reason)
    assert Cancel().reason == ""
    assert Cancel("why").reason == "why"


def test_a_kind_has_one_handler_and_the_function_is_handed_back():
    queue = Queue("mongodb://127.0.0.1:1/", "app.jobs")

    @queue.handler("mail", retries=5, retry_interval=timedelta(seconds=2))
    def first(job): ...

    assert first.__name__ == "first"
    with pytest.raises(HandlerError, match="kind 'mail' already has a handler"):
        queue.handler("mail")(plain_function)
    assert list(queue.handlers) == ["mail"]
    handler = queue.handlers["mail"]
    assert (handler.function, handler.retries, handler.retry_interval) == (first, 5, 2.0)
    job = queue.job("mail")
    assert (job.retries, job.retryinterval) == (5, 2_000_000_000)
    assert repr(queue) == "Queue('app.jobs', kinds=['mail'])"


@pytest.mark.parametrize("kind", ["", None, 5, "a\0"])
def test_a_handlers_kind_is_checked_when_registered(kind):
    with pytest.raises(BadArgument, match=r"^kind: "):
        Handler.of(kind, plain_function)
