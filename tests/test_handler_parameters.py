"""How a handler's parameters are filled from a job's data, and what is bad data."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Optional, TypedDict
from uuid import UUID

import msgspec
import pytest
from bson import DatetimeMS, Decimal128, Int64, ObjectId
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from streamjobs import BadData, Handler, Job, JobError

SOME = ObjectId("0123456789abcdef01234567")
WHEN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
ONE = UUID(int=7)


@dataclass
class Address:
    street: str
    number: int = 1


class Mail(TypedDict):
    to: str
    copies: int


class Order(BaseModel):
    sku: str
    count: int = Field(gt=0)


class Point(msgspec.Struct):
    x: int
    y: int = 0


def call(function: Any, data: dict[str, Any], kind: str = "mail") -> Any:
    """What a handler's function returns for a job with this data."""
    job = Job.new(kind)
    job.data = data
    args, named = Handler.of(kind, function).arguments(job)
    return function(*args, **named)


def int_(a: int):
    return a


def float_(a: float):
    return a


def str_(a: str):
    return a


def bool_(a: bool):
    return a


def bytes_(a: bytes):
    return a


def list_(a: list[int]):
    return a


def dict_(a: dict[str, int]):
    return a


def tuple_(a: tuple[int, str]):
    return a


def set_(a: set[int]):
    return a


def datetime_(a: datetime):
    return a


def uuid_(a: UUID):
    return a


def id_(a: ObjectId):
    return a


def ids_(a: list[ObjectId]):
    return a


def id_or_text(a: ObjectId | None):
    return a


def decimal_(a: Decimal128):
    return a


def optional(a: Optional[int]):  # noqa: UP045 - the older form too
    return a


def either(a: int | str):
    return a


def literal(a: Literal["x", "y"]):
    return a


def bounded(a: Annotated[int, msgspec.Meta(ge=0)]):
    return a


def address(a: Address):
    return a


def addresses(a: dict[str, list[Address]]):
    return a


def mail(a: Mail):
    return a


def order(a: Order):
    return a


def orders(a: list[Order]):
    return a


def point(a: Point):
    return a


def anything(a: Any):
    return a


def bare(a):
    return a


def nested(a: dict[str, Any]):
    return a


