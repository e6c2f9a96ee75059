"""The files for deployment: where they are, and how the tests read and run them."""

import subprocess
from pathlib import Path

import yaml

from streamjobs.settings import Settings

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
COMPOSE = ROOT / "replica-set-compose.yml"
WORKFLOW = ROOT / ".github/workflows/ci.yml"
#: Stop returns within its deadline and one second.
STOP = Settings().stop_deadline + 1
RUN = ["run", "app:jobs"]


def read(name):
    return (DEPLOY / name).read_text(encoding="utf-8")


def load(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def run(*command, **options):
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, **options)
