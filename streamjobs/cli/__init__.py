"""The command line: ``streamjobs``, or ``python -m streamjobs``.

Read on in ``place`` (which server, which collection), ``running`` (run and dev), ``jobs`` (put, list, show and
so on), ``doctor``, ``demo``; ``show`` and ``log`` are how things look.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated, Any

import typer
from bson.errors import BSONError
from pymongo.errors import PyMongoError
from typer.core import TyperGroup

from streamjobs import __version__
from streamjobs.cli import jobs, output, show
from streamjobs.cli.demo import demo
from streamjobs.cli.doctor import doctor
from streamjobs.cli.running import dev, run
from streamjobs.errors import (
    BadArgument,
    ConfigError,
    HandlerError,
    JobNotFound,
    JobState,
    StreamJobsError,
    without_secrets,
)

_EPILOG = """\
[bold]Environment:[/bold] STREAMJOBS_URI and STREAMJOBS_COLLECTION stand in for --uri and --collection; \
STREAMJOBS_SERVER (mongod, rust or python) chooses the server that demo and dev start.

"""
_LONG = 300  # characters of a usage error
_CODES = """\
[bold]Exit codes:[/bold] 0 done; 1 it failed; 2 wrong usage or settings; 3 no such job; \
4 the job's status does not allow it; 5 doctor has warnings; 6 a handler blocked the event loop; \
130 interrupted with ctrl+C.
"""


class _Group(TyperGroup):
    """Turns what a command raises into one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except (StreamJobsError, PyMongoError, BSONError) as error:
            show.error(error)
            raise typer.Exit(exit_code(error)) from None
        except Exception as error:
            _shorten(error)
            raise

    def make_context(self, *args: Any, **named: Any) -> Any:
        """Read the command line."""
        try:
            return super().make_context(*args, **named)
        except Exception as error:
            _shorten(error)
            raise


def _shorten(error: Any) -> None:
    """A usage error repeats what it was given, which may be a URI in the wrong place, or without an end."""
    if hasattr(error, "format_message") and isinstance(error.message, str):
        text = without_secrets(error.message)
        error.message = show.safe(text if len(text) <= _LONG else text[:_LONG] + "...")


def exit_code(error: BaseException) -> int:
    """The exit code of a command that raised this."""
    if isinstance(error, (BadArgument, ConfigError, HandlerError)):
        return 2
    if isinstance(error, JobNotFound):
        return 3
    return 4 if isinstance(error, JobState) else 1


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"streamjobs {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="streamjobs",
    cls=_Group,
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog=_EPILOG + _CODES,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """A job runner for MongoDB that listens to the change stream instead of polling.

    Try [bold]streamjobs demo[/bold] first: it starts a server, two runners and a few jobs, and leaves nothing.
    """
    del version  # its callback has answered


_PANELS: dict[str, dict[str, Callable[..., None]]] = {
    "Run handlers": {"run": run, "dev": dev, "demo": demo},
    "Put and change": {"put": jobs.put, "retry": jobs.retry, "cancel": jobs.cancel, "indexes": jobs.indexes},
    "Look": {"list": jobs.list_jobs, "show": jobs.show_job, "stats": jobs.stats, "doctor": doctor},
}
for _panel, _commands in _PANELS.items():
    for _name, _command in _commands.items():
        app.command(_name, rich_help_panel=_panel, epilog=_CODES)(_command)


def main() -> None:
    """The ``streamjobs`` command."""
    code: Any = 0
    output.settle()
    try:
        app(prog_name="streamjobs")
    except SystemExit as ended:
        code = ended.code
    code = output.finish(code if isinstance(code, int) else 0 if code is None else 1)
    # all is closed by now, but at its exit the interpreter would wait half a second for the driver's idle threads
    os._exit(code)
