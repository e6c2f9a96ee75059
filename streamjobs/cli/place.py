"""Which queue a command works on: its server, its collection, and the module that names its handlers."""

from __future__ import annotations

import functools
import importlib
import os
import re
import sys
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from types import ModuleType
from typing import Annotated, Any
from urllib.parse import unquote

import pymongo
import typer
from bson.errors import BSONError
from bson.objectid import ObjectId
from pymongo.errors import PyMongoError

from streamjobs.errors import BadArgument, ConfigError, ConnectError, JobNotFound, StreamJobsError
from streamjobs.queue import Queue
from streamjobs.sync import SyncQueue

DEFAULT_URI = "mongodb://localhost:27017"
DEFAULT_COLLECTION = "app.jobs"
_ANSWER = 5.0  # seconds that a server gets to answer at all; what follows may take longer
_SHORT = 3  # pieces of a password under this length would blot out half a message
_PROBE = "streamjobs: is anybody there?"

Uri = Annotated[
    str | None,
    typer.Option(
        "--uri",
        envvar="STREAMJOBS_URI",
        metavar="URI",
        help=f"The server. [dim]\\[default: the app's, else {DEFAULT_URI}][/dim]",
        show_default=False,
    ),
]
Collection = Annotated[
    str | None,
    typer.Option(
        "--collection",
        envvar="STREAMJOBS_COLLECTION",
        metavar="DB.COLL",
        help=f"Database and collection. [dim]\\[default: the app's, else {DEFAULT_COLLECTION}][/dim]",
        show_default=False,
    ),
]
App = Annotated[
    str | None,
    typer.Option(
        "--app",
        metavar="MODULE:NAME",
        help="A Queue object of yours: its server, collection and handlers' settings are used.",
    ),
]


@contextmanager
def connected(uri: str | None, collection: str | None, app: str | None = None) -> Generator[SyncQueue]:
    """The queue of a command, on a server that has answered; closed afterwards.

    Raises:
        ConnectError: none answered.

    """
    queue = choose(uri, collection, app)
    try:
        try:
            with pymongo.timeout(_ANSWER):
                queue.sync.get(_PROBE)  # a read by _id, which every role allows
        except JobNotFound:
            pass
        except PyMongoError as error:
            where = f"at {shown(uri or DEFAULT_URI)}" if app is None or uri else f"for {queue.namespace}"
            raise ConnectError(
                f"the server {where} cannot be used ({type(error).__name__}: {hide(_short(error), uri)}): check that it "
                "runs, and that --uri or STREAMJOBS_URI names it"
            ) from None
        yield queue.sync
    except (PyMongoError, BSONError) as error:
        raise StreamJobsError(
            f"{type(error).__name__}: {hide(_short(error), uri)} ({queue.namespace})"
        ) from None
    finally:
        queue.sync.close()


def choose(uri: str | None, collection: str | None, app: str | None) -> Queue:
    """The app's queue, or one made of the URI and the collection."""
    if app is not None:
        return load(app, uri, collection)
    try:
        return Queue(
            DEFAULT_URI if uri is None else uri, DEFAULT_COLLECTION if collection is None else collection
        )
    except BadArgument:
        raise BadArgument("--collection", collection, "give database.collection, as app.jobs") from None
    except ConfigError as error:
        raise ConfigError(hide(str(error), uri)) from None


def load(target: str, uri: str | None = None, collection: str | None = None) -> Queue:
    """The Queue object that ``module:name`` names, on another server if one is given."""
    queue = _find(target)
    if uri is not None:
        try:
            queue.use(uri, collection)
        except ConfigError as error:
            raise ConfigError(hide(str(error), uri)) from None
    elif collection is not None and collection != queue.namespace:
        raise BadArgument(
            "--collection", collection, f"give --uri with it: the server of {target} is its own affair"
        )
    return queue


def parse_id(text: str) -> Any:
    """The ``_id`` that a text means: 24 hexadecimal digits are an ObjectId."""
    return ObjectId(text) if re.fullmatch(r"[0-9a-fA-F]{24}", text) else text


def hide(text: str, uri: str | None) -> str:
    """A text without the password of a URI, whole or in the pieces that a parser may have made of it."""
    userinfo = (uri or "").partition("://")[2].rpartition("@")[0]
    _, _, password = userinfo.partition(":")
    secrets = {userinfo, password, *re.split(r"[/:@?#\[\]&=,]", password)}
    secrets |= {unquote(secret) for secret in secrets}
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _SHORT:
            text = text.replace(secret, "***")
    return text


def shown(uri: str) -> str:
    """A URI without user, password and options."""
    return re.sub(r"//.*@", "//", uri).partition("?")[0]


def _short(error: BaseException) -> str:
    # the driver appends its timeouts and its whole view of the servers
    return re.sub(r" \(configured timeouts:[^)]*\)", "", str(error).partition(", Timeout:")[0])


def _find(target: str) -> Queue:
    module_name, colon, name = target.partition(":")
    if not module_name or not colon or not name:
        raise BadArgument(
            "MODULE:NAME", target, "give a module and the name of a Queue in it, as in app:jobs"
        )
    module = _load_module(module_name, target)
    try:
        found: Any = functools.reduce(getattr, name.split("."), module)
    except AttributeError:
        found = None
    if not isinstance(found, Queue):
        there = sorted(key for key, value in vars(module).items() if isinstance(value, Queue))
        hint = f"it has {', '.join(f'{module_name}:{key}' for key in there)}" if there else "it has none"
        what = "nothing" if found is None else f"a {type(found).__name__}"
        raise BadArgument(
            "MODULE:NAME", target, f"name a Queue of module {module_name}: {hint}, this is {what}"
        )
    return found


def _load_module(name: str, target: str) -> ModuleType:
    here = str(os.getcwd())  # noqa: PTH109 - as text, for the import system
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise StreamJobsError(f"module {name} can't be imported: {error} ({_line(error)})") from None
        raise BadArgument(
            "MODULE:NAME", target, f"there is no module {error.name} here or on PYTHONPATH"
        ) from None
    except Exception as error:  # noqa: BLE001 - whatever the module does while it is imported
        text = f"module {name} can't be imported: {type(error).__name__}: {error} ({_line(error)})"
        raise StreamJobsError(text) from None


def _line(error: BaseException) -> str:
    """Where in the user's code it happened."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    frames = [one for one in traceback.extract_tb(error.__traceback__) if "importlib" not in one.filename]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "in its import"
