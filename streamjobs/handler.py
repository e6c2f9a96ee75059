"""Handlers: which function runs a kind, how its parameters are filled, what it may return."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast
from uuid import UUID

import msgspec

from streamjobs.check import seconds
from streamjobs.errors import BadArgument, BadData, HandlerError
from streamjobs.job import Job, check_kind


@dataclass(frozen=True, slots=True)
class Snooze:
    """Returned by a handler: run this job again after ``delay`` seconds, without using an attempt."""

    delay: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "delay", seconds("delay", self.delay))  # also of a timedelta


@dataclass(frozen=True, slots=True)
class Cancel:
    """Returned by a handler: this job is cancelled for good, with a reason that is kept in the document."""

    reason: str = ""

    def __post_init__(self) -> None:
        if not isinstance(cast("Any", self.reason), str):
            raise BadArgument("reason", self.reason, "give a text")


@dataclass(frozen=True, slots=True)
class Handler:
    """A function and the kind it runs.

    Attributes:
        kind: the kind of its jobs.
        function: takes the job, typed parameters filled from its data, or both.
        retries: attempts in all that put writes for this kind (0 and 1 both mean one).
        retry_interval: seconds between a failed try and the next, as put writes it.
        asynchronous: whether it is a coroutine function; others run in threads.
        arguments: makes the keyword or positional arguments of a call from a job.
        needs: the parameters that a job's data must have.

    """

    kind: str
    function: Callable[..., Any]
    retries: int = 0
    retry_interval: float = 0.0
    asynchronous: bool = True
    arguments: Callable[[Job], tuple[tuple[Any, ...], dict[str, Any]]] = lambda job: ((job,), {})
    needs: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, kind: str, function: Callable[..., Any], *, retries: int = 0, retry_interval: float = 0.0
    ) -> Handler:
        """Look at a function's parameters once, so that a mistake shows when it is registered."""
        kind = check_kind(kind)
        if not callable(cast("Any", function)):
            raise BadArgument("handler", function, "give a function")
        if (
            isinstance(cast("Any", retries), bool)
            or not isinstance(cast("Any", retries), int)
            or not 0 <= retries < 2**31
        ):
            raise BadArgument("retries", retries, "give a whole number from 0: attempts in all")
        if _gives(function, inspect.isgeneratorfunction) or _gives(function, inspect.isasyncgenfunction):
            raise HandlerError(
                f"handler of {kind!r}: it is a generator (it has a yield), of which a call runs nothing; "
                "put that into another function and loop over it in the handler"
            )
        places, rest = _places(kind, function)
        return cls(
            kind,
            function,
            retries,
            seconds("retry_interval", retry_interval),
            is_async(function),
            _filler(kind, places, rest=rest),
            tuple(name for name, hint, one in places if hint is not Job and one.default is one.empty),
        )


def is_async(function: Callable[..., Any]) -> bool:
    """Whether a call gives a coroutine: functions, partials, methods and objects with an async __call__."""
    return _gives(function, inspect.iscoroutinefunction)


def _gives(function: Callable[..., Any], sort: Callable[[object], bool]) -> bool:
    """Whether a function, or what a partial or an object calls, is of a sort."""
    while isinstance(function, functools.partial):
        function = cast("Callable[..., Any]", function.func)
    call = getattr(type(function), "__call__", None)  # noqa: B004 - its sort is asked for, not whether it is there
    return sort(function) or sort(call)


def _places(kind: str, function: Callable[..., Any]) -> tuple[list[tuple[str, Any, inspect.Parameter]], bool]:
    """A function's parameters, each with its name and its type (Job for the job itself), and whether it takes any."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
        hints = typing.get_type_hints(inspect.unwrap(_plain(function)), include_extras=True)
    except Exception as error:  # an annotation is evaluated, so it can raise anything
        raise HandlerError(f"handler of {kind!r}: its parameters can't be read ({error})") from error
    places: list[tuple[str, Any, inspect.Parameter]] = []
    rest = False
    for parameter in parameters:
        hint = hints.get(parameter.name, Any)
        if parameter.kind is parameter.VAR_KEYWORD:
            rest = True
        elif parameter.kind is parameter.VAR_POSITIONAL:
            raise HandlerError(
                f"handler of {kind!r}: *{parameter.name} can't be filled from data; name the parameters"
            )
        elif hint is Job or (parameter.name == "job" and hint is Any):
            places.append((parameter.name, Job, parameter))
        else:
            places.append((parameter.name, hint, parameter))
    return places, rest


def _filler(
    kind: str, places: list[tuple[str, Any, inspect.Parameter]], *, rest: bool
) -> Callable[[Job], tuple[tuple[Any, ...], dict[str, Any]]]:
    """How to call a function: which parameters are the job, which come from its data."""
    known = {name for name, hint, _ in places if hint is not Job}

    if not known and not rest and all(one.kind is not one.POSITIONAL_ONLY for *_, one in places):
        takers = [name for name, *_ in places]  # of the job alone: nothing is filled from its data
        return lambda job: ((), dict.fromkeys(takers, job))

    def arguments(job: Job) -> tuple[tuple[Any, ...], dict[str, Any]]:
        values = [(p, job if hint is Job else _value(job, name, hint, p)) for name, hint, p in places]
        named = {p.name: value for p, value in values if p.kind is not p.POSITIONAL_ONLY}
        extra = {key: value for key, value in job.data.items() if key not in known}
        if rest:
            named.update((key, value) for key, value in extra.items() if key not in named)
        elif extra and known:
            raise BadData(
                f"data has {sorted(extra)!r}, which the handler of {kind!r} does not take; add the parameter or **rest"
            )
        return tuple(value for p, value in values if p.kind is p.POSITIONAL_ONLY), named

    return arguments


def _plain(function: Callable[..., Any]) -> Any:
    while isinstance(function, functools.partial):
        function = cast("Callable[..., Any]", function.func)
    return function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004


def _value(job: Job, name: str, hint: Any, parameter: inspect.Parameter) -> Any:
    if name not in job.data:
        if parameter.default is not parameter.empty:
            return parameter.default
        raise BadData(f"parameter {name!r} is missing from the data of a {job.kind!r} job")
    if hint is Any:
        return job.data[name]
    try:
        return msgspec.convert(
            _builtin(job.data[name]), hint, builtin_types=(datetime, bytes, UUID), dec_hook=_foreign
        )
    except msgspec.ValidationError as error:
        raise BadData(f"parameter {name!r} of a {job.kind!r} job: {error}") from error


def _builtin(value: Any) -> Any:
    """BSON's own numbers as plain ones, which is what a type check expects."""
    if isinstance(value, Mapping):
        return {key: _builtin(item) for key, item in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, list):
        return [_builtin(item) for item in cast("list[Any]", value)]
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _foreign(wanted: type[Any], value: Any) -> Any:
    """Types that msgspec does not know: pydantic models, and values that already are of the type."""
    validate = getattr(wanted, "model_validate", None)
    if validate is not None:
        try:
            return validate(value)
        except ValueError as error:
            raise msgspec.ValidationError(str(error)) from error
    if isinstance(value, wanted):
        return value
    raise msgspec.ValidationError(f"Expected `{wanted.__name__}`, got `{type(value).__name__}`")
