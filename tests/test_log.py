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
