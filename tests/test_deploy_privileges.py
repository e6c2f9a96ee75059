"""The roles for deployment: their actions, and the script that makes them."""

import json
import os
import re
import shutil

import pytest

from tests.deploy_files import read, run

NODE = shutil.which("node")
RUNNER_ACTIONS = ["find", "insert", "update", "remove", "changeStream", "listIndexes"]
ADMIN_ACTIONS = ["createIndex", "collStats", "indexStats"]


def actions(name):
    (block,) = re.findall(rf"const {name} = \[\n(.*?)\n\];", read("role.js"), re.DOTALL)
    lines = [re.fullmatch(r'  "(\w+)", // \S.*', line) for line in block.splitlines()]
    assert all(lines), "each action says on its line what needs it"
    return [line[1] for line in lines]


def test_roles_have_the_documented_actions_and_no_more():
    assert actions("runnerActions") == RUNNER_ACTIONS
    assert actions("adminActions") == ADMIN_ACTIONS
    section = read("README.md").split("## Privileges")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == RUNNER_ACTIONS
    (adds,) = re.findall(r"`streamjobsAdmin` adds (.*)\.", section)
    assert re.findall(r"`(\w+)`", adds) == ADMIN_ACTIONS


@pytest.mark.skipif(NODE is None, reason="node is not on PATH")
@pytest.mark.parametrize("there", [False, True])
def test_role_script_creates_or_updates_both_roles(there):
    shell = """
      const said = [];
      const db = {
        getSiblingDB: (name) => ({
          getRole: (role) => (THERE ? { role } : null),
          createRole: (definition) => said.push(["create", name, definition.role, definition]),
          updateRole: (role, definition) => said.push(["update", name, role, definition]),
        }),
      };
    """.replace("THERE", str(there).lower())
    done = run(
        NODE,
        "-e",
        shell + read("role.js") + "\nconsole.log(JSON.stringify(said));",
        env={**os.environ, "STREAMJOBS_DATABASE": "shop", "STREAMJOBS_COLLECTION": "work"},
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [entry[:3] for entry in said] == [
        ["update" if there else "create", "shop", name] for name in ("streamjobsRunner", "streamjobsAdmin")
    ]
    for (*_, definition), names, roles in zip(
        said, (RUNNER_ACTIONS, ADMIN_ACTIONS), ([], ["streamjobsRunner"]), strict=True
    ):
        assert definition["privileges"] == [
            {"resource": {"db": "shop", "collection": "work"}, "actions": names}
        ]
        assert definition["roles"] == roles
