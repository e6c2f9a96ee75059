"""Every block of the README and the pages runs, and every link leads somewhere."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import streamjobs
from streamjobs import Queue

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "deploy" / "README.md",
]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def test_the_first_block_of_the_readme_begins_by_line_20_and_runs_as_it_stands():
    text = (ROOT / "README.md").read_text()
    assert text[: text.index("```python")].count("\n") < 20
    done = subprocess.run(
        [sys.executable, "-c", blocks(ROOT / "README.md", "python")[0]],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "resizing 7"


async def test_the_readmes_other_blocks_run(uri, namespace, raw):
    space: dict[str, Any] = {}
    _, handlers, use, lifespan, transaction = blocks(ROOT / "README.md", "python")
    exec(handlers, space)
    jobs: Queue = space["jobs"]
    jobs.use(uri, namespace)
    exec(use, space)
    await space["use"](jobs)
    exec(lifespan, space)
    async with space["lifespan"](None):
        await asyncio.to_thread(space["view"], None)
    exec(transaction, space)
    space["Queue"] = lambda collection, connect: Queue(collection, connect=connect)
    await space["order"](uri)
    await jobs.close()
    client = raw.database.client
    assert client.app.orders.count_documents({}) >= 1
    client.drop_database("app")


async def test_the_guides_blocks_run(uri, namespace, raw):
    space: dict[str, Any] = {}
    handlers, put, run, watch, original, testing = blocks(ROOT / "docs" / "guide.md", "python")
    exec(handlers, space)
    jobs: Queue = space["jobs"]
    jobs.use(uri, namespace)
    for block in (put, run, watch, original):
        exec(block, space)
    await space["examples"](jobs)
    await space["embedded"](jobs)
    async with Queue(uri, namespace) as queue:
        await space["as_in_go"](queue, None)
    await jobs.close()
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", handlers + testing], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_every_python_block_is_run_by_a_test():
    counted = {page.name: len(blocks(page, "python")) for page in PAGES if blocks(page, "python")}
    deploy = {name: count for name, count in counted.items() if name not in ("README.md", "guide.md")}
    assert len(blocks(ROOT / "README.md", "python")) == 5
    assert len(blocks(ROOT / "docs" / "guide.md", "python")) == 6
    assert not {name: count for name, count in deploy.items() if name != "cli.md"}


def commands() -> list[str]:
    found = []
    for page in PAGES:
        for block in blocks(page, "sh"):
            found += [line for line in block.splitlines() if re.match(r"(\.venv/bin/)?streamjobs ", line)]
    return sorted(set(found))


@pytest.mark.parametrize("line", commands())
def test_every_command_line_shown_exists_with_its_options(line):
    words = shlex.split(line, comments=True)
    words = words[: words.index("|")] if "|" in words else words
    name, options = words[1], [word.partition("=")[0] for word in words if word.startswith("--")]
    helped = subprocess.run(
        [sys.executable, "-m", "streamjobs", *([] if name.startswith("-") else [name]), "--help"],
        capture_output=True, text=True, timeout=60, env={**os.environ, "COLUMNS": "200", "TERM": "dumb"},
    )  # fmt: skip
    assert helped.returncode == 0, helped.stderr
    for option in options:
        assert option in helped.stdout, (line, option)


def test_the_examples_run(uri, namespace):
    env = {**os.environ, "STREAMJOBS_URI": uri, "COUNT": "2"}
    put = subprocess.run(
        [sys.executable, ROOT / "examples" / "creator.py"],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert put.returncode == 0, put.stderr
    with subprocess.Popen(
        [sys.executable, ROOT / "examples" / "runner.py"], env=env, stdout=subprocess.PIPE, text=True
    ) as runner:
        lines = [runner.stdout.readline() for _ in range(3)]
        runner.terminate()
        rest = runner.stdout.read()
        assert runner.wait(30) == 0
    assert sorted(lines) == [
        "listening; ctrl+C stops\n",
        "notifications: Hello world 1\n",
        "notifications: Hello world 2\n",
    ]
    assert rest.strip() == "stopped"


def test_the_reference_has_every_public_name_with_its_arguments():
    text = (ROOT / "docs" / "reference.md").read_text()
    names = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`\n]+)`", text))))
    assert set(streamjobs.__all__) <= names
    for cls in (Queue, streamjobs.Runner, streamjobs.Job, streamjobs.Try):
        public = {name for name in vars(cls) if not name.startswith("_")}
        assert public - {"from_document"} <= names, cls
    for name, call in vars(Queue).items():
        if inspect.isfunction(call) and not name.startswith("_"):
            told = re.search(rf"`{name}\((.*?)\)`", text)
            assert told, name
            given = [one for one in re.split(r"[ ,*]+|=[^,]+", told[1]) if one]
            assert given == list(inspect.signature(call).parameters)[1:], name


def test_the_reference_has_every_setting_with_its_default():
    text = (ROOT / "docs" / "reference.md").read_text()
    told: dict[str, str] = {}
    for names, values in re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ([\w, ]+) \|", text, re.MULTILINE):
        told |= dict(zip(re.findall(r"\w+", names), values.split(", "), strict=False))
    for field in dataclasses.fields(streamjobs.Settings):
        assert told[field.name] == (f"{field.default:g}" if field.default is not None else "None")