GOOD = [
    (int_, 5, 5), (int_, Int64(5), 5), (float_, 1.5, 1.5), (float_, 2, 2.0), (str_, "é", "é"), (bool_, True, True),
    (bytes_, b"x", b"x"), (list_, [1, Int64(2)], [1, 2]), (dict_, {"a": Int64(1)}, {"a": 1}), (tuple_, [1, "a"], (1, "a")),
    (set_, [1, 2], {1, 2}), (datetime_, WHEN, WHEN), (uuid_, ONE, ONE), (id_, SOME, SOME),
    (ids_, [SOME, SOME], [SOME, SOME]), (id_or_text, None, None), (id_or_text, SOME, SOME),
    (decimal_, Decimal128("1.5"), Decimal128("1.5")), (optional, None, None), (optional, 5, 5), (either, "a", "a"),
    (either, 1, 1), (literal, "x", "x"), (bounded, 0, 0), (address, {"street": "s"}, Address("s")),
    (address, {"street": "s", "number": Int64(2)}, Address("s", 2)), (addresses, {"a": [{"street": "s"}]}, {"a": [Address("s")]}),
    (mail, {"to": "a", "copies": 2}, {"to": "a", "copies": 2}), (order, {"sku": "a", "count": Int64(2)}, Order(sku="a", count=2)),
    (orders, [{"sku": "a", "count": 1}], [Order(sku="a", count=1)]), (point, {"x": 1}, Point(1)), (anything, SOME, SOME),
    (bare, {"a": [SOME]}, {"a": [SOME]}), (nested, {"a": SOME, "b": [WHEN]}, {"a": SOME, "b": [WHEN]}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "value", "wanted"), GOOD, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_value_of_its_type_reaches_the_parameter(function, value, wanted):
    got = call(function, {"a": value})
    assert got == wanted
    assert type(got) is type(wanted)


BAD = [
    (int_, "5"), (int_, 5.5), (int_, True), (int_, None), (int_, SOME), (float_, "1"), (str_, 5), (str_, None), (str_, b"x"),
    (bool_, 1), (bytes_, 5), (list_, [1, "2"]), (list_, 5), (list_, {"a": 1}), (dict_, {"a": "b"}), (tuple_, [1]),
    (datetime_, 5), (datetime_, "tomorrow"), (datetime_, DatetimeMS(2**62)), (uuid_, str(ONE)), (uuid_, "x"), (uuid_, 5), (id_, str(SOME)),
    (id_, 5), (ids_, [SOME, 5]), (id_or_text, 5), (decimal_, "x"), (optional, "x"), (either, 1.5), (literal, "z"),
    (bounded, -1), (address, {"number": 1}), (address, {"street": 5}), (address, "s"), (addresses, {"a": [{"street": 1}]}),
    (mail, {"to": "a"}), (mail, {"to": "a", "copies": "x"}), (order, {"sku": "a", "count": 0}), (order, 5), (order, {}),
    (orders, [{"sku": "a", "count": 0}]), (point, {"x": "a"}),
]  # fmt: skip


@pytest.mark.parametrize(("function", "value"), BAD, ids=lambda value: getattr(value, "__name__", ""))
def test_a_value_of_another_type_is_bad_data_that_names_the_parameter(function, value):
    with pytest.raises(BadData, match=r"^parameter 'a' of a 'mail' job: ") as caught:
        call(function, {"a": value})
    assert isinstance(caught.value, JobError)


@pytest.mark.parametrize(("function", "_value"), BAD, ids=lambda value: getattr(value, "__name__", ""))
def test_a_missing_value_is_bad_data_that_names_the_parameter(function, _value):
    with pytest.raises(BadData, match=r"^parameter 'a' is missing from the data of a 'mail' job"):
        call(function, {})


@given(st.integers(-(2**63), 2**63 - 1), st.booleans())
def test_every_whole_number_of_bson_is_an_int(number, long):
    got = call(int_, {"a": Int64(number) if long else number})
    assert got == number
    assert type(got) is int


def test_defaults_keyword_only_and_positional_only_parameters_are_filled():
    def function(job: Job, a: int, /, b: str = "b", *, c: int = 3, d: list[int] | None = None):
        return job.kind, a, b, c, d

    assert call(function, {"a": 1}) == ("mail", 1, "b", 3, None)
    assert call(function, {"a": 1, "c": 5, "d": [1]}) == ("mail", 1, "b", 5, [1])
    assert call(function, {"a": 1, "b": "x"}) == ("mail", 1, "x", 3, None)


@pytest.mark.parametrize("name", ["job", "it", "task"])
def test_the_job_goes_to_the_parameter_that_is_named_or_annotated_so(name):
    space: dict[str, Any] = {"Job": Job}
    exec(f"def function({name}{'' if name == 'job' else ': Job'}, *, to: str): return {name}, to", space)
    job, to = call(space["function"], {"to": "ann"})
    assert isinstance(job, Job)
    assert to == "ann"


def test_a_parameter_named_job_of_another_type_is_filled_from_the_data():
    def function(job: str):
        return job

    assert call(function, {"job": "clerk"}) == "clerk"
    with pytest.raises(BadData, match="parameter 'job'"):
        call(function, {})


def test_rest_takes_what_no_parameter_does():
    def function(a: int, job, **rest):
        return a, rest

    assert call(function, {"a": 1, "b": 2, "c": [3]}) == (1, {"b": 2, "c": [3]})
    assert call(function, {"a": 1, "job": "x"}) == (1, {})  # the parameter is the job
    assert call(lambda **rest: rest, {"x": 1}) == {"x": 1}

    def first(a, /, **rest):
        return a, rest

    assert call(first, {"a": 1, "b": 2}) == (1, {"b": 2})


def test_data_that_no_parameter_takes_is_bad_data_that_names_it():
    def function(a: int, job: Job):
        return a

    with pytest.raises(BadData, match=r"data has \['b', 'c'\], which the handler of 'mail' does not take"):
        call(function, {"a": 1, "c": 1, "b": 2})


@pytest.mark.parametrize("function", [lambda job: job.data, lambda: {"a": 1, "b": 2}])
def test_a_handler_of_the_job_alone_or_of_nothing_takes_any_data(function):
    assert call(function, {"a": 1, "b": 2}) == {"a": 1, "b": 2}


def test_a_partials_and_a_methods_parameters_are_what_is_left_of_them():
    class Sender:
        def send(self, to: str, copies: int = 1):
            return to, copies

    def function(prefix: str, to: str, copies: int = 1):
        return prefix, to, copies

    assert call(Sender().send, {"to": "a", "copies": 2}) == ("a", 2)
    assert call(functools.partial(function, "p"), {"to": "a"}) == ("p", "a", 1)
    assert call(functools.partial(function, "p", copies=7), {"to": "a"}) == ("p", "a", 7)
    with pytest.raises(BadData, match="parameter 'copies'"):
        call(functools.partial(function, "p", copies=7), {"to": "a", "copies": "x"})


def test_a_decorated_functions_parameters_are_those_of_what_it_wraps():
    def inner(a: int):
        return a

    @functools.wraps(inner)
    def outer(*args, **named):
        return inner(*args, **named)

    assert call(outer, {"a": 1}) == 1
    with pytest.raises(BadData, match="parameter 'a'"):
        call(outer, {"a": "1"})
