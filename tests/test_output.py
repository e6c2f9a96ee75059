"""What is behind the standard streams of a command: nobody, a full disk, a terminal that knows ASCII only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import plain


@pytest.fixture
def command(uri, namespace):
    """Runs a command on the test's collection; with the names of what stdin, stdout and stderr are."""
    env = {**os.environ, "STREAMJOBS_URI": uri, "STREAMJOBS_COLLECTION": namespace}

    def run(*words, closed=(), before=None, **options):
        def shut():
            for number in closed:
                os.close(number)

        streams = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            **options,
        }
        streams["env"] = {**env, **streams.get("env", {})}
        told = subprocess.run(
            [sys.executable, "-m", "streamjobs", *words], timeout=60, preexec_fn=shut, check=False, **streams
        )
        assert b"Traceback" not in (told.stderr or b""), told.stderr
        return told

    return run


@pytest.fixture
def nobody():
    """A pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.parametrize("words", [["put", "mail"], ["put", "mail", "--json"]], ids=["text", "json"])
def test_a_reader_that_has_gone_does_not_make_a_put_a_failure(command, nobody, raw, words):
    """Guard: Output. A caller that is told that a put has failed puts once more."""
    told = command(*words, stdout=nobody)
    assert (told.returncode, told.stderr) == (0, b"")
    assert raw.count_documents({"kind": "mail"}) == 1


@pytest.mark.parametrize("words", [["list"], ["list", "--json"], ["stats"], ["--help"], ["--version"]])
async def test_what_only_looks_ends_quietly_when_its_reader_has_gone(command, nobody, queue, words):
    await queue.put_many([queue.job("mail", {"text": "x" * 1000}) for _ in range(99)])
    told = command(*words, stdout=nobody)
    assert (told.returncode, told.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_told_of_with_what_was_done(command, raw):
    with Path("/dev/full").open("w") as full:
        told = command("put", "mail", "--json", stdout=full)
    assert told.returncode == 1
    assert told.stderr.startswith(
        b"error: what was asked is done, but the output can't be written (No space left"
    )
    assert raw.count_documents({"kind": "mail"}) == 1


def test_streams_that_are_closed_harm_nothing(command, raw):
    assert command("put", "mail", closed=(1,)).returncode == 0
    assert command("put", "mail", closed=(0, 1, 2)).returncode == 0
    assert raw.count_documents({"kind": "mail"}) == 2
    assert command("put", "", closed=(2,)).returncode == 2
    told = command("put", "mail", "-", closed=(0,))
    assert told.returncode == 2
    assert b"no Extended JSON" in told.stderr


def test_what_is_no_text_on_stdin_is_named(command, tmp_path):
    given = tmp_path / "data"
    given.write_bytes(b'{"a": "\xff\xfe"}')
    with given.open("rb") as source:
        told = command("put", "mail", "-", stdin=source, env={"PYTHONIOENCODING": "utf-8:strict"})
    assert told.returncode == 2
    assert b"stdin can't be read" in told.stderr


def test_a_terminal_that_knows_ascii_only_gets_escapes(command, raw):
    raw.insert_one(plain(kind="köln"))
    ascii_only = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    told = command("list", env=ascii_only)
    assert told.returncode == 0
    assert b"k\\xf6ln" in told.stdout
    told = command("show", "köln", env=ascii_only)
    assert told.returncode == 3
    assert told.stderr.isascii()


_TRANSIENT = """
import errno, io, sys
from streamjobs.cli.output import Output
class Full(io.BytesIO):
    full = True
    def write(self, data):
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)
disk = Full()
out = Output(disk, "utf-8", write_through=True)
out.write("lost")
disk.full = False
out.write("kept")
out.flush()
assert disk.getvalue().endswith(b"kept"), disk.getvalue()
assert out.failed.errno == errno.ENOSPC
"""


def test_a_disk_that_has_room_again_is_written_to_again():
    """Guard: only a reader that has gone is for ever. A log would be silent from its first error on."""
    subprocess.run([sys.executable, "-c", _TRANSIENT], check=True, timeout=60)


def test_output_that_is_asked_to_be_unbuffered_is(command, uri, tmp_path):
    """Guard: write_through is handed on. What a handler prints would be lost with a process that is killed."""
    (tmp_path / "app.py").write_text(
        "import os\nfrom streamjobs import Queue\n"
        "jobs = Queue(os.environ['STREAMJOBS_URI'], os.environ['STREAMJOBS_COLLECTION'])\n"
        "print('printed')\nos._exit(7)\n"
    )
    told = command("run", "app:jobs", cwd=tmp_path, env={"PYTHONUNBUFFERED": "1"})
    assert (told.returncode, told.stdout) == (7, b"printed\n")
