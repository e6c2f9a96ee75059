"""The command line's log beside an application's own: each line once, whatever writes it."""

from __future__ import annotations

import json
import subprocess
import sys

_OWN = """
import logging, structlog
structlog.configure(
    processors=[structlog.stdlib.add_log_level, structlog.processors.JSONRenderer()],
    logger_factory=structlog.stdlib.LoggerFactory(), wrapper_class=structlog.stdlib.BoundLogger,
)
"""
_WRITE = """
from streamjobs.cli import log
log.configure(log.Form.JSON)
logging.getLogger("app").warning("by logging")
structlog.get_logger("app").info("by structlog")
logging.getLogger("app").log(25, "of a level between")
"""


def _lines(program: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert not done.stdout
    return done.stderr.splitlines()


def test_an_application_whose_structlog_writes_to_logging_gets_each_line_once():
    """Guard: no bridge beside another's configuration. It handed each line back, twice as long, for ever."""
    by_logging, by_structlog, between = _lines(_OWN + _WRITE)
    assert (by_logging, between) == ("by logging", "of a level between")
    assert json.loads(by_structlog) == {"event": "by structlog", "level": "info"}


def test_without_a_configuration_lines_of_logging_and_of_structlog_are_alike():
    lines = [json.loads(line) for line in _lines("import logging, structlog" + _WRITE)]
    assert [(one["event"], one["level"]) for one in lines] == [
        ("by logging", "warning"), ("by structlog", "info"), ("of a level between", "info"),
    ]  # fmt: skip


def test_what_an_application_tells_beside_a_line_of_logging_is_kept():
    """Guard: the bridge hands ``extra`` and ``stack_info`` on."""
    write = """
import logging
from streamjobs.cli import log
log.configure(log.Form.JSON)
class Lazy:
    def __repr__(self):
        raise LookupError
extra = {"order": 7, "level": "mine", "odd": object(), "method_name": "m", "self": 1, "lazy": Lazy()}
logging.getLogger("app").warning("with more", extra=extra, stack_info=True)
"""
    (told,) = map(json.loads, _lines(write))
    assert (told["event"], told["level"], told["order"]) == ("with more", "warning", 7)
    assert told["odd"].startswith("<object")
    assert told["lazy"] == "(Lazy)"
    assert told["stack"].startswith("Stack (most recent call last)")


_RENAMED = """
import logging, structlog, sys
from streamjobs import events
class Unhashable:
    __hash__ = None
    def __call__(self, logger, name, told):
        return told
logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s / %(error_message)s / %(error)s")
structlog.configure(
    processors=[structlog.stdlib.add_log_level, Unhashable(), PROCESSORS],
    logger_factory=structlog.stdlib.LoggerFactory(), wrapper_class=structlog.stdlib.BoundLogger,
)
events.emit("server.away", runner="w", owner="o", error="AutoReconnect", message="gone")
"""


def test_an_application_that_gives_message_to_the_name_of_an_event_loses_no_text():
    """Guard: our field steps aside. It was overwritten, and ``logging`` refused the whole event."""
    renamer = 'structlog.processors.EventRenamer("message"), structlog.processors.JSONRenderer()'
    program = _RENAMED.replace("PROCESSORS", renamer).replace(
        ' format="%(message)s / %(error_message)s / %(error)s"', ' format="%(message)s"'
    )
    (line,) = _lines(program)
    told = json.loads(line)
    assert (told["message"], told["error_message"], told["error"]) == ("server.away", "gone", "AutoReconnect")
    (line,) = _lines(_RENAMED.replace("PROCESSORS", "structlog.stdlib.render_to_log_kwargs"))
    assert line == "server.away / gone / AutoReconnect"
